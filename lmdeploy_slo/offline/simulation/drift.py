"""An engine that changes in mid-run without telling, and how soon forecasts are right again."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.prediction.calibration import NO_DRIFT, CalibrationStatistics


@dataclass(frozen=True, slots=True)
class Drift:
    """From `at_s` on the engine's coefficients are multiplied by `factors` (of c0, p1, p2, d1, d2; each finite, > 0).

    told: the planner's beliefs are multiplied at the same moment, as if somebody had told it.
    """

    at_s: float
    factors: tuple[float, float, float, float, float]
    told: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.at_s) and self.at_s >= 0):
            raise ValueError(f"at_s must be 0 or more, got {self.at_s}")
        factors: tuple[float, ...] = self.factors
        if len(factors) != 5 or not all(math.isfinite(f) and f > 0 for f in factors):
            raise ValueError(f"factors must be five positive numbers, got {self.factors}")

    def of(self, model: StepModel) -> StepModel:
        """The coefficients from then on."""
        c0, p1, p2, d1, d2 = self.factors
        return StepModel(c0 * model.c0, p1 * model.p1, p2 * model.p2, d1 * model.d1, d2 * model.d2)


class Recovery:
    """Counts the requests that finish until the running error of forecasts stays below `NO_DRIFT`."""

    def __init__(self) -> None:
        self.requests: int | None = None  # None: it is not there, or no longer
        self._finished = 0

    def finished(self, statistics: CalibrationStatistics) -> None:
        """A request finished, since the drift."""
        self._finished += 1
        if statistics.relative_error >= NO_DRIFT:
            self.requests = None
        elif self.requests is None:
            self.requests = self._finished
