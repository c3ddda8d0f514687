"""An engine in another process, without the processes: what both ends promise whatever carries their messages."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_link import LocalLink, local_remote

from lmdeploy_slo.clock import Clock, MonotonicClock, VirtualClock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import Engine, EngineEvent, Sampling, TokenLogprob
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.engine.faults import Faults
from lmdeploy_slo.engine.remote import WINDOW, RemoteEngine
from lmdeploy_slo.engine.remote_host import HEARTBEAT_S, EngineHost
from lmdeploy_slo.engine.remote_reports import (
    ClockOffset,
    Commands,
    Outbox,
    engine_event,
    merged,
    wire_event,
)
from lmdeploy_slo.engine.supervised import EngineState, SupervisedEngine, Supervision
from lmdeploy_slo.errors import EngineError, EngineUnavailable, InvalidRequest, RequestIdInUse
from lmdeploy_slo.testing.builders import NO_TIME, make_request
from lmdeploy_slo.testing.engine_contract import EngineContract
from lmdeploy_slo.testing.event_log import EventLog
from lmdeploy_slo.testing.virtual_time import run_virtual

STEP_S = 0.01
make_fast = partial(EmulatedEngine, NO_TIME, EngineLimits(max_batch_size=4))
make_paced = partial(EmulatedEngine, StepModel(STEP_S, 0.0, 0.0, 0.0, 0.0), EngineLimits(max_batch_size=4))


class TestContract(EngineContract):
    async def make_engine(self) -> Engine:
        return local_remote(make_fast, MonotonicClock())[0]


class TestContractWithALittleOutbox(EngineContract):
    async def make_engine(self) -> Engine:
        engine, link = local_remote(make_fast, MonotonicClock(), max_steps=1)
        link.shuffled = True
        return engine


def remote(*, make: Any = make_paced, **options: Any) -> Any:
    """Runs a test in virtual time with a started engine, its link, its log and the clock; closes the engine."""

    def decorate(test: Any) -> Any:
        def run() -> None:
            async def main(clock: VirtualClock) -> None:
                engine, link = local_remote(make, clock, **options)
                log = EventLog(None)
                await engine.start(log.sink)
                await test(engine, link, log, clock)
                await engine.close()
                assert log.violations == []
                assert engine.load().in_flight == 0

            run_virtual(main)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


# -- steps and instants -------------------------------------------------------


@remote()
async def test_each_step_is_told_by_itself_at_its_own_instant(
    engine: RemoteEngine, link: LocalLink, log: EventLog, clock: Clock
) -> None:
    began_s = clock.now_s()
    for request_id in "ab":
        engine.submit(make_request(request_id, output_tokens=5), 0)
    await log.ended("a", "b")
    assert [len(events) for _, events in log.calls] == [2] * 5
    assert log.token_times_s("a") == pytest.approx([began_s + STEP_S * n for n in range(1, 6)])


@remote()
async def test_a_loop_that_was_held_up_gets_every_step_later(
    engine: RemoteEngine, link: LocalLink, log: EventLog, clock: Clock
) -> None:
    engine.submit(make_request("a", output_tokens=30), 0)
    await log.tokens("a", 1)
    link.hold()
    reports = link.reports
    await asyncio.sleep(10 * STEP_S)
    link.release()
    await log.ended("a")
    assert len(log.token_ids("a")) == 30
    assert link.reports - reports < 25
    intervals = [after - before for before, after in zip(log.token_times_s("a"), log.token_times_s("a")[1:])]
    assert intervals == pytest.approx([STEP_S] * 29)


@remote(max_steps=4)
async def test_who_reads_slowly_gets_all_tokens_from_a_bounded_outbox(
    engine: RemoteEngine, link: LocalLink, log: EventLog, clock: Clock
) -> None:
    for request_id in "abc":
        engine.submit(make_request(request_id, output_tokens=200), 0)
    await log.tokens("a", 1)
    link.hold()
    for _ in range(300):
        await asyncio.sleep(STEP_S)
        assert (await link.host.statistics()).steps <= 4
    assert (await link.host.statistics()).merges > 10
    link.release()
    await log.ended("a", "b", "c")
    assert [len(log.token_ids(i)) for i in "abc"] == [200] * 3
    assert all(log.text(i) == engine.tokenizer.decode(log.token_ids(i)) for i in "abc")


@given(st.lists(st.tuples(st.floats(0, 0.5), st.floats(0, 20)), min_size=1, max_size=60), st.floats(-1e4, 1e4))
def test_instants_are_never_after_receipt_and_as_close_as_the_quickest_message(
    messages: list[tuple[float, float]], difference_s: float
) -> None:
    offset, sent_s = ClockOffset(), 0.0
    for delay_s, gap_s in messages:
        sent_s += gap_s
        told_s = sent_s + offset.observe(sent_s, sent_s + difference_s + delay_s)
        assert told_s <= sent_s + difference_s + delay_s + 1e-6
        assert told_s >= sent_s + difference_s - 1e-6


def test_a_clock_that_drifts_is_followed() -> None:
    offset = ClockOffset()
    for second in range(3600):
        received_s = second * (1 + 50e-6) + 0.001  # the host's clock is slow
        error_s = second + offset.observe(second, received_s) - received_s
        assert -0.007 < error_s <= 0


# -- messages -----------------------------------------------------------------


@remote()
async def test_a_turn_of_the_loop_is_one_message(
    engine: RemoteEngine, link: LocalLink, log: EventLog, clock: Clock
) -> None:
    for number in range(6):
        engine.submit(make_request(f"r{number}", output_tokens=3), number)
    engine.rerank({"r4": -1, "r5": -2, "nobody": 7})
    engine.abort("r0")
    await log.ended(*(f"r{number}" for number in range(6)))
    commands = [Commands.decoded(data) for data in link.sent]
    assert len(commands) == 1
    assert [request.request_id for _, _, request in commands[0].submits] == ["r1", "r2", "r3", "r4", "r5"]
    assert commands[0].aborts == []
    assert sorted(commands[0].ranks.values()) == [-2, -1]


@remote()
async def test_what_a_host_does_not_take_is_put_together(
    engine: RemoteEngine, link: LocalLink, log: EventLog, clock: Clock
) -> None:
    engine.submit(make_request("a", output_tokens=1000), 0)
    await log.tokens("a", 1)
    link.hold()
    for rank in range(100):
        engine.rerank({"a": rank})
        engine.submit(make_request(f"r{rank}", output_tokens=1), rank)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert len(link.sent) <= WINDOW + 1
    engine.abort("r99")
    link.release()
    await log.ended(*(f"r{rank}" for rank in range(100)))
    assert log.end("r99") is FinishReason.ABORT
    assert all(log.token_ids(f"r{rank}") for rank in range(99))
    engine.abort("a")


@remote()
async def test_an_id_may_be_used_again_while_its_abort_is_on_the_way(
    engine: RemoteEngine, link: LocalLink, log: EventLog, clock: Clock
) -> None:
    for tokens in (100, 50, 7):
        engine.submit(make_request("a", output_tokens=tokens), 0)
        if tokens != 7:
            await log.tokens("a", 1)
            engine.abort("a")
            await log.ended("a")
            log.forget("a")
    await log.ended("a")
    assert (len(log.token_ids("a")), log.end("a")) == (7, FinishReason.STOP)


async def test_commands_are_carried_out_in_order_whatever_order_they_come_in() -> None:
    host = EngineHost(make_fast)
    await host.start()
    requests = [make_request(f"r{number}", output_tokens=2) for number in (1, 2, 3)]
    messages = [Commands(n, submits=[(n, 0, request)]).encoded() for n, request in enumerate(requests, start=1)]
    await host.command(messages[2])
    await host.command(messages[1])
    assert host._engine is not None and host._engine.load().in_flight == 0
    await host.command(messages[0])
    assert list(host._numbers) == ["r1", "r2", "r3"]
    await host.close()


@remote()
async def test_what_cannot_be_done_is_said_at_once(
    engine: RemoteEngine, link: LocalLink, log: EventLog, clock: Clock
) -> None:
    with pytest.raises(InvalidRequest, match="logprobs"):
        engine.submit(make_request("a", sampling=Sampling(logprobs=2)), 0)
    engine.submit(make_request("a"), 0)
    with pytest.raises(RequestIdInUse):
        engine.submit(make_request("a"), 0)
    engine.abort("a")
    await log.ended("a")


async def test_what_the_engine_refuses_all_the_same_comes_back_as_its_error() -> None:
    class Lenient(EmulatedEngine):
        def unsupported_fields(self, request: Any) -> list[Any]:
            return [] if self._loop is None else [*super().unsupported_fields(request)]

        def submit(self, request: Any, rank: int) -> None:
            if request.request_id == "broken":
                raise RuntimeError("a defect")
            super().submit(request, rank)

    engine, _ = local_remote(partial(Lenient, NO_TIME, EngineLimits()), MonotonicClock())
    log = EventLog()
    await engine.start(log.sink)
    engine.submit(make_request("a", sampling=Sampling(logprobs=2)), 0)
    engine.submit(make_request("broken"), 0)
    engine.submit(make_request("fine", output_tokens=3), 0)
    await log.ended("a", "broken", "fine")
    error = log.error("a")
    assert isinstance(error, EngineError)
    assert "no probabilities" in str(error)
    assert error.code == "invalid_request"
    assert str(log.error("broken")) == "the engine failed"
    assert log.end("fine") is FinishReason.STOP
    await engine.close()
    assert log.violations == []


# -- ends ---------------------------------------------------------------------


@remote()
async def test_a_lost_link_ends_everything_once_and_at_once(
    engine: RemoteEngine, link: LocalLink, log: EventLog, clock: Clock
) -> None:
    for request_id in "abcdefg":
        engine.submit(make_request(request_id, output_tokens=1000), 0)
    await log.tokens("a", 3)
    engine.abort("g")
    lost_at_s = clock.now_s()
    link.lose("the process died")
    await log.ended(*"abcdefg")
    assert clock.now_s() == lost_at_s
    assert all(str(log.error(i)) == "the process died" for i in "abcdef")
    assert all(isinstance(log.error(i), EngineUnavailable) for i in "abcdef")
    assert log.end("g") is FinishReason.ABORT
    assert engine.load().gone == "the process died"
    with pytest.raises(EngineUnavailable, match="died"):
        engine.submit(make_request("h"), 0)


@remote(make=partial(make_paced, faults=Faults(crash_after_steps=3)))
async def test_an_engine_that_crashes_in_its_host_is_gone(
    engine: RemoteEngine, link: LocalLink, log: EventLog, clock: Clock
) -> None:
    engine.submit(make_request("a", output_tokens=1000), 0)
    await log.ended("a")
    assert isinstance(log.error("a"), EngineUnavailable)
    assert len(log.token_ids("a")) == 3
    assert engine.load().gone == "the engine crashed"


@remote(silence_s=20.0)
async def test_a_host_that_falls_silent_is_gone_though_it_has_nothing_to_do(
    engine: RemoteEngine, link: LocalLink, log: EventLog, clock: Clock
) -> None:
    await asyncio.sleep(100.0)
    assert engine.load().gone is None
    link.hold()
    await asyncio.sleep(20.0 - 2 * HEARTBEAT_S)
    assert engine.load().gone is None
    await asyncio.sleep(4 * HEARTBEAT_S)
    assert "said nothing" in (engine.load().gone or "")
    link.release()


@remote(silence_s=20.0)
async def test_a_jump_of_the_clock_is_no_silence(
    engine: RemoteEngine, link: LocalLink, log: EventLog, clock: VirtualClock
) -> None:
    for _ in range(5):
        clock.advance(3600.0)
        await asyncio.sleep(2 * HEARTBEAT_S)
    assert engine.load().gone is None


def test_a_host_that_stalls_is_replaced_by_whoever_watches_engines() -> None:
    async def main(clock: VirtualClock) -> None:
        links: list[LocalLink] = []

        def build() -> RemoteEngine:
            engine, link = local_remote(make_paced, clock)
            links.append(link)
            return engine

        supervised = SupervisedEngine(build, clock, Supervision(stall_timeout_s=5.0))
        up = asyncio.Event()
        supervised.on_change = lambda state, _: up.set() if state is EngineState.UP else None
        log = EventLog(None)
        await supervised.start(log.sink)
        supervised.submit(make_request("a", output_tokens=1000), 0)
        await log.tokens("a", 1)
        inner: Any = links[0].host._engine
        inner.stall()
        await log.ended("a")
        assert isinstance(log.error("a"), EngineUnavailable)
        await up.wait()
        assert (len(links), links[0].closes) == (2, 1)
        supervised.submit(make_request("b", output_tokens=4), 0)
        await log.ended("b")
        assert log.end("b") is FinishReason.STOP
        await supervised.close()
        assert log.violations == []

    run_virtual(main)


@pytest.mark.parametrize("error", [EngineUnavailable("no place"), RuntimeError("a defect")])
async def test_a_start_that_fails_leaves_nothing_behind(error: Exception) -> None:
    engine, link = local_remote(make_fast, MonotonicClock())
    link.open_error = error
    with pytest.raises(type(error), match=str(error)):
        await engine.start(EventLog().sink)
    assert link.closes == 1
    with pytest.raises(EngineUnavailable):
        await engine.start(EventLog().sink)
    with pytest.raises(EngineUnavailable):
        engine.submit(make_request("a"), 0)
    await engine.close()


async def test_a_sink_that_raises_costs_nobody_else_an_answer() -> None:
    engine, _ = local_remote(make_fast, MonotonicClock())
    log = EventLog()

    def sink(events: Any, at_s: float) -> None:
        log.sink(events, at_s)
        if any(event.request_id == "a" for event in events):
            raise RuntimeError("a defect")

    await engine.start(sink)
    engine.submit(make_request("a", output_tokens=2), 0)
    engine.submit(make_request("b", output_tokens=5), 0)
    await log.ended("a", "b")
    assert engine.load().gone is None
    await engine.close()


# -- the outbox ---------------------------------------------------------------


def test_events_survive_the_wire() -> None:
    event = EngineEvent(
        "a",
        [1, 2],
        "xy",
        error=EngineUnavailable("gone"),
        logprobs=[[TokenLogprob(1, -0.5, "x")], [TokenLogprob(2, -0.1, "y")]],
        cached_tokens=3,
        queued_at_s=1.0,
        scheduled_at_s=2.0,
    )
    back = engine_event("a", wire_event(7, event), 10.0)
    assert (back.token_ids, back.text, back.logprobs, back.cached_tokens) == ([1, 2], "xy", event.logprobs, 3)
    assert (back.queued_at_s, back.scheduled_at_s) == (11.0, 12.0)
    assert isinstance(back.error, EngineUnavailable)
    ended = engine_event("a", wire_event(7, EngineEvent("a", end=FinishReason.LENGTH)), 0.0)
    assert ended == EngineEvent("a", end=FinishReason.LENGTH)


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.booleans()), max_size=4)), st.integers(1, 5)
)
def test_an_outbox_keeps_every_token_in_order(steps: list[list[tuple[int, int, bool]]], max_steps: int) -> None:
    """Of each request: its tokens, its text, its first cached_tokens, in whatever pieces."""
    outbox = Outbox(max_steps)
    told: dict[int, list[EngineEvent]] = {}
    for at_s, step in enumerate(steps):
        events = {n: EngineEvent(str(n), (t,), str(t), cached_tokens=t if first else None) for n, t, first in step}
        for number, event in events.items():
            told.setdefault(number, []).append(event)
        outbox.add(float(at_s), [wire_event(number, event) for number, event in events.items()])
        assert len(outbox) <= max_steps
    got: dict[int, list[EngineEvent]] = {}
    instants = []
    for at_s, wired in outbox.take():
        instants.append(at_s)
        for event in wired:
            got.setdefault(event[0], []).append(engine_event(str(event[0]), event, 0.0))
    assert instants == sorted(instants)
    assert got.keys() == told.keys()
    for number, events in told.items():
        assert [t for e in got[number] for t in e.token_ids] == [t for e in events for t in e.token_ids]
        assert "".join(e.text for e in got[number]) == "".join(e.text for e in events)
        firsts = [[e.cached_tokens for e in each if e.cached_tokens is not None][:1] for each in (got[number], events)]
        assert firsts[0] == firsts[1]


def test_merged_events_end_as_the_last_of_them() -> None:
    events = [EngineEvent("a", (1,), "x"), EngineEvent("a", (2,), "y", logprobs=[[TokenLogprob(2, -1.0)]])]
    events.append(EngineEvent("a", (), "", end=FinishReason.STOP))
    back = engine_event("a", merged([wire_event(1, event) for event in events]), 0.0)
    assert (back.token_ids, back.text, back.end) == ([1, 2], "xy", FinishReason.STOP)
    assert back.logprobs == [[TokenLogprob(2, -1.0)]]
