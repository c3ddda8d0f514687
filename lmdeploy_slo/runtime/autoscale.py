"""How many engines there should be: a rule on what requests are foretold when they come.

More, where the mean chance of meeting their SLOs that the requests of the last `up_s` seconds were told is below the
target: one more, or as many as it takes for each to be asked for no more than `FULL` of its time. One fewer, where the
target was kept for `down_s` seconds and with one engine less each would still be asked for no more than `SPARE`. After
a change nothing is decided until what it changed can be seen: `up_s` seconds after the last engine has come or gone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lmdeploy_slo.runtime.demand import DemandLog

FULL, SPARE = 0.8, 0.5
LEAST_REQUESTS = 10
"""Fewer tell nothing."""


@dataclass(frozen=True, slots=True)
class AutoscaleOptions:
    """least, most: engines, 1 <= least <= most. attainment: the target, above 0, at most 1. up_s, down_s: seconds, at
    least 1, at most 600."""

    least: int
    most: int
    attainment: float = 0.9
    up_s: float = 15.0
    down_s: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"at least 1 and at most {self.most} engines are possible, got a least of {self.least}")
        if not 0 < self.attainment <= 1:
            raise ValueError(f"attainment must be above 0 and at most 1, got {self.attainment}")
        for name in ("up_s", "down_s"):
            if not 1 <= getattr(self, name) <= 600:
                raise ValueError(f"{name} must be from 1 to 600 seconds, got {getattr(self, name)}")


class AutoscaleRule:
    """Pure: instants are given. Not to be asked while engines come or go."""

    def __init__(self, options: AutoscaleOptions) -> None:
        self.options = options
        self._settled_at_s = -math.inf
        self._kept_since_s: float | None = None

    def changed(self, now_s: float) -> None:
        """An engine has come or gone."""
        self._settled_at_s, self._kept_since_s = now_s + self.options.up_s, None

    def wanted(self, engines: int, demand: DemandLog, now_s: float) -> int:
        """How many there should be, where there are `engines` now."""
        options = self.options
        if not options.least <= engines <= options.most:
            return min(max(engines, options.least), options.most)
        if now_s < self._settled_at_s:
            return engines
        lately = demand.of_last(options.up_s, now_s)
        if lately.attainment is not None and lately.attainment < options.attainment:
            self._kept_since_s = None
            if lately.requests < LEAST_REQUESTS:
                return engines
            return min(options.most, max(engines + 1, math.ceil(lately.engines / FULL)))
        if self._kept_since_s is None:
            self._kept_since_s = now_s
        if engines == options.least or now_s - self._kept_since_s < options.down_s:
            return engines
        spare = demand.of_last(options.down_s, now_s).engines <= SPARE * (engines - 1)
        return engines - 1 if spare else engines
