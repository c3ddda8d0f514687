"""The estimate of `prediction.backoff` written out: lists of weighted observations, summed anew for every question."""

from __future__ import annotations

from collections.abc import Sequence

from lmdeploy_slo.prediction.backoff import (
    JUDGED_AT,
    JUDGED_EVERY,
    MEMORY,
    PARENT_WEIGHT,
    PRIOR_DEPTH_WEIGHT,
    Context,
)
from lmdeploy_slo.prediction.experts import ExpertWeights, pinball_loss


class PlainBackoff:
    """Of values on the support alone, without cut ones, and of contexts that are never forgotten."""

    def __init__(self, support: Sequence[float], prior: Sequence[float], depth: int) -> None:
        self.support = list(support)
        self.prior = list(prior)
        self.start = [PRIOR_DEPTH_WEIGHT] + [1.0] * depth
        self.seen: dict[Context, list[float]] = {}
        self.experts: dict[Context, ExpertWeights] = {}

    def by_depth(self, path: Sequence[Context]) -> list[list[float]]:
        """The cumulative distribution at each depth."""
        estimates = [self.prior]
        for context in path:
            values = self.seen.get(context, [])
            weights = [(1 + 1 / MEMORY) ** -age for age in range(len(values) - 1, -1, -1)]
            total = sum(weights)
            above = estimates[-1]
            estimates.append(
                [
                    (sum(w for w, v in zip(weights, values, strict=True) if v <= end) + PARENT_WEIGHT * above[at])
                    / (total + PARENT_WEIGHT)
                    for at, end in enumerate(self.support)
                ]
            )
        return estimates

    def cumulative(self, path: Sequence[Context], group: Context) -> list[float]:
        estimates = self.by_depth(path)
        weights = self.experts.get(group, ExpertWeights(self.start)).weights
        return [sum(w * e[at] for w, e in zip(weights, estimates, strict=True)) for at in range(len(self.support))]

    def observe(self, path: Sequence[Context], group: Context, value: float) -> None:
        experts = self.experts.setdefault(group, ExpertWeights(self.start))
        if experts.due(JUDGED_EVERY):
            losses = []
            for estimate in self.by_depth(path):
                quantiles = [self.support[sum(e < level for e in estimate)] for level in JUDGED_AT]
                losses.append(
                    sum(pinball_loss(value - q, level) for q, level in zip(quantiles, JUDGED_AT, strict=True))
                )
            experts.charge(losses)
        for context in path:
            self.seen.setdefault(context, []).append(value)
