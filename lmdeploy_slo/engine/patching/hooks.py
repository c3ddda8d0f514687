"""What the lines inserted into LMDeploy call: the line in which its requests wait for a handle.

LMDeploy gives each request one of `max_batch_size` handles. Here waiting requests are ranked by (priority, rank,
arrival) and served in that order when a handle comes back; both may change while a request waits. A waiting request
can be aborted: it goes on with a handle that only says "cancelled", so that LMDeploy ends it the way it ends any
aborted request. All of it runs on LMDeploy's one event loop.

    priority  GenerationConfig.priority: 0..255, 0 first
    rank      the scheduler's place of the request, any integer, smaller first; set with `set_rank`
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from typing import Any

_STALE_ENTRIES = 64
"""How many outdated heap entries are kept, beyond one per waiting request, before the heap is rebuilt."""


class CancelledHandle:
    """Stands for a handle where a request was aborted before it got one."""

    async def async_stream_infer(self, session_id: int, **kwargs: Any) -> AsyncIterator[Any]:
        from lmdeploy.messages import EngineOutput, ResponseType

        yield EngineOutput(ResponseType.CANCEL, [])

    async def async_cancel(self, session_id: int | None = None) -> None:
        return None


CANCELLED_HANDLE = CancelledHandle()


class WaitingLine:
    """Requests waiting for a handle of one pool. Its heap is bounded by twice their number."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], Place]] = []  # some entries are stale
        self._numbers = itertools.count()
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def join(self, place: Place) -> None:
        place.number = next(self._numbers)
        place.waits = True
        self._waiting += 1
        heapq.heappush(self._heap, (place.key, place))

    def leave(self, place: Place) -> None:
        place.waits = False
        self._waiting -= 1

    def moved(self, place: Place) -> None:
        """`place.key` has changed."""
        heapq.heappush(self._heap, (place.key, place))
        if len(self._heap) > 2 * self._waiting + _STALE_ENTRIES:
            live = {entry[1].number: entry for entry in self._heap if _is_live(entry)}
            self._heap = sorted(live.values(), key=lambda entry: entry[0])

    def take_first(self) -> Place | None:
        """The place to be served next, which leaves the line; None where nobody waits."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            if _is_live(entry):
                self.leave(entry[1])
                return entry[1]
        return None


def _is_live(entry: tuple[tuple[int, int, int], Place]) -> bool:
    key, place = entry
    return place.waits and place.key == key


class Place:
    """One request's place in the line; has the `get` and `put` that LMDeploy calls on the pool."""

    def __init__(self, session: Any, pool: Any, line: WaitingLine) -> None:
        self._session = session
        self._pool = pool
        self._line = line
        self._wake: asyncio.Future[None] | None = None
        self._handle: Any = None
        self.priority = _priority_of(session)
        self.rank: int = getattr(session, "slo_rank", 0)
        self.number = -1
        self.waits = False

    def __lt__(self, other: Place) -> bool:
        return self.number < other.number

    @property
    def key(self) -> tuple[int, int, int]:
        return (self.priority, self.rank, self.number)

    async def get(self) -> Any:
        """A handle, in its turn; CANCELLED_HANDLE where the request was aborted first.

        Raises LMDeploy's RequestError where another request of the same session waits already.
        """
        if getattr(self._session, "slo_place", None) is not None:
            _count_failed(self._session, "error")
            raise _conflict(self._session)
        if self._pool.pool is None or not self._pool.pool.empty():
            return await self._pool.get()  # does not suspend; nobody waits while a handle is free
        self._wake = asyncio.get_running_loop().create_future()
        self._session.slo_place = self
        self._line.join(self)
        try:
            await self._wake
        except BaseException as error:
            self._withdraw(isinstance(error, asyncio.CancelledError))
            raise
        finally:
            self._session.slo_place = None
        return self._handle

    def put(self, handle: Any) -> None:
        """Gives a handle to the first in line, or back to the pool where nobody waits."""
        if handle is CANCELLED_HANDLE or handle is None:
            return
        first = self._line.take_first()
        if first is None:
            self._pool.put(handle)
        else:
            first.serve(handle)

    def serve(self, handle: Any) -> None:
        """Lets a request that has left the line go on with `handle`."""
        self._handle = handle
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def rerank(self, rank: int) -> None:
        if rank != self.rank:
            self.rank = rank
            if self.waits:
                self._line.moved(self)

    def abort(self) -> None:
        """Ends the wait; a handle that was given but not yet taken goes to the next."""
        if self.waits:
            self._line.leave(self)
            self.serve(CANCELLED_HANDLE)
        elif self._handle is not None and self._handle is not CANCELLED_HANDLE:
            handle, self._handle = self._handle, CANCELLED_HANDLE
            self.put(handle)

    def _withdraw(self, cancelled: bool) -> None:
        """The task that waited is gone: give back what it was given, and leave nothing of the request behind."""
        if self.waits:
            self._line.leave(self)
        elif self._handle is not None:
            self.put(self._handle)
        _forget(self._session, "cancel" if cancelled else "error")


def place_in_line(session: Any, pool: Any) -> Place:
    """What a session gets and puts its handle through, in place of the pool.

    Raises LMDeploy's RequestError where the priority is out of range (it can be set after it was checked).
    """
    try:
        return Place(session, pool, line_of(pool))
    except Exception:
        _forget(session, "error")
        raise


def line_of(pool: Any) -> WaitingLine:
    """The waiting line of a pool."""
    line: WaitingLine | None = getattr(pool, "slo_line", None)
    if line is None:
        line = pool.slo_line = WaitingLine()
    return line


def set_rank(session: Any, rank: int) -> None:
    """Gives a session's request its place among those of equal priority, before or while it waits."""
    session.slo_rank = rank
    place: Place | None = getattr(session, "slo_place", None)
    if place is not None:
        place.rerank(rank)


def abort_waiting(session: Any) -> None:
    """Ends a session's request where it waits, for a handle or, by `session.slo_abort`, with a scheduler before that;
    does nothing elsewhere."""
    abort = getattr(session, "slo_abort", None)
    if abort is not None:
        abort()
    place: Place | None = getattr(session, "slo_place", None)
    if place is not None:
        place.abort()


def _forget(session: Any, how: str) -> None:
    """What LMDeploy does when a request with a handle ends, for one that never got one."""
    _count_failed(session, how)
    if session._remove_on_request_exit:
        session._remove_on_request_exit = False
        manager = session._session_mgr and session._session_mgr()
        if manager is not None:
            manager.remove(session)


def _count_failed(session: Any, how: str) -> None:
    """Only requests that `generate` has counted as begun are counted as ended."""
    from lmdeploy.metrics.metrics_processor import metrics_processor

    if session._remove_on_request_exit:
        metrics_processor.increase_failed_requests(how)


def _priority_of(session: Any) -> int:
    from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

    priority = getattr(session.gen_config, "priority", 0)
    if type(priority) is not int or not 0 <= priority <= 255:
        message = f"priority must be an integer from 0 (served first) to 255, but got {priority!r}"
        raise RequestError(ErrorCode.INVALID_REQUEST, message)
    return priority


def _conflict(session: Any) -> Exception:
    from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

    message = f"session {session.session_id} has another request that waits; use one session per request"
    error: Exception = RequestError(ErrorCode.REQUEST_CONFLICT, message)
    return error
