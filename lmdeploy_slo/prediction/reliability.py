"""Probabilities that come true: how often did what was told with this probability happen?

Knots lie on the log-odds scale; a probability is shared between the two around it. Each knot holds how many were told
about that much, and how many of those happened, the old ones fading; what is told is that share, with the probability
itself counting as `PRIOR_WEIGHT` of them, interpolated between the knots.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

from lmdeploy_slo.prediction.backoff import Context, context_of

KNOTS = tuple(range(-5, 6))
"""Log-odds, from 0.7 % to 99.3 %; beyond them a probability counts as that of the last."""

PRIOR_WEIGHT = 10.0
MEMORY = 500.0
"""Of one knot: observations after which one counts 1/e as much as a new one."""

MAX_GROUPS = 512


class Reliability:
    """See the module. Groups are corrected apart; memory is bounded."""

    __slots__ = ("_groups",)

    def __init__(self) -> None:
        self._groups: OrderedDict[Context, list[list[float]]] = OrderedDict()  # of each knot: told, happened

    def calibrated(self, group: Context, probability: float) -> float:
        """`probability`, in [0, 1], corrected."""
        knots = self._groups.get(group)
        if knots is None:
            return probability
        at, share = _place(probability)
        low, high = (_excess(knots[k], KNOTS[k]) for k in (at, at + 1))
        return min(max(probability + (1.0 - share) * low + share * high, 0.0), 1.0)

    def observe(self, group: Context, probability: float, happened: bool) -> None:
        """What was told with this probability, before it was corrected, did or did not happen."""
        knots = self._groups.get(group)
        if knots is None:
            if len(self._groups) >= MAX_GROUPS:
                self._groups.popitem(last=False)
            knots = self._groups[group] = [[0.0, 0.0] for _ in KNOTS]
        else:
            self._groups.move_to_end(group)
        at, share = _place(probability)
        for knot, weight in ((knots[at], 1.0 - share), (knots[at + 1], share)):
            fade = 1.0 - weight / MEMORY
            knot[0] = knot[0] * fade + weight
            knot[1] = knot[1] * fade + weight * happened

    def state(self) -> list[Any]:
        """All that was learnt, as JSON can hold it."""
        return [[list(group), [[round(x, 6) for x in knot] for knot in knots]] for group, knots in self._groups.items()]

    def restore(self, state: Any) -> None:
        """Goes on from what `state` gave; raises ValueError, with nothing changed, for anything else."""
        groups: OrderedDict[Context, list[list[float]]] = OrderedDict()
        try:
            for group, knots in state:
                counts = [[float(told), float(happened)] for told, happened in knots]
                if len(counts) != len(KNOTS) or not all(0 <= b <= a < math.inf for a, b in counts):
                    raise ValueError(f"{knots!r} are not the counts of {len(KNOTS)} knots")
                groups[context_of(group)] = counts
        except (TypeError, KeyError) as error:
            raise ValueError(f"not how often forecasts came true: {error!r}") from error
        self._groups = groups


def _place(probability: float) -> tuple[int, float]:
    """The knot below a probability, and how far it is on to the next one, 0 to 1."""
    if probability <= 0.0:
        return 0, 0.0
    if probability >= 1.0:
        return len(KNOTS) - 2, 1.0
    odds = min(max(math.log(probability / (1.0 - probability)), KNOTS[0]), KNOTS[-1])
    at = min(int(odds - KNOTS[0]), len(KNOTS) - 2)
    return at, odds - KNOTS[at]


def _excess(knot: list[float], log_odds: float) -> float:
    """By how much more often than it says that happens which is told with the knot's probability."""
    told, happened = knot
    own = 1.0 / (1.0 + math.exp(-log_odds))
    return (happened + PRIOR_WEIGHT * own) / (told + PRIOR_WEIGHT) - own
