"""Looks at the runtime a few times a second, on its loop: what it is doing, and how late the loop is.

Metrics are read by other threads; they are given these pictures, which never change, and touch nothing of the runtime.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.runtime.statistics import RuntimeLoad

logger = logging.getLogger(__name__)

PERIOD_S = 0.25


class Sampler:
    """`on_sample` is called with each picture and how much later than due it was taken, seconds >= 0."""

    def __init__(self, runtime: Runtime, clock: Clock, on_sample: Callable[[RuntimeLoad, float], None]) -> None:
        self._runtime = runtime
        self._clock = clock
        self._on_sample = on_sample
        self._due_at_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Takes the first picture at once."""
        self._due_at_s = self._clock.now_s()
        self._sample()

    def close(self) -> None:
        """Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sample(self) -> None:
        lag_s = max(0.0, self._clock.now_s() - self._due_at_s)
        try:
            self._on_sample(self._runtime.load(), lag_s)
        except Exception:
            logger.exception("the load could not be sampled")
        self._due_at_s = self._clock.now_s() + PERIOD_S
        self._timer = asyncio.get_running_loop().call_later(PERIOD_S, self._sample)
