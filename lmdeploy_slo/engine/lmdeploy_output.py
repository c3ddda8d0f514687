"""Reads one request's outputs of LMDeploy: new tokens and text, stop texts, log-probabilities, times, how it ended."""

from __future__ import annotations

from typing import Any

from lmdeploy_slo.clock import Clock, unix_time_s
from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.engine import lmdeploy_request
from lmdeploy_slo.engine.base import EngineEvent, EngineRequest, TokenLogprob
from lmdeploy_slo.engine.lmdeploy_tokenizer import LmdeployTokenizer
from lmdeploy_slo.engine.stop_text import StopScanner

_ENDS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORT}


class OutputReader:
    """Feed it LMDeploy's outputs (GenOut) in order. After an event with `end` there is nothing more to read.

    stopped_early: it ended the request at a stop text, and LMDeploy still works on it.
    """

    def __init__(self, request: EngineRequest, tokenizer: LmdeployTokenizer, clock: Clock) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._clock = clock
        stopping = request.stopping
        self._scanner = StopScanner(stopping.stop, include_stop=stopping.include_stop) if stopping.stop else None
        self._token_ids: list[int] = []
        self._texts: list[str] = []  # as LMDeploy gave them
        self._text_is_behind = False  # the last tokens have no text yet
        self._times_told = False
        self.stopped_early = False

    def read(self, output: Any) -> EngineEvent:
        token_ids = list(output.token_ids or ())
        end = _ENDS.get(output.finish_reason)
        text = self._new_text(output.response or "", token_ids, end is not None)
        logprobs = self._logprobs(token_ids, output)
        if self._scanner is not None and len(self._token_ids) >= self._request.stopping.min_new_tokens:
            text = self._scanner.feed(text)
            if self._scanner.stopped:
                self.stopped_early = end is None
                end = FinishReason.STOP
                token_ids = token_ids[: self._needed(token_ids)]
                logprobs = logprobs and logprobs[: len(token_ids)]
        if end is not None and self._scanner is not None:
            text += self._scanner.flush()
        event = EngineEvent(self._request.request_id, token_ids, text, end, logprobs=logprobs)
        if not self._times_told and token_ids:
            self._times_told = True
            event.cached_tokens = output.cached_tokens
            self._add_times(event, getattr(output, "req_metrics", None))
        return event

    def _new_text(self, text: str, token_ids: list[int], is_last: bool) -> str:
        """LMDeploy's text, and at the end that of tokens which never became whole characters: it keeps that back."""
        self._token_ids += token_ids
        if token_ids:
            self._text_is_behind = not text
        self._texts.append(text)
        if is_last and self._text_is_behind:
            given, whole = "".join(self._texts), self._decode(self._token_ids)
            if whole.startswith(given):
                text += whole[len(given) :]
        return text

    def _needed(self, token_ids: list[int]) -> int:
        """How many of the last output's tokens it took to complete a stop text."""
        before = len(self._token_ids) - len(token_ids)
        for count in range(1, len(token_ids)):
            text = self._decode(self._token_ids[: before + count])
            if any(stop in text for stop in self._request.stopping.stop):
                return count
        return len(token_ids)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode_text(token_ids, skip_special_tokens=self._request.stopping.skip_special_tokens)

    def _logprobs(self, token_ids: list[int], output: Any) -> list[list[TokenLogprob]] | None:
        sampling = self._request.sampling
        if not sampling.logprobs or not token_ids:
            return None
        if lmdeploy_request.wants_logits(sampling):
            rows = output.logits[-len(token_ids) :]
            candidates = lmdeploy_request.candidates_of_logits(rows, token_ids, sampling.logprobs)
        else:
            candidates = output.logprobs
        return lmdeploy_request.token_logprobs(token_ids, candidates, self._tokenizer.token_text)

    def _add_times(self, event: EngineEvent, metrics: Any) -> None:
        """When TurboMind queued and scheduled the request, from its wall clock to ours."""
        if metrics is not None:
            offset_s = self._clock.now_s() - unix_time_s()
            at_s = {told.type.name: told.timestamp + offset_s for told in metrics.engine_events}
            event.queued_at_s, event.scheduled_at_s = at_s.get("QUEUED"), at_s.get("SCHEDULED")
