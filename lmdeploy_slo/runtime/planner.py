"""Runs a policy, one plan at a time; never raises for what a policy does.

A plan is made in a worker thread, so that a long search holds up no stream. To go there and back costs as much as a
plan for a request or two: of a policy that says so (`few_at_once`) these are made on the loop, while such plans have
been short of late.

A request that comes when the engine has nothing to do waits for no plan, where the policy would certainly send it
(`fills_idle_engine`): the policy, which may learn from all it is shown, is shown it later.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.snapshot import Snapshot
from lmdeploy_slo.scheduling.policy import Policy, few_at_once, fills_idle_engine
from lmdeploy_slo.scheduling.rules import RulePolicy

logger = logging.getLogger(__name__)

SHORT_S = 0.001
"""The loop may be held up by a plan for so long: a fifth of the shortest step of an engine."""

FADE = 0.8
"""What the longest small plan of late still counts, one such plan later."""


@dataclass(frozen=True, slots=True)
class PlannerStatistics:
    """failures: plans for which the policy raised and arrival order stood in. Durations in seconds, None before the
    first plan; they count the policy alone."""

    plans: int
    failures: int
    last_plan_s: float | None
    mean_plan_s: float | None

    @classmethod
    def together(cls, each: Sequence[PlannerStatistics]) -> PlannerStatistics:
        """Of several planners; the last plan is the longest of theirs."""
        plans = sum(one.plans for one in each)
        lasts_s = [one.last_plan_s for one in each if one.last_plan_s is not None]
        total_s = sum((one.mean_plan_s or 0.0) * one.plans for one in each)
        failures = sum(one.failures for one in each)
        return cls(plans, failures, max(lasts_s, default=None), total_s / plans if plans else None)


class Planner:
    """`executor` must run one call at a time, as `Policy.plan` asks."""

    def __init__(self, policy: Policy, executor: Executor, clock: Clock) -> None:
        self.policy = policy
        self._executor = executor
        self._few = few_at_once(policy)
        self._fills_idle_engine = fills_idle_engine(policy)
        self._unshown: Snapshot | None = None  # for which a plan was certain
        self._clock = clock
        self._fallback = RulePolicy("fcfs")
        self._plans = self._failures = 0
        self._last_plan_s: float | None = None
        self._total_plan_s = 0.0
        self._small_plan_s = 0.0  # the longest of late, fading

    async def warm_up(self) -> None:
        """Compiles what the policy needs; raises what that raises."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self.policy.warm_up)

    def certain(self, snapshot: Snapshot) -> Plan | None:
        """The plan for a single request and an idle engine, made without the policy; None where there is something to
        decide. `catch_up` is to be called some time later."""
        alone = len(snapshot.waiting) == 1 and not len(snapshot.running)
        if not alone or not self._fills_idle_engine or self._unshown is not None:
            return None
        self._unshown = snapshot
        return Plan(order=snapshot.waiting["handle"].copy(), send_now=1)

    async def catch_up(self) -> None:
        """Shows the policy what was planned without it."""
        unshown, self._unshown = self._unshown, None
        if unshown is not None:
            await self._plan_of(unshown)

    async def plan(self, snapshot: Snapshot) -> Plan:
        """The policy's plan, or that of arrival order where it raised or answered nonsense."""
        await self.catch_up()
        return await self._plan_of(snapshot)

    def statistics(self) -> PlannerStatistics:
        mean_s = self._total_plan_s / self._plans if self._plans else None
        return PlannerStatistics(self._plans, self._failures, self._last_plan_s, mean_s)

    async def _plan_of(self, snapshot: Snapshot) -> Plan:
        small = len(snapshot.waiting) <= self._few
        if small and self._small_plan_s <= SHORT_S:
            plan, elapsed_s, error = self._plan(snapshot)
        else:
            loop = asyncio.get_running_loop()
            plan, elapsed_s, error = await loop.run_in_executor(self._executor, self._plan, snapshot)
        if small:
            self._small_plan_s = max(elapsed_s, FADE * self._small_plan_s)
        self._plans += 1
        self._last_plan_s = elapsed_s
        self._total_plan_s += elapsed_s
        if error is not None:
            self._failures += 1
            told = "; later failures are only counted" if self._failures == 1 else ""
            logger.log(
                logging.ERROR if self._failures == 1 else logging.DEBUG,
                "policy %s failed, arrival order stands in%s",
                self.policy.name,
                told,
                exc_info=error,
            )
        return plan

    def _plan(self, snapshot: Snapshot) -> tuple[Plan, float, Exception | None]:
        begun_at_s = self._clock.now_s()
        error: Exception | None = None
        try:
            plan = self.policy.plan(snapshot)
            if not 0 <= plan.send_now <= len(plan.order):
                raise ValueError(f"send_now is {plan.send_now} for an order of {len(plan.order)}")
        except Exception as failure:  # whatever it is, the requests must not wait for a bug fix
            error = failure
            plan = self._fallback.plan(snapshot)
        return plan, self._clock.now_s() - begun_at_s, error
