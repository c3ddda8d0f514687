"""What a client's hint is worth: the distribution of true length / `expected_output_tokens`, learnt from its hints.

Contexts, coarse to fine: all hints -> the client's -> those for this task and model -> hints within a
factor of 2 -> within a factor of 1.2. So a bias and a spread are learnt of a client, then of each of its tasks, and of
small hints apart from large ones. Before anything was seen a hint is as good as `PRIOR_SIGMA` says.
"""

from __future__ import annotations

import math

import numpy as np

from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.prediction.backoff import BackoffDistribution, Context, Floats, log_ratio_support

PRIOR_SIGMA = 0.3
"""Spread assumed of an unknown client's hints: sigma of the logarithm of true / hint."""

_LARGEST_LOG_RATIO = 8.0
_FINEST = 0.02  # bins of the log ratio: of about a tenth of this at 0, wider in proportion beyond it
_BINS = 140


class HintModel:
    """See the module. Lengths and hints in tokens, >= 1."""

    __slots__ = ("ratios",)

    def __init__(self) -> None:
        log_ratios, prior = log_ratio_support(_FINEST, _LARGEST_LOG_RATIO, _BINS, PRIOR_SIGMA)
        self.ratios = BackoffDistribution(np.exp(log_ratios), prior, depth=5)

    def quantiles(self, spec: RequestSpec, hint: float, levels: Floats) -> Floats:
        """Of the output length, at `levels`."""
        path = _path(spec, hint)
        return hint * self.ratios.quantiles(path, path[2], levels)

    def observe(self, spec: RequestSpec, hint: float, output_tokens: float, *, at_least: bool) -> None:
        path = _path(spec, hint)
        self.ratios.observe(path, path[2], output_tokens / hint, unit=hint, at_least=at_least)


def client_of(spec: RequestSpec) -> str:
    """Whose hint it is: who sent the request, else whom it says it asks for."""
    return str(spec.client) or spec.fairness_id


def _path(spec: RequestSpec, hint: float) -> tuple[Context, ...]:
    client, task, model = client_of(spec), spec.task_type, spec.model
    fine = int(4.0 * math.log2(hint))
    return (
        ("hint",),
        ("hint", client),
        ("hint", client, task, model),
        ("hint", client, task, model, 1, fine >> 2),
        ("hint", client, task, model, 4, fine),
    )
