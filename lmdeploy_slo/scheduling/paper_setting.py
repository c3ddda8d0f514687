"""The parameters of Huang et al. (arXiv 2504.14966) for the static model, in one place.

As recalled, not verified against the paper's text: the annealing parameters, the objectives of code and chat, the batch
size and the coefficients, which are those of a slow GPU. Ours: the spread of the lengths, and how much tighter the
objectives are made so that no order meets them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lmdeploy_slo.core.latency_model import BilinearModel
from lmdeploy_slo.core.slo import Slo
from lmdeploy_slo.scheduling.static_model import StaticProblem, StaticRequest


@dataclass(frozen=True, slots=True)
class AnnealingSchedule:
    """From temperature `hot`, times `cooling` after `moves_per_level` moves, while above `cold`.

    hot > cold > 0, 0 < cooling < 1, moves_per_level >= 1; else ValueError.
    """

    hot: float = 500.0
    cold: float = 20.0
    cooling: float = 0.95
    moves_per_level: int = 100

    def __post_init__(self) -> None:
        if not self.hot > self.cold > 0 or not 0 < self.cooling < 1 or self.moves_per_level < 1:
            raise ValueError(f"needs hot > cold > 0, 0 < cooling < 1 and moves_per_level >= 1, got {self}")


@dataclass(frozen=True, slots=True)
class Task:
    """A kind of request: lognormal lengths with these medians, tokens, and its objectives."""

    prompt_median: float
    output_median: float
    slo: Slo


SCHEDULE = AnnealingSchedule()
"""63 levels, so 6,300 moves."""

MAX_BATCH_SIZE = 4

LATENCY = BilinearModel(
    prefill=(0.1e-3, 5.7e-3, 0.01e-3, 43.67e-3),
    decode=(0.0002e-3, 0.275e-3, 0.00088e-3, 15.85e-3),
)

CODE = Task(prompt_median=104, output_median=339, slo=Slo(e2e_s=30.0))
CHAT = Task(prompt_median=150, output_median=280, slo=Slo(ttft_s=10.0, tpot_s=0.05))

LENGTH_SIGMA = 0.7
"""Of the logarithm of every length."""

SLO_SCALE = 0.5
"""Ten requests take about 25 s, so that at half of these objectives most draws cannot be fully met."""


def draw_problem(
    requests: int,
    rng: np.random.Generator,
    *,
    slo_scale: float = SLO_SCALE,
    unless: Callable[[StaticProblem], bool] = lambda problem: False,
) -> StaticProblem:
    """So many requests (>= 1), code and chat with equal chances; drawn again while `unless` is true of them."""
    while True:
        chosen = [CODE if code else CHAT for code in rng.random(requests) < 0.5]
        problem = StaticProblem(tuple(_draw_request(task, rng, slo_scale) for task in chosen), MAX_BATCH_SIZE, LATENCY)
        if not unless(problem):
            return problem


def _draw_request(task: Task, rng: np.random.Generator, slo_scale: float) -> StaticRequest:
    prompt = rng.lognormal(math.log(task.prompt_median), LENGTH_SIGMA)
    output = rng.lognormal(math.log(task.output_median), LENGTH_SIGMA)
    return StaticRequest(max(1, round(prompt)), max(1, round(output)), task.slo.scaled(slo_scale))
