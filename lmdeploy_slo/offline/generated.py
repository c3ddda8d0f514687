"""A generated workload in the shape of a recorded one: code completion and chat, one hour of a production service.

The parameters below were fitted to AzureLLMInferenceTrace_code and _conv of Azure/AzurePublicDataset
("Azure LLM Inference Trace 2023", CC-BY-4.0). Lengths are drawn from the quantiles of each task, independently of each
other: in the recording the logarithms of prompt and output correlate by -0.005 for code and 0.09 for chat. Chat arrives
as a Poisson process; its slow drift over the hour is left out. Code arrives in bursts: phases with requests and silent
phases, both exponential (told apart in the recording by gaps of more than 3 s), and within a burst gamma gaps, which
cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.offline.traces import TraceRow

_STREAM = 0x574F524B  # keeps these draws apart from others that start from the same seed

PROBABILITIES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
"""Where the quantiles of lengths are given."""


@dataclass(frozen=True, slots=True)
class _Task:
    """Quantiles of the lengths, tokens, at `PROBABILITIES`; rates in requests a second, phases in seconds."""

    name: str
    prompt_quantiles: tuple[int, ...]
    output_quantiles: tuple[int, ...]
    rate_rps: float  # while a phase with requests lasts
    gap_shape: float = 1.0  # of the gamma distribution of gaps: 1 is Poisson, smaller clusters
    burst_s: float | None = None  # mean length of a phase with requests; None: it never ends
    silence_s: float = 0.0  # mean length of a phase without


_TASKS = (
    _Task(
        "code",
        prompt_quantiles=(3, 17, 75, 147, 578, 1469, 2744, 5188, 7303, 7436, 7437, 7437),
        output_quantiles=(6, 6, 6, 7, 9, 13, 24, 55, 90, 251, 825, 1899),
        rate_rps=9.6,
        gap_shape=0.27,
        burst_s=12.8,
        silence_s=35.4,
    ),
    _Task(
        "chat",
        prompt_quantiles=(2, 29, 181, 207, 396, 1020, 1189, 2734, 4083, 4142, 6179, 14050),
        output_quantiles=(7, 16, 41, 54, 85, 129, 395, 424, 451, 601, 954, 1000),
        rate_rps=5.5,
    ),
)


def generate_workload(requests: int, seed: int = 0) -> list[TraceRow]:
    """`requests` rows at 8 a second on average, the same for the same arguments; the first is at 0.

    A longer workload of the same seed begins with the shorter one. Raises ConfigError for a count below 1 or a
    negative seed.
    """
    if requests < 1:
        raise ConfigError(f"a workload needs at least 1 request, got {requests}")
    if seed < 0:
        raise ConfigError(f"seed: must be 0 or more, got {seed}")
    drawn: list[tuple[float, int, int, str]] = []
    for number, task in enumerate(_TASKS):
        # One generator for each quantity, so that how many are drawn of one changes nothing in another.
        phases, gaps, prompts, outputs = (
            np.random.default_rng([_STREAM, seed, number, quantity]) for quantity in range(4)
        )
        arrivals = _arrivals_s(task, requests, phases, gaps)
        prompt_tokens = _lengths(task.prompt_quantiles, requests, prompts)
        output_tokens = _lengths(task.output_quantiles, requests, outputs)
        drawn.extend(
            (float(at_s), int(prompt), int(output), task.name)
            for at_s, prompt, output in zip(arrivals, prompt_tokens, output_tokens, strict=True)
        )
    drawn.sort()
    first_s = drawn[0][0]
    return [TraceRow(index, row[0] - first_s, row[1], row[2], row[3]) for index, row in enumerate(drawn[:requests])]


def azure_lengths() -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Task -> quantiles of (prompt, output) at `PROBABILITIES`, tokens."""
    return {task.name: (task.prompt_quantiles, task.output_quantiles) for task in _TASKS}


def azure_shares() -> dict[str, float]:
    """Task -> its share of the requests."""
    rates = {
        task.name: task.rate_rps * (1.0 if task.burst_s is None else task.burst_s / (task.burst_s + task.silence_s))
        for task in _TASKS
    }
    return {name: rate / sum(rates.values()) for name, rate in rates.items()}


def _lengths(quantiles: tuple[int, ...], count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draws by inverting the distribution function, straight between the quantiles on a logarithmic axis."""
    logarithms = np.interp(rng.random(count), PROBABILITIES, np.log(quantiles))
    return np.maximum(1, np.rint(np.exp(logarithms))).astype(np.int64)


def _arrivals_s(
    task: _Task, count: int, phases: np.random.Generator, gaps: np.random.Generator
) -> npt.NDArray[np.float64]:
    """The first `count` arrivals: gamma gaps on the clock of the phases with requests, silences put in between."""
    busy_s = np.cumsum(gaps.gamma(task.gap_shape, 1.0 / (task.rate_rps * task.gap_shape), count))
    if task.burst_s is None:
        return busy_s
    # The workload begins inside a silence as often as the stationary process is silent; exponential phases have no
    # memory, so one that is cut is drawn like a whole one.
    lead_s = phases.exponential(task.silence_s) * (phases.random() < task.silence_s / (task.burst_s + task.silence_s))
    bursts = int(2 * busy_s[-1] / task.burst_s) + 64  # more than enough to cover busy_s
    lengths_s = phases.exponential(1.0, (bursts, 2)) * (task.burst_s, task.silence_s)
    burst_ends_s = np.cumsum(lengths_s[:, 0])
    silence_before_s = lead_s + np.concatenate([[0.0], np.cumsum(lengths_s[:, 1])])
    return np.asarray(busy_s + silence_before_s[np.searchsorted(burst_ends_s, busy_s)])
