"""The distribution of a number in a context, learnt one observation at a time, whole: any quantile can be asked for.

A context is a path from coarse to fine, such as all requests -> those of a task -> those with prompts of about this
length. Each context on it keeps a histogram, in which old observations fade. The estimate at depth d is that of depth
d - 1 taken as `PARENT_WEIGHT` observations, and what depth d saw itself (backing off, as in language models):

    F_0 = prior,   F_d(x) = (seen_d(<= x) + K F_{d-1}(x)) / (seen_d + K)

How deep to go is learnt as well: every depth is judged by the pinball loss of its 0.5 and 0.9 quantiles on what came
next, and the answer is the mixture of all depths, weighted as in `experts`. One group of contexts shares its weights.

A value known only to be larger than the one seen (an output cut at its limit) goes into the tail of the estimate in
force, in proportion (redistribution to the right: Efron 1967).

Knows nothing of requests, and of no clock. Memory is bounded: the contexts not updated for longest are forgotten.
Not thread-safe.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.prediction.experts import ExpertWeights, pinball_loss

Floats = npt.NDArray[np.float64]
Context = tuple[Hashable, ...]
"""Of strings and numbers, so that it can be written down."""

PARENT_WEIGHT = 10.0
MEMORY = 600.0
"""Observations after which one counts 1/e as much in its histogram as a new one."""

PRIOR_DEPTH_WEIGHT = 0.1
"""Of the prior alone at first; every other depth has 1, and holds the prior already for as long as it needs it."""

JUDGED_AT = (0.5, 0.9)
JUDGED_EVERY = 4
"""Of so many observations of a group one is judged by: judging costs twice what all the rest of learning does."""

MAX_CONTEXTS, MAX_GROUPS = 2048, 512

_RESCALE_AT = 1e12
_FORGOTTEN, _KEPT = 1e-30, 1e-6


class BackoffDistribution:
    """See the module.

    support: the values at the upper ends of the histogram's bins, increasing; support[0] is below every value.
    prior: cumulative probability at each of them, from 0 to 1, increasing. depth: length of every path, >= 1.
    """

    __slots__ = (
        "_capacity", "_depth", "_groups", "_mass", "_rows", "_start", "_start_weights", "_step", "_support",
        "_support_list", "_total",
    )  # fmt: skip

    def __init__(self, support: Floats, prior: Floats, depth: int, *, max_contexts: int = MAX_CONTEXTS) -> None:
        if len(support) != len(prior) or prior[0] != 0 or not math.isclose(prior[-1], 1.0):
            raise ValueError("the prior must rise from 0 to 1 over the support")
        if not 1 <= depth < max_contexts:
            raise ValueError(f"depth must be at least 1 and below max_contexts, got {depth} and {max_contexts}")
        self._support = support
        self._support_list: list[float] = support.tolist()
        self._depth = depth
        self._capacity = max_contexts
        self._rows: OrderedDict[Context, int] = OrderedDict()  # least recently updated first
        self._mass = np.zeros((64, len(support)))  # cumulative, by row; row 0 is the prior
        self._mass[0] = prior
        self._total = [0.0]
        self._step = [1.0]  # what an observation weighs now: it grows, which makes the old ones fade
        self._groups: OrderedDict[Context, ExpertWeights] = OrderedDict()
        self._start = [PRIOR_DEPTH_WEIGHT] + [1.0] * depth
        self._start_weights = ExpertWeights(self._start).weights

    @property
    def support(self) -> Floats:
        return self._support

    def cumulative(self, path: Sequence[Context], group: Context) -> Floats:
        """The probability of at most each value of the support, in the context at the end of `path`."""
        rows, share, rest = self._look_up(path)
        experts = self._groups.get(group)
        weights = self._start_weights if experts is None else experts.weights
        factors = [0.0] * len(weights)
        left = 0.0
        for d in range(self._depth, 0, -1):
            left += weights[d]
            factors[d] = share[d] * left
            left *= rest[d]
        factors[0] = left + weights[0]
        return np.asarray(np.dot(factors, self._mass.take(rows, axis=0)))

    def quantiles(self, path: Sequence[Context], group: Context, levels: Floats) -> Floats:
        """The values below which the shares `levels` (in (0, 1)) are expected."""
        return np.interp(levels, self.cumulative(path, group), self._support)

    def observe(
        self, path: Sequence[Context], group: Context, value: float, *, unit: float = 1.0, at_least: bool = False
    ) -> None:
        """`value` was seen in the context at the end of `path`. unit: what a unit of the value matters, for the loss.
        at_least: it would have been larger, had it not been cut there."""
        if at_least:
            cumulative = self.cumulative(path, group)
            below = float(np.interp(value, self._support, cumulative))
            tail = np.maximum(cumulative - below, 0.0)
            added: Floats = tail / tail[-1] if tail[-1] > 1e-9 else (self._support >= value).astype(np.float64)
            added[-1] = 1.0
            for row, step in self._grow(path):
                self._mass[row] += step * added
            return
        experts = self._group(group)
        if experts.due(JUDGED_EVERY):
            experts.charge(self._losses(path, value), unit)
        at = min(bisect_left(self._support_list, value), len(self._support_list) - 1)
        grown = self._grow(path)
        self._mass[[row for row, _ in grown], at:] += np.array([step for _, step in grown])[:, None]

    # -- across restarts ------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that was learnt, as JSON can hold it: of each context the bins that hold something, and what."""
        rows = list(self._rows.values())
        steps = np.array([self._step[row] for row in rows]).reshape(-1, 1)
        mass = np.diff(self._mass[rows] / steps, axis=1, prepend=0.0)
        held = mass > _KEPT
        bins, weights = np.nonzero(held)[1].tolist(), np.round(mass[held], 5).tolist()
        ends = np.cumsum(held.sum(axis=1)).tolist()
        contexts = [
            [list(context), bins[begin:end], weights[begin:end]]
            for context, begin, end in zip(self._rows, [0, *ends], ends, strict=False)
        ]
        groups = [[list(group), experts.state()] for group, experts in self._groups.items()]
        return {"bins": len(self._support), "depth": self._depth, "contexts": contexts, "groups": groups}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave; raises ValueError, with nothing changed, for anything else."""
        fresh = BackoffDistribution(self._support, self._mass[0].copy(), self._depth, max_contexts=self._capacity)
        try:
            if (state["bins"], state["depth"]) != (len(self._support), self._depth):
                raise ValueError("it is of other histograms")
            for context, bins, weights in state["contexts"]:
                mass = np.zeros(len(self._support))
                for at, weight in zip(bins, weights, strict=True):
                    if not (isinstance(at, int) and 0 <= at < len(mass) and 0 <= weight < _RESCALE_AT):
                        raise ValueError(f"{weight!r} cannot lie in bin {at!r}")
                    mass[at] = weight
                row = fresh._new_row(context_of(context))
                fresh._mass[row] = np.cumsum(mass)
                fresh._total[row] = float(fresh._mass[row, -1])
            for group, losses in state["groups"]:
                fresh._group(context_of(group)).restore(losses)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a learnt distribution: {error!r}") from error
        for name in ("_rows", "_mass", "_total", "_step", "_groups"):
            setattr(self, name, getattr(fresh, name))

    # -- inside ---------------------------------------------------------------

    def _look_up(self, path: Sequence[Context]) -> tuple[list[int], list[float], list[float]]:
        """By depth: the row, and the factors of its mass and of the depth above in the estimate."""
        rows, share, rest = [0], [1.0], [0.0]
        get, total, steps = self._rows.get, self._total, self._step
        for context in path:
            row = get(context)
            if row is None:
                rows.append(0)
                share.append(0.0)
                rest.append(1.0)
            else:
                prior_weight = PARENT_WEIGHT * steps[row]
                factor = 1.0 / (total[row] + prior_weight)
                rows.append(row)
                share.append(factor)
                rest.append(prior_weight * factor)
        return rows, share, rest

    def _losses(self, path: Sequence[Context], value: float) -> list[float]:
        """By depth: the pinball loss of what it would have said."""
        rows, share, rest = self._look_up(path)
        depths = self._depth + 1
        factors = [1.0] + [0.0] * self._depth
        table = factors.copy()
        for d in range(1, depths):
            kept = rest[d]
            factors = [kept * factor for factor in factors]
            factors[d] = share[d]
            table += factors
        estimates = np.array(table).reshape(depths, depths).dot(self._mass.take(rows, axis=0))
        support = self._support_list
        losses = [0.0] * depths
        for level in JUDGED_AT:
            for d, place in enumerate((estimates < level).sum(axis=1).tolist()):
                losses[d] += pinball_loss(value - support[place], level)
        return losses

    def _group(self, group: Context) -> ExpertWeights:
        experts = self._groups.get(group)
        if experts is None:
            if len(self._groups) >= MAX_GROUPS:
                self._groups.popitem(last=False)
            experts = self._groups[group] = ExpertWeights(self._start)
        else:
            self._groups.move_to_end(group)
        return experts

    def _grow(self, path: Sequence[Context]) -> list[tuple[int, float]]:
        """Counts one more observation in each context; (row, what it weighs there)."""
        grown = []
        for context in path:
            row = self._rows.get(context)
            if row is None:
                row = self._new_row(context)
            else:
                self._rows.move_to_end(context)
            step = self._step[row] * (1.0 + 1.0 / MEMORY)
            if step > _RESCALE_AT:
                scaled = self._mass[row] / step
                self._mass[row] = np.where(scaled > _FORGOTTEN, scaled, 0.0)
                self._total[row] /= step
                step = 1.0
            self._step[row] = step
            self._total[row] += step
            grown.append((row, step))
        return grown

    def _new_row(self, context: Context) -> int:
        if len(self._rows) >= self._capacity:
            _, row = self._rows.popitem(last=False)
            self._mass[row] = 0.0
            self._total[row], self._step[row] = 0.0, 1.0
        else:
            row = len(self._total)
            self._total.append(0.0)
            self._step.append(1.0)
            if row == len(self._mass):
                self._mass = np.concatenate([self._mass, np.zeros_like(self._mass)])
        self._rows[context] = row
        return row


def log_ratio_support(finest: float, reach: float, bins: int, sigma: float) -> tuple[Floats, Floats]:
    """For a distribution of ratios: logarithms at the ends of `bins` bins within +-`reach`, and a lognormal prior.

    The bins are finest at a ratio of 1, and much wider than `finest` only where the logarithm is. sigma: of the prior's
    logarithm. A ratio of 0 lies in the first bin.
    """
    stretch = math.log1p(reach / finest)
    at = np.linspace(-stretch, stretch, bins + 1)
    ends: Floats = np.sign(at) * finest * np.expm1(np.abs(at))
    return ends, smooth_prior([x / sigma for x in ends.tolist()])


def smooth_prior(z: Sequence[float]) -> Floats:
    """Cumulative probability of a standard normal at `z`, rising, from 0 at the first to 1 at the last: mixed with a
    little of everything, so that nothing is impossible."""
    normal = np.array([0.5 * math.erfc(-x / math.sqrt(2.0)) for x in z])
    prior = 0.999 * normal + 0.001 * np.linspace(0.0, 1.0, len(normal))
    prior[0], prior[-1] = 0.0, 1.0
    return np.asarray(prior)


def context_of(parts: Any) -> Context:
    """From what JSON makes of one; raises ValueError for anything else."""
    if not isinstance(parts, list) or not all(isinstance(part, (str, int)) for part in parts):
        raise ValueError(f"{parts!r} is not a context")
    return tuple(parts)
