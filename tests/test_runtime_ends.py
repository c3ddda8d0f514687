"""Every other way a request ends leads to one end, and gives back what was held; and how a runtime shuts down."""

from __future__ import annotations

import asyncio

import pytest
from runtime_bench import ONE_AT_A_TIME, Bench, outcome, virtual
from scripted_engine import turns

from lmdeploy_slo.core.request import EndStatus, FinishReason
from lmdeploy_slo.engine.base import EngineEvent, EngineRequest
from lmdeploy_slo.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    EngineError,
    EngineUnavailable,
    FieldViolation,
    InvalidRequest,
    QueueTimeout,
    RequestError,
)
from lmdeploy_slo.runtime.stream import Completion

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
