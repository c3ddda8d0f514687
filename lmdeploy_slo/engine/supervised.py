"""Watches an engine and replaces it when it is gone: an engine itself, so that whoever drives it never changes hands.

    UP -> the engine says it is gone, or makes no progress -> DOWN -> closed, wait, built anew -> UP
                                                                  `-> too often in a row -> LOST

Progress is an event of the engine, or a step more in its `load`. An engine that has work and makes none for
`stall_timeout_s` is gone; one without work is only asked whether it is. It is noticed within `stall_timeout_s` and two
looks. Time in which this process did not run itself (it was stopped, the machine slept, its loop was blocked) counts as
one look at most, so a jump of the clock is no stall.

What is in flight when an engine goes ends with EngineUnavailable, once; what the old engine still says is not heard.
Closing it and starting the next are bounded in time: threads that hang in foreign code are left behind, and then only
the end of the process frees what they hold (`left_behind`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.engine.base import Engine, EngineEvent, EngineInfo, EngineLoad, EngineRequest, EventSink
from lmdeploy_slo.errors import ConfigError, EngineUnavailable

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0
START_TIMEOUT_S = 1800.0
"""Loading a large model from a slow disk takes long; a start that hangs must end all the same."""


class EngineState(Enum):
    """DOWN: being replaced. LOST: it will not come back in this process."""

    UP = "up"
    DOWN = "down"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Supervision:
    """stall_timeout_s: > 0. restarts: attempts in a row, >= 0; forgotten once the engine was up for `settled_s`.
    backoff_s: before the first attempt, doubled for each further one up to `longest_backoff_s`. check_s: between looks;
    no longer than a quarter of stall_timeout_s."""

    stall_timeout_s: float = 120.0
    restarts: int = 3
    backoff_s: float = 1.0
    longest_backoff_s: float = 30.0
    settled_s: float = 300.0
    check_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("stall_timeout_s", "backoff_s", "longest_backoff_s", "settled_s", "check_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.restarts < 0:
            raise ValueError(f"restarts must not be negative, got {self.restarts}")

    @property
    def look_s(self) -> float:
        return min(self.check_s, self.stall_timeout_s / 4)


class SupervisedEngine:
    """See the module, and `engine.base.Engine` for the protocol.

    on_change: called with the new state and why, before the requests that were in flight are told. failures: attempts
    in a row by now; restarted: how often the engine came back.
    """

    def __init__(self, build: Callable[[], Engine], clock: Clock, options: Supervision | None = None) -> None:
        """build: a new engine, not started; called at once for the first. Raises what it raises."""
        self.options = options or Supervision()
        self.on_change: Callable[[EngineState, str], None] | None = None
        self.state = EngineState.UP
        self.reason = ""
        self.failures = self.restarted = 0
        self.left_behind = False
        self._build = build
        self._clock = clock
        self.inner = build()  # the engine of now; while down, the last one
        self._generation = 0
        self._in_flight: dict[str, None] = {}  # in the order of their submits
        self._sink: EventSink | None = None
        self._watch: asyncio.Task[None] | None = None
        self._replacing: asyncio.Task[None] | None = None
        self._quiet_s = 0.0  # for so long it has had work and made no progress
        self._steps: int | None = None
        self._up_at_s = 0.0

    # -- what callers may ask -------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        return self.inner.info

    @property
    def tokenizer(self) -> Any:
        """Also while the engine is down: that of the last one."""
        return self.inner.tokenizer

    def load(self) -> EngineLoad:
        if self.state is not EngineState.UP:
            return EngineLoad(in_flight=0, active=0, kv_tokens_used=None, kv_usage=None, gone=self.reason)
        return self.inner.load()

    def unsupported_fields(self, request: EngineRequest) -> Sequence[tuple[str, str]]:
        return self.inner.unsupported_fields(request)

    # -- life -----------------------------------------------------------------

    async def start(self, sink: EventSink) -> None:
        """Raises EngineUnavailable, or what the engine raises, where the first one does not start: that is nothing to
        try again."""
        self._sink = sink
        await self.inner.start(partial(self._on_events, self._generation))
        self._up_at_s = self._clock.now_s()
        self._watch = asyncio.get_running_loop().create_task(self._run(), name="engine-watch")

    async def close(self) -> None:
        self.state, self.reason = EngineState.LOST, self.reason or "the engine was closed"
        tasks = [task for task in (self._watch, self._replacing) if task is not None]
        self._watch = self._replacing = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._close_inner()

    # -- requests -------------------------------------------------------------

    def submit(self, request: EngineRequest, rank: int) -> None:
        if self.state is not EngineState.UP:
            raise EngineUnavailable(self.reason)
        try:
            self.inner.submit(request, rank)
        except EngineUnavailable as error:
            self._fell(str(error))
            raise
        if not self._in_flight:
            self._quiet_s = 0.0
        self._in_flight[request.request_id] = None

    def rerank(self, ranks: Mapping[str, int]) -> None:
        if self.state is EngineState.UP:
            self.inner.rerank(ranks)

    def abort(self, request_id: str) -> None:
        if self.state is EngineState.UP:
            self.inner.abort(request_id)

    def _on_events(self, generation: int, events: Sequence[EngineEvent], at_s: float) -> None:
        """The sink of one engine."""
        if generation != self._generation:
            return
        self._quiet_s, gone = 0.0, None
        in_flight = self._in_flight
        for event in events:
            if event.end is not None or event.error is not None:
                in_flight.pop(event.request_id, None)
                if isinstance(event.error, EngineUnavailable):
                    gone = str(event.error)
        assert self._sink is not None
        if gone is not None:
            self._fell(gone)
        self._sink(events, at_s)

    # -- watching -------------------------------------------------------------

    async def _run(self) -> None:
        looked_at_s, look_s = self._clock.now_s(), self.options.look_s
        while True:
            await asyncio.sleep(look_s)
            now_s = self._clock.now_s()
            passed_s, looked_at_s = min(now_s - looked_at_s, 2 * look_s), now_s
            if self.state is EngineState.UP:
                self._look(passed_s, now_s)

    def _look(self, passed_s: float, now_s: float) -> None:
        try:
            load = self.inner.load()
        except Exception as error:  # an engine that cannot be asked is gone, whatever it is
            logger.exception("the engine cannot tell what it does")
            self._fell(f"the engine does not answer ({type(error).__name__})")
            return
        if load.gone is not None:
            self._fell(load.gone)
            return
        if load.steps != self._steps or not self._in_flight:
            self._steps, self._quiet_s = load.steps, 0.0
        else:
            self._quiet_s += passed_s
            if self._quiet_s >= self.options.stall_timeout_s:
                self._fell(f"the engine made no progress for {self._quiet_s:.3g} s")
        if self.failures and self.state is EngineState.UP and now_s - self._up_at_s >= self.options.settled_s:
            self.failures = 0

    def _fell(self, reason: str) -> None:
        """It is gone. Requests are told on the next turn: this may be called from within their submit."""
        if self.state is not EngineState.UP:
            return
        self._generation += 1
        left, self._in_flight = list(self._in_flight), {}
        lost = self.options.restarts == self.failures
        logger.error("the engine is gone: %s; %d requests were in flight", reason, len(left))
        self._change(EngineState.LOST if lost else EngineState.DOWN, reason)
        loop = asyncio.get_running_loop()
        loop.call_soon(self._tell_gone, left, reason)
        if not lost:
            self._replacing = loop.create_task(self._replace(), name="engine-restart")

    def _tell_gone(self, request_ids: Sequence[str], reason: str) -> None:
        assert self._sink is not None
        if request_ids:
            events = [EngineEvent(request_id, error=EngineUnavailable(reason)) for request_id in request_ids]
            self._sink(events, self._clock.now_s())

    def _change(self, state: EngineState, reason: str) -> None:
        self.state, self.reason = state, reason
        if self.on_change is not None:
            self.on_change(state, reason)

    # -- replacing ------------------------------------------------------------

    async def _replace(self) -> None:
        options = self.options
        await self._close_inner()
        while self.failures < options.restarts:
            wait_s = min(options.backoff_s * 2**self.failures, options.longest_backoff_s)
            self.failures += 1
            logger.warning("the engine is started again in %g s (%d of %d)", wait_s, self.failures, options.restarts)
            await asyncio.sleep(wait_s)
            if await self._start_anew():
                self.restarted += 1
                self._up_at_s, self._quiet_s, self._steps = self._clock.now_s(), 0.0, None
                logger.warning("the engine is back")
                self._change(EngineState.UP, "")
                return
        logger.critical("the engine did not come back: %s", self.reason)
        self._change(EngineState.LOST, self.reason)

    async def _start_anew(self) -> bool:
        engine: Engine | None = None
        try:
            engine = self._build()
            await asyncio.wait_for(engine.start(partial(self._on_events, self._generation)), START_TIMEOUT_S)
        except asyncio.TimeoutError:
            logger.error("the engine did not start within %g s", START_TIMEOUT_S)
            self.left_behind = True
        except (EngineUnavailable, ConfigError) as error:
            logger.error("the engine did not start: %s", error)
        except Exception:  # loading a model can fail in any way
            logger.exception("the engine did not start")
        else:
            self.inner = engine
            return True
        return False

    async def _close_inner(self) -> None:
        try:
            await asyncio.wait_for(self.inner.close(), CLOSE_TIMEOUT_S)
        except asyncio.TimeoutError:
            logger.error("the engine did not close within %g s", CLOSE_TIMEOUT_S)
            self.left_behind = True
        except Exception:
            logger.exception("the engine could not be closed")
