"""What the runtime tells the models that learn from what the engine does: the step model and the prefix cache's.

A token costs nothing here, a step of the engine a few microseconds, and some tens where it ends a window.
"""

from __future__ import annotations

from collections.abc import Mapping

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import EngineEvent
from lmdeploy_slo.prediction.calibration import Calibration
from lmdeploy_slo.runtime.live import Live
from lmdeploy_slo.scheduling.scheduler import Scheduler


class Learning:
    """by_handle: the requests that have not ended. calibrate: False only watches how right forecasts are."""

    def __init__(
        self, scheduler: Scheduler, limits: EngineLimits, by_handle: Mapping[int, Live], *, calibrate: bool
    ) -> None:
        self._scheduler = scheduler
        self._by_handle = by_handle
        self._unseen = 0  # tokens of this step that nobody is shown
        self.calibration = Calibration(
            scheduler.model, limits, progress=self._tokens_of, on_model=self._believe, learning=calibrate
        )

    def sent(self, live: Live, at_s: float) -> None:
        """The engine took a request."""
        cached_tokens = self._scheduler.cached_tokens(live.handle)
        self.calibration.sent(live.handle, live.spec.prompt_tokens + live.resumed_tokens, cached_tokens, at_s)

    def first_token(self, live: Live, event: EngineEvent, at_s: float) -> None:
        if event.cached_tokens is not None:
            self._scheduler.on_cached(live.handle, event.cached_tokens, at_s)
        tokens = live.output_tokens - live.resumed_tokens
        self.calibration.first_token(live.handle, tokens, event.cached_tokens, event.scheduled_at_s)

    def finished(self, live: Live, at_s: float) -> None:
        """At the end of its last step. An end of sequence is a token as well, one that nobody is shown."""
        output_tokens = live.output_tokens - live.resumed_tokens
        if live.last_token_at_s != at_s:
            output_tokens += 1
            if not live.started:
                self.calibration.first_token(live.handle, 1, live.cached_tokens)
            else:
                self._unseen += 1
        self.calibration.left(live.handle, output_tokens, finished=True)

    def gone(self, live: Live) -> None:
        """It was in the engine, and did not run to its end there."""
        self.calibration.left(live.handle, live.output_tokens - live.resumed_tokens, finished=False)

    def step(self, at_s: float, tokens: int) -> None:
        """All events of a step were handled; `tokens` of them are of requests that had a first token before."""
        unseen, self._unseen = self._unseen, 0
        self.calibration.step(at_s, tokens + unseen)

    def _tokens_of(self, handle: int) -> int:
        live = self._by_handle[handle]
        return live.output_tokens - live.resumed_tokens

    def _believe(self, model: StepModel) -> None:
        self._scheduler.model = model
