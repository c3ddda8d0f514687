"""Token streams: order and content are the engine's whatever is merged, and deltas leave when they are due."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.core.slo import NO_SLO, Timing
from lmdeploy_slo.engine.base import EngineEvent, TokenLogprob
from lmdeploy_slo.errors import Cancelled, RequestError
from lmdeploy_slo.runtime.stream import COMPACT_AT, MAX_MERGED_TOKENS, Completion, Delta, Encoder, RequestStream
from lmdeploy_slo.scheduling.admission import Forecast
from lmdeploy_slo.testing.virtual_time import run_virtual

END = Completion(
    request_id="r",
    finish_reason=FinishReason.STOP,
    prompt_tokens=1,
    cached_tokens=None,
    timing=Timing(0.0),
    slo=NO_SLO,
    slo_met=None,
    predicted=Forecast(1.0, 0, 0.0, 0.0, None, 0.0),
    rank=0,
    instance="i",
)


def make_stream(clock: VirtualClock, flush_interval_s: float, encode: Encoder | None = None) -> RequestStream:
    return RequestStream("r", clock, flush_interval_s, lambda error: None, encode)


def as_bytes(event: EngineEvent) -> bytes:
    """An encoder whose output can be read back."""
    return f"{list(event.token_ids)} {event.text}".encode()


def as_tokens(message: bytes) -> tuple[list[int], str]:
    ids, _, text = message.decode().partition("] ")
    return [int(i) for i in ids.strip("[").split(",") if i], text


def event(*token_ids: int, text: str | None = None, logprobs: Any = None) -> EngineEvent:
    shown = "".join(chr(token) for token in token_ids) if text is None else text
    return EngineEvent("r", token_ids, shown, logprobs=logprobs)


async def read(stream: RequestStream, into: list[tuple[float, Delta]], clock: VirtualClock) -> None:
    async for delta in stream:
        into.append((clock.now_s(), delta))


def seen(deltas: list[tuple[float, Delta]]) -> list[tuple[float, str]]:
    return [(round(at_s, 6), delta.text) for at_s, delta in deltas]


def timed(flush_interval_s: float, arrivals: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """(instant, text) of each delta read by an eager reader, for tokens that come at given instants; the last ends."""

    async def main(clock: VirtualClock) -> list[tuple[float, str]]:
        stream = make_stream(clock, flush_interval_s)
        deltas: list[tuple[float, Delta]] = []
        reading = asyncio.ensure_future(read(stream, deltas, clock))
        for at_s, text in arrivals:
            await asyncio.sleep(at_s - clock.now_s())
            stream.push(event(ord(text)))
        stream.close(END)
        await reading
        assert [d.completion is not None for _, d in deltas] == [False] * (len(deltas) - 1) + [True]
        return seen(deltas)

    return run_virtual(main)


def test_without_a_flush_interval_every_token_leaves_at_once_alone() -> None:
    arrivals = [(0.0, "a"), (0.001, "b"), (0.0011, "c"), (0.5, "d")]
    assert timed(0.0, arrivals) == arrivals


def test_with_one_the_first_leaves_at_once_and_the_next_when_the_last_is_old_enough() -> None:
    arrivals = [(1.0, "a"), (1.002, "b"), (1.004, "c"), (1.012, "d"), (1.013, "e"), (1.5, "f"), (1.6, "g")]
    assert timed(0.01, arrivals) == [(1.0, "a"), (1.01, "bc"), (1.02, "de"), (1.5, "f"), (1.6, "g")]


def test_the_end_does_not_wait() -> None:
    assert timed(10.0, [(0.0, "a"), (0.1, "b"), (0.2, "c")]) == [(0.0, "a"), (0.2, "bc")]


def test_tokens_slower_than_the_interval_are_not_held_up() -> None:
    arrivals = [(0.02 * i, chr(97 + i)) for i in range(6)]
    assert timed(0.01, arrivals) == [(round(at_s, 6), text) for at_s, text in arrivals]


def run(scenario: Any, flush_interval_s: float) -> None:
    async def main(clock: VirtualClock) -> None:
        await scenario(make_stream(clock, flush_interval_s), clock)

    run_virtual(main)


def test_a_reader_that_falls_behind_gets_one_message_with_all_it_missed() -> None:
    async def scenario(stream: RequestStream, clock: VirtualClock) -> None:
        for token in b"abcde":
            stream.push(event(token))
        assert (await stream.__anext__()).text == "abcde"
        clock.advance(1.0)
        for token in b"xyz":
            stream.push(event(token))
        assert (await stream.__anext__()).text == "xyz"

    run(scenario, 0.01)


def test_coalescing_off_a_reader_that_falls_behind_still_gets_one_token_a_message() -> None:
    async def scenario(stream: RequestStream, clock: VirtualClock) -> None:
        for token in b"abcde":
            stream.push(event(token))
        stream.close(END)
        assert [d.text async for d in stream] == list("abcde")

    run(scenario, 0.0)


def test_coalescing_off_an_event_of_many_tokens_is_taken_apart() -> None:
    logprobs = [[TokenLogprob(token, -0.5)] for token in (1, 2, 3)]

    async def scenario(stream: RequestStream, clock: VirtualClock) -> None:
        stream.push(event(1, 2, 3, text="one two three", logprobs=logprobs))
        stream.close(END)
        deltas = [d async for d in stream]
        assert [list(d.token_ids) for d in deltas] == [[1], [2], [3]]
        assert [d.text for d in deltas] == ["", "", "one two three"]
        assert [d.logprobs for d in deltas] == [[logprobs[0]], [logprobs[1]], [logprobs[2]]]

    run(scenario, 0.0)


@pytest.mark.parametrize("flush_interval_s", [0.0, 0.01])
def test_text_that_comes_without_a_token_goes_with_the_next_or_with_the_end(flush_interval_s: float) -> None:
    async def scenario(stream: RequestStream, clock: VirtualClock) -> None:
        stream.push(event(text="lagging "))
        stream.push(event(1, text="with one"))
        assert (await stream.__anext__()).text == "lagging with one"
        stream.push(event(text="tail"))
        stream.close(END)
        last = await stream.__anext__()
        assert (list(last.token_ids), last.text, last.completion) == ([], "tail", END)

    run(scenario, flush_interval_s)


@pytest.mark.parametrize("flush_interval_s", [0.0, 0.01])
def test_an_end_without_anything_new_is_a_message_of_its_own(flush_interval_s: float) -> None:
    async def scenario(stream: RequestStream, clock: VirtualClock) -> None:
        stream.push(event(65))
        await stream.__anext__()
        stream.close(END)
        deltas = [d async for d in stream]
        assert [(list(d.token_ids), d.text, d.completion) for d in deltas] == [([], "", END)]

    run(scenario, flush_interval_s)


@pytest.mark.parametrize("flush_interval_s", [0.0, 0.01])
def test_an_error_comes_at_once_and_every_time(flush_interval_s: float) -> None:
    async def scenario(stream: RequestStream, clock: VirtualClock) -> None:
        stream.push(event(65))
        stream.close(Cancelled("gone"))
        assert stream.failed
        for _ in range(2):
            with pytest.raises(Cancelled):
                await stream.__anext__()
        with pytest.raises(Cancelled):
            await stream.result()

    run(scenario, flush_interval_s)


@pytest.mark.parametrize("flush_interval_s", [0.0, 0.01])
def test_an_error_ends_a_stream_with_an_encoder(flush_interval_s: float) -> None:
    async def main(clock: VirtualClock) -> None:
        stream = make_stream(clock, flush_interval_s, as_bytes)
        stream.push(event(65))
        stream.close(Cancelled("gone"))
        for _ in range(2):
            with pytest.raises(Cancelled):
                await stream.ready()

    run_virtual(main)


@pytest.mark.parametrize(("flush_interval_s", "messages"), [(0.0, ["[97] a", "[98] b"]), (0.01, ["[97, 98] ab"])])
def test_an_encoder_makes_a_message_of_each_delta(flush_interval_s: float, messages: list[str]) -> None:
    async def main(clock: VirtualClock) -> None:
        stream = make_stream(clock, flush_interval_s, as_bytes)
        stream.push(event(97))
        stream.push(event(98))
        assert await stream.ready() == ([m.encode() for m in messages], None)
        stream.push(event(99))
        stream.push(event(text="tail"))
        stream.close(END)
        assert await stream.ready() == ([b"[99] c", b"[] tail"], END)

    run_virtual(main)


def test_an_end_alone_is_no_message() -> None:
    async def main(clock: VirtualClock) -> None:
        stream = make_stream(clock, 0.0, as_bytes)
        stream.close(END)
        assert await stream.ready() == ([], END)

    run_virtual(main)


def test_a_waiting_reader_is_told_of_an_error() -> None:
    async def scenario(stream: RequestStream, clock: VirtualClock) -> None:
        reading = asyncio.ensure_future(stream.result())
        await asyncio.sleep(0)
        stream.close(Cancelled("gone"))
        with pytest.raises(Cancelled):
            await reading

    run(scenario, 0.0)


def test_a_stream_has_one_reader() -> None:
    async def scenario(stream: RequestStream, clock: VirtualClock) -> None:
        first = asyncio.ensure_future(stream.__anext__())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="one reader"):
            await stream.__anext__()
        stream.push(event(65))
        assert (await first).text == "A"

    run(scenario, 0.0)


def test_a_reader_that_was_cancelled_may_read_on() -> None:
    async def scenario(stream: RequestStream, clock: VirtualClock) -> None:
        for _ in range(2):
            reading = asyncio.ensure_future(stream.__anext__())
            await asyncio.sleep(0.001)
            reading.cancel()
            await asyncio.wait([reading])
        stream.push(event(65))
        assert (await stream.__anext__()).text == "A"
        stream.push(event(66))  # too young to leave: a timer is set, and dropped with the reader
        reading = asyncio.ensure_future(stream.__anext__())
        await asyncio.sleep(0.001)
        reading.cancel()
        await asyncio.wait([reading])
        stream.close(END)
        assert [d.text async for d in stream] == ["B"]

    run(scenario, 0.01)


def test_what_a_stuck_reader_missed_is_kept_in_few_pieces_of_bounded_size() -> None:
    async def scenario(stream: RequestStream, clock: VirtualClock) -> None:
        tokens = [97 + i % 26 for i in range(3 * MAX_MERGED_TOKENS + 7)]
        for token in tokens:
            stream.push(event(token, logprobs=[[TokenLogprob(token, -1.0)]]))
            assert len(stream._pending) <= COMPACT_AT + 4
        stream.close(END)
        deltas = [d async for d in stream]
        assert len(deltas) == 3
        assert all(len(d.token_ids) < MAX_MERGED_TOKENS + COMPACT_AT + 1 for d in deltas)
        assert [token for d in deltas for token in d.token_ids] == tokens
        assert "".join(d.text for d in deltas) == "".join(map(chr, tokens))
        assert [c[0].token_id for d in deltas for c in d.logprobs or ()] == tokens
        assert [d.completion is not None for d in deltas] == [False, False, True]

    run(scenario, 0.01)


def test_the_pieces_of_a_reader_that_falls_behind_follow_each_other_at_once() -> None:
    async def scenario(stream: RequestStream, clock: VirtualClock) -> None:
        for _ in range(2 * MAX_MERGED_TOKENS):
            stream.push(event(97))
        lengths = [len((await stream.__anext__()).token_ids) for _ in range(2)]
        assert sum(lengths) == 2 * MAX_MERGED_TOKENS
        assert clock.now_s() == 0.0

    run(scenario, 10.0)


def test_a_whole_answer_has_everything_however_long() -> None:
    async def scenario(stream: RequestStream, clock: VirtualClock) -> None:
        result = asyncio.ensure_future(stream.result())
        for _ in range(2 * MAX_MERGED_TOKENS):
            stream.push(event(97))
        stream.push(event(text="tail"))
        stream.close(END)
        delta = await result
        assert delta.text == "a" * 2 * MAX_MERGED_TOKENS + "tail"
        assert (len(delta.token_ids), delta.completion) == (2 * MAX_MERGED_TOKENS, END)

    run(scenario, 0.0)


def test_cancel_tells_the_owner_until_the_end() -> None:
    told: list[RequestError] = []

    async def main(clock: VirtualClock) -> None:
        stream = RequestStream("r", clock, 0.0, told.append)
        stream.cancel()
        mine = Cancelled("mine")
        stream.cancel(mine)
        stream.close(mine)
        stream.cancel()
        assert told[1:] == [mine]
        assert isinstance(told[0], Cancelled)

    run_virtual(main)


# A step of a random history: tokens come, time passes, the reader reads.
_push = st.tuples(st.just("push"), st.lists(st.integers(97, 122), max_size=3))
_wait = st.tuples(st.just("wait"), st.floats(0.0, 0.05))
_read = st.tuples(st.just("read"), st.none())


@given(
    history=st.lists(st.one_of(_push, _wait, _read), max_size=40),
    flush_interval_s=st.sampled_from([0.0, 0.001, 0.01, 1.0]),
    encoded=st.booleans(),
)
def test_whatever_is_merged_content_and_order_are_the_engines(
    history: list[tuple[str, Any]], flush_interval_s: float, encoded: bool
) -> None:
    async def main(clock: VirtualClock) -> None:
        stream = make_stream(clock, flush_interval_s, as_bytes if encoded else None)
        sent: list[int] = []
        got: list[tuple[list[int], str]] = []

        async def wait_at_most(reading: Coroutine[Any, Any, Any]) -> Any:
            """None where nothing is due."""
            try:
                return await asyncio.wait_for(reading, 0.02)
            except asyncio.TimeoutError:
                return None

        for action, argument in history:
            if action == "push":
                sent.extend(argument)
                stream.push(event(*argument))
            elif action == "wait":
                await asyncio.sleep(argument)
            elif encoded:
                ready = await wait_at_most(stream.ready())
                got.extend([] if ready is None else map(as_tokens, ready[0]))
            else:
                delta = await wait_at_most(stream.__anext__())
                got.extend([] if delta is None else [(list(delta.token_ids), delta.text)])
        stream.close(END)
        if encoded:
            messages, completion = await stream.ready()
            assert completion is END
            rest = [as_tokens(message) for message in messages]
        else:
            rest = [(list(d.token_ids), d.text) async for d in stream]

        everything = got + rest
        assert [token for tokens, _ in everything for token in tokens] == sent
        assert "".join(text for _, text in everything) == "".join(map(chr, sent))
        assert all(len(tokens) >= 1 for tokens, _ in everything[:-1])
        if flush_interval_s == 0:
            assert all(len(tokens) <= 1 for tokens, _ in everything)
        else:
            assert len(rest) <= 1

    run_virtual(main)
