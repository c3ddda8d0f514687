"""The engines of a runtime: which there are, where a request goes, and who moves while it waits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.runtime.journal import Journal
from lmdeploy_slo.runtime.live import Live
from lmdeploy_slo.runtime.planner import PlannerStatistics
from lmdeploy_slo.runtime.replica import Replica
from lmdeploy_slo.scheduling.fleet import Fleet

logger = logging.getLogger(__name__)


class EnginePool:
    """On the loop of the runtime that owns it. replicas: by number, at least one once the runtime is made."""

    def __init__(self, fleet: Fleet, clock: Clock, journal: Journal, by_handle: Mapping[int, Live]) -> None:
        self.fleet = fleet
        self.replicas: dict[int, Replica] = {}
        self._clock = clock
        self._journal = journal
        self._by_handle = by_handle
        self._past_planners, self._past_restarts = PlannerStatistics(0, 0, None, None), 0  # of engines that are no more

    @property
    def first(self) -> Replica:
        """The one that has been here longest."""
        return next(iter(self.replicas.values()))

    @property
    def any_open(self) -> bool:
        """Whether there is one that takes requests."""
        return any(self.fleet.is_open(number) for number in self.replicas)

    def others_open(self, replica: Replica) -> bool:
        """Whether another one takes requests."""
        return any(number != replica.number and self.fleet.is_open(number) for number in self.replicas)

    def add(self, replica: Replica) -> None:
        """Its number is the fleet's; it is closed at first."""
        self.fleet.close(replica.number)
        if self.replicas:  # what is learnt of how forecasts turn out holds for all
            replica.expectation.forecaster = self.first.expectation.forecaster
        self._journal.join(replica.number, replica.scheduler)
        self.replicas[replica.number] = replica

    def remove(self, replica: Replica) -> None:
        """It holds nothing any more, else ValueError."""
        self.fleet.remove(replica.number)
        del self.replicas[replica.number]
        self._journal.leave(replica.number)
        planners = PlannerStatistics.together([self._past_planners, replica.planner.statistics()])
        self._past_planners = dataclasses.replace(planners, last_plan_s=None)
        self._past_restarts += replica.recovery.restarts

    def planners(self) -> PlannerStatistics:
        """Of all engines since the start, also of those that are no more."""
        now = (replica.planner.statistics() for replica in self.replicas.values())
        return PlannerStatistics.together([self._past_planners, *now])

    @property
    def restarts(self) -> int:
        """How often an engine was replaced, likewise."""
        return self._past_restarts + sum(replica.recovery.restarts for replica in self.replicas.values())

    def oldest_arrival_s(self) -> float | None:
        """When the request that has waited longest arrived; None where none waits."""
        arrivals_s = [replica.scheduler.oldest_arrival_s() for replica in self.replicas.values()]
        return min((at_s for at_s in arrivals_s if at_s is not None), default=None)

    def place(self, spec: RequestSpec) -> Replica:
        """Where a new request would go. Raises EngineUnavailable where there are several and none is open."""
        if len(self.replicas) == 1:
            return self.first
        return self.replicas[self.fleet.place(spec, self._clock.now_s())]

    def rebalance(self) -> None:
        """Those that wait go to where they do better, and away from engines that take none."""
        if len(self.replicas) == 1:
            return
        try:
            moves = self.fleet.rebalance(self._clock.now_s())
        except Exception:  # they wait where they are
            logger.exception("waiting requests could not be moved between engines")
            return
        for move in moves:
            live = self._by_handle[move.handle]
            live.replica = self.replicas[move.target]
            self._journal.moved(live, move.source)
            live.replica.plans.mark_stale()
