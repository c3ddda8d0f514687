"""Whether there is an engine, and what becomes of requests while there is none.

Of an engine that nobody replaces it is only known that it is gone: requests go on being tried, and the first it takes
shows that it is back. One under supervision (`engine.supervised`) says so itself. While it is replaced, new requests
are refused, nothing is planned, and those that wait go on waiting, for `hold_s` at most; who was in the engine and has
shown nothing yet waits again, once. Where it will not come back, all end with EngineUnavailable.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from lmdeploy_slo.engine.base import Engine
from lmdeploy_slo.engine.supervised import EngineState, SupervisedEngine
from lmdeploy_slo.errors import EngineUnavailable
from lmdeploy_slo.runtime.plan_loop import PlanLoop
from lmdeploy_slo.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Recovery:
    """On the loop of the runtime that owns it. lost: set once the engine will not come back."""

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        plans: PlanLoop,
        hold_s: float,
        *,
        fail_all: Callable[[EngineUnavailable], None],
        changed: Callable[[], None],
    ) -> None:
        """fail_all: ends every request that waits for this engine. changed: `up` or `lost` is not what it was."""
        self.lost = asyncio.Event()
        self.up = True
        self._engine = engine if isinstance(engine, SupervisedEngine) else None
        self._scheduler = scheduler
        self._plans = plans
        self._hold_s = hold_s
        self._fail_all = fail_all
        self._changed = changed
        self._timer: asyncio.TimerHandle | None = None
        if self._engine is not None:
            self._engine.on_change = self._on_change

    @property
    def returning(self) -> bool:
        """The engine is being replaced: who can start over may wait for it."""
        return self._engine is not None and self._engine.state is EngineState.DOWN

    @property
    def restarts(self) -> int:
        """How often the engine was replaced."""
        return 0 if self._engine is None else self._engine.restarted

    @property
    def closed(self) -> bool:
        """Nothing can be taken now, and it is known."""
        return self._engine is not None and not self.up

    def check(self) -> None:
        """Raises EngineUnavailable where nothing can be taken now."""
        if self._engine is not None and not self.up:
            lost = self._engine.state is EngineState.LOST
            raise EngineUnavailable("the engine is gone" if lost else "the engine is being restarted")

    def seen(self, *, up: bool) -> None:
        """What an engine without supervision was seen to be."""
        if self._engine is None:
            self._set(up)

    def close(self) -> None:
        """Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._engine is not None:
            self._engine.on_change = None

    def _on_change(self, state: EngineState, reason: str) -> None:
        loop = asyncio.get_running_loop()
        if state is EngineState.UP:
            self._stop_holding()
            self._scheduler.on_new_engine()
            self._plans.resume()
        else:
            self._plans.pause()
        if state is EngineState.DOWN:
            self._timer = loop.call_later(self._hold_s, self._on_hold_over)
        elif state is EngineState.LOST:
            self._stop_holding()
            self.lost.set()
            loop.call_soon(self._fail_all, EngineUnavailable("the engine is gone"))
        if state is EngineState.LOST and not self.up:
            self._changed()  # it was down already, and stays so
        self._set(state is EngineState.UP)

    def _on_hold_over(self) -> None:
        self._timer = None
        logger.warning("the engine is not back after %g s: those that wait are not held any longer", self._hold_s)
        self._fail_all(EngineUnavailable("the engine is being restarted"))

    def _stop_holding(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self, up: bool) -> None:
        if up != self.up:
            self.up = up
            self._changed()
