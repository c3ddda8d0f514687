"""Writes what was learnt to its file, now and then and at the end."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from lmdeploy_slo.prediction.state import StateFile

logger = logging.getLogger(__name__)

KEEP_EVERY_S = 60.0


class Keeper:
    """On one event loop; only the collecting happens there, a thread writes. Whatever fails is logged, never raised."""

    def __init__(self, file: StateFile, every_s: float = KEEP_EVERY_S) -> None:
        self._file = file
        self._every_s = every_s
        self._kept: dict[str, Any] | None = None
        self._task: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="state")

    async def close(self) -> None:
        """Writes once more. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            await self._keep()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await asyncio.shield(self._keep())

    async def _keep(self) -> None:
        try:
            async with self._writing:
                parts = self._file.collect()
                if parts != self._kept and await asyncio.to_thread(self._file.write, parts):
                    self._kept = parts
        except Exception:
            logger.exception("what was learnt could not be kept")
