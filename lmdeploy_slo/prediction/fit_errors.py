"""How far a model is off what was measured, in the figures that reports and profile files carry.

With s a measured and p a predicted duration: relative error e = p / s - 1; MAPE = mean |e|; worst = the largest |e|;
R2 = 1 - sum (s - p)^2 / sum (s - mean s)^2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.core.latency_model import BilinearModel, StepModel
from lmdeploy_slo.prediction.observations import (
    Kind,
    Observation,
    bilinear_decode_rows,
    bilinear_prefill_rows,
    seconds_of,
    step_rows,
)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ErrorFigures:
    """See the module; mape, median and worst are fractions. r2: None where all durations are equal."""

    count: int
    r2: float | None
    mape: float
    median: float
    worst: float


def error_figures(measured_s: Floats, predicted_s: Floats) -> ErrorFigures | None:
    """None where nothing was measured. Measured durations are > 0."""
    if not len(measured_s):
        return None
    relative = np.abs(predicted_s / measured_s - 1)
    spread = float(np.sum((measured_s - measured_s.mean()) ** 2))
    r2 = 1 - float(np.sum((measured_s - predicted_s) ** 2)) / spread if spread > 0 else None
    return ErrorFigures(len(measured_s), r2, float(relative.mean()), float(np.median(relative)), float(relative.max()))


def predicted_by_step(model: StepModel, observations: Sequence[Observation]) -> Floats:
    """Seconds, one per observation."""
    theta = np.array([model.c0, model.p1, model.p2, model.d1, model.d2])
    return np.asarray(step_rows(observations) @ theta)


def predicted_by_bilinear(model: BilinearModel, observations: Sequence[Observation]) -> Floats:
    """Seconds, one per observation; nan where prompts are computed beside decoding, of which the model says nothing."""
    predicted = np.full(len(observations), np.nan)
    for kind, rows, coefficients in (
        (Kind.PREFILL, bilinear_prefill_rows, model.prefill),
        (Kind.DECODE, bilinear_decode_rows, model.decode),
    ):
        own = [number for number, o in enumerate(observations) if o.kind is kind]
        predicted[own] = rows([observations[number] for number in own]) @ np.array(coefficients)
    return predicted


def errors_by_kind(observations: Sequence[Observation], predicted_s: Floats) -> Mapping[str, ErrorFigures]:
    """Kind -> figures, and "all" of all; what was not measured, or not predicted, is left out."""
    measured_s = seconds_of(observations)
    known = np.isfinite(predicted_s)
    kinds = np.array([o.kind.value for o in observations], dtype=object)
    found = {}
    for name in (*(kind.value for kind in Kind), "all"):
        own = known if name == "all" else known & (kinds == name)
        figures = error_figures(measured_s[own], predicted_s[own])
        if figures is not None:
            found[name] = figures
    return found
