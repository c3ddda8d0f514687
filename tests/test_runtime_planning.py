"""When plans are made, on what, and that neither a slow nor a broken policy holds anything up."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scripted_engine import ManualExecutor, ScriptedEngine, make_runtime, turns

from lmdeploy_slo.clock import MonotonicClock, VirtualClock
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.core.snapshot import EngineLimits, Snapshot
from lmdeploy_slo.errors import Cancelled
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.runtime.plan_loop import AT_ONCE
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import NO_TIME, make_request, make_spec
from lmdeploy_slo.testing.virtual_time import run_virtual


class WatchedPolicy:
    """Arrival order, unless told otherwise; keeps every snapshot with its instant."""

    name = "watched"

    def __init__(self, *, wants_ticks: bool = False, answer: Callable[[Snapshot], Plan] | None = None) -> None:
        self.wants_ticks = wants_ticks
        self.answer = answer or self.arrival_order
        self.snapshots: list[Snapshot] = []
        self.warm = False

    @staticmethod
    def arrival_order(snapshot: Snapshot) -> Plan:
        handles = np.sort(snapshot.waiting["handle"])
        return Plan(order=handles, send_now=min(len(handles), snapshot.free_slots))

    def plan(self, snapshot: Snapshot) -> Plan:
        self.snapshots.append(snapshot)
        return self.answer(snapshot)

    def warm_up(self) -> None:
        self.warm = True


class Bench:
    def __init__(self, clock: VirtualClock, policy: WatchedPolicy, batch_size: int = 256, **options: Any) -> None:
        self.clock = clock
        self.policy = policy
        self.engine = ScriptedEngine(clock, limits=EngineLimits(max_batch_size=batch_size))
        self.executor = ManualExecutor()
        self.runtime: Runtime = make_runtime(self.engine, clock, policy=policy, executor=self.executor, **options)

    def submit(self, *request_ids: str) -> None:
        self.streams = [
            self.runtime.submit(make_spec(r, arrival_at_s=self.clock.now_s()), make_request(r)) for r in request_ids
        ]


def planned(policy: WatchedPolicy, scenario: Any, **options: Any) -> None:
    async def main(clock: VirtualClock) -> None:
        bench = Bench(clock, policy, **options)
        await bench.runtime.start()
        assert policy.warm
        try:
            await scenario(bench)
        finally:
            bench.executor.holds = False
            bench.executor.release()
            await bench.runtime.close()

    run_virtual(main)


def test_what_happens_during_a_plan_leads_to_one_more() -> None:
    policy = WatchedPolicy()

    async def scenario(bench: Bench) -> None:
        bench.executor.holds = True
        bench.submit("a")
        await turns()
        assert len(bench.executor.held) == 1
        bench.submit("b", "c", "d")
        await turns()
        assert len(bench.executor.held) == 1, "one plan at a time"
        bench.executor.holds = False
        bench.executor.release()
        await bench.engine.has("a", "b", "c", "d")
        assert [len(s.waiting) for s in policy.snapshots] == [1, 3]

    planned(policy, scenario)


def test_who_left_during_a_plan_is_not_sent() -> None:
    policy = WatchedPolicy()

    async def scenario(bench: Bench) -> None:
        bench.executor.holds = True
        bench.submit("stays", "leaves")
        leaving = bench.streams[1]
        await turns()
        bench.runtime.abort("leaves")
        bench.executor.holds = False
        bench.executor.release()
        await bench.engine.has("stays")
        await turns()
        assert bench.engine.submitted == ["stays"]
        assert bench.engine.aborts == []
        with pytest.raises(Cancelled):
            await leaving.result()
        assert bench.runtime.scheduler.statistics().stale_entries == 1

    planned(policy, scenario)


def test_tokens_flow_while_a_plan_is_made() -> None:
    policy = WatchedPolicy()

    async def scenario(bench: Bench) -> None:
        bench.submit("running")
        running = bench.streams[0]
        await bench.engine.has("running")
        bench.executor.holds = True
        bench.submit("waiting")
        await turns()
        assert len(bench.executor.held) == 1, "the plan is being made"
        for token in (65, 66, 67):
            bench.engine.emit("running", token)
            assert list((await running.__anext__()).token_ids) == [token]
        assert bench.executor.held, "and still is"

    planned(policy, scenario)


def test_the_snapshot_says_how_far_running_requests_are() -> None:
    policy = WatchedPolicy()

    async def scenario(bench: Bench) -> None:
        bench.submit("running")
        await bench.engine.has("running")
        bench.clock.advance(2.0)
        for _ in range(5):
            bench.engine.step()
            bench.clock.advance(1.0)
        bench.submit("waiting")
        await turns()
        (row,) = policy.snapshots[-1].running
        assert row["generated_tokens"] == 5
        assert row["dispatched_at_s"] == 0.0
        assert row["first_token_at_s"] == 2.0
        assert policy.snapshots[-1].now_s == bench.clock.now_s()

    planned(policy, scenario, batch_size=1)


@pytest.mark.parametrize("wants_ticks", [True, False])
def test_progress_alone_leads_to_a_plan_only_where_the_policy_wants_it(wants_ticks: bool) -> None:
    policy = WatchedPolicy(wants_ticks=wants_ticks)

    async def scenario(bench: Bench) -> None:
        bench.submit("running", "waiting")
        await bench.engine.has("running")
        await turns()
        before = len(policy.snapshots)
        for _ in range(3):
            bench.engine.step()
            await turns()
        assert len(policy.snapshots) - before == (3 if wants_ticks else 0)

    planned(policy, scenario, batch_size=1)


def test_nobody_waiting_means_no_plan() -> None:
    policy = WatchedPolicy(wants_ticks=True)

    async def scenario(bench: Bench) -> None:
        bench.submit("running")
        await bench.engine.has("running")
        await turns()
        before = len(policy.snapshots)
        bench.engine.step()
        await turns()
        bench.engine.step("running")
        await turns()
        assert len(policy.snapshots) == before == 1

    planned(policy, scenario)


def test_a_plan_may_ask_to_be_made_again() -> None:
    def hold_until_two(snapshot: Snapshot) -> Plan:
        plan = WatchedPolicy.arrival_order(snapshot)
        if snapshot.now_s < 2.0:
            return Plan(plan.order, send_now=0, replan_after_s=0.75)
        return plan

    policy = WatchedPolicy(answer=hold_until_two)

    async def scenario(bench: Bench) -> None:
        bench.submit("r")
        await bench.engine.has("r")
        assert [s.now_s for s in policy.snapshots] == [0.0, 0.75, 1.5, 2.25]

    planned(policy, scenario)


def test_a_policy_that_holds_all_back_from_an_idle_engine_is_asked_again() -> None:
    def hold_twice(snapshot: Snapshot) -> Plan:
        plan = WatchedPolicy.arrival_order(snapshot)
        return Plan(plan.order, send_now=0) if len(policy.snapshots) < 3 else plan

    policy = WatchedPolicy(answer=hold_twice)

    async def scenario(bench: Bench) -> None:
        bench.submit("r")
        await bench.engine.has("r")
        assert [s.now_s for s in policy.snapshots] == pytest.approx([0.0, 0.05, 0.1])

    planned(policy, scenario)


def test_a_new_event_overtakes_the_time_a_plan_asked_for() -> None:
    def hold_the_first(snapshot: Snapshot) -> Plan:
        plan = WatchedPolicy.arrival_order(snapshot)
        return Plan(plan.order, send_now=0, replan_after_s=60.0) if len(plan.order) == 1 else plan

    policy = WatchedPolicy(answer=hold_the_first)

    async def scenario(bench: Bench) -> None:
        bench.submit("a")
        await turns()
        bench.submit("b")
        await bench.engine.has("a", "b")
        assert bench.clock.now_s() == 0.0

    planned(policy, scenario)


def test_a_burst_shares_plans_and_arrivals_now_and_then_are_planned_at_once() -> None:
    policy = WatchedPolicy()
    gap_s = 0.02

    async def scenario(bench: Bench) -> None:
        for i in range(16):
            bench.submit(f"burst{i}")
            await asyncio.sleep(0.003)
        await bench.engine.has("burst15")
        planned = [(pytest.approx(s.now_s), len(s.waiting)) for s in policy.snapshots]
        at_once = [(0.0, 1), (0.003, 1), (0.006, 1), (0.009, 1)]
        assert len(at_once) == AT_ONCE
        assert planned == [*at_once, (gap_s, 3), (2 * gap_s, 7), (3 * gap_s, 2)]

        await asyncio.sleep(AT_ONCE * gap_s)
        policy.snapshots.clear()
        came_s = []
        for i in range(2 * AT_ONCE):
            came_s.append(bench.clock.now_s())
            bench.submit(f"later{i}")
            await asyncio.sleep(gap_s)
        assert [s.now_s for s in policy.snapshots] == came_s

    planned(policy, scenario, plan_gap_s=gap_s)


def _raises(snapshot: Snapshot) -> Plan:
    raise ZeroDivisionError("in the policy")


def _sends_too_many(snapshot: Snapshot) -> Plan:
    return Plan(order=snapshot.waiting["handle"], send_now=len(snapshot.waiting) + 1)


def _is_no_plan(snapshot: Snapshot) -> Plan:
    return None  # type: ignore[return-value]


@pytest.mark.parametrize("broken", [_raises, _sends_too_many, _is_no_plan])
def test_where_the_policy_fails_arrival_order_stands_in(
    broken: Callable[[Snapshot], Plan], caplog: pytest.LogCaptureFixture
) -> None:
    policy = WatchedPolicy(answer=broken)

    async def scenario(bench: Bench) -> None:
        bench.submit("a", "b", "c")
        for request_id in ("a", "b", "c"):
            await bench.engine.has(request_id)
            bench.engine.step(request_id)
            await turns()
        assert bench.engine.submitted == ["a", "b", "c"]
        planner = bench.runtime.load().planner
        assert planner.failures == planner.plans == 3

    with caplog.at_level(logging.INFO):
        planned(policy, scenario, batch_size=1)
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1, "told once"
    assert told[0].exc_info is not None


def test_unknown_and_repeated_handles_in_a_plan_are_skipped() -> None:
    def confused(snapshot: Snapshot) -> Plan:
        handles = np.sort(snapshot.waiting["handle"])
        order = np.concatenate([[10**9, -1], handles[::-1], handles])
        return Plan(order=order, send_now=len(order))

    policy = WatchedPolicy(answer=confused)

    async def scenario(bench: Bench) -> None:
        bench.submit("a", "b")
        await bench.engine.has("a", "b")
        await turns()
        assert bench.engine.submitted == ["b", "a"]

    planned(policy, scenario)


def test_the_time_a_plan_took_is_told() -> None:
    policy = WatchedPolicy()

    async def scenario(bench: Bench) -> None:
        assert bench.runtime.load().planner.last_plan_s is None
        bench.executor.holds = True
        plan = policy.answer

        def slow(snapshot: Snapshot) -> Plan:
            bench.clock.advance(0.003)
            return plan(snapshot)

        policy.answer = slow
        bench.submit("a")
        await turns()
        bench.executor.holds = False
        bench.executor.release()
        await bench.engine.has("a")
        policy.answer = plan
        bench.submit("b")
        await bench.engine.has("b")
        planner = bench.runtime.load().planner
        assert planner.plans == 2
        assert planner.last_plan_s == 0.0
        assert planner.mean_plan_s == pytest.approx(0.0015)

    planned(policy, scenario)


def test_a_warm_up_that_fails_fails_the_start() -> None:
    policy = WatchedPolicy()

    def fail() -> None:
        raise ZeroDivisionError("cannot compile")

    policy.warm_up = fail  # type: ignore[method-assign]

    async def main(clock: VirtualClock) -> None:
        bench = Bench(clock, policy)
        with pytest.raises(ZeroDivisionError):
            await bench.runtime.start()
        assert not bench.runtime.serving
        await bench.runtime.close()

    run_virtual(main)


async def test_plans_are_made_off_the_loop_by_default() -> None:
    """The worker thread of a real runtime: the policy does not run in the loop's thread."""
    threads: list[threading.Thread] = []

    def answer(snapshot: Snapshot) -> Plan:
        threads.append(threading.current_thread())
        return WatchedPolicy.arrival_order(snapshot)

    clock = MonotonicClock()
    engine = ScriptedEngine(clock)
    scheduler = Scheduler(limits=EngineLimits(), model=NO_TIME, lengths=TaskLengthPredictor())
    runtime = Runtime(engine, scheduler, WatchedPolicy(answer=answer), clock)
    await runtime.start()
    stream = runtime.submit(make_spec("r", arrival_at_s=clock.now_s()), make_request("r"))
    await engine.has("r")
    engine.emit("r", 65, end=FinishReason.STOP)
    assert (await stream.result()).text == "A"
    await runtime.close()
    assert threads
    assert threading.current_thread() not in threads
