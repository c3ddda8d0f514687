"""Where plans are made, and that the policy sees all of them."""

from __future__ import annotations

import numpy as np
import pytest
from scripted_engine import ManualExecutor

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.snapshot import EngineLimits, Snapshot
from lmdeploy_slo.runtime.planner import FADE, SHORT_S, Planner
from lmdeploy_slo.scheduling.policy import few_at_once, fills_idle_engine, make_policy, policy_names
from lmdeploy_slo.testing.builders import make_snapshot


class TimedPolicy:
    """Newest first; each plan takes `takes_s`."""

    name = "timed"
    wants_ticks = False

    def __init__(self, clock: VirtualClock, *, few: int = 2, fills: bool = False) -> None:
        self.few_at_once, self.fills_idle_engine = few, fills
        self.takes_s = 0.0
        self.seen: list[Snapshot] = []
        self._clock = clock

    def plan(self, snapshot: Snapshot) -> Plan:
        self.seen.append(snapshot)
        self._clock.advance(self.takes_s)
        return Plan(np.sort(snapshot.waiting["handle"])[::-1], send_now=0)

    def warm_up(self) -> None:
        return None


def queue(waiting: int, running: int = 0, **row: float) -> Snapshot:
    return make_snapshot([row] * waiting, [{}] * running)


def story(few: int = 2, *, fills: bool = False) -> tuple[TimedPolicy, ManualExecutor, Planner]:
    clock = VirtualClock()
    policy, executor = TimedPolicy(clock, few=few, fills=fills), ManualExecutor()
    return policy, executor, Planner(policy, executor, clock)


async def test_plans_for_few_are_made_on_the_loop_while_they_are_short() -> None:
    policy, executor, planner = story()
    few, many = queue(2), queue(3)
    await planner.plan(few)
    assert executor.calls == 0
    await planner.plan(many)
    assert executor.calls == 1, "more than a few are planned by the worker"

    policy.takes_s = 2 * SHORT_S
    await planner.plan(many)
    await planner.plan(few)
    assert executor.calls == 2, "how long it took for many says nothing of few"
    policy.takes_s = 0.0
    calls = 0
    while executor.calls - 2 == calls:
        calls += 1
        await planner.plan(few)
    assert 2 * SHORT_S * FADE ** (calls - 1) <= SHORT_S < 2 * SHORT_S * FADE ** (calls - 2)
    assert planner.statistics().plans == len(policy.seen) == 4 + calls


async def test_a_policy_that_says_nothing_of_itself_plans_in_its_thread_alone() -> None:
    _, executor, planner = story(few=0)
    assert planner.certain(queue(1)) is None
    await planner.plan(queue(1))
    assert executor.calls == 1


async def test_where_there_is_nothing_to_decide_the_policy_is_told_afterwards_and_misses_nothing() -> None:
    policy, _, planner = story(fills=True)
    alone, next_alone = queue(1), queue(1)
    for snapshot in (queue(2), queue(1, running=1)):
        assert planner.certain(snapshot) is None
    plan = planner.certain(alone)
    assert plan is not None
    assert (plan.order.tolist(), plan.send_now) == (alone.waiting["handle"].tolist(), 1)
    assert policy.seen == []
    assert planner.certain(next_alone) is None, "the policy has to catch up first"
    await planner.plan(next_alone)
    assert policy.seen == [alone, next_alone]
    assert planner.certain(alone) is not None
    await planner.catch_up()
    await planner.catch_up()
    assert policy.seen == [alone, next_alone, alone]
    assert planner.statistics().plans == 3


@pytest.mark.parametrize("name", [name for name in policy_names() if fills_idle_engine(make_policy(name))])
def test_a_policy_that_says_it_fills_an_idle_engine_does(name: str) -> None:
    for ttft_s in (10.0, 1e-6, np.inf):  # easily met, hopeless, and without an objective
        for limits in (EngineLimits(1), EngineLimits(256, kv_tokens=10)):
            snapshot = make_snapshot([{"ttft_s": ttft_s}], limits=limits)
            assert make_policy(name).plan(snapshot).send_now == 1


def test_the_default_policy_plans_few_at_once_and_fills_an_idle_engine() -> None:
    policy = make_policy(policy_names()[0])
    assert few_at_once(policy) >= 1
    assert fills_idle_engine(policy)
