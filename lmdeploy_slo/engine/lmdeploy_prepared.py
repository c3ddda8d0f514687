"""A request that LMDeploy's own code has prepared: it goes through the scheduler, and LMDeploy reads its outputs.

The scheduler sees token counts only; every output is handed on as LMDeploy made it, so that nothing LMDeploy can do
(logits, tools, adapters ...) is lost on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.engine.base import EngineEvent
from lmdeploy_slo.engine.stop_text import StopScanner

_ENDS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORT}


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """What `EngineRequest.prepared` holds for LMDeploy.

    request: LMDeploy's PreprocessedRequest. stops: texts that end it, looked for in its output.
    on_output: called with every output (GenOut) on the engine's loop, before the event that tells of it.
    """

    request: Any
    stops: tuple[str, ...]
    on_output: Callable[[Any], None]


class PreparedReader:
    """As `lmdeploy_output.OutputReader`, for requests LMDeploy has prepared."""

    def __init__(self, request_id: str, prepared: PreparedRequest) -> None:
        self._request_id = request_id
        self._prepared = prepared
        config = prepared.request.gen_config
        self._min_new_tokens = config.min_new_tokens or 0
        self._scanner = None
        if prepared.stops:
            self._scanner = StopScanner(prepared.stops, include_stop=config.include_stop_str_in_output)
        self._first = True
        self.stopped_early = False

    def read(self, output: Any) -> EngineEvent:
        if self._scanner is not None:
            self._scan(self._scanner, output)
        self._prepared.on_output(output)
        end = _ENDS.get(output.finish_reason)
        event = EngineEvent(self._request_id, list(output.token_ids or ()), end=end)
        if self._first and event.token_ids:
            self._first = False
            event.cached_tokens = output.cached_tokens
        return event

    def _scan(self, scanner: StopScanner, output: Any) -> None:
        """Changes the output's text, and its end where a stop text was completed."""
        if output.generate_token_len >= self._min_new_tokens:
            output.response = scanner.feed(output.response or "")
        if scanner.stopped:
            self.stopped_early = output.finish_reason is None
            output.finish_reason = "stop"
        elif output.finish_reason is not None:
            output.response = (output.response or "") + scanner.flush()
