"""What a policy answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class PlanQuality:
    """How a plan came about, for metrics and reports; nothing is decided by it."""

    start: str = ""  # the rule the search started from
    start_score: float = 0.0
    score: float = 0.0
    evaluations: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """An order over the waiting requests, and how many of its head enter the engine now.

    order: handles, first to go first. May leave requests out (they stay, behind all others); must not repeat one.
    send_now: how many of `order` to dispatch at once; 0 <= send_now <= len(order).
    replan_after_s: ask again after this long even if nothing happens; None to wait for the next event.
    """

    order: npt.NDArray[np.int64]
    send_now: int
    replan_after_s: float | None = None
    quality: PlanQuality = field(default_factory=PlanQuality)
