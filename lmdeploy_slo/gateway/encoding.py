"""From what the runtime says to messages of the protocol; durations become milliseconds here."""

from __future__ import annotations

from collections.abc import Sequence

from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.core.slo import Slo, Timing
from lmdeploy_slo.engine.base import EngineEvent, TokenLogprob
from lmdeploy_slo.runtime.stream import Completion, Delta
from lmdeploy_slo.scheduling.admission import Forecast
from lmdeploy_slo.v1 import inference_pb2 as pb

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}

MAX_KEPT_TOKENS, MAX_KEPT_BYTES = 32_768, 64
"""Of single tokens so many messages are kept, none of them longer."""

_Response = pb.GenerateStreamResponse


def add_completion(messages: list[bytes], completion: Completion) -> None:
    """The completion goes with the last message of a stream, or alone.

    Fields of a serialised message may follow each other in any number of pieces, so no message is made again.
    """
    tail = _Response(completion=to_completion(completion)).SerializeToString()
    messages[-1:] = [messages[-1] + tail] if messages else [tail]


class EventEncoder:
    """Makes `GenerateStreamResponse`s on the wire of the tokens and text of events.

    A token tends to come with the same text again: what was made of the last ones is kept, for all streams together.
    """

    def __init__(self) -> None:
        self._single: dict[int, tuple[str, bytes]] = {}  # token id -> its last text, and both on the wire

    def encode(self, event: EngineEvent) -> bytes:
        """Called for every token."""
        token_ids, text = event.token_ids, event.text
        if event.logprobs is not None or len(token_ids) != 1:
            return _Response(token_ids=token_ids, text=text, logprobs=_logprobs(event.logprobs)).SerializeToString()
        token_id = token_ids[0]
        known = self._single.get(token_id)
        if known is not None and known[0] == text:
            return known[1]
        message = _Response(token_ids=token_ids, text=text).SerializeToString()
        if len(message) <= MAX_KEPT_BYTES:
            if len(self._single) >= MAX_KEPT_TOKENS:
                self._single.clear()
            self._single[token_id] = (text, message)
        return message


def encode_whole(delta: Delta) -> bytes:
    """A `GenerateResponse` on the wire."""
    assert delta.completion is not None, "the whole answer ends with its completion"
    return pb.GenerateResponse(
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=_logprobs(delta.logprobs),
        completion=to_completion(delta.completion),
    ).SerializeToString()


def to_completion(completion: Completion) -> pb.Completion:
    message = pb.Completion(
        request_id=completion.request_id,
        finish_reason=_REASONS.get(completion.finish_reason, pb.FINISH_REASON_UNSPECIFIED),
        usage=pb.Usage(
            prompt_tokens=completion.prompt_tokens,
            cached_tokens=completion.cached_tokens,
            output_tokens=completion.timing.output_tokens,
        ),
        timing=to_timing(completion.timing),
        predicted=to_prediction(completion.predicted),
        effective_priority=max(0, completion.rank),
        instance=completion.instance,
        slo=to_slo(completion.slo),
    )
    if completion.slo_met is not None:
        message.slo_met = completion.slo_met
    return message


def to_timing(timing: Timing) -> pb.Timing:
    return pb.Timing(
        queue_ms=_ms(timing.queue_s),
        ttft_ms=_ms(timing.ttft_s),
        tpot_ms=_ms(timing.tpot_s),
        e2e_ms=_ms(timing.e2e_s),
    )


def to_prediction(expected: Forecast) -> pb.Prediction:
    message = pb.Prediction(
        output_tokens=expected.output_tokens,
        queue_ms=_ms(expected.queue_s),
        ttft_ms=_ms(expected.ttft_s),
        tpot_ms=_ms(expected.tpot_s),
        e2e_ms=_ms(expected.e2e_s),
        slo_probability=expected.chance,
    )
    within = expected.intervals
    if within is not None:
        message.output_tokens_interval.low, message.output_tokens_interval.high = within.output_tokens
        for interval, place in (
            (within.queue_s, message.queue_ms_interval),
            (within.ttft_s, message.ttft_ms_interval),
            (within.e2e_s, message.e2e_ms_interval),
        ):
            place.low, place.high = interval.low * 1e3, interval.high * 1e3
        if within.tpot_s is not None:
            message.tpot_ms_interval.low, message.tpot_ms_interval.high = (1e3 * end for end in within.tpot_s)
    return message


def to_slo(slo: Slo) -> pb.Slo | None:
    """None where there is no objective."""
    if not slo.has_objective:
        return None
    return pb.Slo(ttft_ms=_ms(slo.ttft_s), tpot_ms=_ms(slo.tpot_s), e2e_ms=_ms(slo.e2e_s))


def _ms(duration_s: float | None) -> float | None:
    return None if duration_s is None else duration_s * 1e3


def _logprobs(per_token: Sequence[Sequence[TokenLogprob]] | None) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(
            candidates=[pb.TokenLogprob(token_id=c.token_id, logprob=c.logprob, text=c.text) for c in candidates]
        )
        for candidates in per_token or ()
    ]
