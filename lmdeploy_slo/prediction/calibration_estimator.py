"""The five coefficients of the step model, refined by what the engine was seen to need.

An observation is a stretch of engine time with the work done in it:

    duration = c0 steps + p1 prefill_tokens + p2 prefill_square + d1 sequence_steps + d2 context_tokens

**Units.** Each coefficient is looked for as a multiple of what it was believed to be (of what is typical, where that
was 0), so that all columns are seconds and comparable. An observation weighs by its own length: a relative error of
`NOISE` is what is taken for granted, and `NOISE_S` beside it for what event loops add.

**Recursive least squares with directional forgetting** (Cao and Schwartz, 2000): new knowledge replaces old knowledge
of the same combination of coefficients only. An hour without prompts does not make the cost of a prompt uncertain, so
what is hardly excited does not wander. What was believed at first counts as a weak observation that is never used up:
coefficients that nothing says anything about keep their proportion to the rest.

**Robust.** A residual counts in full up to `HUBER` times the recent typical one, then only by its sign (Huber): a
pause of the process moves nothing by more than an ordinary step does. Where residuals are of one sign, or much larger
than they used to be, the engine has changed, and is followed quickly: few observations are remembered, and above all
the common factor of all coefficients is doubted, since an engine seldom changes in one of them alone. No coefficient
moves by more than `LARGEST_STEP` of itself at once, and none is ever negative: the estimate is projected, in the metric
of what is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.core.latency_model import StepModel

Floats = npt.NDArray[np.float64]

NOISE, NOISE_S = 0.02, 0.0005
"""Relative and absolute error (seconds) of an observation that is expected of a model that is right."""

HUBER = 1.5

MEMORY, MEMORY_OF_CHANGE = 100.0, 10.0
"""Observations of the same kind that are remembered, in quiet times and while the engine is changing."""

FADING, COMMON_CHANGE = 0.95, 0.05
"""While the engine is changing: so much of all that is known outlives an observation, and by so much all coefficients
together are taken to change from one to the next."""

CHANGE, SURPRISE = 0.6, 2.0
"""The engine counts as changing where the mean residual is at least so much of the mean absolute one (they are of one
sign), or the mean absolute one so many times what it used to be."""

PACE, SLOW_PACE = 0.1, 0.01
"""Weight of the newest observation in the running means of residuals, and in what the absolute one used to be."""

LARGEST_STEP = 0.1
SMALLEST_SHARE = 0.2
"""A coefficient near 0 may move as far as one of this share of what is typical."""

SPREAD, COMMON_SPREAD = 0.3, 0.5
"""How wrong coefficients are taken to be at first: each by itself, and all by the same factor."""

LEAK = 0.01
"""Of the first knowledge that is believed anew with each observation."""

_LEAK = LEAK / SPREAD**2

_TYPICAL_C0_S = 0.01
_C0_PER_P1, _P2_PER_P1, _D1_PER_P1, _D2_PER_C0 = 220.0, 2.9e-5, 0.5, 7e-6  # as in `prediction.fitting`


@dataclass(frozen=True, slots=True)
class Work:
    """What an engine did in `duration_s` > 0 seconds: passes, prompt tokens computed, the sum of their
    x (x + 2 ctx), tokens of decoding sequences, and the sum of the context of each of these tokens."""

    duration_s: float
    steps: float
    prefill_tokens: float
    prefill_square: float
    sequence_steps: float
    context_tokens: float


class StepEstimator:
    """See the module. prior: what is believed at first; all zeros are taken for an engine nothing is known of."""

    def __init__(self, prior: StepModel) -> None:
        self.prior = prior
        believed = np.array(astuple(prior))
        self._unit = _units(prior)
        self._shape: Floats = believed / self._unit  # 1, or 0 where the prior is 0
        self._value: Floats = self._shape.copy()
        self._information = self._first_information()
        self._model = prior
        self._residual = 0.0  # running means, in units of the noise expected
        self._absolute = self._usual = 1.0
        self.slowness = 1.0
        self.updates = 0

    @property
    def model(self) -> StepModel:
        """The coefficients as they are believed now."""
        return self._model

    def expected_s(self, work: Work) -> float:
        """How long this work should have taken."""
        model = self._model
        return (
            model.c0 * work.steps
            + model.p1 * work.prefill_tokens
            + model.p2 * work.prefill_square
            + model.d1 * work.sequence_steps
            + model.d2 * work.context_tokens
        )

    def update(self, work: Work) -> None:
        """Learns from an observation; some tens of microseconds."""
        expected_s = self.expected_s(work)
        noise_s = math.hypot(NOISE * expected_s, NOISE_S)
        residual = (work.duration_s - expected_s) / noise_s
        share = self._weigh(residual)
        counts = (work.steps, work.prefill_tokens, work.prefill_square, work.sequence_steps, work.context_tokens)
        columns = np.array(counts, dtype=np.float64)
        columns *= self._unit
        self._follow_slowness(work.duration_s, float(columns @ self._shape))
        columns /= noise_s

        memory = self._memory
        # What is forgotten lies in the direction of what is learnt.
        information = self._information
        seen = information @ columns
        known = float(columns @ seen)
        if known > 0:
            seen *= math.sqrt(share / (known * memory))
            information -= seen[:, None] * seen
        pull = columns * (share * residual) + _LEAK * (self.slowness * self._shape - self._value)
        columns *= math.sqrt(share)
        information += columns[:, None] * columns
        if memory == MEMORY_OF_CHANGE:
            information *= FADING
            common = information @ self._value
            common /= math.sqrt(1 / COMMON_CHANGE**2 + float(common @ self._value))
            information -= common[:, None] * common
        information.flat[::6] += _LEAK  # the diagonal
        self._move(self._solved(pull))
        self.updates += 1

    def state(self) -> dict[str, Any]:
        """For `restore`; JSON."""
        return {
            "prior": list(astuple(self.prior)),
            "value": self._value.tolist(),
            "information": self._information.tolist(),
            "slowness": self.slowness,
            "updates": self.updates,
        }

    def restore(self, state: Mapping[str, Any]) -> bool:
        """Goes on from a state; False, with nothing changed, where that was learnt from another prior.

        Raises ValueError, TypeError or KeyError for what is not a state.
        """
        if [float(c) for c in state["prior"]] != list(astuple(self.prior)):
            return False
        value, information = np.array(state["value"], dtype=float), np.array(state["information"], dtype=float)
        slowness, updates = float(state["slowness"]), int(state["updates"])
        if value.shape != (5,) or information.shape != (5, 5) or not slowness > 0 or updates < 0:
            raise ValueError("not the state of five coefficients")
        if not (np.all(np.isfinite(value)) and np.all(value >= 0) and np.all(np.isfinite(information))):
            raise ValueError("coefficients must be finite and >= 0")
        if np.max(np.abs(information - information.T)) > 1e-6 * np.max(np.abs(information)):
            raise ValueError("the information must be symmetric")
        np.linalg.cholesky(information)  # LinAlgError, a ValueError, where it is not positive
        self._value, self._information = value, information
        self.slowness, self.updates = slowness, updates
        self._model = self._as_model()
        return True

    # -- inside ---------------------------------------------------------------

    def _first_information(self) -> Floats:
        covariance = COMMON_SPREAD**2 * np.outer(self._shape, self._shape) + SPREAD**2 * np.eye(5)
        return np.asarray(np.linalg.inv(covariance), dtype=np.float64)

    def _solved(self, pull: Floats) -> Floats:
        """The step to take. Should rounding ever have worn the information out, it begins afresh from here."""
        try:
            step = np.asarray(np.linalg.solve(self._information, pull), dtype=np.float64)
        except np.linalg.LinAlgError:
            step = np.full(5, np.nan)
        if not math.isfinite(sum(step.tolist())):
            self._information = self._first_information()
            return np.zeros(5)
        return step

    @property
    def _memory(self) -> float:
        changing = abs(self._residual) > CHANGE * self._absolute or self._absolute > SURPRISE * self._usual
        return MEMORY_OF_CHANGE if changing else MEMORY

    def _weigh(self, residual: float) -> float:
        """How much of an observation counts, and the running means with it."""
        bound = 3 * self._absolute
        self._absolute = max(1.0, self._absolute + PACE * (min(abs(residual), bound) - self._absolute))
        self._residual += PACE * (min(max(residual, -bound), bound) - self._residual)
        self._usual += SLOW_PACE * (self._absolute - self._usual)
        largest = HUBER * self._absolute
        return 1.0 if abs(residual) <= largest else largest / abs(residual)

    def _follow_slowness(self, duration_s: float, believed_s: float) -> None:
        if believed_s > 0:
            ratio = duration_s / believed_s
            now = self.slowness
            self.slowness = now + PACE / 2 * (min(max(ratio, now / 1.25), now * 1.25) - now)

    def _move(self, step: Floats) -> None:
        target = self._value + step
        if min(target.tolist()) < 0:
            target = _projected(target, self._information)
            step = target - self._value
        least = SMALLEST_SHARE * self.slowness
        excess = max(
            abs(by) / (LARGEST_STEP * max(value, least))
            for by, value in zip(step.tolist(), self._value.tolist(), strict=True)
        )
        self._value = target if excess <= 1 else np.maximum(0.0, self._value + step / excess)
        self._model = self._as_model()

    def _as_model(self) -> StepModel:
        return StepModel(*(self._value * self._unit).tolist())


def _units(prior: StepModel) -> Floats:
    """What one of each coefficient is: the prior's, or what is typical beside the others."""
    p1 = prior.p1 or prior.c0 / _C0_PER_P1 or _TYPICAL_C0_S / _C0_PER_P1
    c0 = prior.c0 or p1 * _C0_PER_P1
    return np.array([c0, p1, prior.p2 or _P2_PER_P1 * p1, prior.d1 or _D1_PER_P1 * p1, prior.d2 or _D2_PER_C0 * c0])


def _projected(target: Floats, information: Floats) -> Floats:
    """The nearest point without a negative coordinate, in the metric of the information; what was put to 0 stays 0."""
    covariance = np.linalg.inv(information)
    zero: list[int] = []
    point = target
    while point.min() < -1e-12 and len(zero) < len(target):
        zero.append(int(np.argmin(point)))
        columns = covariance[:, zero]
        point = target - columns @ np.linalg.solve(columns[zero], target[zero])
        point[zero] = 0.0
    return np.maximum(point, 0.0)
