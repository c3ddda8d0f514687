"""What has been asked of the engines lately, and what was foretold of it: the ground on which more or fewer are wanted.

In slots of `SLOT_S`, so that memory is bounded whatever comes.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from lmdeploy_slo.scheduling.admission import Forecast

MAX_TOLD = 256
"""Forecasts that are kept for somebody to ask before they are looked at."""

SLOT_S = 1.0
LONGEST_S = 600.0


@dataclass(slots=True)
class _Slot:
    number: int
    with_slo: int = 0
    chance: float = 0.0
    engine_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Demand:
    """Of a stretch of time. requests: that came with an objective. attainment: the mean chance of meeting it that they
    were told, 0 to 1; refused ones count as 0; None where there were none. engines: engine time asked for in a second,
    in engines like those it was foretold for; see `StepModel.engine_time_s`."""

    requests: int
    attainment: float | None
    engines: float


class DemandLog:
    """On one event loop."""

    def __init__(self) -> None:
        self._slots: deque[_Slot] = deque(maxlen=int(LONGEST_S / SLOT_S))
        self._first_s: float | None = None
        self._told: list[tuple[_Slot, Forecast]] = []  # of requests with an objective, not in their slots yet

    def came(self, engine_s: float, with_slo: bool, expected: Forecast, now_s: float) -> None:
        """A request was accepted that is foretold to need `engine_s` of an engine, and was told `expected`."""
        slot = self._slot(now_s)
        slot.engine_s += engine_s
        if with_slo:  # its chance may not be worked out yet, and nobody waits for it
            self._told.append((slot, expected))
            if len(self._told) >= MAX_TOLD:
                self._count_told()

    def refused(self, with_slo: bool, now_s: float) -> None:
        """A request that was offered was not accepted."""
        self._slot(now_s).with_slo += with_slo

    def of_last(self, duration_s: float, now_s: float) -> Demand:
        """Of the last `duration_s` seconds, at most `LONGEST_S`; of fewer where less has been seen."""
        self._count_told()
        first = math.ceil((now_s - duration_s) / SLOT_S)
        slots = [slot for slot in self._slots if slot.number >= first]
        seen_s = 0.0 if self._first_s is None else now_s - self._first_s
        span_s = max(SLOT_S, min(duration_s, seen_s))
        with_slo = sum(slot.with_slo for slot in slots)
        attainment = sum(slot.chance for slot in slots) / with_slo if with_slo else None
        return Demand(with_slo, attainment, sum(slot.engine_s for slot in slots) / span_s)

    def _count_told(self) -> None:
        for slot, expected in self._told:
            if expected.chance is not None:
                slot.with_slo += 1
                slot.chance += expected.chance
        self._told.clear()

    def _slot(self, now_s: float) -> _Slot:
        number = int(now_s // SLOT_S)
        if self._first_s is None:
            self._first_s = now_s
        if not self._slots or self._slots[-1].number != number:
            self._slots.append(_Slot(number))
        return self._slots[-1]
