"""A value that is read from files and kept up to date with them; a broken file leaves the last good value in force.

The files are looked at when the value is asked for, at most once a second, and read again where one was replaced or
changed. So a renewed certificate or a withdrawn token needs no signal; `reload` is for who does not want to wait.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.errors import ConfigError

logger = logging.getLogger(__name__)

LOOK_S = 1.0

T = TypeVar("T")


class Watched(Generic[T]):
    """Safe to use from any thread."""

    def __init__(self, what: str, paths: Sequence[Path], read: Callable[[], T], clock: Clock) -> None:
        """what: as it is called in the log. read: raises ConfigError where the files are wrong, and so does this."""
        self._what = what
        self._paths = paths
        self._read = read
        self._clock = clock
        self._lock = threading.Lock()
        self._state = self._look()
        self._value = read()
        self._next_look_at_s = clock.now_s() + LOOK_S

    def __call__(self) -> T:
        """The last good value."""
        if self._clock.now_s() >= self._next_look_at_s:
            with self._lock:
                self._next_look_at_s = self._clock.now_s() + LOOK_S
                state = self._look()
                if state != self._state:
                    self._state = state
                    self._replace()
        return self._value

    def reload(self) -> bool:
        """Reads the files whether they changed or not; False, with the reason in the log, where they are wrong."""
        with self._lock:
            self._state = self._look()
            return self._replace()

    def _replace(self) -> bool:
        try:
            self._value = self._read()
        except ConfigError as error:
            logger.error("%s stay as they were: %s", self._what, error)
            return False
        logger.info("%s were read again", self._what)
        return True

    def _look(self) -> list[tuple[int, int, int] | None]:
        """What tells a file from the one before it; None for one that is not there."""
        state: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                seen = path.stat()
            except OSError:
                state.append(None)
            else:
                state.append((seen.st_ino, seen.st_ctime_ns, seen.st_size))
        return state
