"""Runs a policy in a worker thread, one plan at a time; never raises for what a policy does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.snapshot import Snapshot
from lmdeploy_slo.scheduling.policy import Policy
from lmdeploy_slo.scheduling.rules import RulePolicy

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlannerStatistics:
    """failures: plans for which the policy raised and arrival order stood in. Durations in seconds, None before the
    first plan; they count the worker thread alone."""

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
        self._clock = clock
        self._fallback = RulePolicy("fcfs")
        self._plans = self._failures = 0
        self._last_plan_s: float | None = None
        self._total_plan_s = 0.0

    async def warm_up(self) -> None:
        """Compiles what the policy needs; raises what that raises."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self.policy.warm_up)

    async def plan(self, snapshot: Snapshot) -> Plan:
        """The policy's plan, or that of arrival order where it raised or answered nonsense."""
        plan, elapsed_s, error = await asyncio.get_running_loop().run_in_executor(self._executor, self._plan, snapshot)
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

    def statistics(self) -> PlannerStatistics:
        mean_s = self._total_plan_s / self._plans if self._plans else None
        return PlannerStatistics(self._plans, self._failures, self._last_plan_s, mean_s)

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
