"""How requests come, run and end: every way leads to one end, and gives back what was held."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from scripted_engine import ScriptedEngine, make_runtime, turns

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.request import EndStatus, FinishReason
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import EngineEvent, EngineRequest
from lmdeploy_slo.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    EngineError,
    EngineUnavailable,
    FieldViolation,
    InvalidRequest,
    QueueFull,
    QueueTimeout,
    RequestError,
    RequestIdInUse,
    Unattainable,
)
from lmdeploy_slo.runtime.runtime import RuntimeOptions
from lmdeploy_slo.runtime.stream import Completion, RequestStream
from lmdeploy_slo.testing.builders import make_request, make_slo, make_spec
from lmdeploy_slo.testing.virtual_time import run_virtual

ONE_AT_A_TIME = EngineLimits(max_batch_size=1)


class Bench:
    """A started runtime on a scripted engine, in virtual time."""

    def __init__(self, clock: VirtualClock, limits: EngineLimits, **options: Any) -> None:
        self.clock = clock
        self.engine = ScriptedEngine(clock, limits=limits)
        self.runtime = make_runtime(self.engine, clock, **options)

    def submit(self, request_id: str = "r", *, deadline_at_s: float | None = None, **spec: Any) -> RequestStream:
        spec = {"arrival_at_s": self.clock.now_s()} | spec
        return self.runtime.submit(make_spec(request_id, **spec), make_request(request_id), deadline_at_s=deadline_at_s)

    async def running(self, *request_ids: str) -> list[RequestStream]:
        streams = [self.submit(request_id) for request_id in request_ids]
        await self.engine.has(*request_ids)
        return streams

    def counts(self) -> dict[EndStatus, int]:
        return {status: count for status, count in self.runtime.load().ended.items() if count}

    def nothing_is_held(self) -> bool:
        """No request, slot, timer or table entry is left."""
        load = self.runtime.load()
        timers = [h for h in asyncio.get_running_loop()._scheduled if not h.cancelled()]  # type: ignore[attr-defined]
        return load.waiting == load.in_flight == 0 and not self.engine.requests and not timers


class DefectLog(logging.Handler):
    """Keeps what is logged of defects."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def virtual(
    limits: EngineLimits | None = None, *, defects: int = 0, **options: Any
) -> Callable[[Callable[[Bench], Awaitable[None]]], Callable[[], None]]:
    """Runs a test in virtual time on a started bench; afterwards nothing is left and so many `defects` were logged."""

    def wrap(test: Callable[[Bench], Awaitable[None]]) -> Callable[[], None]:
        async def main(clock: VirtualClock) -> None:
            bench = Bench(clock, limits or EngineLimits(), **options)
            await bench.runtime.start()
            await test(bench)
            await bench.runtime.close()
            assert bench.nothing_is_held()

        def run() -> None:
            log, logger = DefectLog(), logging.getLogger("lmdeploy_slo.runtime")
            logger.addHandler(log)
            try:
                run_virtual(main)
            finally:
                logger.removeHandler(log)
            assert [record.getMessage() for record in log.records][defects:] == []
            assert len(log.records) == defects

        run.__doc__ = test.__doc__
        return run

    return wrap


@virtual()
async def test_a_cache_that_the_engine_knows_only_once_it_is_up_bounds_the_plans(bench: Bench) -> None:
    runtime = make_runtime(ScriptedEngine(bench.clock), bench.clock)
    assert runtime.scheduler.limits.kv_tokens is None
    runtime.engine.info = replace(bench.engine.info, limits=EngineLimits(kv_tokens=4096))  # type: ignore[misc]
    await runtime.start()
    assert runtime.scheduler.limits == EngineLimits(kv_tokens=4096)
    assert runtime.scheduler.snapshot(0.0).limits.kv_tokens == 4096
    await runtime.close()


async def outcome(stream: RequestStream) -> Completion | RequestError:
    try:
        async for delta in stream:
            if delta.completion is not None:
                return delta.completion
    except RequestError as error:
        return error
    raise AssertionError("a stream ended without an outcome")


# -- a request runs to its end ------------------------------------------------


@virtual()
async def test_a_request_streams_its_tokens_and_tells_how_it_went(bench: Bench) -> None:
    bench.clock.advance(5.0)
    stream = bench.submit(slo=make_slo(ttft_ms=1000, e2e_ms=3500), prompt_tokens=7)
    bench.clock.advance(0.25)
    await bench.engine.has("r")
    bench.clock.advance(0.75)
    bench.engine.emit("r", 65, cached_tokens=3)
    bench.clock.advance(1.0)
    bench.engine.emit("r", 66)
    bench.clock.advance(1.0)
    bench.engine.emit("r", 67, end=FinishReason.LENGTH)

    deltas = [delta async for delta in stream]

    assert [(list(d.token_ids), d.text, d.completion is not None) for d in deltas] == [
        ([65], "A", False),
        ([66], "B", False),
        ([67], "C", True),
    ]
    completion = deltas[-1].completion
    assert completion is not None
    assert completion.request_id == "r"
    assert completion.finish_reason is FinishReason.LENGTH
    assert (completion.prompt_tokens, completion.cached_tokens, completion.timing.output_tokens) == (7, 3, 3)
    assert completion.timing.queue_s == pytest.approx(0.25)
    assert completion.timing.ttft_s == pytest.approx(1.0)
    assert completion.timing.tpot_s == pytest.approx(1.0)
    assert completion.timing.e2e_s == pytest.approx(3.0)
    assert completion.slo_met is True
    assert completion.rank == 0
    assert completion.instance == "scripted-0"
    assert bench.counts() == {EndStatus.FINISHED: 1}
    assert (bench.runtime.load().with_slo, bench.runtime.load().slo_met) == (1, 1)


@virtual()
async def test_the_end_of_a_request_is_its_last_token_not_the_event_that_tells_of_it(bench: Bench) -> None:
    (stream,) = await bench.running("r")
    bench.clock.advance(1.0)
    bench.engine.emit("r", 65)
    bench.clock.advance(1.0)
    bench.engine.emit("r", 66)
    bench.clock.advance(9.0)
    bench.engine.emit("r", end=FinishReason.STOP)

    completion = await outcome(stream)

    assert isinstance(completion, Completion)
    assert completion.timing.e2e_s == pytest.approx(2.0)


@virtual()
async def test_a_missed_objective_is_told_and_counted(bench: Bench) -> None:
    stream = bench.submit(slo=make_slo(ttft_ms=500))
    await bench.engine.has("r")
    bench.clock.advance(0.6)
    bench.engine.emit("r", 65, end=FinishReason.STOP)

    completion = await outcome(stream)

    assert isinstance(completion, Completion)
    assert completion.slo_met is False
    assert (bench.runtime.load().with_slo, bench.runtime.load().slo_met) == (1, 0)


@virtual(ONE_AT_A_TIME)
async def test_the_next_one_waits_for_a_slot_and_gets_it_at_once(bench: Bench) -> None:
    first, second = bench.submit("first"), bench.submit("second")
    await bench.engine.has("first")
    await turns()
    assert bench.engine.submitted == ["first"]

    bench.engine.step("first")
    await turns()

    assert bench.engine.submitted == ["first", "second"]
    bench.engine.step("second")
    assert isinstance(await outcome(first), Completion)
    assert isinstance(await outcome(second), Completion)


@virtual()
async def test_the_rank_of_a_request_is_its_place_in_the_plan(bench: Bench) -> None:
    streams = [bench.submit(str(i)) for i in range(3)]
    await bench.engine.has("0", "1", "2")

    assert bench.engine.ranks == {"0": 0, "1": 1, "2": 2}
    bench.engine.step("0", "1", "2")
    completions = [await outcome(stream) for stream in streams]
    assert [c.rank for c in completions if isinstance(c, Completion)] == [0, 1, 2]


@virtual()
async def test_a_whole_answer_is_one_delta(bench: Bench) -> None:
    (stream,) = await bench.running("r")
    result = asyncio.ensure_future(stream.result())
    for token in (65, 66, 67):
        await turns()
        bench.engine.emit("r", token)
    bench.engine.emit("r", 68, end=FinishReason.STOP)

    delta = await result

    assert (list(delta.token_ids), delta.text) == ([65, 66, 67, 68], "ABCD")
    assert delta.completion is not None


# -- refusals -----------------------------------------------------------------


@virtual(ONE_AT_A_TIME, max_queued_requests=1)
async def test_a_full_queue_refuses_with_a_time_to_try_again(bench: Bench) -> None:
    await bench.running("running")
    bench.submit("waiting")

    with pytest.raises(QueueFull) as refusal:
        bench.submit("one-too-many", slo=make_slo(e2e_ms=1))

    assert refusal.value.retry_after_s is not None
    assert refusal.value.retry_after_s > 0
    assert bench.counts() == {EndStatus.REJECTED: 1}
    assert (bench.runtime.load().with_slo, bench.runtime.load().slo_met) == (1, 0)


@virtual(ONE_AT_A_TIME)
async def test_an_id_is_in_use_until_its_request_has_ended(bench: Bench) -> None:
    await bench.running("a")
    waiting = bench.submit("b")
    for request_id in ("a", "b"):
        with pytest.raises(RequestIdInUse):
            bench.submit(request_id)

    bench.runtime.abort("b")
    again = bench.submit("b")

    assert isinstance(await outcome(waiting), Cancelled)
    bench.engine.step("a")
    await turns()
    bench.engine.step("b")
    assert isinstance(await outcome(again), Completion)


@virtual()
async def test_an_id_stays_in_use_while_the_engine_still_holds_it(bench: Bench) -> None:
    await bench.running("r")
    bench.engine.confirms_late = True
    bench.runtime.abort("r")
    with pytest.raises(RequestIdInUse):
        bench.submit("r")

    bench.engine.emit("r", end=FinishReason.ABORT, text="")

    again = bench.submit("r")
    await bench.engine.has("r")
    bench.engine.step("r")
    assert isinstance(await outcome(again), Completion)


@virtual()
async def test_a_deadline_that_has_passed_is_refused(bench: Bench) -> None:
    bench.clock.advance(1.0)
    with pytest.raises(DeadlineExceeded):
        bench.submit(deadline_at_s=1.0)
    assert bench.counts() == {EndStatus.TIMED_OUT: 1}


@virtual(shed=True)
async def test_a_sheddable_request_that_cannot_meet_its_slo_is_refused(bench: Bench) -> None:
    bench.runtime.scheduler.model = bench.runtime.scheduler.model.__class__(0.1, 0, 0, 0, 0)
    unattainable = make_slo(e2e_ms=50)
    with pytest.raises(Unattainable, match="e2e is expected to be"):
        bench.submit("sheddable", slo=unattainable, sheddable=True)
    bench.submit("kept", slo=unattainable)
    bench.submit("easy", slo=make_slo(ttft_ms=1000), sheddable=True)
    await bench.engine.has("kept", "easy")


@virtual()
async def test_without_shedding_sheddable_requests_are_kept(bench: Bench) -> None:
    bench.runtime.scheduler.model = bench.runtime.scheduler.model.__class__(0.1, 0, 0, 0, 0)
    bench.submit(slo=make_slo(e2e_ms=50), sheddable=True)
    await bench.engine.has("r")


def test_before_the_start_nothing_is_taken() -> None:
    async def main(clock: VirtualClock) -> None:
        bench = Bench(clock, EngineLimits())
        assert not bench.runtime.serving
        with pytest.raises(EngineUnavailable):
            bench.submit()
        await bench.runtime.close()

    run_virtual(main)


# -- other ends ---------------------------------------------------------------


@virtual(ONE_AT_A_TIME)
async def test_abort_ends_a_waiting_request(bench: Bench) -> None:
    await bench.running("running")
    stream = bench.submit("waiting")
    await turns()

    assert bench.runtime.abort("waiting") is True
    assert bench.runtime.abort("waiting") is False

    assert isinstance(await outcome(stream), Cancelled)
    assert bench.engine.aborts == []
    assert bench.runtime.load().waiting == 0


@virtual(ONE_AT_A_TIME)
async def test_abort_ends_a_running_request_and_frees_its_slot(bench: Bench) -> None:
    (stream,) = await bench.running("running")
    bench.submit("next")
    await turns()

    assert bench.runtime.abort("running") is True

    assert isinstance(await outcome(stream), Cancelled)
    assert bench.engine.aborts == ["running"]
    await bench.engine.has("next")
    assert bench.counts() == {EndStatus.CANCELLED: 1}


@virtual()
async def test_abort_of_an_unknown_id_is_told(bench: Bench) -> None:
    assert bench.runtime.abort("nobody") is False


@virtual()
async def test_a_reader_that_goes_away_ends_its_request(bench: Bench) -> None:
    (stream,) = await bench.running("r")
    bench.engine.emit("r", 65)
    stream.cancel()
    stream.cancel()
    assert bench.engine.aborts == ["r"]
    assert bench.counts() == {EndStatus.CANCELLED: 1}
    assert isinstance(await outcome(stream), Cancelled)


@virtual()
async def test_cancelling_after_the_end_changes_nothing(bench: Bench) -> None:
    (stream,) = await bench.running("r")
    bench.engine.step("r")
    stream.cancel()
    assert bench.counts() == {EndStatus.FINISHED: 1}
    assert isinstance(await outcome(stream), Completion)


@virtual(ONE_AT_A_TIME)
async def test_the_deadline_ends_waiting_and_running_requests(bench: Bench) -> None:
    running = bench.submit("running", deadline_at_s=2.0)
    waiting = bench.submit("waiting", deadline_at_s=1.0)
    await bench.engine.has("running")

    assert isinstance(await outcome(waiting), DeadlineExceeded)
    assert bench.clock.now_s() == pytest.approx(1.0)
    assert isinstance(await outcome(running), DeadlineExceeded)
    assert bench.clock.now_s() == pytest.approx(2.0)
    assert bench.engine.aborts == ["running"]
    assert bench.counts() == {EndStatus.TIMED_OUT: 2}


@virtual()
async def test_what_ends_in_time_leaves_no_timer_behind(bench: Bench) -> None:
    stream = bench.submit(deadline_at_s=1000.0, queue_timeout_s=1000.0)
    await bench.engine.has("r")
    bench.engine.step("r")
    assert isinstance(await outcome(stream), Completion)
    assert bench.nothing_is_held()


@virtual(ONE_AT_A_TIME)
async def test_the_queue_timeout_counts_from_arrival_and_only_while_waiting(bench: Bench) -> None:
    bench.clock.advance(1.0)
    running = bench.submit("running", queue_timeout_s=0.5)
    await bench.engine.has("running")
    waiting = bench.submit("waiting", arrival_at_s=0.8, queue_timeout_s=0.5)

    error = await outcome(waiting)

    assert isinstance(error, QueueTimeout)
    assert "500 ms" in str(error)
    assert bench.clock.now_s() == pytest.approx(1.3)
    bench.clock.advance(10.0)
    await turns()
    bench.engine.step("running")
    assert isinstance(await outcome(running), Completion)
    assert bench.counts() == {EndStatus.TIMED_OUT: 1, EndStatus.FINISHED: 1}


@virtual(ONE_AT_A_TIME)
async def test_what_the_engine_fails_ends_with_its_error(bench: Bench) -> None:
    (stream,) = await bench.running("r")
    bench.engine.emit("r", 65)
    bench.engine.fail("r")

    error = await outcome(stream)

    assert isinstance(error, EngineError)
    assert error.code == "oom"
    assert bench.engine.aborts == []
    assert bench.counts() == {EndStatus.FAILED: 1}


@virtual()
async def test_an_abort_nobody_asked_for_is_a_failure(bench: Bench) -> None:
    (stream,) = await bench.running("r")
    bench.engine.emit("r", end=FinishReason.ABORT, text="")
    assert isinstance(await outcome(stream), EngineError)
    assert bench.counts() == {EndStatus.FAILED: 1}


@virtual(ONE_AT_A_TIME)
async def test_a_crash_ends_all_and_the_server_is_not_serving(bench: Bench) -> None:
    changes: list[bool] = []
    bench.runtime.on_serving_change = lambda: changes.append(bench.runtime.serving)
    streams = [bench.submit("running"), bench.submit("waiting")]
    await bench.engine.has("running")

    bench.engine.crash()

    for stream in streams:
        assert isinstance(await outcome(stream), EngineUnavailable)
    assert not bench.runtime.serving
    assert changes == [False]
    bench.engine.submit_error = None  # it is back
    bench.submit("after")
    await bench.engine.has("after")
    assert changes == [False, True]
    assert bench.counts() == {EndStatus.FAILED: 2}


@pytest.mark.parametrize(
    ("raised", "seen", "status"),
    [
        (InvalidRequest([FieldViolation("sampling", "no")]), InvalidRequest, EndStatus.REJECTED),
        (EngineError("no", code="x"), EngineError, EndStatus.FAILED),
        (ZeroDivisionError("secret"), EngineError, EndStatus.FAILED),
    ],
)
def test_whatever_submit_raises_ends_that_request_alone(
    raised: Exception, seen: type[RequestError], status: EndStatus
) -> None:
    @virtual(defects=int(isinstance(raised, ZeroDivisionError)))
    async def run(bench: Bench) -> None:
        bench.engine.submit_error = raised
        stream = bench.submit("bad")
        error = await outcome(stream)
        assert isinstance(error, seen)
        assert "secret" not in str(error)
        assert bench.counts() == {status: 1}
        assert bench.runtime.serving
        bench.engine.submit_error = None
        bench.submit("good")
        await bench.engine.has("good")

    run()


@virtual()
async def test_an_engine_that_ends_a_request_twice_ends_it_once(bench: Bench) -> None:
    engine, submit = bench.engine, bench.engine.submit

    def end_then_raise(request: EngineRequest, rank: int) -> None:
        submit(request, rank)
        engine.emit(request.request_id, 65, end=FinishReason.STOP)
        raise EngineError("too late", code="late")

    engine.submit = end_then_raise  # type: ignore[method-assign]
    stream = bench.submit()
    assert isinstance(await outcome(stream), Completion)
    assert bench.counts() == {EndStatus.FINISHED: 1}


@virtual(ONE_AT_A_TIME)
async def test_an_abort_that_the_engine_lost_is_sent_again(bench: Bench) -> None:
    await bench.running("r")
    bench.engine.deaf = True
    bench.runtime.abort("r")
    bench.engine.deaf = False
    bench.engine.emit("r", 65)
    assert bench.engine.aborts == ["r", "r"]
    assert bench.engine.requests == {}


@virtual(defects=1)
async def test_an_engine_that_raises_on_abort_keeps_nobody(bench: Bench) -> None:
    (stream,) = await bench.running("r")
    bench.engine.abort_error = ZeroDivisionError()
    assert bench.runtime.abort("r")
    assert isinstance(await outcome(stream), Cancelled)
    bench.engine.abort_error = None
    del bench.engine.requests["r"]


@virtual()
async def test_events_after_the_end_change_nothing(bench: Bench) -> None:
    (stream,) = await bench.running("r")
    bench.engine.step("r")
    bench.engine.emit("r", 65, end=FinishReason.STOP)
    bench.engine.fail("r")
    completion = await outcome(stream)
    assert isinstance(completion, Completion)
    assert completion.timing.output_tokens == 1
    assert bench.counts() == {EndStatus.FINISHED: 1}


class BrokenEvent:
    """Raises where an event has its tokens."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id

    @property
    def token_ids(self) -> tuple[int, ...]:
        raise ZeroDivisionError("broken")


def test_an_event_that_cannot_be_handled_ends_its_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    @virtual(defects=1)
    async def run(bench: Bench) -> None:
        bad, good = await bench.running("bad", "good")
        bench.engine.send(BrokenEvent("bad"), EngineEvent("good", (65,), "A", end=FinishReason.STOP))  # type: ignore[arg-type]
        del bench.engine.requests["good"]
        assert isinstance(await outcome(good), Completion)
        error = await outcome(bad)
        assert type(error) is RequestError
        assert "broken" not in str(error)
        assert bench.engine.aborts == ["bad"]

    run()
    assert "ZeroDivisionError: broken" in caplog.text


# -- shutdown -----------------------------------------------------------------


@virtual(ONE_AT_A_TIME)
async def test_draining_refuses_new_requests_and_lets_the_others_end(bench: Bench) -> None:
    streams = [bench.submit("running"), bench.submit("waiting")]
    await bench.engine.has("running")
    drained = asyncio.ensure_future(bench.runtime.drain(10.0))
    await turns()
    assert not bench.runtime.serving
    assert bench.runtime.load().draining
    with pytest.raises(Draining):
        bench.submit("late")

    bench.engine.step("running")
    await bench.engine.has("waiting")
    assert not drained.done()
    bench.engine.step("waiting")
    await drained

    assert bench.clock.now_s() == 0.0
    for stream in streams:
        assert isinstance(await outcome(stream), Completion)
    assert bench.counts() == {EndStatus.FINISHED: 2, EndStatus.REJECTED: 1}


@virtual(ONE_AT_A_TIME)
async def test_after_the_grace_the_rest_is_ended(bench: Bench) -> None:
    streams = [bench.submit("running"), bench.submit("waiting")]
    await bench.engine.has("running")

    await bench.runtime.drain(3.0)

    assert bench.clock.now_s() == pytest.approx(3.0)
    for stream in streams:
        assert isinstance(await outcome(stream), Draining)
    assert bench.engine.requests == {}
    assert bench.counts() == {EndStatus.FAILED: 2}


@virtual()
async def test_draining_an_idle_runtime_takes_no_time(bench: Bench) -> None:
    await bench.runtime.drain(100.0)
    assert bench.clock.now_s() == 0.0


@virtual()
async def test_close_ends_what_is_left_and_may_be_repeated(bench: Bench) -> None:
    (stream,) = await bench.running("r")
    await bench.runtime.close()
    await bench.runtime.close()
    assert isinstance(await outcome(stream), Draining)


# -- options ------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"flush_interval_s": -1.0}, {"flush_interval_s": 60.0}, {"plan_gap_s": 1.5}])
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RuntimeOptions(**wrong)  # type: ignore[arg-type]


@virtual(instance="gpu-7")
async def test_the_instance_has_a_name(bench: Bench) -> None:
    (stream,) = await bench.running("r")
    bench.engine.step("r")
    completion = await outcome(stream)
    assert isinstance(completion, Completion)
    assert completion.instance == "gpu-7"
