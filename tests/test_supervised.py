"""An engine that is gone is noticed in time, replaced with backoff, and given up where it does not come back; and what
the runtime makes of that for the requests. In virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from scripted_engine import InlineExecutor, ScriptedEngine, turns

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine import supervised
from lmdeploy_slo.engine.base import EngineLoad
from lmdeploy_slo.engine.supervised import EngineState, SupervisedEngine, Supervision
from lmdeploy_slo.errors import EngineUnavailable, QueueTimeout, RequestError
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.prediction.prefix import PrefixPredictor
from lmdeploy_slo.runtime.explanation import RequestState
from lmdeploy_slo.runtime.live import RuntimeOptions
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.runtime.stream import Completion, RequestStream
from lmdeploy_slo.scheduling.rules import RulePolicy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import NO_TIME, make_request, make_spec
from lmdeploy_slo.testing.virtual_time import run_virtual

OPTIONS = Supervision(stall_timeout_s=10.0, restarts=2, backoff_s=1.0, settled_s=100.0)


class Fragile(ScriptedEngine):
    """Tells what it is told to tell of itself."""

    gone: str | None = None
    steps: int | None = None
    start_error: Exception | None = None
    closes = 0
    hangs_on_close = False

    def load(self) -> EngineLoad:
        return EngineLoad(len(self.requests), len(self.requests), None, 0.25, self.gone, self.steps)

    async def start(self, sink: Any) -> None:
        if self.start_error is not None:
            raise self.start_error
        await super().start(sink)

    async def close(self) -> None:
        self.closes += 1
        if self.hangs_on_close:
            await asyncio.Event().wait()
        await super().close()


class Bench:
    """A runtime on a supervised engine; `starts`: what each engine but the first says on its start."""

    def __init__(self, clock: VirtualClock, options: Supervision = OPTIONS, hold_s: float = 30.0) -> None:
        self.clock = clock
        self.engines: list[Fragile] = []
        self.starts: list[Exception] = []
        self.supervised = SupervisedEngine(self.build, clock, options)
        limits = EngineLimits(max_batch_size=2)
        scheduler = Scheduler(limits=limits, model=NO_TIME, lengths=TaskLengthPredictor())
        runtime_options = RuntimeOptions(flush_interval_s=0.0, plan_gap_s=0.0, hold_s=hold_s)
        self.runtime = Runtime(
            self.supervised, scheduler, RulePolicy("fcfs"), clock, runtime_options, executor=InlineExecutor()
        )
        self.serving: list[tuple[float, bool]] = []
        self.runtime.on_serving_change = lambda: self.serving.append((clock.now_s(), self.runtime.serving))

    def build(self) -> Fragile:
        engine = Fragile(self.clock, limits=EngineLimits(max_batch_size=2))
        if self.engines and self.starts:
            engine.start_error = self.starts.pop(0)
        self.engines.append(engine)
        return engine

    @property
    def engine(self) -> Fragile:
        return self.engines[-1]

    def submit(self, request_id: str = "r", **spec: Any) -> RequestStream:
        spec = {"arrival_at_s": self.clock.now_s()} | spec
        return self.runtime.submit(make_spec(request_id, **spec), make_request(request_id))

    async def up(self) -> None:
        while self.supervised.state is not EngineState.UP:  # noqa: ASYNC110 # virtual time
            await asyncio.sleep(0.1)
        await turns()

    async def lose(self, reason: str) -> None:
        """Returns when it is noticed."""
        self.engine.gone = reason
        await asyncio.sleep(1.1 * OPTIONS.look_s)


def bench(options: Supervision = OPTIONS, hold_s: float = 30.0) -> Callable[[Callable[[Bench], Awaitable[None]]], Any]:
    def decorate(test: Callable[[Bench], Awaitable[None]]) -> Callable[[], None]:
        def run() -> None:
            async def main(clock: VirtualClock) -> None:
                bench = Bench(clock, options, hold_s)
                await bench.runtime.start()
                await test(bench)
                await bench.runtime.close()

            run_virtual(main)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


async def outcome(stream: RequestStream) -> Completion | RequestError:
    try:
        completion = (await stream.result()).completion
    except RequestError as error:
        return error
    assert completion is not None
    return completion


# -- noticing -----------------------------------------------------------------


@bench()
async def test_a_stalled_engine_is_noticed_within_the_bound(bench: Bench) -> None:
    stream = bench.submit()
    await bench.engine.has("r")
    bench.engine.step()  # the last sign of life
    stalled_at_s = bench.clock.now_s()

    error = await outcome(stream)

    assert isinstance(error, EngineUnavailable)
    noticed_s = bench.clock.now_s() - stalled_at_s
    assert OPTIONS.stall_timeout_s <= noticed_s <= OPTIONS.stall_timeout_s + 2 * OPTIONS.look_s
    assert bench.serving == [(bench.clock.now_s(), False)]


@pytest.mark.parametrize("sign", ["event", "step"])
def test_whatever_moves_is_not_stalled(sign: str) -> None:
    @bench()
    async def run(bench: Bench) -> None:
        bench.submit()
        await bench.engine.has("r")
        for number in range(20):
            await asyncio.sleep(0.9 * OPTIONS.stall_timeout_s)
            if sign == "event":
                bench.engine.step()
            else:  # a long prefill
                bench.engine.steps = number
        assert bench.supervised.state is EngineState.UP

    run()


@bench()
async def test_an_idle_engine_may_be_idle(bench: Bench) -> None:
    await asyncio.sleep(1000.0)
    stream = bench.submit()
    await bench.engine.has("r")
    await asyncio.sleep(0.9 * OPTIONS.stall_timeout_s)
    bench.engine.step("r")
    assert isinstance(await outcome(stream), Completion)
    assert bench.serving == []


@bench()
async def test_an_idle_engine_that_is_gone_is_noticed_at_the_next_look(bench: Bench) -> None:
    await asyncio.sleep(5.5)
    await bench.lose("the driver is gone")
    assert not bench.runtime.serving
    assert bench.runtime.engine.load().gone == "the driver is gone"
    with pytest.raises(EngineUnavailable, match="being restarted"):
        bench.submit()
    await bench.up()
    assert bench.serving[-1][1]


@bench()
async def test_a_jump_of_the_clock_is_no_stall(bench: Bench) -> None:
    bench.submit()
    await bench.engine.has("r")
    for _ in range(3):
        bench.clock.advance(3600.0)  # the process was stopped
        await asyncio.sleep(0.1)
    assert bench.supervised.state is EngineState.UP


# -- replacing ----------------------------------------------------------------


@bench()
async def test_who_saw_no_token_is_tried_again_and_who_did_is_told(bench: Bench) -> None:
    began, untouched, waiting = bench.submit("began"), bench.submit("untouched"), bench.submit("waiting")
    await bench.engine.has("began", "untouched")
    bench.engine.emit("began", 65)

    bench.engine.crash()

    assert isinstance(await outcome(began), EngineUnavailable)
    assert bench.runtime.load().waiting == 2
    await bench.up()
    assert len(bench.engines) == 2
    assert bench.engines[0].closes == 1
    assert bench.clock.now_s() == pytest.approx(OPTIONS.backoff_s, abs=0.1)
    assert set(bench.engine.requests) == {"untouched", "waiting"}
    bench.engine.step("untouched", "waiting")
    for stream in (untouched, waiting):
        completion = await outcome(stream)
        assert isinstance(completion, Completion)
        assert completion.timing.output_tokens == 1
        assert completion.timing.dispatched_at_s == pytest.approx(OPTIONS.backoff_s, abs=0.1)
    load = bench.runtime.load()
    assert (load.retried, load.engine_restarts) == (1, 1)
    assert load.ended[EndStatus.FAILED] == 1
    assert [serving for _, serving in bench.serving] == [False, True]


@bench()
async def test_why_it_waited_is_told_of_the_wait_for_the_engine_too(bench: Bench) -> None:
    stream = bench.submit()
    await bench.engine.has("r")
    bench.engine.crash()
    await turns()
    told = bench.runtime.journal.explain("r")
    assert told is not None
    assert (told.state, told.sent) == (RequestState.WAITING, None)
    await bench.up()
    bench.engine.step("r")
    assert isinstance(await outcome(stream), Completion)
    told = bench.runtime.journal.explain("r")
    assert told is not None
    assert told.state is RequestState.ENDED
    assert told.sent is not None
    assert told.waited_s == pytest.approx(OPTIONS.backoff_s, abs=0.1)


@bench()
async def test_what_conversations_left_in_the_old_cache_is_forgotten(bench: Bench) -> None:
    prefixes = bench.runtime.scheduler.prefixes = PrefixPredictor()
    for number in range(5):
        spec = make_spec(f"turn{number}", prompt_tokens=100 + 100 * number, conversation_id="c")
        prefixes.observe(spec, 100 * number, float(number))
    for request_id in ("a", "b"):
        bench.submit(request_id)
    await bench.engine.has("a", "b")
    bench.submit("next", prompt_tokens=600, conversation_id="c")
    await turns()
    (row,) = bench.runtime.scheduler.snapshot(0.0).waiting
    assert row["cached_tokens"] > 400
    bench.engine.crash()
    await bench.up()
    await bench.engine.has("a", "b")
    (row,) = bench.runtime.scheduler.snapshot(0.0).waiting
    assert row["cached_tokens"] < 100
    assert row["prompt_tokens"] + row["cached_tokens"] == 600


@bench()
async def test_nobody_is_tried_more_than_twice(bench: Bench) -> None:
    stream = bench.submit()
    await bench.engine.has("r")
    bench.engine.crash()
    await bench.up()
    await bench.engine.has("r")
    bench.engine.crash()
    assert isinstance(await outcome(stream), EngineUnavailable)


@bench()
async def test_what_an_engine_says_after_its_end_is_not_heard(bench: Bench) -> None:
    stream = bench.submit()
    await bench.engine.has("r")
    await bench.lose("lost")
    await bench.up()
    old, new = bench.engines
    await new.has("r")
    old.emit("r", 66)
    new.emit("r", 65)
    new.step("r")
    delta = await stream.result()
    assert list(delta.token_ids) == [65, 97]


@bench()
async def test_a_queue_timeout_goes_on_while_there_is_no_engine(bench: Bench) -> None:
    bench.starts = [EngineUnavailable("not yet")]
    stream = bench.submit(queue_timeout_s=2.0)
    await bench.engine.has("r")
    bench.engine.crash()
    assert isinstance(await outcome(stream), QueueTimeout)
    assert bench.clock.now_s() == pytest.approx(2.0)


@bench(hold_s=0.5)
async def test_those_that_wait_are_held_for_so_long(bench: Bench) -> None:
    stream = bench.submit()
    await bench.engine.has("r")
    bench.engine.crash()
    assert isinstance(await outcome(stream), EngineUnavailable)
    assert bench.clock.now_s() == pytest.approx(0.5)
    await bench.up()
    bench.submit("next")
    await bench.engine.has("next")


@bench()
async def test_the_wait_before_an_attempt_doubles_and_then_it_is_lost(bench: Bench) -> None:
    bench.starts = [EngineUnavailable("no memory"), ZeroDivisionError("a defect")]
    stream = bench.submit()
    await bench.engine.has("r")
    bench.engine.crash()
    assert isinstance(await outcome(stream), EngineUnavailable)
    assert bench.clock.now_s() == pytest.approx(1.0 + 2.0)
    assert bench.runtime.lost.is_set()
    assert not bench.runtime.serving
    with pytest.raises(EngineUnavailable, match="gone"):
        bench.submit("after")


@bench()
async def test_attempts_are_forgotten_once_the_engine_was_up_for_long(bench: Bench) -> None:
    for _ in range(3 * OPTIONS.restarts):
        await asyncio.sleep(OPTIONS.settled_s + 2)
        await bench.lose("gone again")
        await bench.up()
    assert bench.supervised.restarted == 3 * OPTIONS.restarts
    assert not bench.runtime.lost.is_set()


@bench()
async def test_a_crash_loop_is_given_up(bench: Bench) -> None:
    for _ in range(OPTIONS.restarts):
        await bench.lose("gone again")
        await bench.up()
    await bench.lose("gone again")
    assert bench.runtime.lost.is_set()


@bench(Supervision(restarts=0))
async def test_without_restarts_the_first_loss_is_the_last(bench: Bench) -> None:
    streams = [bench.submit("a"), bench.submit("b"), bench.submit("c")]
    await bench.engine.has("a", "b")
    bench.engine.crash()
    for stream in streams:
        assert isinstance(await outcome(stream), EngineUnavailable)
    assert bench.runtime.lost.is_set()


@bench()
async def test_an_engine_that_hangs_on_close_is_left_behind(bench: Bench) -> None:
    first = bench.engine
    first.hangs_on_close = True
    await bench.lose("stuck")
    await bench.up()
    assert bench.clock.now_s() == pytest.approx(OPTIONS.look_s + supervised.CLOSE_TIMEOUT_S + 1.0, abs=0.3)
    assert bench.supervised.left_behind


@bench()
async def test_a_drain_ends_what_waits_for_an_engine(bench: Bench) -> None:
    bench.starts = [EngineUnavailable("no")] * 2
    stream = bench.submit()
    await bench.engine.has("r")
    bench.engine.crash()
    await turns()
    await bench.runtime.drain(0.5)
    assert (await _reason(stream)) == "DRAINING"


async def _reason(stream: RequestStream) -> str:
    result = await outcome(stream)
    assert isinstance(result, RequestError)
    return result.reason


@pytest.mark.parametrize("wrong", [{"stall_timeout_s": 0}, {"backoff_s": -1}, {"restarts": -1}])
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Supervision(**wrong)
