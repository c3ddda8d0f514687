"""How long people would wait if everybody were served in order of arrival: the yardstick for patience.

A request that can no longer meet its SLO may be put off, but not without bound. The bound is measured against what
first come, first served would have done to it: a virtual queue takes in the engine time of every arrival and works it
off at the speed of the engine; its longest length so far is the longest wait FCFS would have caused.
"""

from __future__ import annotations

import numpy as np

from lmdeploy_slo.core.snapshot import Snapshot
from lmdeploy_slo.scheduling.rules import engine_time_s

SHORTEST_S = 1.0
"""The longest wait is never taken to be below this: in an idle hour nobody counts milliseconds."""

HALF_LIFE_S = 600.0
"""A peak is forgotten by half in this time, so that the yardstick follows the load of the day."""


class FcfsBacklog:
    """Learns from snapshots alone. longest_s: the longest wait of late, seconds, >= SHORTEST_S."""

    def __init__(self) -> None:
        self._last_handle = 0
        self._backlog_s = 0.0
        self._at_s: float | None = None
        self.longest_s = SHORTEST_S

    def learn(self, snapshot: Snapshot, batch_size: float) -> None:
        """Takes in what arrived since the last snapshot. batch_size: as in `rules.engine_time_s`."""
        elapsed_s = 0.0 if self._at_s is None else max(0.0, snapshot.now_s - self._at_s)
        self._at_s = snapshot.now_s
        self._backlog_s = max(0.0, self._backlog_s - elapsed_s)
        new = snapshot.waiting[snapshot.waiting["handle"] > self._last_handle]
        if len(new):
            self._last_handle = int(np.max(new["handle"]))
            self._backlog_s += float(np.sum(engine_time_s(new, snapshot.model, batch_size)))
        faded_s = self.longest_s * 0.5 ** (elapsed_s / HALF_LIFE_S)
        self.longest_s = max(SHORTEST_S, faded_s, self._backlog_s)
