"""A remote engine whose host lives on the same loop: everything of it but the way between processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.engine.base import Engine, EngineInfo
from lmdeploy_slo.engine.remote import EngineFace, LinkLost, RemoteEngine
from lmdeploy_slo.engine.remote_host import EngineHost


class LocalLink:
    """lose: the host is gone. hold, release: what is sent to it does not arrive meanwhile, nor do its reports.
    shuffled: commands arrive in the reverse order of a turn."""

    name = "local"

    def __init__(self, make: Callable[..., Engine], clock: Clock | None = None, max_steps: int = 64) -> None:
        self.host = EngineHost(make, clock, max_steps)
        self.sent: list[bytes] = []
        self.reports = 0
        self.closes = 0
        self.open_error: Exception | None = None
        self.shuffled = False
        self._lost: asyncio.Future[str] | None = None
        self._may_pass = asyncio.Event()
        self._may_pass.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._delivering = False
        self._queue: list[bytes] = []

    async def open(self) -> EngineInfo:
        self._lost = asyncio.get_running_loop().create_future()
        if self.open_error is not None:
            raise self.open_error
        return await self.host.start()

    def send(self, data: bytes) -> None:
        self.sent.append(data)
        self._queue.append(data)
        if not self._delivering:
            self._delivering = True
            task = asyncio.get_running_loop().create_task(self._deliver())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _deliver(self) -> None:
        await self._may_pass.wait()
        self._delivering = False
        queue, self._queue = self._queue, []
        for data in reversed(queue) if self.shuffled else queue:
            await self.host.command(data)

    async def next_report(self) -> bytes:
        assert self._lost is not None
        await self._may_pass.wait()
        asking = asyncio.ensure_future(self.host.next_report())
        try:
            await asyncio.wait([asking, self._lost], return_when=asyncio.FIRST_COMPLETED)
            await self._may_pass.wait()
        finally:
            if not asking.done():
                asking.cancel()
        if self._lost.done():
            raise LinkLost(self._lost.result())
        self.reports += 1
        return await asking

    async def close(self) -> None:
        self.closes += 1
        for task in self._tasks:
            task.cancel()
        await self.host.close()

    def lose(self, reason: str) -> None:
        assert self._lost is not None
        self._lost.set_result(reason)

    def hold(self) -> None:
        self._may_pass.clear()

    def release(self) -> None:
        self._may_pass.set()


def local_remote(
    make: Callable[..., Engine], clock: Clock, *, max_steps: int = 64, silence_s: float = 120.0
) -> tuple[RemoteEngine, LocalLink]:
    """An engine not started, with its link; both ends on one clock."""
    link = LocalLink(make, clock, max_steps)
    return RemoteEngine(link, EngineFace(make(clock=clock)), clock, silence_s), link
