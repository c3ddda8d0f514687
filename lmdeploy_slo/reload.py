"""What SIGHUP changes while the server serves: the files that say who is let in, and some keys of the configuration.

All sources are read again, file, environment and flags, by the same rules as at the start. What is wrong leaves
everything as it was. A key that cannot change while serving keeps its value, and the log names it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lmdeploy_slo.app import Server, gateway_options, limits_of
from lmdeploy_slo.config import Config
from lmdeploy_slo.errors import ConfigError

logger = logging.getLogger(__name__)

LIVE: dict[str, frozenset[str]] = {
    "server": frozenset({"drain_grace_s", "default_max_new_tokens"}),
    "scheduler": frozenset({"plan_budget_ms", "max_queued_requests", "queue_timeout_ms", "shed"}),
    "limits": frozenset({"max_streams", "max_queued_tokens", "max_wait_ms", "queue_share"}),
    "observability": frozenset({"log_level"}),
}
"""Section -> keys that may change; so may every [tasks.NAME]."""


class Reloader:
    """config: what is in effect."""

    def __init__(self, server: Server, read: Callable[[], Config] | None) -> None:
        """read: the configuration as its sources say now, None where it has none. Raises ConfigError."""
        self.config = server.config
        self._server = server
        self._read = read

    def reload(self) -> None:
        """On the loop of the runtime; never raises for what the files say."""
        self._server.protection.reload()
        if self._read is None:
            return
        try:
            wanted = self._read()
        except ConfigError as error:
            logger.error("the configuration stays as it was: %s", error)
            return
        before, after = _flat(self.config), _flat(wanted)
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        stuck = [key for key in changed if not _is_live(key)]
        if stuck:
            logger.warning("a change of %s needs a restart", ", ".join(stuck))
        live = [key for key in changed if _is_live(key)]
        if live:
            self._put(wanted)
        logger.info("the configuration was read again: %s", ", ".join(live) if live else "nothing changed")

    def _put(self, wanted: Config) -> None:
        update: dict[str, Any] = {"tasks": wanted.tasks}
        for section, keys in LIVE.items():
            values = {key: getattr(getattr(wanted, section), key) for key in keys}
            update[section] = getattr(self.config, section).model_copy(update=values)
        config = self.config = self.config.model_copy(update=update)
        server, runtime = self._server, self._server.runtime
        server.gateway.configure(gateway_options(config))
        server.task_slos.clear()  # the HTTP routes hold this very mapping
        server.task_slos.update((name, task.slo) for name, task in config.tasks.items())
        server.budget.time_s = config.scheduler.plan_budget_ms / 1e3
        runtime.options = replace(runtime.options, shed=config.scheduler.shed)
        runtime.limiter.limits = limits_of(config)
        if not config.engine.on_ray:  # of several engines the limiter alone bounds it
            runtime.scheduler.max_queued_requests = config.scheduler.max_queued_requests
        logging.getLogger("lmdeploy_slo").setLevel(getattr(logging, config.observability.log_level.name))


def _is_live(key: str) -> bool:
    section, _, name = key.partition(".")
    return section == "tasks" or name in LIVE.get(section, ())


def _flat(config: Config) -> dict[str, Any]:
    sections = config.model_dump()
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
