"""The only place that reads a clock.

Every other module is handed a `Clock`; tests and the simulator hand in a `VirtualClock`, so no test waits.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock. Instants have no meaning outside the process; only differences do."""

    def now_s(self) -> float:
        """The current instant in seconds; never decreases."""
        ...


class MonotonicClock:
    """The operating system's monotonic clock."""

    __slots__ = ()

    def now_s(self) -> float:
        return time.monotonic()


class VirtualClock:
    """A clock that stands still until it is moved."""

    __slots__ = ("_now_s",)

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, duration_s: float) -> None:
        """Moves forward by `duration_s` >= 0 seconds; raises ValueError where that is negative."""
        if duration_s < 0:
            raise ValueError(f"a clock never goes back: duration_s is {duration_s}")
        self._now_s += duration_s

    def advance_to(self, at_s: float) -> None:
        """Moves forward to the instant `at_s`; an instant in the past leaves the clock as it is."""
        self._now_s = max(self._now_s, at_s)


def unix_time_s() -> float:
    """Seconds since 1970, for instants that are shown or compared with another process's; it may go back."""
    return time.time()
