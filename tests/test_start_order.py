"""Requests that wait inside the engine are ranked anew whenever something has changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine, make_runtime, turns

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.request import PriorityClass, RequestSpec
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.scheduling.policy import make_policy
from lmdeploy_slo.scheduling.rules import RulePolicy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import A100, make_request, make_slo, make_spec
from lmdeploy_slo.testing.virtual_time import run_virtual

LATEST_START = RulePolicy("llf", feasible_first=True)

# -- the order ------------------------------------------------------------------------------------------------------


def dispatched(*specs: RequestSpec) -> tuple[Scheduler, dict[str, int]]:
    """A scheduler that has sent all of them, and their handles."""
    scheduler = Scheduler(limits=EngineLimits(), model=A100, lengths=TaskLengthPredictor())
    handles = {spec.request_id: scheduler.add(spec) for spec in specs}
    scheduler.apply(RulePolicy("fcfs").plan(scheduler.snapshot(0.0)), 0.0)
    return scheduler, handles


def start_order(scheduler: Scheduler, handles: Mapping[str, int], rule: RulePolicy, now_s: float) -> list[str]:
    ranks = scheduler.start_ranks(rule, now_s)
    assert sorted(ranks.values()) == list(range(len(ranks)))
    return sorted((name for name in handles if handles[name] in ranks), key=lambda name: ranks[handles[name]])


def test_priority_then_class_then_urgency_then_the_hopeless() -> None:
    scheduler, handles = dispatched(
        make_spec("none"),
        make_spec("hopeless", slo=make_slo(ttft_ms=1)),
        make_spec("lax", slo=make_slo(ttft_ms=5000)),
        make_spec("urgent", slo=make_slo(ttft_ms=500)),
        make_spec("system", priority_class=PriorityClass.SYSTEM),
        make_spec("behind", slo=make_slo(ttft_ms=100), priority=1),
    )
    expected = ["system", "urgent", "lax", "none", "hopeless", "behind"]
    assert start_order(scheduler, handles, LATEST_START, 0.0) == expected
    late = ["system", "lax", "none", "hopeless", "urgent", "behind"]
    assert start_order(scheduler, handles, LATEST_START, 1.0) == late
    arrival = ["system", "none", "hopeless", "lax", "urgent", "behind"]
    assert start_order(scheduler, handles, RulePolicy("fcfs"), 1.0) == arrival
    assert start_order(scheduler, handles, RulePolicy("edf"), 1.0)[1] == "hopeless"


def test_only_dispatched_requests_without_a_token_have_a_rank() -> None:
    scheduler, handles = dispatched(make_spec("started"), make_spec("gone"), make_spec("a"), make_spec("b"))
    handles["outside"] = scheduler.add(make_spec("outside"))
    scheduler.on_tokens(handles["started"], 1, 0.1)
    scheduler.drop(handles["gone"])
    assert start_order(scheduler, handles, LATEST_START, 0.2) == ["a", "b"]
    scheduler.drop(handles["a"])
    assert start_order(scheduler, handles, LATEST_START, 0.2) == ["b"]
    scheduler.drop(handles["b"])
    assert scheduler.start_ranks(LATEST_START, 0.2) == {}


requests = st.builds(
    lambda ttft_ms, e2e_ms, tier, priority, prompt, arrival_ms: make_spec(
        slo=make_slo(ttft_ms=ttft_ms, e2e_ms=e2e_ms),
        priority_class=PriorityClass(tier),
        priority=priority,
        prompt_tokens=prompt,
        arrival_at_s=arrival_ms / 1e3,
        expected_output_tokens=50,
    ),
    st.none() | st.integers(1, 3000),
    st.none() | st.integers(1, 3000),
    st.integers(0, 3),
    st.integers(0, 2),
    st.integers(1, 4000),
    st.integers(0, 500),
)


@given(st.lists(requests, max_size=12), st.floats(0, 3))
def test_the_order_is_that_of_a_plain_sort(specs: list[RequestSpec], now_s: float) -> None:
    scheduler = Scheduler(limits=EngineLimits(), model=A100, lengths=TaskLengthPredictor())
    by_handle = {scheduler.add(spec): spec for spec in specs}
    scheduler.apply(RulePolicy("fcfs").plan(scheduler.snapshot(0.0)), 0.0)

    def key(handle: int) -> tuple[float, ...]:
        spec = by_handle[handle]
        prompt, output = spec.prompt_tokens, 50
        prefill_s = A100.p1 * prompt + A100.p2 * prompt * prompt
        ttft_s = math.inf if spec.slo.ttft_s is None else spec.slo.ttft_s
        e2e_s = math.inf if spec.slo.e2e_s is None else spec.slo.e2e_s
        wall_s = prefill_s + output * A100.step_s(0, 0, 1, 0.0)
        latest_s = spec.arrival_at_s + min(ttft_s - (prefill_s + A100.c0), e2e_s - wall_s)
        late = latest_s < now_s
        work_s = prefill_s + output * (A100.d1 + A100.d2 * (prompt + output / 2) + A100.c0 / 64)
        urgency = work_s if late else latest_s
        return (spec.priority, -spec.priority_class, late, urgency, spec.arrival_at_s, handle)

    ranks = scheduler.start_ranks(LATEST_START, now_s)
    assert sorted(ranks, key=ranks.__getitem__) == sorted(by_handle, key=key)


# -- the runtime ----------------------------------------------------------------------------------------------------


class RankedEngine(ScriptedEngine):
    """Keeps what it was told anew."""

    def __init__(self, clock: VirtualClock, look_ahead: int) -> None:
        super().__init__(clock, limits=EngineLimits(max_batch_size=8), look_ahead=look_ahead)
        self.told: list[dict[str, int]] = []

    def rerank(self, ranks: Mapping[str, int]) -> None:
        assert set(ranks) <= set(self.requests), "only those submitted are ranked anew"
        self.told.append(dict(ranks))
        super().rerank(ranks)

    def start_order(self) -> list[str]:
        waiting = sorted(self.requests, key=lambda name: self.ranks[name])
        assert len({self.ranks[name] for name in waiting}) == len(waiting)
        return waiting


class Bench:
    def __init__(self, clock: VirtualClock, runtime: Runtime, engine: RankedEngine) -> None:
        self.clock, self.runtime, self.engine = clock, runtime, engine

    async def arrives(self, request_id: str, ttft_ms: float | None = None, **fields: Any) -> None:
        spec = make_spec(request_id, slo=make_slo(ttft_ms=ttft_ms), arrival_at_s=self.clock.now_s(), **fields)
        self.runtime.submit(spec, make_request(request_id))
        await self.engine.has(request_id)
        await turns()


def driven(
    scenario: Callable[[Bench], Coroutine[Any, Any, None]], *, policy: str = "annealing", look_ahead: int = 6
) -> None:
    async def main(clock: VirtualClock) -> None:
        engine = RankedEngine(clock, look_ahead)
        runtime = make_runtime(engine, clock, policy=make_policy(policy))
        await runtime.start()
        try:
            await scenario(Bench(clock, runtime, engine))
        finally:
            await runtime.close()

    run_virtual(main)


@pytest.mark.parametrize("policy", ["annealing", "slack-guard", "edf", "llf"])
def test_a_later_and_more_urgent_request_goes_before_those_already_inside(policy: str) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.arrives("lax", 9000)
        await bench.arrives("laxer", 12_000)
        await bench.arrives("urgent", 3000)
        assert bench.engine.start_order() == ["urgent", "lax", "laxer"]
        await bench.arrives("between", 10_000)
        assert bench.engine.start_order() == ["urgent", "lax", "between", "laxer"]

    driven(scenario, policy=policy)


def test_arrival_order_stays_arrival_order() -> None:
    async def scenario(bench: Bench) -> None:
        for name, ttft_ms in (("a", 9000), ("b", 100), ("c", 3000)):
            await bench.arrives(name, ttft_ms)
        assert bench.engine.start_order() == ["a", "b", "c"]
        await bench.arrives("first", priority_class=PriorityClass.SYSTEM)
        assert bench.engine.start_order() == ["first", "a", "b", "c"]

    driven(scenario, policy="fcfs")


def test_who_can_no_longer_meet_its_slo_goes_last_though_nobody_waits_outside() -> None:
    async def scenario(bench: Bench) -> None:
        for name, ttft_ms in (("runs", 100), ("b", 500), ("c", 2000)):
            await bench.arrives(name, ttft_ms)
        assert bench.engine.start_order() == ["runs", "b", "c"]
        bench.engine.emit("runs", 97)
        bench.clock.advance(1.0)
        bench.runtime.abort("runs")
        await turns()
        assert bench.engine.start_order() == ["c", "b"]

    driven(scenario)


def test_only_changes_are_told() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.arrives("a", 9000)
        await bench.arrives("b", 12_000)
        assert bench.engine.told == [{"a": 0}, {"b": 1}]
        bench.engine.emit("a", 97)
        await turns()
        assert bench.engine.told[2:] == [{"b": 0}]
        bench.engine.emit("a", 97)
        await turns()
        assert len(bench.engine.told) == 3

    driven(scenario)


def test_an_engine_without_a_look_ahead_is_told_nothing() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.arrives("a", 9000)
        await bench.arrives("b", 3000)
        assert bench.engine.told == []

    driven(scenario, look_ahead=0)
