"""A duration that another model foretells roughly: its median, an interval that holds, and chances of limits.

    (observed + d) / (base + d) ~ a `backoff` distribution, learnt,   base the rough forecast

d keeps ratios of durations apart that are next to nothing. The median and chances are those of the distribution. The
interval's ends start as its quantiles at 0.1 and 0.9, and then move by what they missed: after each observation the
level of the low end, on the normal scale, falls by `RATE` if the value was below it, else rises a ninth of that; the
high end likewise. So each side is missed by about one in ten in the long run, whatever comes (adaptive conformal
inference: Gibbs and Candes 2021), also while load rises, when those whose wait was longest have not ended yet and are
learnt of too late.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from lmdeploy_slo.prediction.backoff import BackoffDistribution, Context, context_of, log_ratio_support

RATE = 0.02
SIDE = 0.1
"""Share of observations on either side of the interval."""

PRIOR_SIGMA = 0.5
"""Spread of the logarithm of the ratio before anything was seen."""

LEAST_Z, MOST_Z = 1.0, 3.0
"""Between these distances from the median a level stays, on the normal scale. The least keeps it from stepping down
into the first of two humps in order to be wrong as often as it may."""

MAX_CONTEXTS, MAX_GROUPS = 1024, 512
_FINEST, _LARGEST_LOG_RATIO, _BINS = 0.05, 9.0, 120
_NORMAL = NormalDist()
_START = (_NORMAL.inv_cdf(SIDE), _NORMAL.inv_cdf(1.0 - SIDE))


class CalibratedDuration:
    """See the module. short_s: d, seconds, > 0. depth: length of every path of contexts. Memory is bounded."""

    __slots__ = ("_levels", "_ratios", "_short_s")

    def __init__(self, short_s: float, depth: int) -> None:
        ends, prior = log_ratio_support(_FINEST, _LARGEST_LOG_RATIO, _BINS, PRIOR_SIGMA)
        self._short_s = short_s
        self._ratios = BackoffDistribution(np.exp(ends), prior, depth, max_contexts=MAX_CONTEXTS)
        self._levels: OrderedDict[Context, list[float]] = OrderedDict()  # by group: of the two ends, as z

    def forecast(
        self, path: Sequence[Context], group: Context, base_s: float, limit_s: float | None = None
    ) -> tuple[float, float, float, float | None]:
        """(low, median, high, chance of at most limit_s), each duration >= 0; the chance is None without a limit."""
        cumulative = self._ratios.cumulative(path, group)
        low_z, high_z = self._levels.get(group, _START)
        levels = (_NORMAL.cdf(low_z), 0.5, _NORMAL.cdf(high_z))
        ratios = np.interp(levels, cumulative, self._ratios.support).tolist()
        short_s, unit_s = self._short_s, base_s + self._short_s
        low, median, high = (max(0.0, base_s + (ratio - 1.0) * unit_s) for ratio in ratios)
        chance = None
        if limit_s is not None:
            chance = min(1.0, float(np.interp((limit_s + short_s) / unit_s, self._ratios.support, cumulative)))
        return low, median, high, chance

    def observe(
        self,
        path: Sequence[Context],
        group: Context,
        base_s: float,
        value_s: float,
        told: tuple[float, float] | None,
        *,
        at_least: bool = False,
    ) -> None:
        """It took `value_s`, or was cut off there; `told` is the interval that was forecast for it, if one was."""
        unit_s = base_s + self._short_s
        self._ratios.observe(path, group, (value_s + self._short_s) / unit_s, at_least=at_least)
        if told is None or (at_least and value_s <= told[1]):
            return  # cut off there, it might have ended up within or above
        levels = self._of_group(group)
        levels[0] = -_bounded(-levels[0] + RATE * ((value_s < told[0]) - SIDE))
        levels[1] = _bounded(levels[1] + RATE * ((value_s > told[1]) - SIDE))

    def state(self) -> dict[str, Any]:
        """All that was learnt, as JSON can hold it."""
        levels = [[list(group), *levels] for group, levels in self._levels.items()]
        return {"ratios": self._ratios.state(), "levels": levels}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave; raises ValueError, with the levels unchanged, for anything else."""
        levels: OrderedDict[Context, list[float]] = OrderedDict()
        try:
            for group, low, high in state["levels"]:
                if not (LEAST_Z <= -low <= MOST_Z and LEAST_Z <= high <= MOST_Z):
                    raise ValueError(f"{(low, high)!r} are not the levels of an interval")
                levels[context_of(group)] = [float(low), float(high)]
            self._ratios.restore(state["ratios"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a calibrated duration: {error!r}") from error
        self._levels = levels

    def _of_group(self, group: Context) -> list[float]:
        levels = self._levels.get(group)
        if levels is None:
            if len(self._levels) >= MAX_GROUPS:
                self._levels.popitem(last=False)
            levels = self._levels[group] = list(_START)
        else:
            self._levels.move_to_end(group)
        return levels


def _bounded(z: float) -> float:
    return min(max(z, LEAST_Z), MOST_Z)
