"""A started runtime on a scripted engine, in virtual time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from scripted_engine import ScriptedEngine, make_runtime

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.errors import (
    RequestError,
)
from lmdeploy_slo.runtime.stream import Completion, RequestStream
from lmdeploy_slo.testing.builders import make_request, make_spec
from lmdeploy_slo.testing.virtual_time import run_virtual

ONE_AT_A_TIME = EngineLimits(max_batch_size=1)


class Bench:
    """A started runtime on a scripted engine, in virtual time."""

    def __init__(self, clock: VirtualClock, limits: EngineLimits, **options: Any) -> None:
        self.clock = clock
        self.engine = ScriptedEngine(clock, limits=limits)
        self.runtime = make_runtime(self.engine, clock, **options)

    def submit(self, request_id: str = "r", *, deadline_at_s: float | None = None, **spec: Any) -> RequestStream:
        spec = {"arrival_at_s": self.clock.now_s()} | spec
        return self.runtime.submit(make_spec(request_id, **spec), make_request(request_id), deadline_at_s=deadline_at_s)

    async def running(self, *request_ids: str) -> list[RequestStream]:
        streams = [self.submit(request_id) for request_id in request_ids]
        await self.engine.has(*request_ids)
        return streams

    def counts(self) -> dict[EndStatus, int]:
        return {status: count for status, count in self.runtime.load().ended.items() if count}

    def nothing_is_held(self) -> bool:
        """No request, slot, timer or table entry is left."""
        load = self.runtime.load()
        timers = [h for h in asyncio.get_running_loop()._scheduled if not h.cancelled()]  # type: ignore[attr-defined]
        return load.waiting == load.in_flight == 0 and not self.engine.requests and not timers


class DefectLog(logging.Handler):
    """Keeps what is logged of defects."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def virtual(
    limits: EngineLimits | None = None, *, defects: int = 0, **options: Any
) -> Callable[[Callable[[Bench], Awaitable[None]]], Callable[[], None]]:
    """Runs a test in virtual time on a started bench; afterwards nothing is left and so many `defects` were logged."""

    def wrap(test: Callable[[Bench], Awaitable[None]]) -> Callable[[], None]:
        async def main(clock: VirtualClock) -> None:
            bench = Bench(clock, limits or EngineLimits(), **options)
            await bench.runtime.start()
            await test(bench)
            await bench.runtime.close()
            assert bench.nothing_is_held()

        def run() -> None:
            log, logger = DefectLog(), logging.getLogger("lmdeploy_slo.runtime")
            logger.addHandler(log)
            try:
                run_virtual(main)
            finally:
                logger.removeHandler(log)
            assert [record.getMessage() for record in log.records][defects:] == []
            assert len(log.records) == defects

        run.__doc__ = test.__doc__
        return run

    return wrap


async def outcome(stream: RequestStream) -> Completion | RequestError:
    try:
        async for delta in stream:
            if delta.completion is not None:
                return delta.completion
    except RequestError as error:
        return error
    raise AssertionError("a stream ended without an outcome")
