"""An engine that lives in another process, for the runtime an engine like every other.

    submit, abort, rerank -> one message a turn of the loop -> Link -> EngineHost -> the engine
    sink <- events, step by step <- reports <- asked for again and again <-'

Nothing here waits for the other end: `submit` and the like put down what is to be sent. An aborted request ends at
once; what still comes of it is not heard. Reports are asked for one at a time, so a loop that is busy gets fewer and
larger ones, and the host merges what it cannot hold (`remote_reports.Outbox`). Likewise commands: while `WINDOW`
messages are not acknowledged, further ones become one.

Gone. A link that is lost is noticed at once; a host that falls silent, though it has nothing to do, after `silence_s`,
counted in heartbeats that did not come, so that time in which this process did not run is not held against it. Then
everything in flight ends with EngineUnavailable. It is not brought back: `engine.supervised` builds another.

Instants are the host's, moved to this clock (`remote_reports.ClockOffset`), never after their receipt, and never going
back; where the host merged steps, those of the last.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.engine.base import (
    Engine,
    EngineEvent,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    EventSink,
    Tokenizer,
)
from lmdeploy_slo.engine.remote_host import HEARTBEAT_S
from lmdeploy_slo.engine.remote_reports import ClockOffset, Commands, Report, engine_event
from lmdeploy_slo.errors import EngineUnavailable, FieldViolation, InvalidRequest, RequestIdInUse

logger = logging.getLogger(__name__)

WINDOW = 16
"""Messages on their way to the host, at most."""


class LinkLost(Exception):
    """The host cannot be reached any more; the text says why."""


class Link(Protocol):
    """The way to one `EngineHost`, and its life. Used once: opened, closed."""

    @property
    def name(self) -> str:
        """Of the replica, for logs."""
        ...

    async def open(self) -> EngineInfo:
        """Has the host and its engine started. Raises EngineUnavailable or ConfigError where they are not."""
        ...

    def send(self, data: bytes) -> None:
        """To `EngineHost.command`; never blocks. What is lost shows in `next_report`."""
        ...

    async def next_report(self) -> bytes:
        """`EngineHost.next_report`; raises LinkLost."""
        ...

    async def close(self) -> None:
        """Ends the host with all it holds, whatever it is doing. Idempotent."""
        ...


class Face(Protocol):
    """What is known of an engine where it does not run."""

    @property
    def info(self) -> EngineInfo:
        """What is known before the engine was started."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises EngineUnavailable before `load`."""
        ...

    def load(self) -> None:
        """Reads what is needed, which may take seconds; called in a thread, perhaps again."""
        ...

    def unsupported_fields(self, request: EngineRequest, info: EngineInfo) -> Sequence[tuple[str, str]]:
        """(field path, reason) for everything the engine would refuse. info: the engine's own, once it is known."""
        ...


class EngineFace:
    """That of an engine which says all without being started."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    def load(self) -> None:
        """There is nothing to read."""

    def unsupported_fields(self, request: EngineRequest, info: EngineInfo) -> Sequence[tuple[str, str]]:
        return self._engine.unsupported_fields(request)


class RemoteEngine:
    """See the module, and `engine.base.Engine` for the protocol. silence_s: > 0."""

    def __init__(self, link: Link, face: Face, clock: Clock, silence_s: float = 120.0) -> None:
        if not silence_s > 0:
            raise ValueError(f"silence_s must be positive, got {silence_s}")
        self._link = link
        self._face = face
        self._clock = clock
        self._silence_s = max(silence_s, 3 * HEARTBEAT_S)
        self._info = face.info
        self._offset = ClockOffset()
        self._gone: str | None = "the engine is not started"
        self._used = False
        self._sink: EventSink | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._in_flight: dict[str, int] = {}  # number by request id
        self._ids: dict[int, str] = {}  # the same, the other way round
        self._last_number = 0
        self._ends: list[EngineEvent] = []  # due on the next turn of the loop
        self._aborts: list[int] = []  # to be sent, as are these:
        self._submits: dict[int, tuple[int, int, EngineRequest]] = {}
        self._ranks: dict[int, int] = {}
        self._flushing = False
        self._sent = self._taken = 0  # messages; by the host's last report
        self._missed = 0  # heartbeats in a row
        self._told_at_s = -math.inf
        self._load = EngineLoad(in_flight=0, active=0, kv_tokens_used=None, kv_usage=None)

    # -- what callers may ask -------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """Complete after `start`."""
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        """In this process; raises EngineUnavailable before `start` where it is read from a model."""
        return self._face.tokenizer

    def load(self) -> EngineLoad:
        """By the host's last report, not older than a heartbeat; in_flight as of now."""
        return replace(self._load, in_flight=len(self._in_flight), gone=self._gone)

    def unsupported_fields(self, request: EngineRequest) -> Sequence[tuple[str, str]]:
        if request.prepared is not None:
            return [("prepared", "what LMDeploy has prepared does not leave its process")]
        return self._face.unsupported_fields(request, self._info)

    # -- life -----------------------------------------------------------------

    async def start(self, sink: EventSink) -> None:
        """Raises EngineUnavailable or ConfigError where there is no place for the host, or its engine does not start;
        then, and when it is cancelled, nothing is left of it."""
        if self._used:
            raise EngineUnavailable("the engine was started or closed already")
        self._used, self._sink = True, sink
        loading = asyncio.create_task(asyncio.to_thread(self._face.load))
        try:
            self._info = await self._link.open()
            await loading
        except BaseException:
            loading.cancel()
            await self._link.close()
            raise
        self._gone = None
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._read(), name=f"read-{self._link.name}"),
            loop.create_task(self._watch(), name=f"watch-{self._link.name}"),
        ]

    async def close(self) -> None:
        self._used = True
        self._fail("the engine was closed")
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._link.close()

    # -- requests -------------------------------------------------------------

    def submit(self, request: EngineRequest, rank: int) -> None:
        if self._gone is not None:
            raise EngineUnavailable(self._gone)
        if request.request_id in self._in_flight:
            raise RequestIdInUse(f"request_id {request.request_id!r} is in the engine already")
        wrong = self.unsupported_fields(request)
        if wrong:
            raise InvalidRequest([FieldViolation(*each) for each in wrong])
        self._last_number = number = self._last_number + 1
        self._in_flight[request.request_id] = number
        self._ids[number] = request.request_id
        self._submits[number] = number, rank, request
        self._flush_soon()

    def rerank(self, ranks: Mapping[str, int]) -> None:
        in_flight = self._in_flight
        known = {in_flight[request_id]: rank for request_id, rank in ranks.items() if request_id in in_flight}
        if known:
            self._ranks.update(known)
            self._flush_soon()

    def abort(self, request_id: str) -> None:
        """It ends on the next turn of the loop."""
        number = self._in_flight.pop(request_id, None)
        if number is None:
            return
        del self._ids[number]
        self._ranks.pop(number, None)
        if self._submits.pop(number, None) is None:
            self._aborts.append(number)
        self._ends.append(EngineEvent(request_id, end=FinishReason.ABORT))
        self._flush_soon()

    # -- sending --------------------------------------------------------------

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        ends, self._ends = self._ends, []
        if ends:
            self._tell(ends, self._clock.now_s())
        nothing = not (self._aborts or self._submits or self._ranks)
        if self._gone is not None or nothing or self._sent - self._taken >= WINDOW:
            return
        self._sent += 1
        message = Commands(self._sent, self._aborts, list(self._submits.values()), self._ranks)
        self._aborts, self._submits, self._ranks = [], {}, {}
        self._link.send(message.encoded())

    # -- what comes back ------------------------------------------------------

    async def _read(self) -> None:
        try:
            while self._gone is None:
                self._on_report(Report.decoded(await self._link.next_report()))
        except LinkLost as lost:
            self._fail(str(lost))
        except Exception:
            logger.exception("replica %s cannot be understood", self._link.name)
            self._fail("what the replica says cannot be understood")

    def _on_report(self, report: Report) -> None:
        active, kv_tokens_used, kv_usage, gone, steps = report.load
        self._missed, self._taken = 0, report.taken
        self._load = EngineLoad(0, active, kv_tokens_used, kv_usage, steps=steps)
        for level, name, text in report.logs:
            logging.getLogger(name).log(level, "replica %s: %s", self._link.name, text)
        offset_s = self._offset.observe(report.sent_at_s, self._clock.now_s())
        ids = self._ids
        for at_s, wired in report.steps:
            events = []
            for event in wired:
                request_id = ids.get(event[0])
                if request_id is None:  # aborted meanwhile
                    continue
                told = engine_event(request_id, event, offset_s)
                if told.end is not None or told.error is not None:
                    self._forget(request_id)
                events.append(told)
            if events:
                self._tell(events, at_s + offset_s)
        if gone is not None:
            self._fail(gone)
        elif self._aborts or self._submits or self._ranks:
            self._flush_soon()

    def _forget(self, request_id: str) -> None:
        del self._ids[self._in_flight.pop(request_id)]

    def _tell(self, events: Sequence[EngineEvent], at_s: float) -> None:
        assert self._sink is not None
        self._told_at_s = max(self._told_at_s, at_s)
        try:
            self._sink(events, self._told_at_s)
        except Exception:  # a defect of its owner, which must not cost the other requests their answers
            logger.exception("events of replica %s were not taken", self._link.name)

    # -- the end --------------------------------------------------------------

    async def _watch(self) -> None:
        while self._gone is None:
            await asyncio.sleep(HEARTBEAT_S)
            self._missed += 1
            silent_s = self._missed * HEARTBEAT_S
            if silent_s > self._silence_s:
                self._fail(f"the replica has said nothing for {silent_s:g} s")

    def _fail(self, reason: str) -> None:
        """From now on the engine is gone; everything in flight ends with that. The first reason counts."""
        if self._gone is not None:
            return
        self._gone = reason
        left, self._in_flight = [*self._in_flight], {}
        self._ids.clear()
        self._submits.clear()
        ends, self._ends = self._ends, []
        ends += [EngineEvent(request_id, error=EngineUnavailable(reason)) for request_id in left]
        if ends:
            self._tell(ends, self._clock.now_s())
