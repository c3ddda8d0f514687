"""The far end of a remote engine: hosts one engine, carries out commands, and reports what comes of them.

It knows nothing of how it is reached. All methods run on one event loop, of the process the engine lives in.

    command(bytes)      at once, in the order they were counted, whatever order they come in
    next_report()       waits for something to say, but no longer than a heartbeat; asked for again, one at a time

While nobody asks, steps are kept in a bounded outbox (`remote_reports.Outbox`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import traceback
from collections import deque
from collections.abc import Callable, Sequence

from lmdeploy_slo import __version__
from lmdeploy_slo.clock import Clock, MonotonicClock
from lmdeploy_slo.engine.base import Engine, EngineEvent, EngineInfo, EngineRequest
from lmdeploy_slo.engine.remote_reports import MAX_STEPS, Commands, Outbox, OutboxStatistics, Report, wire_event
from lmdeploy_slo.errors import EngineError, RequestError

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
"""The longest silence of a host that is well."""

MAX_LOGS = 200
"""Records that wait to be told; older ones are lost."""

_TAKEN_UNTOLD = 8
"""So many commands are acknowledged at once, though there be nothing else to say."""


class EngineHost:
    """See the module. make: gives the engine, not started, for the `clock` it is handed; called in `start`."""

    def __init__(self, make: Callable[..., Engine], clock: Clock | None = None, max_steps: int = MAX_STEPS) -> None:
        self._make = make
        self._clock = clock or MonotonicClock()
        self._engine: Engine | None = None
        self._outbox = Outbox(max_steps)
        self._numbers: dict[str, int] = {}  # of what is in the engine, by request id
        self._ids: dict[int, str] = {}
        self._aborted: set[int] = set()  # their last event is of no interest
        self._held: dict[str, tuple[int, int, EngineRequest]] = {}  # until the engine lets go of the same id
        self._taken = self._told = 0
        self._early: dict[int, Commands] = {}  # those before have not come yet
        self._logs: deque[tuple[int, str, str]] = deque(maxlen=MAX_LOGS)
        self._waiter: asyncio.Future[None] | None = None

    async def hello(self) -> tuple[str, str, int]:
        """Version of the package, name of the machine, and process id."""
        return __version__, socket.gethostname(), os.getpid()

    async def statistics(self) -> OutboxStatistics:
        return self._outbox.statistics()

    async def start(self, log_level: int | None = None) -> EngineInfo:
        """Starts the engine; raises what that raises. log_level: the least that is told of this process's log; None:
        nothing is."""
        if log_level is not None:
            root = logging.getLogger()
            root.addHandler(_LogCollector(self._logs, log_level))
            root.setLevel(max(log_level, logging.INFO))
            logging.getLogger("lmdeploy_slo").setLevel(log_level)
        self._engine = self._make(clock=self._clock)
        await self._engine.start(self._on_events)
        return self._engine.info

    async def command(self, data: bytes) -> None:
        commands = Commands.decoded(data)
        self._early[commands.count] = commands
        while (next_one := self._early.pop(self._taken + 1, None)) is not None:
            self._taken += 1
            self._carry_out(next_one)
        if self._taken - self._told >= _TAKEN_UNTOLD:
            self._wake()

    async def next_report(self) -> bytes:
        if not self._outbox and self._taken - self._told < _TAKEN_UNTOLD:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(HEARTBEAT_S, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        return self._report().encoded()

    async def close(self) -> None:
        """Of a host that shares its process with others; whoever has it alone just kills that."""
        if self._engine is not None:
            await self._engine.close()

    # -- inside ---------------------------------------------------------------

    def _report(self) -> Report:
        assert self._engine is not None, "the engine was not started"
        steps, logs = self._outbox.take(), tuple(self._logs)
        self._logs.clear()
        self._told = self._taken
        load = self._engine.load()
        told = (load.active, load.kv_tokens_used, load.kv_usage, load.gone, load.steps)
        return Report(self._clock.now_s(), self._taken, told, steps, logs)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _carry_out(self, commands: Commands) -> None:
        assert self._engine is not None, "the engine was not started"
        for number in commands.aborts:
            self._abort(number)
        for number, rank, request in commands.submits:
            if request.request_id in self._numbers:
                self._held[request.request_id] = number, rank, request
            else:
                self._submit(number, rank, request)
        if commands.ranks:
            ranks = {self._ids[number]: rank for number, rank in commands.ranks.items() if number in self._ids}
            self._engine.rerank(ranks)

    def _submit(self, number: int, rank: int, request: EngineRequest) -> None:
        assert self._engine is not None
        try:
            self._engine.submit(request, rank)
        except RequestError as error:
            self._refuse(number, request, error)
        except Exception:
            logger.exception("request %s could not be given to the engine", request.request_id)
            self._refuse(number, request, EngineError("the engine failed"))
        else:
            self._numbers[request.request_id] = number
            self._ids[number] = request.request_id

    def _refuse(self, number: int, request: EngineRequest, error: RequestError) -> None:
        told = error if isinstance(error, EngineError) else EngineError(str(error), error.reason.lower())
        self._outbox.add(self._clock.now_s(), [wire_event(number, EngineEvent(request.request_id, error=told))])
        self._wake()

    def _abort(self, number: int) -> None:
        assert self._engine is not None
        request_id = self._ids.get(number)
        if request_id is not None:
            self._aborted.add(number)
            self._engine.abort(request_id)
            return
        for held_id, (held, _, _) in self._held.items():
            if held == number:
                del self._held[held_id]
                return

    def _on_events(self, events: Sequence[EngineEvent], at_s: float) -> None:
        """The sink of the engine."""
        told = []
        for event in events:
            number = self._numbers.get(event.request_id)
            if number is None:
                continue
            if number not in self._aborted:
                told.append(wire_event(number, event))
            elif event.end is None and event.error is None:  # it crossed with the abort, or that got lost
                assert self._engine is not None
                asyncio.get_running_loop().call_soon(self._engine.abort, event.request_id)
            if event.end is not None or event.error is not None:
                del self._numbers[event.request_id], self._ids[number]
                self._aborted.discard(number)
                if event.request_id in self._held:  # not from within the engine's call
                    asyncio.get_running_loop().call_soon(self._submit_held, event.request_id)
        if told:
            self._outbox.add(at_s, told)
            self._wake()

    def _submit_held(self, request_id: str) -> None:
        if request_id in self._held:
            self._submit(*self._held.pop(request_id))


class _LogCollector(logging.Handler):
    """Keeps what is logged as text; of an exception its type and where it was, for its own text may quote a prompt."""

    def __init__(self, records: deque[tuple[int, str, str]], level: int) -> None:
        super().__init__(level)
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[0] is not None:
            where = "".join(traceback.format_tb(record.exc_info[2]))
            text = f"{text}\n{where}{record.exc_info[0].__name__}"
        self._records.append((record.levelno, record.name, text))
