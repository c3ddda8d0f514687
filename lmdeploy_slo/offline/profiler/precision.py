"""How well a point is known, and how many more repeats it takes.

A point's mean is known to a relative half-width h: the 95 % confidence interval of Student's t over its repeats, each
as a multiple of what the model says of it (repeats differ a little in what was computed), disturbed ones left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.prediction.fit_errors import predicted_by_step
from lmdeploy_slo.prediction.least_squares import disturbed
from lmdeploy_slo.prediction.observations import Observation, seconds_of

FEWEST_REPEATS = 3
MOST_REPEATS = 30
"""Of one point: what so many do not settle, more will not."""

_TWO_SIDED = 0.975


def half_width(repeats: Sequence[Observation], model: StepModel) -> float:
    """h of one point, a fraction; inf for fewer than two repeats."""
    if len(repeats) < 2:
        return math.inf
    from scipy.special import stdtrit

    kept = ~disturbed(repeats, model)
    ratios = (seconds_of(repeats) / np.maximum(predicted_by_step(model, repeats), 1e-12))[kept]
    if len(ratios) < 2:
        return math.inf
    error = float(np.std(ratios, ddof=1)) / math.sqrt(len(ratios))
    return float(stdtrit(len(ratios) - 1, _TWO_SIDED)) * error / float(np.mean(ratios))


def repeats_missing(repeats: Sequence[Observation], model: StepModel, wanted: float) -> int:
    """How many more it takes, about, until h <= wanted; 0 where that, or the most, is reached."""
    count = len(repeats)
    if count >= MOST_REPEATS:
        return 0
    if count < FEWEST_REPEATS:
        return FEWEST_REPEATS - count
    known = half_width(repeats, model)
    if known <= wanted:
        return 0
    return min(MOST_REPEATS, max(count + 1, math.ceil(count * (known / wanted) ** 2))) - count


def half_widths(repeats: Mapping[str, Sequence[Observation]], model: StepModel) -> dict[str, float]:
    """h of each point."""
    return {name: half_width(own, model) for name, own in repeats.items()}
