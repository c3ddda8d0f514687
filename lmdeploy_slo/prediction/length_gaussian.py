"""Output lengths as in the paper: normal, with a mean and a variance for each (task, model), whatever the prompt.

    X ~ N(mean, variance) given X > 1/2, rounded

Starts from a stated prior; old observations fade. A hint is taken at its word. For comparison, and for tasks of which
nothing but a mean and a spread is worth learning; `length.TaskLengthPredictor` foretells better (docs/prediction.md).

Source: Huang et al., "SLO-Aware Scheduling for Large Language Model Inferences", arXiv 2504.14966.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.core.snapshot import Rows
from lmdeploy_slo.prediction.length_forecast import LEVELS, LengthForecast, forecast_of
from lmdeploy_slo.prediction.length_remaining import revise_lognormal

PRIOR_MEAN = 200.0
PRIOR_DEVIATION = 200.0
PRIOR_WEIGHT = 8.0
"""What is believed of a task before anything of it was seen, tokens, and how many observations that is worth."""

MEMORY = 600.0
"""Observations after which an old one counts 1/e as much as a new one."""

HINT_SIGMA = 0.3
"""Spread assumed of a client's hint: sigma of the logarithm of true / hint."""

MAX_TASKS = 1024

_LEVELS = np.array(LEVELS)
_Z = ndtri(_LEVELS)


@dataclass(slots=True)
class _Moments:
    weight: float = PRIOR_WEIGHT
    mean: float = PRIOR_MEAN
    variance: float = PRIOR_DEVIATION**2

    def update(self, value: float) -> None:
        self.weight = min(self.weight + 1.0, MEMORY)
        delta = value - self.mean
        self.mean += delta / self.weight
        self.variance += (delta * (value - self.mean) - self.variance) / self.weight


class GaussianLengthPredictor:
    """See the module. Memory is bounded: the (task, model) pairs not seen for longest are forgotten."""

    def __init__(self) -> None:
        self._tasks: OrderedDict[tuple[str, str], _Moments] = OrderedDict()

    def predict(self, spec: RequestSpec) -> LengthForecast:
        if spec.expected_output_tokens is not None:
            lengths = float(spec.expected_output_tokens) * np.exp(HINT_SIGMA * _Z)
        else:
            moments = self._tasks.get((spec.task_type, spec.model), _Moments())
            deviation = max(math.sqrt(max(moments.variance, 0.0)), 1e-3)
            above_half = ndtr((moments.mean - 0.5) / deviation)
            lengths = moments.mean - deviation * ndtri(above_half * (1.0 - _LEVELS))
        return forecast_of(np.clip(np.ceil(lengths - 0.5), 1.0, spec.max_new_tokens).tolist())

    def observe(self, spec: RequestSpec, output_tokens: int) -> None:
        key = (spec.task_type, spec.model)
        if key not in self._tasks and len(self._tasks) >= MAX_TASKS:
            self._tasks.popitem(last=False)
        self._tasks.setdefault(key, _Moments()).update(float(max(1, output_tokens)))
        self._tasks.move_to_end(key)

    def revise(self, running: Rows) -> None:
        revise_lognormal(running)

    def state(self) -> dict[str, Any]:
        """All that was learnt, as JSON can hold it."""
        return {"tasks": [[*key, m.weight, m.mean, m.variance] for key, m in self._tasks.items()]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave; raises ValueError, with nothing changed, for anything else."""
        tasks: OrderedDict[tuple[str, str], _Moments] = OrderedDict()
        try:
            for task, model, weight, mean, variance in state["tasks"]:
                if not (weight > 0 and variance >= 0 and math.isfinite(weight + mean + variance)):
                    raise ValueError(f"{(weight, mean, variance)} are not weight, mean and variance")
                tasks[str(task), str(model)] = _Moments(float(weight), float(mean), float(variance))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not what a length predictor learnt: {error!r}") from error
        self._tasks = tasks
