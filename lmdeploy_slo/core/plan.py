"""What a policy answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

DEFAULT_PATIENCE = 8.0
"""How long requests whose SLO is lost may be put off, in terms of the longest wait first come, first served would have
caused of late: the knob between attainment and the longest waits; see `scheduling.annealing.AnnealingOptions`."""

DEFAULT_PLACEMENT = "slo"
"""On which of several engines a request is served; see `scheduling.placement`."""


@dataclass(frozen=True, slots=True)
class PlanQuality:
    """How a plan came about, for metrics and reports; of what comes after it, placement alone looks at the last two.

    price_s: what a second of engine time is worth, in requests met; None where the policy knows no such price. duty:
    the share of time that prefills take by recent arrivals, None where it is not known.
    """

    start: str = ""  # the rule the search started from
    start_score: float = 0.0
    score: float = 0.0
    evaluations: int = 0
    price_s: float | None = None
    duty: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """An order over the waiting requests, and how many of its head enter the engine now.

    order: handles, first to go first. May leave requests out (they stay, behind all others); must not repeat one.
    send_now: how many of `order` to dispatch at once; 0 <= send_now <= len(order).
    replan_after_s: ask again after this long even if nothing happens; None to wait for the next event.
    costs: one entry for each of `order`: what sending it now is expected to cost all others, in requests met; for
    `annealing` the price of its engine time; nan: not known. None where the policy knows no costs. For explanations
    alone.
    """

    order: npt.NDArray[np.int64]
    send_now: int
    replan_after_s: float | None = None
    quality: PlanQuality = field(default_factory=PlanQuality)
    costs: npt.NDArray[np.float64] | None = None
