"""Keeps the ranks of requests that wait inside the engine up to date.

An engine with a look-ahead is given more requests than it works on. Each was ranked when it was dispatched; whoever
arrived since, and what time has made of its objectives, may put it before or behind another. The engine is told the
ranks that changed, and those of new dispatches: all are places in one order, so they compare.

An engine without a look-ahead starts what it is given as it is given, and is told nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from lmdeploy_slo.engine.base import Engine
from lmdeploy_slo.scheduling.policy import Policy
from lmdeploy_slo.scheduling.rules import RulePolicy
from lmdeploy_slo.scheduling.scheduler import Scheduler


class StartOrder:
    """A fixed rule orders them as it orders what waits outside; for any other policy the one that must start earliest
    to meet its objectives goes first, those that can no longer meet them last."""

    def __init__(self, engine: Engine, scheduler: Scheduler, policy: Policy, request_id: Callable[[int], str]) -> None:
        """request_id: of the dispatched request with that handle."""
        self._engine = engine
        self._scheduler = scheduler
        self._rule = policy if isinstance(policy, RulePolicy) else RulePolicy("llf", feasible_first=True)
        self._request_id = request_id
        self._told: dict[int, int] = {}

    def renew(self, now_s: float) -> None:
        """Tells the engine what has changed; to be called after dispatches, before the loop turns."""
        if not self._engine.info.look_ahead:
            return
        before, self._told = self._told, self._scheduler.start_ranks(self._rule, now_s)
        changed = {self._request_id(h): rank for h, rank in self._told.items() if before.get(h) != rank}
        if changed:
            self._engine.rerank(changed)
