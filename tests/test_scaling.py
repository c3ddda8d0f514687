"""Engines that come and go while requests are served, and the rule that says how many there should be. Virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import InlineExecutor, turns

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.slo import Slo
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.engine.supervised import SupervisedEngine, Supervision
from lmdeploy_slo.errors import EngineUnavailable, InvalidRequest
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.runtime.autoscale import AutoscaleOptions, AutoscaleRule
from lmdeploy_slo.runtime.demand import DemandLog
from lmdeploy_slo.runtime.live import RuntimeOptions
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.runtime.scaling import RETRY_S, Parts, Scaling
from lmdeploy_slo.runtime.stream import RequestStream
from lmdeploy_slo.scheduling.admission import Forecast
from lmdeploy_slo.scheduling.fleet import Fleet
from lmdeploy_slo.scheduling.placement import make_placement
from lmdeploy_slo.scheduling.policy import SearchBudget, make_policy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import make_request, make_spec
from lmdeploy_slo.testing.virtual_time import run_virtual

MODEL = StepModel(c0=0.01, p1=1e-5, p2=0.0, d1=1e-4, d2=0.0)
LIMITS = EngineLimits(max_batch_size=8)


class Slow(EmulatedEngine):
    """Takes ten seconds to start, or fails."""

    async def start(self, sink: Any) -> None:
        await asyncio.sleep(10.0)
        await super().start(sink)


class Bench:
    def __init__(self, clock: VirtualClock, rule: AutoscaleRule | None = None) -> None:
        self.clock = clock
        self.fleet = Fleet(make_placement("least-work"))
        self.lengths = TaskLengthPredictor()
        self.built = 0
        self.failures: list[Exception] = []
        options = RuntimeOptions(flush_interval_s=0.0, plan_gap_s=0.0)
        self.runtime = Runtime(*self.parts(), clock, options, executor=InlineExecutor(), fleet=self.fleet)
        self.scaling = Scaling(self.runtime, self.parts, clock, grace_s=5.0, rule=rule)

    def parts(self) -> Parts:
        self.built += 1
        scheduler = Scheduler(limits=LIMITS, model=MODEL, lengths=self.lengths, numbers=self.fleet.numbers)
        supervision = Supervision(restarts=0)
        policy = make_policy("annealing", budget=SearchBudget(time_s=None, evaluations=100))
        return SupervisedEngine(self.engine, self.clock, supervision), scheduler, policy

    def engine(self) -> EmulatedEngine:
        if self.built == 1:
            return EmulatedEngine(MODEL, LIMITS, self.clock)
        if self.failures:
            raise self.failures.pop()
        return Slow(MODEL, LIMITS, self.clock)

    @property
    def states(self) -> list[str]:
        return ["draining" if one.draining else "up" if one.up else "starting" for one in self.runtime.load().replicas]

    def submit(self, request_id: str, tokens: int = 50, slo: Slo | None = None) -> RequestStream:
        spec = make_spec(
            request_id,
            arrival_at_s=self.clock.now_s(),
            expected_output_tokens=tokens,
            max_new_tokens=tokens,
            slo=slo or Slo(),
        )
        return self.runtime.submit(spec, make_request(request_id, output_tokens=tokens, max_new_tokens=tokens))


def bench(rule: Callable[[], AutoscaleRule] | None = None) -> Callable[[Callable[[Bench], Awaitable[None]]], Any]:
    def decorate(test: Callable[[Bench], Awaitable[None]]) -> Callable[[], None]:
        def run() -> None:
            async def main(clock: VirtualClock) -> None:
                bench = Bench(clock, None if rule is None else rule())
                await bench.runtime.start()
                bench.scaling.start()
                await test(bench)
                await bench.scaling.close()
                await bench.runtime.close()

            run_virtual(main)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


@bench()
async def test_more_engines_take_requests_when_they_are_up(bench: Bench) -> None:
    assert bench.scaling.scale(3) == 1
    await turns()
    assert bench.states == ["up", "starting", "starting"]
    await asyncio.sleep(11.0)
    assert bench.states == ["up"] * 3
    streams = [bench.submit(f"r{i}") for i in range(9)]
    await turns(50)
    assert [one.in_flight + one.waiting for one in bench.runtime.load().replicas] == [3, 3, 3]
    for stream in streams:
        await stream.result()


@bench()
async def test_fewer_engines_lose_nothing(bench: Bench) -> None:
    bench.scaling.scale(3)
    await asyncio.sleep(11.0)
    streams = [bench.submit(f"r{i}", tokens=800) for i in range(30)]
    await asyncio.sleep(1.0)
    bench.scaling.scale(1)
    await turns()
    assert bench.states == ["up", "draining", "draining"]
    told = [await stream.result() for stream in streams]
    assert all(len(delta.token_ids) == 800 for delta in told)
    assert bench.states == ["up"]
    assert bench.runtime.load().resumed > 0, "they had five seconds, and needed more"


@bench()
async def test_the_last_word_holds(bench: Bench) -> None:
    bench.scaling.scale(4)
    await asyncio.sleep(5.0)
    bench.scaling.scale(2)
    await turns()
    assert len(bench.states) == 2, "those that were starting are stopped"
    await asyncio.sleep(6.0)
    assert bench.states == ["up", "up"]


@pytest.mark.parametrize("wanted", [0, 1025])
def test_out_of_range(wanted: int) -> None:
    @bench()
    async def test(bench: Bench) -> None:
        with pytest.raises(InvalidRequest, match="replicas"):
            bench.scaling.scale(wanted)

    test()


@bench()
async def test_one_that_does_not_start_is_tried_again_later(bench: Bench) -> None:
    original = Slow.start

    async def fails(self: Slow, sink: Any) -> None:
        raise EngineUnavailable("no place for it")

    Slow.start = fails  # type: ignore[method-assign]
    try:
        bench.scaling.scale(2)
        await asyncio.sleep(2.0)
        assert bench.states == ["up"]
        assert bench.built == 2
    finally:
        Slow.start = original  # type: ignore[method-assign]
    await asyncio.sleep(RETRY_S + 12.0)
    assert bench.states == ["up", "up"]


@bench()
async def test_one_that_was_given_up_is_replaced(bench: Bench) -> None:
    bench.scaling.scale(2)
    await asyncio.sleep(11.0)
    stream = bench.submit("r", tokens=2000)
    await asyncio.sleep(0.5)
    (number,) = [n for n, replica in bench.runtime.replicas.items() if replica.in_engine]
    bench.runtime.replicas[number].engine.inner.crash("a crash")  # type: ignore[attr-defined]
    await asyncio.sleep(12.5)
    assert bench.states == ["up", "up"]
    assert len((await stream.result()).token_ids) == 2000
    assert bench.runtime.load().resumed == 1


@bench()
async def test_one_that_is_asked_to_go_is_replaced(bench: Bench) -> None:
    bench.scaling.scale(2)
    await asyncio.sleep(11.0)
    streams = [bench.submit(f"r{i}", tokens=900) for i in range(6)]
    await asyncio.sleep(0.1)
    bench.scaling.scale(2, ["emulated-0"])
    await turns()
    assert [one.name for one in bench.runtime.load().replicas if one.draining] == ["emulated-0"]
    for stream in streams:
        assert len((await stream.result()).token_ids) == 900
    await asyncio.sleep(12.0)
    assert [one.name for one in bench.runtime.load().replicas] == ["emulated-1", "emulated-2"]
    assert bench.states == ["up", "up"]


@bench()
async def test_the_only_one_goes_when_another_is_there(bench: Bench) -> None:
    stream = bench.submit("r", tokens=100)
    bench.scaling.scale(1, ["emulated-0"])
    await asyncio.sleep(0.5)
    assert bench.states == ["up", "starting"]
    await asyncio.sleep(12.0)
    assert [one.name for one in bench.runtime.load().replicas] == ["emulated-1"]
    assert len((await stream.result()).token_ids) == 100
    with pytest.raises(InvalidRequest, match=r"no 'emulated-0', but emulated-1"):
        bench.scaling.scale(1, ["emulated-0"])


@bench(lambda: AutoscaleRule(AutoscaleOptions(least=1, most=3, up_s=10.0, down_s=60.0)))
async def test_the_rule_follows_the_load(bench: Bench) -> None:
    slo, streams, sizes = Slo(e2e_s=3.0), [], []
    for second in range(360):
        for i in range(24 if 60 <= second < 180 else 2):
            streams.append(bench.submit(f"r{second}-{i}", tokens=60, slo=slo))
        await asyncio.sleep(1.0)
        sizes.append(len([state for state in bench.states if state == "up"]))
    for stream in streams:
        await stream.result()
    assert sizes[59] == 1
    assert max(sizes) == 3
    assert sizes[-1] < 3
    assert bench.runtime.load().predicted_attainment is not None


@bench(lambda: AutoscaleRule(AutoscaleOptions(least=1, most=3, up_s=5.0, down_s=30.0)))
async def test_where_there_is_no_room_for_more_the_rule_still_takes_away(bench: Bench) -> None:
    original = Slow.start

    async def fails(self: Slow, sink: Any) -> None:
        if len(bench.runtime.replicas) > 2:
            raise EngineUnavailable("no place for it")
        await original(self, sink)

    Slow.start = fails  # type: ignore[method-assign]
    try:
        streams = []
        for second in range(200):
            for i in range(30 if second < 60 else 0):
                streams.append(bench.submit(f"r{second}-{i}", tokens=60, slo=Slo(e2e_s=3.0)))
            await asyncio.sleep(1.0)
        for stream in streams:
            await stream.result()
        assert bench.states == ["up"]
        assert bench.scaling.wanted == 1
    finally:
        Slow.start = original  # type: ignore[method-assign]


@bench()
async def test_what_the_prefix_cache_holds_is_not_asked_of_engines(bench: Bench) -> None:
    """A conversation's next turn asks for its new words alone."""
    demand = bench.runtime.journal.demand
    whole = bench.submit("whole", tokens=10)
    asked = demand.of_last(1.0, bench.clock.now_s()).engines
    bench.runtime.scheduler.expected_cached_tokens = lambda spec: spec.prompt_tokens - 1.0  # type: ignore[method-assign]
    cached = bench.submit("cached", tokens=10)
    assert demand.of_last(1.0, bench.clock.now_s()).engines - asked < asked
    for stream in (whole, cached):
        stream.cancel()


# -- the rule itself ----------------------------------------------------------

NEEDED_S = MODEL.engine_time_s(100.0, 100.0)
OPTIONS = AutoscaleOptions(least=2, most=6, attainment=0.9, up_s=10.0, down_s=60.0)


def told(chance: float | None) -> Forecast:
    return Forecast(output_tokens=100, queue_position=0, queue_s=0.0, ttft_s=0.1, tpot_s=0.01, e2e_s=1.0, chance=chance)


def offered(seconds: int, a_second: int, chance: float, until_s: float = 1000.0) -> DemandLog:
    log = DemandLog()
    for second in range(seconds):
        for _ in range(a_second):
            log.came(NEEDED_S, True, told(chance), until_s - seconds + second + 0.5)
    return log


def test_it_adds_while_too_few_are_foretold_to_meet() -> None:
    rule = AutoscaleRule(OPTIONS)
    assert rule.wanted(2, offered(10, 2, 0.5), 1000.0) == 3
    assert rule.wanted(2, offered(10, 2, 0.95), 1000.0) == 2


def test_it_adds_as_many_as_the_work_takes() -> None:
    rule, log = AutoscaleRule(OPTIONS), offered(10, 100, 0.1)
    engines = log.of_last(10.0, 1000.0).engines
    assert engines > 2.4
    assert rule.wanted(2, log, 1000.0) == min(6, -(-engines // 0.8))


def test_refused_requests_count_as_missed() -> None:
    log = offered(10, 2, 1.0)
    for _ in range(10):
        log.refused(True, 999.0)
    assert log.of_last(10.0, 1000.0).attainment == pytest.approx(20 / 30)
    assert AutoscaleRule(OPTIONS).wanted(2, log, 1000.0) == 3


def test_it_waits_until_a_change_can_be_seen() -> None:
    rule = AutoscaleRule(OPTIONS)
    rule.changed(995.0)
    assert rule.wanted(2, offered(10, 2, 0.5), 1000.0) == 2
    assert rule.wanted(2, offered(10, 2, 0.5, 1005.0), 1005.0) == 3


def test_it_takes_away_after_a_long_quiet() -> None:
    rule, log = AutoscaleRule(OPTIONS), DemandLog()
    for second in range(200):
        log.came(NEEDED_S, True, told(1.0), float(second))
        wanted = rule.wanted(3, log, float(second))
        assert wanted == (2 if second >= 60 else 3)
    assert rule.wanted(2, log, 200.0) == 2, "never fewer than the least"


@given(st.integers(1, 20), st.integers(0, 60), st.floats(0, 1), st.floats(0, 2000))
def test_it_stays_in_its_bounds(engines: int, a_second: int, chance: float, now_s: float) -> None:
    wanted = AutoscaleRule(OPTIONS).wanted(engines, offered(10, a_second, chance, now_s), now_s)
    assert OPTIONS.least <= wanted <= OPTIONS.most


@pytest.mark.parametrize("wrong", [{"least": 0}, {"least": 7}, {"attainment": 0.0}, {"up_s": 0.5}, {"down_s": 601.0}])
def test_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AutoscaleOptions(**({"least": 1, "most": 6} | wrong))
