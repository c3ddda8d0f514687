"""Coefficients of both latency models from measured durations: least squares under constraints.

Minimised is the sum of squared relative errors, sum w_i (row_i theta / s_i - 1)^2 with theta >= 0, so that a step of
5 ms counts as much as one of 500 ms and no model can predict a negative time. A point weighs the same however often it
was repeated, and the less the less its repeats agree: 1 / (1 + (e / LEAST_SIGMA)^2), e the standard error of its mean.

Outliers. A repeat far from the others of its point is set aside: it was disturbed. What is left is fitted with Huber's
weights (min(1, k sigma / |e_i|), sigma from the median absolute error, found in turn with theta), which bound the pull
of single values where there are no repeats, and still heed a point where all repeats agree and only the model is off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.core.latency_model import BilinearModel, StepModel
from lmdeploy_slo.core.model_range import ModelRange
from lmdeploy_slo.prediction.fit_errors import predicted_by_step
from lmdeploy_slo.prediction.observations import (
    Kind,
    Observation,
    bilinear_decode_rows,
    bilinear_prefill_rows,
    range_of,
    seconds_of,
    step_rows,
)

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

HUBER = 1.345
"""k above: 95 % as efficient as least squares where errors are normal."""

LEAST_SIGMA = 0.01
"""Errors this small are never taken for outliers: a model that fits better than that is not made better by it."""

_TO_SIGMA = 1.4826  # median absolute deviation of normal errors -> their sigma
_FAR = 5.0  # sigmas from the other repeats
_LEAST_FAR = 0.05  # and no less than this share
_FEWEST_REPEATS = 3  # fewer do not say which of them is off
_ROUNDS = 60
_CLOSE = 1e-10


@dataclass(frozen=True, slots=True)
class FittedModels:
    """Both models with what they rest on.

    bilinear: None where no batch of prompts, or no decoding, was measured by itself. kept, set_aside: the observations
    that were used, and those that were taken for disturbed. range: of those kept.
    """

    step: StepModel
    bilinear: BilinearModel | None
    kept: tuple[Observation, ...]
    set_aside: tuple[Observation, ...]
    range: ModelRange


def fit_models(observations: Sequence[Observation]) -> FittedModels:
    """Both models from the same observations. A coefficient of which they say nothing is 0: see the range.

    Raises ValueError without observations.
    """
    if not observations:
        raise ValueError("there is nothing to fit a model to")
    kept = ~disturbed(observations, fit_step(observations))
    used = [o for o, keep in zip(observations, kept, strict=True) if keep]
    step = fit_step(used)
    return FittedModels(
        step=step,
        bilinear=fit_bilinear(used),
        kept=tuple(used),
        set_aside=tuple(o for o, keep in zip(observations, kept, strict=True) if not keep),
        range=range_of(used),
    )


def fit_step(observations: Sequence[Observation]) -> StepModel:
    """The step model nearest to the observations, all of them used."""
    return StepModel(*_solve(step_rows(observations), observations))


def fit_bilinear(observations: Sequence[Observation]) -> BilinearModel | None:
    """The paper's model; steps in which prompts were computed beside decoding say nothing of it. None: see above."""
    prefill = [o for o in observations if o.kind is Kind.PREFILL]
    decode = [o for o in observations if o.kind is Kind.DECODE]
    if not prefill or not decode:
        return None
    a, b, c, d = _solve(bilinear_prefill_rows(prefill), prefill)
    e, f, g, h = _solve(bilinear_decode_rows(decode), decode)
    return BilinearModel((a, b, c, d), (e, f, g, h))


def disturbed(observations: Sequence[Observation], model: StepModel) -> Mask:
    """Which repeats lie far from the others of their point, each as a multiple of what the model says.

    Relative to the model because repeats of a point differ a little in what was computed.
    """
    ratios = seconds_of(observations) / np.maximum(predicted_by_step(model, observations), 1e-12)
    found: Mask = np.zeros(len(observations), dtype=bool)
    for own in points_of(observations).values():
        if len(own) >= _FEWEST_REPEATS:
            middle = float(np.median(ratios[own]))
            off = np.abs(ratios[own] - middle)
            found[own] = off > max(_FAR * _TO_SIGMA * float(np.median(off)), _LEAST_FAR * middle)
    return found


def points_of(observations: Sequence[Observation]) -> dict[str, list[int]]:
    """Point -> the numbers of its repeats. An observation without a name is a point of its own."""
    found: dict[str, list[int]] = {}
    for number, observation in enumerate(observations):
        found.setdefault(observation.point or f"#{number}", []).append(number)
    return found


def _solve(rows: Floats, observations: Sequence[Observation]) -> list[float]:
    """theta of the module's sum; 0 for what no row has."""
    seconds = seconds_of(observations)
    relative = rows / seconds[:, None]
    scale = np.sqrt(np.mean(relative**2, axis=0))
    present = scale > 0
    weights = np.ones(len(observations))
    for own in points_of(observations).values():
        weights[own] = 1 / len(own) / (1 + (_standard_error(seconds[own]) / LEAST_SIGMA) ** 2)
    theta = np.zeros(rows.shape[1])
    theta[present] = _huber(relative[:, present] / scale[present], weights) / scale[present]
    return [float(value) for value in theta]


def _standard_error(seconds: Floats) -> float:
    """Of the mean of a point's repeats, a fraction of it; 0 where there are too few to say. Heeds no outliers."""
    if len(seconds) < _FEWEST_REPEATS:
        return 0.0
    middle = float(np.median(seconds))
    return _TO_SIGMA * float(np.median(np.abs(seconds - middle))) / middle / math.sqrt(len(seconds))


def _huber(rows: Floats, weights: Floats) -> Floats:
    """Least squares of rows theta = 1 with theta >= 0, weights and Huber's weights."""
    from scipy.optimize import lsq_linear  # half a second to import

    theta = np.zeros(rows.shape[1])
    robust = np.ones(len(rows))
    for _ in range(_ROUNDS):
        root = np.sqrt(weights * robust)
        found = lsq_linear(rows * root[:, None], root, bounds=(0, np.inf), method="bvls", tol=1e-14).x
        found = np.maximum(found, 0.0)
        if np.allclose(found, theta, rtol=_CLOSE, atol=_CLOSE * float(np.max(found, initial=0.0))):
            break
        theta = found
        error = np.abs(rows @ theta - 1)
        sigma = max(_TO_SIGMA * float(np.median(error)), LEAST_SIGMA)
        robust = np.minimum(1.0, HUBER * sigma / np.maximum(error, 1e-300))
    return np.asarray(found)
