"""The emulated engine: its timing, against the batch it emulates, and what it does when told to go wrong.

All in virtual time: instants are exact, and nothing waits.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine import batch
from lmdeploy_slo.engine.base import EngineEvent, Sampling
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.engine.faults import Faults
from lmdeploy_slo.errors import EngineError, EngineUnavailable, InvalidRequest
from lmdeploy_slo.testing import virtual_time
from lmdeploy_slo.testing.builders import NO_TIME, make_request
from lmdeploy_slo.testing.event_log import EventLog
from lmdeploy_slo.testing.virtual_time import VirtualTimeLoop, run_virtual

SECOND = StepModel(c0=1.0, p1=0.0, p2=0.0, d1=0.0, d2=0.0)
"""Every step takes one second."""

MODEL = StepModel(c0=0.2539871, p1=0.0101733, p2=1.0313e-4, d1=0.0207761, d2=1.0471e-3)
"""Odd numbers, so that no step ends at the very instant of an arrival: who is first then is the loop's choice."""

Script = Callable[[EmulatedEngine, EventLog, VirtualClock], Awaitable[None]]


def play(
    script: Script,
    model: StepModel = SECOND,
    limits: EngineLimits | None = None,
    loop_type: type[VirtualTimeLoop] = VirtualTimeLoop,
    **options: Any,
) -> EventLog:
    """Runs a script against a started engine; nothing may have broken the protocol unless it says so itself."""
    logs = []

    async def main(clock: VirtualClock) -> None:
        engine = EmulatedEngine(model, limits or EngineLimits(), clock, **options)
        log = EventLog(patience_s=None)
        logs.append(log)
        await engine.start(log.sink)
        await script(engine, log, clock)
        await engine.close()
        assert engine.load().in_flight == engine.load().active == engine.load().kv_tokens_used == 0

    run_virtual(main, loop_type)
    return logs[0]


# -- time ---------------------------------------------------------------------


def nominal_times_s(
    arrivals: Sequence[tuple[float, int, int]], model: StepModel, limits: EngineLimits
) -> dict[str, Any]:
    """When each token should come: the batch alone, stepped over (instant, prompt tokens, output tokens)."""
    twin, at_s, waiting = (
        batch.PersistentBatch(model, limits),
        -math.inf,
        sorted(enumerate(arrivals), key=lambda a: a[1][0]),
    )
    times: dict[str, list[float]] = {f"r{number}": [] for number in range(len(arrivals))}
    while waiting or len(twin):
        if not len(twin):
            at_s = max(at_s, waiting[0][1][0])
        while waiting and waiting[0][1][0] <= at_s:
            number, (_, prompt_tokens, output_tokens) = waiting.pop(0)
            twin.submit(batch.Sequence(f"r{number}", prompt_tokens, output_tokens))
        duration_s = twin.begin_step()
        assert duration_s is not None
        at_s += duration_s
        for sequence, _ in twin.end_step():
            times[str(sequence.key)].append(at_s)
    return times


arrivals_strategy = st.lists(
    st.tuples(st.integers(0, 20 * 64).map(lambda ticks: ticks / 64), st.integers(1, 40), st.integers(1, 20)),
    min_size=1,
    max_size=12,
).map(sorted)
limits_strategy = st.builds(
    EngineLimits,
    max_batch_size=st.integers(1, 5),
    max_prefill_tokens=st.integers(1, 60),
    kv_tokens=st.none() | st.integers(60, 120),
)


@settings(max_examples=150)
@given(arrivals_strategy, limits_strategy)
def test_tokens_come_when_the_batch_says(arrivals: list[tuple[float, int, int]], limits: EngineLimits) -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        for number, (at_s, prompt_tokens, output_tokens) in enumerate(arrivals):
            if at_s > clock.now_s():
                await asyncio.sleep(at_s - clock.now_s())
            engine.submit(make_request(f"r{number}", prompt_tokens=prompt_tokens, output_tokens=output_tokens), 0)
        await log.ended(*(f"r{number}" for number in range(len(arrivals))))

    log = play(script, MODEL, limits)
    for request_id, times in nominal_times_s(arrivals, MODEL, limits).items():
        assert log.token_times_s(request_id) == pytest.approx(times, abs=1e-6)


def test_a_request_that_comes_during_a_step_joins_the_next() -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        await asyncio.sleep(5.0)
        engine.submit(make_request("first", output_tokens=3), 0)
        await asyncio.sleep(0.5)
        engine.submit(make_request("during", output_tokens=1), 0)
        await log.ended("first", "during")

    log = play(script)
    assert log.token_times_s("first") == [6.0, 7.0, 8.0]
    assert log.token_times_s("during") == [7.0]


def test_all_submits_of_one_turn_start_together_and_share_their_steps() -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        for request_id in "abc":
            engine.submit(make_request(request_id, output_tokens=2), 0)
            clock.advance(0.125)  # the turn itself takes time
        await log.ended(*"abc")

    log = play(script)
    assert [(at_s, [e.request_id for e in events]) for at_s, events in log.calls] == [
        (1.0, ["a", "b", "c"]),
        (2.0, ["a", "b", "c"]),
    ]


def test_a_busy_loop_delays_tokens_but_not_the_schedule() -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        engine.submit(make_request("a", output_tokens=7), 0)
        await log.tokens("a", 2)
        clock.advance(2.75)  # the loop is blocked from 2.0 to 4.75
        engine.submit(make_request("b", output_tokens=1), 0)
        await log.ended("a", "b")

    log = play(script)
    assert log.token_times_s("a") == [1.0, 2.0, 4.75, 4.75, 5.0, 6.0, 7.0]
    assert log.token_times_s("b") == [6.0]


class CoarseLoop(VirtualTimeLoop):
    """Timers as uvloop's: whole milliseconds, rounded to the nearest, so up to half of one early."""

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:
        milliseconds = round(delay * 1e3)
        if milliseconds == 0:
            return self.call_soon(callback, *args, context=context)
        return super().call_later(milliseconds / 1e3, callback, *args, context=context)


@pytest.mark.parametrize("step_s", [0.0103, 0.0108, 0.0017, 0.0003])
def test_coarse_timers_are_never_early_and_do_not_add_up(step_s: float) -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        engine.submit(make_request("a", output_tokens=400), 0)
        await log.ended("a")

    log = play(script, StepModel(step_s, 0.0, 0.0, 0.0, 0.0), loop_type=CoarseLoop)
    late_s = [at_s - step * step_s for step, at_s in enumerate(log.token_times_s("a"), start=1)]
    assert min(late_s) >= -1e-6
    assert max(late_s) <= 1.5e-3


def test_steps_without_duration_let_others_run_and_others_join() -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        for number in range(64):
            engine.submit(make_request(f"r{number}", output_tokens=200), 0)
        turns = 0
        while len(log.calls) < 100:
            await asyncio.sleep(0)
            turns += 1
        assert turns >= 100
        clock.advance(0.25)  # real time passes although the steps take none
        engine.submit(make_request("late", output_tokens=5), 0)
        await log.ended("late")
        assert not log.has_ended("r0")
        await log.ended(*(f"r{number}" for number in range(64)))

    log = play(script, NO_TIME)
    assert len(log.calls) == 200
    assert all(len(events) >= 64 for _, events in log.calls)


def test_the_engine_rests_and_starts_again() -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        for request_id, at_s in (("a", 0.0), ("b", 10.25)):
            await asyncio.sleep(at_s - clock.now_s())
            engine.submit(make_request(request_id, output_tokens=1), 0)
            await log.ended(request_id)

    log = play(script)
    assert [at_s for at_s, _ in log.calls] == [1.0, 11.25]


# -- limits -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"max_session_tokens": 14}, 4),
        ({"limits": EngineLimits(kv_tokens=14)}, 5),
        ({"limits": EngineLimits(kv_tokens=12), "max_session_tokens": 30}, 3),
    ],
)
def test_an_output_is_cut_at_what_the_engine_holds(options: dict[str, Any], tokens: int) -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        engine.submit(make_request("a", prompt_tokens=10, output_tokens=50), 0)
        await log.ended("a")

    log = play(script, **options)
    assert len(log.token_ids("a")) == tokens
    assert log.end("a") is FinishReason.LENGTH


def test_load_tells_what_is_held() -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        for request_id in "abc":
            engine.submit(make_request(request_id, prompt_tokens=10, output_tokens=5), 0)
        assert (engine.load().in_flight, engine.load().active) == (3, 0)
        await log.tokens("a", 2)
        load = engine.load()
        assert (load.in_flight, load.active, load.kv_tokens_used, load.kv_usage) == (3, 2, 22, 22 / 44)

    play(script, limits=EngineLimits(max_batch_size=2, kv_tokens=44))


@pytest.mark.parametrize(
    ("request_fields", "options", "field"),
    [
        ({"sampling": Sampling(logprobs=1)}, {}, "sampling.logprobs"),
        ({"prompt_tokens": 0}, {}, "prompt"),
        ({"prompt_tokens": 20}, {"max_session_tokens": 20}, "prompt"),
        ({"prompt_tokens": 21}, {"limits": EngineLimits(kv_tokens=20)}, "prompt"),
    ],
)
def test_what_it_cannot_do_is_named(request_fields: dict[str, Any], options: dict[str, Any], field: str) -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        request = make_request("a", **request_fields)
        assert [name for name, _ in engine.unsupported_fields(request)] == [field]
        with pytest.raises(InvalidRequest) as refusal:
            engine.submit(request, 0)
        assert [violation.field for violation in refusal.value.violations] == [field]

    assert play(script, **options).calls == []


def test_an_id_in_use_is_refused_until_its_last_event_was_sent() -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        engine.submit(make_request("a"), 0)
        with pytest.raises(InvalidRequest, match="already"):
            engine.submit(make_request("a"), 0)
        engine.abort("a")
        with pytest.raises(InvalidRequest, match="already"):
            engine.submit(make_request("a"), 0)
        await log.ended("a")
        log.forget("a")
        engine.submit(make_request("a", output_tokens=1), 0)
        await log.ended("a")
        assert log.end("a") is FinishReason.STOP

    play(script)


def test_it_must_be_started_once_and_cannot_be_started_after_its_end() -> None:
    async def main(clock: VirtualClock) -> None:
        engine = EmulatedEngine(SECOND, EngineLimits(), clock)
        with pytest.raises(EngineUnavailable, match="not started"):
            engine.submit(make_request(), 0)
        log = EventLog(patience_s=None)
        await engine.start(log.sink)
        with pytest.raises(EngineUnavailable, match="started already"):
            await engine.start(log.sink)
        await engine.close()
        with pytest.raises(EngineUnavailable, match="closed"):
            await engine.start(log.sink)

    run_virtual(main)


# -- rank, stop, abort ---------------------------------------------------------


def test_waiting_requests_go_by_rank() -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        for rank, request_id in enumerate(["runs", "b", "c", "d"]):
            engine.submit(make_request(request_id, output_tokens=2), rank)
        engine.rerank({"d": 2, "b": 9})  # before the first step
        await log.tokens("runs", 1)
        engine.rerank({"d": -1, "nobody": 3})  # while they wait in the batch
        await log.ended("runs", "b", "c", "d")

    log = play(script, limits=EngineLimits(max_batch_size=1))
    ends = [e.request_id for _, events in log.calls for e in events if e.end]
    assert ends == ["runs", "d", "c", "b"]


def test_abort_within_a_step_frees_everything_and_ends_on_the_next_turn() -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        for request_id in "ab":
            engine.submit(make_request(request_id, prompt_tokens=10, output_tokens=9), 0)
        await log.tokens("b", 1)
        await asyncio.sleep(0.5)
        engine.abort("a")
        assert (engine.load().in_flight, engine.load().active, engine.load().kv_tokens_used) == (1, 1, 10)
        await log.ended("a")
        assert clock.now_s() == 1.5
        await log.ended("b")

    log = play(script)
    assert log.end("a") is FinishReason.ABORT
    assert log.token_times_s("a") == [1.0]
    assert log.token_times_s("b") == [float(n) for n in range(1, 10)]


def test_abort_from_within_the_sink_comes_after_the_tokens_of_that_step() -> None:
    async def main(clock: VirtualClock) -> None:
        engine = EmulatedEngine(SECOND, EngineLimits(), clock)
        log = EventLog(patience_s=None)

        def sink(events: Sequence[EngineEvent], at_s: float) -> None:
            if at_s == 2.0:
                engine.abort("b")
            log.sink(events, at_s)

        await engine.start(sink)
        for request_id in "ab":
            engine.submit(make_request(request_id, output_tokens=3), 0)
        await log.ended("a", "b")
        assert log.token_times_s("b") == [1.0, 2.0]
        assert log.end("b") is FinishReason.ABORT
        assert log.violations == []

    run_virtual(main)


def test_a_sink_that_raises_does_not_stop_the_batch() -> None:
    async def main(clock: VirtualClock) -> None:
        engine, log, seen = EmulatedEngine(SECOND, EngineLimits(), clock), EventLog(patience_s=None), []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context["exception"]))

        def sink(events: Sequence[EngineEvent], at_s: float) -> None:
            log.sink(events, at_s)
            if at_s == 1.0:
                raise LookupError("a defect in the runtime")

        await engine.start(sink)
        engine.submit(make_request("a", output_tokens=3), 0)
        await log.ended("a")
        assert log.token_times_s("a") == [1.0, 2.0, 3.0]
        assert [type(error) for error in seen] == [LookupError]

    run_virtual(main)


def test_a_stop_text_ends_the_stream() -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        engine.submit(make_request("free", output_tokens=30), 0)
        await log.ended("free")
        stop = log.text("free")[20:28]
        engine.submit(make_request("cut", output_tokens=30, stop=(stop,)), 0)
        engine.submit(make_request("kept", output_tokens=30, stop=(stop,), include_stop=True), 0)
        await log.ended("cut", "kept")
        assert log.text("cut") == log.text("free")[:20]
        assert log.text("kept") == log.text("free")[:28]
        assert log.end("cut") is log.end("kept") is FinishReason.STOP
        assert log.token_ids("cut") == log.token_ids("free")[: len(log.token_ids("cut"))]

    play(script)


# -- faults -------------------------------------------------------------------


def test_a_request_can_be_told_to_fail() -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        for request_id in ("at once", "later", "never", "by hand"):
            engine.submit(make_request(request_id, output_tokens=4), 0)
        await log.tokens("by hand", 2)
        engine.fail("by hand", EngineError("out of memory", code="oom"))
        engine.fail("nobody")
        await log.ended("at once", "later", "never", "by hand")

    log = play(script, faults=Faults(fail_after_tokens={"at once": 0, "later": 3, "never": 4}))
    counts = {request_id: len(log.token_ids(request_id)) for request_id in log.request_ids()}
    assert counts == {"at once": 0, "later": 3, "never": 4, "by hand": 2}
    codes = {request_id: getattr(log.error(request_id), "code", None) for request_id in counts}
    assert codes == {"at once": "injected", "later": "injected", "never": None, "by hand": "oom"}
    assert log.end("never") is FinishReason.STOP
    assert log.text("at once") == ""


def test_a_stall_stops_time_for_the_batch_alone() -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        engine.submit(make_request("a", output_tokens=3), 0)
        engine.submit(make_request("b", output_tokens=3), 0)
        await asyncio.sleep(1.25)
        engine.stall()
        engine.stall()
        engine.submit(make_request("c", output_tokens=1), 0)
        await asyncio.sleep(10.0)
        assert len(log.calls) == 1
        engine.abort("b")
        await log.ended("b")
        engine.release()
        engine.release()
        await log.ended("a", "c")

    log = play(script)
    assert log.token_times_s("a") == [1.0, 12.0, 13.0]
    assert log.token_times_s("c") == [13.0]


def test_a_stall_of_an_idle_engine_holds_what_comes() -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        engine.release()
        engine.stall()
        await asyncio.sleep(2.0)
        engine.submit(make_request("a", output_tokens=2), 0)
        await asyncio.sleep(3.0)
        assert log.calls == []
        engine.release()
        await log.ended("a")

    assert play(script).token_times_s("a") == [6.0, 7.0]


def test_a_stall_from_within_the_sink_holds_the_next_step() -> None:
    async def main(clock: VirtualClock) -> None:
        engine, log = EmulatedEngine(SECOND, EngineLimits(), clock), EventLog(patience_s=None)

        def sink(events: Sequence[EngineEvent], at_s: float) -> None:
            if at_s == 1.0:
                engine.stall()
            log.sink(events, at_s)

        await engine.start(sink)
        engine.submit(make_request("a", output_tokens=2), 0)
        await asyncio.sleep(4.0)
        engine.release()
        await log.ended("a")
        assert log.token_times_s("a") == [1.0, 5.0]

    run_virtual(main)


@pytest.mark.parametrize("by_step", [True, False])
def test_a_crash_ends_everything_in_flight(by_step: bool) -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        if by_step:
            engine.inject(Faults(crash_after_steps=2))
        for request_id in "ab":
            engine.submit(make_request(request_id, output_tokens=2 if request_id == "a" else 9), 0)
        engine.submit(make_request("waits", output_tokens=1), 0)
        if not by_step:
            await log.tokens("b", 2)
            engine.crash()
            engine.crash("again")
        await log.ended("a", "b", "waits")
        with pytest.raises(EngineUnavailable, match="the engine crashed"):
            engine.submit(make_request("c"), 0)
        engine.release()
        await asyncio.sleep(10.0)

    log = play(script, limits=EngineLimits(max_batch_size=2))
    assert log.end("a") is FinishReason.STOP
    assert log.token_times_s("b") == [1.0, 2.0]
    assert isinstance(log.error("b"), EngineUnavailable)
    assert isinstance(log.error("waits"), EngineUnavailable)
    assert log.violations == []


def test_steps_can_be_slowed() -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        engine.submit(make_request("a", output_tokens=4), 0)
        await log.tokens("a", 1)
        engine.inject(Faults(slow_factor=3.0))
        await log.tokens("a", 3)
        engine.inject(Faults())
        await log.ended("a")

    assert play(script).token_times_s("a") == [1.0, 2.0, 5.0, 8.0]


def test_an_abort_can_be_lost_and_an_end_sent_twice() -> None:
    async def script(engine: EmulatedEngine, log: EventLog, clock: VirtualClock) -> None:
        for request_id in "ab":
            engine.submit(make_request(request_id, output_tokens=2), 0)
        engine.abort("a")
        assert engine.load().in_flight == 2
        engine.abort("b")
        await log.ended("a", "b")

    log = play(script, faults=Faults(lost_aborts=1, duplicate_ends=1))
    assert log.end("a") is FinishReason.STOP
    assert log.end("b") is FinishReason.ABORT
    assert [event.end for event in log.events("a")] == [None, FinishReason.STOP, FinishReason.STOP]
    assert len(log.violations) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"fail_after_tokens": {"a": -1}},
        {"slow_factor": math.inf},
        {"slow_factor": -1.0},
        {"crash_after_steps": 0},
        {"lost_aborts": -1},
        {"duplicate_ends": -1},
    ],
)
def test_impossible_faults_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        Faults(**changes)


# -- the loop these tests run on ------------------------------------------------


def test_a_wait_for_nothing_is_an_error_rather_than_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_time, "_PATIENCE_S", 0.0)

    async def main(clock: VirtualClock) -> None:
        await asyncio.sleep(1e6)
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="never happen"):
        run_virtual(main)
