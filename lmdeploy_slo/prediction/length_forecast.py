"""What is said of an output's length, and by whom: the forecast and the protocol of those who make one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.core.snapshot import Rows

LEVELS = (0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975)
"""Of the quantiles a forecast carries."""

MEDIAN = LEVELS.index(0.5)

TIMING_SIGMA = 0.3
"""Added to the spread of the length, as of independent errors: what is not known of the times a length is turned into.
Plans that take a length to the token meet 3 points less (docs/prediction.md)."""

_NORMAL = NormalDist()
_Z = tuple(_NORMAL.inv_cdf(level) for level in LEVELS)
_FITTED = tuple((at, _Z[at]) for at, level in enumerate(LEVELS) if 0.5 < level <= 0.9)
_FITTED_SQUARES = sum(z * z for _, z in _FITTED)


@dataclass(frozen=True, slots=True)
class LengthForecast:
    """What plans go by: tokens, the median of the output length, >= 1; sigma, how far its logarithm may be off, >= 0.

    quantiles: of the length, at LEVELS, rising; empty where it is taken for lognormal with that median and sigma.
    """

    tokens: float
    sigma: float
    quantiles: tuple[float, ...] = ()

    def quantile(self, level: float) -> float:
        """The length not exceeded with probability `level`, in (0, 1); between and beyond LEVELS as of a lognormal."""
        z = _NORMAL.inv_cdf(level)
        if not self.quantiles:
            return max(1.0, self.tokens * math.exp(z * self.sigma))
        at = 0
        while at < len(_Z) - 2 and z > _Z[at + 1]:
            at += 1
        share = min(max((z - _Z[at]) / (_Z[at + 1] - _Z[at]), 0.0), 1.0)
        low, high = self.quantiles[at], self.quantiles[at + 1]
        return float(low * (high / low) ** share)


def forecast_of(quantiles: Sequence[float]) -> LengthForecast:
    """The forecast with these quantiles at LEVELS, each >= 1, rising.

    sigma is that of the lognormal which has their median and comes closest to those from 0.6 to 0.9 (least squares of
    logarithms): what plans go wrong by is an output that turns out longer. TIMING_SIGMA is added.
    """
    median = quantiles[MEDIAN]
    sigma = sum(z * math.log(quantiles[at] / median) for at, z in _FITTED) / _FITTED_SQUARES
    return LengthForecast(median, math.hypot(sigma, TIMING_SIGMA), tuple(quantiles))


class LengthPredictor(Protocol):
    """Forecasts output lengths and learns from those seen. Pure: equal histories give equal forecasts."""

    def predict(self, spec: RequestSpec) -> LengthForecast: ...

    def observe(self, spec: RequestSpec, output_tokens: int) -> None:
        """A request of this spec generated `output_tokens`, of its own accord or up to its `max_new_tokens`."""
        ...

    def revise(self, running: Rows) -> None:
        """Brings `output_tokens` and `length_sigma` up to date in place, given `generated_tokens`."""
        ...
