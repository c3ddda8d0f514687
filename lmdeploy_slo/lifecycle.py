"""The life of a serving process: `serve`, its signals, and the status it ends with. See docs/operations.md.

SIGTERM and SIGINT   before requests are taken: ends at once, nothing was promised. After that: no new requests, those
                     here end within `server.drain_grace_s`, the rest gets UNAVAILABLE (DRAINING). A second one: the
                     rest gets that at once. A third one kills.
SIGHUP               reads again what can change, see `reload`.
The engine is lost   all requests get UNAVAILABLE (ENGINE_UNAVAILABLE), and the process ends with `EXIT_ENGINE_LOST`, so
                     that whoever runs it starts a fresh one.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from lmdeploy_slo.app import Server, serving
from lmdeploy_slo.config import Config, LogFormat, is_loopback
from lmdeploy_slo.engine.supervised import SupervisedEngine
from lmdeploy_slo.observability.logs import set_up_logs
from lmdeploy_slo.reload import Reloader

logger = logging.getLogger(__name__)

EXIT_ENGINE_LOST = 3

_ENDING = (signal.SIGTERM, signal.SIGINT)


async def serve(config: Config, announce: Callable[[str], None], read: Callable[[], Config] | None = None) -> int:
    """Serves until it is told to end, or its engine is lost; the status to exit with.

    announce: called with one line when requests are taken. read: the configuration as its sources say now, for SIGHUP;
    raises ConfigError. None: only the files of [security] are read again.
    """
    loop = asyncio.get_running_loop()
    for number in _ENDING:
        loop.add_signal_handler(number, _leave, 128 + number)
    loop.add_signal_handler(signal.SIGHUP, logger.info, "nothing to read again yet")
    missing = config.security.missing_for_strangers
    if missing and not is_loopback(config.server.host):
        logger.warning("insecure: others can reach %s, and there is no %s", config.server.host, ", no ".join(missing))
    status = 0
    async with serving(config) as server:
        asked, insisted = _listen(loop)
        reloader = Reloader(server, read)
        loop.add_signal_handler(signal.SIGHUP, reloader.reload)
        # What is here by now stays: to walk through it again and again would stop all streams for 0.1 to 0.3 s a time.
        gc.collect()
        gc.freeze()
        announce(f"lmdeploy_slo: serving on {server}")
        lost = server.runtime.lost
        await _first(asked.wait(), lost.wait())
        if lost.is_set():
            status = EXIT_ENGINE_LOST
            logger.critical("the engine is lost: ending with status %d", status)
            await server.gateway.drain(0)
        else:
            await _drain(server, reloader.config.server.drain_grace_s, insisted)
            if lost.is_set():
                status = EXIT_ENGINE_LOST
    engines = [replica.engine for replica in server.runtime.replicas.values()]
    if any(isinstance(engine, SupervisedEngine) and engine.left_behind for engine in engines):
        logger.error("threads of the engine hang: leaving them")
        _leave(status)
    return status


def run(config: Config, announce: Callable[[str], None], read: Callable[[], Config] | None = None) -> int:
    """`serve` on an event loop of its own (uvloop where there is one), with logs on stderr."""
    logs = config.observability
    set_up_logs(
        as_json=logs.log_format is LogFormat.JSON,
        level=getattr(logging, logs.log_level.name),
        content=logs.log_content,
    )
    if sys.platform == "win32":
        return asyncio.run(serve(config, announce, read))
    import uvloop

    return uvloop.run(serve(config, announce, read))


def _listen(loop: asyncio.AbstractEventLoop) -> tuple[asyncio.Event, asyncio.Event]:
    """Set by the first and the second signal to end; a third one does what it does without us."""
    asked, insisted = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if not asked.is_set():
            asked.set()
            return
        insisted.set()
        for number in _ENDING:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in _ENDING:
        loop.add_signal_handler(number, on_signal)
    return asked, insisted


async def _drain(server: Server, grace_s: float, insisted: asyncio.Event) -> None:
    logger.info("shutting down: requests may end for %g s", grace_s)
    draining = asyncio.get_running_loop().create_task(server.gateway.drain(grace_s))
    await _first(asyncio.shield(draining), insisted.wait())
    if not draining.done():
        logger.info("second signal: ending the requests that are left")
        await server.runtime.drain(0)
    await draining


async def _first(*waits: Coroutine[Any, Any, Any] | asyncio.Future[Any]) -> None:
    """Returns when one of them is over; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _leave(status: int) -> NoReturn:
    """Without waiting for threads, which may hang in foreign code."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
