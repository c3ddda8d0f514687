"""What is still to come of a request that has generated k tokens and goes on.

Its length X is lognormal by the forecast, and now known to be above k:

    S = P(X > k),   quantile p of X given X > k = Q(1 - S (1 - p)),   Q the quantiles of X

The forecast is held until quantile 0.3 of that passes it, and then is that. The median would be the better guess of
the length, and makes the worse plans: it lets the planner stall a running request now, for time to be made up by
tokens that in half the cases never come (2 points of attainment, docs/prediction.md).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtr, ndtri

from lmdeploy_slo.core.snapshot import Rows

HELD_UNTIL = 0.3
UPPER_Z = 0.8
"""The new spread is that up to this many sigmas above the median: the upper of the lengths a plan is scored with."""

_UPPER_TAIL = float(ndtr(-UPPER_Z))


def revise_lognormal(running: Rows) -> None:
    """`output_tokens` and `length_sigma` in place, given `generated_tokens`, each row by itself.

    No request ends before its next token; one without a spread ends as forecast or with the next token.
    """
    known, median, sigma = running["generated_tokens"], running["output_tokens"], running["length_sigma"]
    z = np.log(np.maximum(known, 0.5) / median) / np.maximum(sigma, 1e-6)
    tail = np.maximum(ndtr(-z), 1e-300)
    middle = np.maximum(-ndtri(tail * (1.0 - HELD_UNTIL)), 0.0)
    upper = -ndtri(tail * _UPPER_TAIL)
    running["output_tokens"] = np.maximum(median * np.exp(sigma * middle), known + 1.0)
    running["length_sigma"] = sigma * (upper - middle) / UPPER_Z


def cap_length(running: Rows, at: int, most_tokens: int) -> None:
    """Row `at` in place: it ends with `most_tokens` at the latest, and so does the upper length it is planned with."""
    tokens = min(float(running["output_tokens"][at]), float(most_tokens))
    running["output_tokens"][at] = tokens
    room = math.log(max(most_tokens / tokens, 1.0)) / UPPER_Z
    running["length_sigma"][at] = min(float(running["length_sigma"][at]), room)
