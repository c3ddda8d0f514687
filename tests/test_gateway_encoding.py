"""What goes on the wire is what the generated classes would have written, and durations arrive in milliseconds."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.core.slo import Slo, Timing
from lmdeploy_slo.engine.base import EngineEvent, TokenLogprob
from lmdeploy_slo.gateway.encoding import MAX_KEPT_BYTES, MAX_KEPT_TOKENS, EventEncoder, add_completion, encode_whole
from lmdeploy_slo.runtime.stream import Completion, Delta
from lmdeploy_slo.scheduling.admission import Forecast, Interval, Intervals
from lmdeploy_slo.testing.builders import make_slo
from lmdeploy_slo.v1 import inference_pb2 as pb


def make_completion(slo: Slo, cached_tokens: int | None = None, slo_met: bool | None = None) -> Completion:
    return Completion(
        request_id="r",
        finish_reason=FinishReason.LENGTH,
        prompt_tokens=5,
        cached_tokens=cached_tokens,
        timing=Timing(1.0, dispatched_at_s=1.25, first_token_at_s=2.0, ended_at_s=4.0, output_tokens=5),
        slo=slo,
        slo_met=slo_met,
        predicted=Forecast(
            6.5,
            0,
            0.5,
            1.5,
            None,
            2.5,
            Intervals(Interval(3, 9), Interval(0.0, 1.0), Interval(1.25, 2.0), None, Interval(2.0, 4.0)),
            0.25,
        ),
        rank=3,
        instance="i-0",
    )


COMPLETION = make_completion(make_slo(ttft_ms=100, e2e_ms=900), cached_tokens=2, slo_met=False)

EXPECTED = pb.Completion(
    request_id="r",
    finish_reason=pb.FINISH_REASON_LENGTH,
    usage=pb.Usage(prompt_tokens=5, cached_tokens=2, output_tokens=5),
    timing=pb.Timing(queue_ms=250, ttft_ms=1000, tpot_ms=500, e2e_ms=3000),
    predicted=pb.Prediction(
        output_tokens=6.5,
        queue_ms=500,
        ttft_ms=1500,
        e2e_ms=2500,
        output_tokens_interval=pb.Interval(low=3, high=9),
        queue_ms_interval=pb.Interval(low=0, high=1000),
        ttft_ms_interval=pb.Interval(low=1250, high=2000),
        e2e_ms_interval=pb.Interval(low=2000, high=4000),
        slo_probability=0.25,
    ),
    slo_met=False,
    effective_priority=3,
    instance="i-0",
    slo=pb.Slo(ttft_ms=100, e2e_ms=900),
)

token_ids = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 127, 128, 16383, 16384, 2**21 - 1, 2**21, 2**32 - 1]),
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=140)


@given(st.lists(st.tuples(st.lists(token_ids, max_size=3), texts), max_size=8))
@example([([5], "a"), ([5], "a"), ([5], "b"), ([5], "b"), ([5], "a"), ([], "a"), ([5, 5], "a")])
def test_messages_are_those_of_the_generated_class_whatever_came_before(events: list[tuple[list[int], str]]) -> None:
    encoder = EventEncoder()
    for ids, text in events:
        expected = pb.GenerateStreamResponse(token_ids=ids, text=text).SerializeToString()
        for _ in range(2):
            assert encoder.encode(EngineEvent("r", ids, text)) == expected
            assert encoder.encode(EngineEvent("r", array("I", ids), text)) == expected


def test_what_is_kept_is_bounded() -> None:
    encoder = EventEncoder()
    for token_id in range(MAX_KEPT_TOKENS + 10):
        encoder.encode(EngineEvent("r", (token_id,), "x"))
        assert len(encoder._single) <= MAX_KEPT_TOKENS
    encoder = EventEncoder()
    encoder.encode(EngineEvent("r", (1,), "x" * MAX_KEPT_BYTES))
    assert not encoder._single


def encode_event(event: EngineEvent) -> bytes:
    return EventEncoder().encode(event)


@given(st.lists(st.tuples(token_ids, texts), max_size=5))
def test_the_completion_goes_with_the_last_message_or_alone(tokens: list[tuple[int, str]]) -> None:
    messages = [encode_event(EngineEvent("r", (token_id,), text)) for token_id, text in tokens]
    add_completion(messages, COMPLETION)

    assert len(messages) == max(1, len(tokens))
    parsed = [pb.GenerateStreamResponse.FromString(message) for message in messages]
    assert [list(m.token_ids) for m in parsed] == [[token_id] for token_id, _ in tokens] or [[]]
    assert "".join(m.text for m in parsed) == "".join(text for _, text in tokens)
    assert [m.HasField("completion") for m in parsed] == [False] * (len(parsed) - 1) + [True]
    assert parsed[-1].completion == EXPECTED
    assert messages[-1] == parsed[-1].SerializeToString()


def test_log_probabilities_go_with_their_tokens() -> None:
    logprobs = [[TokenLogprob(7, -0.25, "a"), TokenLogprob(8, -1.5, "b")], [TokenLogprob(9, -2.0)]]
    expected = [
        pb.TokenLogprobs(
            candidates=[
                pb.TokenLogprob(token_id=7, logprob=-0.25, text="a"),
                pb.TokenLogprob(token_id=8, logprob=-1.5, text="b"),
            ]
        ),
        pb.TokenLogprobs(candidates=[pb.TokenLogprob(token_id=9, logprob=-2.0)]),
    ]
    message = pb.GenerateStreamResponse.FromString(encode_event(EngineEvent("r", (7, 9), "a", logprobs=logprobs)))
    assert list(message.logprobs) == expected
    whole = pb.GenerateResponse.FromString(encode_whole(Delta((7, 9), "a", logprobs, COMPLETION)))
    assert list(whole.logprobs) == expected


def test_a_whole_answer() -> None:
    whole = pb.GenerateResponse.FromString(encode_whole(Delta((1, 2), "ab", None, COMPLETION)))
    assert (list(whole.token_ids), whole.text, whole.completion) == ([1, 2], "ab", EXPECTED)


@pytest.mark.parametrize(("slo_met", "is_set"), [(None, False), (True, True), (False, True)])
def test_what_is_unknown_stays_unset(slo_met: bool | None, is_set: bool) -> None:
    completion = make_completion(Slo(), slo_met=slo_met)
    messages: list[bytes] = []
    add_completion(messages, completion)
    (message,) = messages
    parsed = pb.GenerateStreamResponse.FromString(message).completion
    assert parsed.HasField("slo_met") is is_set
    assert not parsed.usage.HasField("cached_tokens")
    assert not parsed.HasField("slo")
    assert not parsed.predicted.HasField("tpot_ms")
