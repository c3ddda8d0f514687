"""Weights of several forecasters by how they have been doing.

    weight ~ exp(-RATE x sum of losses above the least of the time, the old ones faded / the mean size of losses)

(exponential weights: Vovk 1990, Littlestone and Warmuth 1994). The losses are in any one unit; only their ratios count.
Of one observation no more than `MOST` mean losses are held against anybody: lengths and times have heavy tails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

RATE = 0.3
LOSS_MEMORY = 500.0
"""Losses after which one counts 1/e as much as a new one."""

MOST = 3.0

_WEYL = 0x9E3779B1  # about 2^32 over the golden ratio: multiples of it fall evenly (Weyl 1916)
_SCALE_RATE = 0.01  # of the running mean of losses


def pinball_loss(error: float, level: float) -> float:
    """Of a quantile at `level` that was missed by `error` = true - forecast (Koenker and Bassett 1978)."""
    return (level if error > 0 else level - 1.0) * error


class ExpertWeights:
    """See the module. `weights` sum to 1; at first they are in proportion to `prior`, each above 0."""

    __slots__ = ("_losses", "_scale", "_seen", "weights")

    def __init__(self, prior: Sequence[float]) -> None:
        self._losses = [-math.log(weight) / RATE for weight in prior]
        self._scale = 0.0
        self._seen = 0
        self.weights: list[float] = []
        self._weigh()

    def due(self, every: int) -> bool:
        """True on one in `every` calls, the first included, in no rhythm that observations could share."""
        self._seen += 1
        return ((self._seen - 1) * _WEYL & 0xFFFFFFFF) * every < 1 << 32

    def charge(self, losses: Sequence[float], unit: float = 1.0) -> None:
        """Each forecaster lost so much, in so large a unit, on the same observation."""
        mean = sum(losses) / len(losses) * unit
        self._scale = self._scale + _SCALE_RATE * (mean - self._scale) if self._scale else mean
        fade, by = 1.0 - 1.0 / LOSS_MEMORY, unit / max(self._scale, 1e-12)
        least = min(losses)
        self._losses = [
            fade * old + min((new - least) * by, MOST) for old, new in zip(self._losses, losses, strict=True)
        ]
        self._weigh()

    def state(self) -> list[float]:
        """Scale, number of calls of `due`, and the losses."""
        return [self._scale, self._seen, *(round(loss, 6) for loss in self._losses)]

    def restore(self, state: Sequence[float]) -> None:
        """Goes on from what `state` gave; raises ValueError for anything else."""
        if len(state) != 2 + len(self._losses) or state[0] < 0 or not all(map(math.isfinite, state)):
            raise ValueError(f"{state!r} are not the losses of {len(self._losses)} forecasters")
        self._scale, self._seen, self._losses = float(state[0]), int(state[1]), list(map(float, state[2:]))
        self._weigh()

    def _weigh(self) -> None:
        least = min(self._losses)
        weights = [math.exp(RATE * (least - loss)) for loss in self._losses]
        by = 1.0 / sum(weights)
        self.weights = [weight * by for weight in weights]
