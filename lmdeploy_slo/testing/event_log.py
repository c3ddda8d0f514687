"""A sink for engines that remembers every event, lets tests wait for one, and knows what must never happen."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.engine.base import EngineEvent
from lmdeploy_slo.errors import EngineError


class EventLog:
    """Pass `log.sink` to `Engine.start`. What breaks the protocol is listed in `violations` as it happens."""

    def __init__(self, patience_s: float | None = 60.0) -> None:
        """patience_s: how long a wait may take before it raises TimeoutError, seconds; None: no bound."""
        self.calls: list[tuple[float, list[EngineEvent]]] = []
        self.violations: list[str] = []
        self._patience_s = patience_s
        self._events: dict[str, list[tuple[float, EngineEvent]]] = {}
        self._ended: set[str] = set()
        self._thread = threading.get_ident()
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    def sink(self, events: Sequence[EngineEvent], at_s: float) -> None:
        """The sink."""
        if threading.get_ident() != self._thread:
            self.violations.append("the sink was called on another thread than the loop's")
        if self.calls and at_s < self.calls[-1][0]:
            self.violations.append(f"an instant went back from {self.calls[-1][0]} to {at_s}")
        self.calls.append((at_s, list(events)))
        for event in events:
            if event.request_id in self._ended:
                self.violations.append(f"{event.request_id} got an event after its end: {event}")
            if event.end is not None and event.error is not None:
                self.violations.append(f"{event.request_id} ended in two ways: {event}")
            if event.end is not None or event.error is not None:
                self._ended.add(event.request_id)
            self._events.setdefault(event.request_id, []).append((at_s, event))
        for condition, future in self._waiters:
            if not future.done() and condition():
                future.set_result(None)

    # -- what happened --------------------------------------------------------

    def request_ids(self) -> set[str]:
        return set(self._events)

    def events(self, request_id: str) -> list[EngineEvent]:
        return [event for _, event in self._events.get(request_id, [])]

    def token_ids(self, request_id: str) -> list[int]:
        return [token_id for event in self.events(request_id) for token_id in event.token_ids]

    def text(self, request_id: str) -> str:
        return "".join(event.text for event in self.events(request_id))

    def token_times_s(self, request_id: str) -> list[float]:
        """The instant of each token."""
        return [at_s for at_s, event in self._events.get(request_id, []) for _ in event.token_ids]

    def has_ended(self, request_id: str) -> bool:
        return request_id in self._ended

    def end(self, request_id: str) -> FinishReason | None:
        """How it ended; None where it failed or has not ended."""
        events = self.events(request_id)
        return events[-1].end if events else None

    def error(self, request_id: str) -> EngineError | None:
        """What it failed with; None where it did not fail."""
        events = self.events(request_id)
        return events[-1].error if events else None

    def forget(self, request_id: str) -> None:
        """Its id is going to be used again."""
        self._ended.discard(request_id)
        self._events.pop(request_id, None)

    # -- waiting --------------------------------------------------------------

    async def ended(self, *request_ids: str) -> None:
        """Waits until all these have ended."""
        await self.until(lambda: self._ended.issuperset(request_ids))

    async def tokens(self, request_id: str, count: int) -> None:
        """Waits until a request has `count` tokens or has ended."""
        await self.until(lambda: self.has_ended(request_id) or len(self.token_ids(request_id)) >= count)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition that only events can make true."""
        if condition():
            return
        waiter = (condition, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            await asyncio.wait_for(waiter[1], self._patience_s)
        finally:
            self._waiters.remove(waiter)
