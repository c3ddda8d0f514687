"""How many tokens a request will generate.

A client's hint is taken at its word (capped by `max_new_tokens`). Without one, the forecast is the mean of the
logarithm of what requests of the same (task, model) generated lately, starting from a stated prior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.core.snapshot import Rows

HINT_SIGMA = 0.3
"""Spread assumed of a client's hint: sigma of the logarithm of true / hint."""

PRIOR_TOKENS = 128.0
PRIOR_SIGMA = 1.0
PRIOR_WEIGHT = 8.0
"""What is believed of a task before anything of it was seen: a lognormal length, worth so many observations."""

MEMORY = 500.0
"""Observations after which an old one counts 1/e as much as a new one."""


@dataclass(frozen=True, slots=True)
class LengthForecast:
    """tokens: predicted output length, >= 1. sigma: spread of its logarithm, >= 0."""

    tokens: float
    sigma: float


class LengthPredictor(Protocol):
    """Forecasts output lengths and learns from those seen. Pure: equal histories give equal forecasts."""

    def predict(self, spec: RequestSpec) -> LengthForecast: ...

    def observe(self, spec: RequestSpec, output_tokens: int) -> None:
        """A request of this spec generated `output_tokens` and ended by itself."""
        ...

    def revise(self, running: Rows) -> None:
        """Raises `output_tokens` in place where a request has outlived its forecast."""
        ...


@dataclass(slots=True)
class _LogMoments:
    weight: float = PRIOR_WEIGHT
    mean: float = math.log(PRIOR_TOKENS)
    variance: float = PRIOR_SIGMA**2

    def update(self, value: float) -> None:
        self.weight = min(self.weight + 1.0, MEMORY)
        delta = value - self.mean
        self.mean += delta / self.weight
        self.variance += (delta * (value - self.mean) - self.variance) / self.weight


class TaskLengthPredictor:
    """See the module. Memory grows with the number of (task, model) pairs only."""

    def __init__(self) -> None:
        self._by_task: dict[tuple[str, str], _LogMoments] = {}

    def predict(self, spec: RequestSpec) -> LengthForecast:
        cap = float(spec.max_new_tokens)
        if spec.expected_output_tokens is not None:
            return LengthForecast(min(max(1.0, float(spec.expected_output_tokens)), cap), HINT_SIGMA)
        moments = self._by_task.get((spec.task_type, spec.model), _LogMoments())
        return LengthForecast(min(max(1.0, math.exp(moments.mean)), cap), math.sqrt(moments.variance))

    def observe(self, spec: RequestSpec, output_tokens: int) -> None:
        key = (spec.task_type, spec.model)
        if key not in self._by_task:
            self._by_task[key] = _LogMoments()
        self._by_task[key].update(math.log(max(1, output_tokens)))

    def revise(self, running: Rows) -> None:
        generated = running["generated_tokens"]
        outlived = generated >= running["output_tokens"]
        # A lognormal forecast that was outlived: about half a sigma more of what there is.
        longer = generated * (1.0 + 0.5 * running["length_sigma"]) + 1.0
        running["output_tokens"] = np.where(outlived, longer, running["output_tokens"])
