"""Several engines as one: a scheduler for each, and a placement that says which of them serves a request.

    place -> scheduler.add -> (rebalance)* -> that scheduler's plans

As a scheduler it is synchronous and knows no clock: the runtime drives it in real time, the simulator in virtual time.
A request is bound to an engine when it is dispatched; while it waits, `rebalance` may move it to another.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.errors import EngineUnavailable
from lmdeploy_slo.scheduling.placement import Placement, Proposal, Replica
from lmdeploy_slo.scheduling.policy import Policy
from lmdeploy_slo.scheduling.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Move:
    """A waiting request that was with the scheduler of replica `source` and is with that of `target` now."""

    handle: int
    source: int
    target: int


class Fleet:
    """Not thread-safe: all calls, and those of its schedulers, from one thread.

    numbers: where the schedulers of a fleet take their handles from (`Scheduler(numbers=...)`), so that a handle stands
    for one request wherever it is.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.numbers: Iterator[int] = itertools.count(1)
        self._replicas: dict[int, Replica] = {}
        self._next_replica = 0

    def add(self, scheduler: Scheduler, policy: Policy | None = None) -> int:
        """One more replica, open; returns its number, which is never used again. policy: what plans for it."""
        number = self._next_replica
        self._next_replica += 1
        self._replicas[number] = Replica(number, scheduler, policy)
        return number

    def remove(self, replica: int) -> None:
        """Forgets a replica; raises ValueError where requests are left there, KeyError for an unknown one."""
        held = self._replicas[replica].scheduler.held
        if held:
            raise ValueError(f"replica {replica} still holds {held} requests")
        self.placement.removed(self._replicas.pop(replica))

    def open(self, replica: int) -> None:
        """New requests may be placed there."""
        self._replicas[replica].open = True

    def close(self, replica: int) -> None:
        """It is draining or down: nothing is placed there, and what waits there leaves with the next `rebalance`, as
        soon as another replica is open."""
        self._replicas[replica].open = False

    def is_open(self, replica: int) -> bool:
        return self._replicas[replica].open

    def replicas(self) -> list[int]:
        """The numbers of all replicas, in the order in which they were added."""
        return list(self._replicas)

    def scheduler(self, replica: int) -> Scheduler:
        return self._replicas[replica].scheduler

    def place(self, spec: RequestSpec, now_s: float) -> int:
        """The replica to whose scheduler this new request should be added. Raises EngineUnavailable where none is open.

        One whose queue is full, or whose KV cache could not hold the prompt, is chosen only where all are like that.
        """
        return self._choose(spec, now_s, bounded=True).number

    def warm_up(self) -> None:
        """Compiles what placing needs (or loads it from the cache), so that the first request is placed as fast as the
        next; may be called in another thread."""
        self.placement.warm_up()

    def note_plan(self, replica: int, plan: Plan, now_s: float) -> None:
        """A plan was applied there."""
        self.placement.planned(self._replicas[replica], plan, now_s)

    def rebalance(self, now_s: float) -> list[Move]:
        """Moves waiting requests to where they do better, and away from closed replicas; says who was moved.

        Call it after requests have come and plans were applied, as often as is convenient.
        """
        moved: dict[int, Move] = {}
        open_replicas = [replica for replica in self._replicas.values() if replica.open]
        if open_replicas:
            for replica in self._replicas.values():
                if not replica.open and replica.scheduler.waiting:
                    for handle in replica.scheduler.waiting_order().tolist():
                        spec = replica.scheduler.spec(handle)
                        target = self._choose(spec, now_s, bounded=False)
                        self._move(Proposal(handle, replica, target), moved)
        if len(open_replicas) > 1:
            for proposal in self.placement.moves(open_replicas, now_s):
                self._move(proposal, moved)
        return list(moved.values())

    def _choose(self, spec: RequestSpec, now_s: float, *, bounded: bool) -> Replica:
        candidates = [replica for replica in self._replicas.values() if replica.open]
        if not candidates:
            raise EngineUnavailable("no replica is open")
        fitting = [replica for replica in candidates if replica.could_hold(spec)] or candidates
        if bounded:
            fitting = [replica for replica in fitting if not replica.scheduler.full] or fitting
        return fitting[0] if len(fitting) == 1 else self.placement.choose(spec, fitting, now_s)

    def _move(self, proposal: Proposal, moved: dict[int, Move]) -> None:
        handle, source, target = proposal
        target.scheduler.take_in(handle, source.scheduler.take_out(handle))
        earlier = moved.get(handle)
        moved[handle] = Move(handle, source.number if earlier is None else earlier.source, target.number)
