"""Engines come and go while requests are served: as many as an operator, or the rule of `runtime.autoscale`, wants.

A new engine takes requests when it is up. Of those that go, the ones added last go first: who waits there moves at
once, what runs there may end for `grace_s` seconds and then goes on elsewhere. A new number holds from the moment it is
said: engines that are still starting, and are not wanted any more, are stopped. One that was given up, or is asked to
go by name, is replaced.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import TypeAlias

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.engine.base import Engine
from lmdeploy_slo.errors import FieldViolation, InvalidRequest
from lmdeploy_slo.runtime.autoscale import AutoscaleRule
from lmdeploy_slo.runtime.replica import Replica
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.scheduling.policy import Policy
from lmdeploy_slo.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)

MOST = 1024
LOOK_S = 1.0
"""Between two looks of the rule."""

RETRY_S = 30.0
"""After an engine did not start, until another one is tried."""

Parts: TypeAlias = tuple[Engine, Scheduler, Policy]


class Scaling:
    """On the loop of `runtime`, which it does not own. wanted: how many engines there shall be."""

    def __init__(
        self,
        runtime: Runtime,
        build: Callable[[], Parts],
        clock: Clock,
        *,
        grace_s: float,
        rule: AutoscaleRule | None = None,
        look_s: float = LOOK_S,
    ) -> None:
        """build: the parts of one more engine, not started. rule: None for the operator alone."""
        self.wanted = len(runtime.replicas)
        self._runtime = runtime
        self._build = build
        self._clock = clock
        self._grace_s = grace_s
        self._rule = rule
        self._look_s = look_s
        self._doomed: set[Replica] = set()  # asked to go, by name
        self._changing: dict[Replica, asyncio.Task[None]] = {}  # those that start or leave
        self._retry_at_s = 0.0
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Of a started runtime."""
        self._watch = asyncio.get_running_loop().create_task(self._run(), name="scaling")

    async def close(self) -> None:
        """Nothing changes any more; engines that were still starting are closed. Idempotent."""
        tasks = [*self._changing.values(), *([self._watch] if self._watch is not None else [])]
        self._watch = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def scale(self, wanted: int, drain: Sequence[str] = ()) -> int:
        """There shall be so many; returns how many take requests now. Where a rule is at work, it goes on from there.

        drain: names of engines that shall go whatever their number. Raises InvalidRequest for less than 1 or more than
        `MOST`, and for names that are unknown; then nothing changes.
        """
        replicas = self._runtime.replicas.values()
        by_name = {replica.name: replica for replica in replicas}
        wrong = []
        if not 1 <= wanted <= MOST:
            wrong.append(FieldViolation("replicas", f"must be from 1 to {MOST}, got {wanted}"))
        if unknown := [name for name in drain if name not in by_name]:
            wrong.append(FieldViolation("drain", f"there is no {unknown[0][:64]!r}, but {', '.join(by_name)}"))
        if wrong:
            raise InvalidRequest(wrong)
        self._want(wanted, "on request")
        self._doomed.update(by_name[name] for name in drain)
        self._retry_at_s = 0.0
        self._reconcile()
        return sum(replica.up and not replica.draining for replica in replicas)

    def _want(self, wanted: int, why: str) -> None:
        if wanted != self.wanted:
            logger.info("%d engines are wanted instead of %d: %s", wanted, self.wanted, why)
            self.wanted = wanted

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._look_s)
            try:
                if self._rule is not None and not self._changing:
                    demand = self._runtime.journal.demand
                    wanted = self._rule.wanted(self.wanted, demand, self._clock.now_s())
                    self._want(wanted, "by what was foretold")
                self._reconcile()
            except Exception:  # what serves goes on serving
                logger.exception("scaling failed")

    def _reconcile(self) -> None:
        replicas = self._runtime.replicas.values()
        self._doomed.intersection_update(replicas)
        self._doomed.update(replica for replica in replicas if replica.recovery.lost.is_set())  # it will not come back
        staying = [replica for replica in replicas if not replica.draining and replica not in self._doomed]
        going = [*self._doomed, *reversed(staying[self.wanted :])]
        for replica in going:
            if not replica.started and replica in self._changing:
                self._changing[replica].cancel()  # it was only starting
            elif not replica.draining and any(other.up for other in staying[: self.wanted]):
                self._begin(replica, self._leave(replica))
        if self._clock.now_s() >= self._retry_at_s:
            for _ in range(self.wanted - len(staying)):
                replica = self._runtime.add(*self._build())
                self._begin(replica, self._join(replica))

    def _begin(self, replica: Replica, change: Coroutine[None, None, None]) -> None:
        earlier = self._changing.get(replica)
        if earlier is not None and not earlier.done():
            change.close()
            return
        task = asyncio.get_running_loop().create_task(change, name=f"scaling-{replica.name}")
        self._changing[replica] = task
        task.add_done_callback(lambda _: self._done(replica))

    def _done(self, replica: Replica) -> None:
        del self._changing[replica]

    async def _join(self, replica: Replica) -> None:
        try:
            await replica.start()
        except BaseException as error:
            self._runtime.discard(replica)
            await replica.close()
            if not isinstance(error, Exception):  # it is not wanted any more
                raise
            logger.error("%s did not start: %s", replica.name, error)
            self._retry_at_s = self._clock.now_s() + RETRY_S
            if self._rule is not None:  # there is no room: it asks again where it still wants more
                self.wanted = max(1, self.wanted - 1)
            return
        self._runtime.changed(replica)
        self._changed()
        logger.info("%s takes requests", replica.name)

    async def _leave(self, replica: Replica) -> None:
        try:
            await self._runtime.remove(replica, self._grace_s)
        except ValueError as error:  # meanwhile it has become the only one
            logger.warning("it stays: %s", error)
        else:
            self._changed()
            logger.info("%s is gone", replica.name)

    def _changed(self) -> None:
        if self._rule is not None:
            self._rule.changed(self._clock.now_s())
