"""When plans are made, and that they are carried out.

Whatever can change a plan marks it stale. A task takes a snapshot, has it planned, applies the plan and starts again
where something happened meanwhile: many events during one plan lead to one more plan. Plans start `gap_s` apart in the
long run, so that a burst of arrivals costs few plans rather than one each; up to `AT_ONCE` of these gaps can be saved
up, so that an arrival now and then is planned when it comes.

Where there is nothing to decide (`Planner.certain`), the request is sent first, and the policy told a moment later.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.snapshot import Snapshot
from lmdeploy_slo.runtime.planner import Planner, PlannerStatistics
from lmdeploy_slo.runtime.start_order import StartOrder
from lmdeploy_slo.scheduling.scheduler import Dispatch, Scheduler

logger = logging.getLogger(__name__)

IDLE_REPLAN_S = 0.05
"""A plan that sends nothing into an idle engine, and names no time to ask again, is asked again after this long."""


AT_ONCE = 4
"""So many plans may follow each other without a gap after a while without any."""

CATCH_UP_S = 0.002
"""So long after a request was sent past the policy it is told: while the engine is busy with the prompt."""


PlanTold: TypeAlias = Callable[[Snapshot, Plan, Sequence[Dispatch], PlannerStatistics, float], None]
"""Told that a plan of this snapshot was applied, who is about to be sent, how the planner does, and the instant."""


class PlanLoop:
    """On the loop of the runtime that owns it."""

    def __init__(
        self,
        scheduler: Scheduler,
        planner: Planner,
        start_order: StartOrder,
        planned: PlanTold,
        clock: Clock,
        gap_s: float,
        *,
        report_progress: Callable[[], None],
        dispatch: Callable[[Dispatch, float], None],
    ) -> None:
        """report_progress: brings the scheduler up to date before a snapshot. dispatch: sends a request, at an instant,
        to the engine; must not raise. planned: is told of each plan before those it lets go are sent. gap_s: >= 0, see
        the module."""
        self._scheduler = scheduler
        self._planner = planner
        self._start_order = start_order
        self._planned = planned
        self._clock = clock
        self._gap_s = gap_s
        self._report_progress = report_progress
        self._dispatch = dispatch
        self._stale = asyncio.Event()  # the last plan is
        self._open = asyncio.Event()  # there is an engine to plan for
        self._open.set()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="planning")

    def mark_stale(self) -> None:
        """Something has happened that a plan should know; cheap."""
        self._stale.set()

    def pause(self) -> None:
        """Plans nothing until `resume`; a plan that is being made is not applied."""
        self._open.clear()

    def resume(self) -> None:
        """Plans at once."""
        self._open.set()
        self._stale.set()

    async def close(self) -> None:
        """No plan is applied any more when it returns. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def _run(self) -> None:
        paid_until_s = -math.inf  # each plan takes a gap of time, and may begin so many gaps ahead of it
        while True:
            await self._stale.wait()
            await self._open.wait()
            wait_s = paid_until_s - (AT_ONCE - 1) * self._gap_s - self._clock.now_s()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            self._stale.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            try:
                if self._scheduler.statistics().waiting:
                    paid_until_s = max(paid_until_s, self._clock.now_s()) + self._gap_s
                    await self._plan_once()
                else:  # the order of those in the engine may still have changed
                    self._start_order.renew(self._clock.now_s())
                    await self._planner.catch_up()
            except Exception:  # a defect here must not stop all planning
                logger.exception("planning failed")
                self._ask_again_after(IDLE_REPLAN_S)

    async def _plan_once(self) -> None:
        self._report_progress()
        snapshot = self._scheduler.snapshot(self._clock.now_s())
        plan = certain = self._planner.certain(snapshot)
        if plan is None:
            plan = await self._planner.plan(snapshot)
            if not self._open.is_set():
                return
        now_s = self._clock.now_s()
        dispatches = self._scheduler.apply(plan, now_s)
        self._planned(snapshot, plan, dispatches, self._planner.statistics(), now_s)
        for dispatch in dispatches:
            self._dispatch(dispatch, now_s)
        if plan.replan_after_s is not None:
            self._ask_again_after(plan.replan_after_s)
        elif not self._scheduler.statistics().running:
            self._ask_again_after(IDLE_REPLAN_S)
        elif certain is not None:
            self._ask_again_after(CATCH_UP_S)
        self._start_order.renew(now_s)

    def _ask_again_after(self, delay_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(max(0.0, delay_s), self._stale.set)
