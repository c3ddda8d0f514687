"""Made-up workloads: tasks with their shares and lengths, and an arrival process. Presets say where theirs come from.

The same arguments give the same rows. Each quantity has a random stream of its own, so that a longer workload begins
with the shorter one, and changing the lengths of a task does not move anybody's arrival.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.offline.generated import PROBABILITIES, azure_lengths, azure_shares
from lmdeploy_slo.offline.traces import TraceRow

_STREAM = 0x4D495845  # keeps these draws apart from others that start from the same seed

Ints = npt.NDArray[np.int64]


class Lengths(Protocol):
    """A distribution of token counts, each >= 1."""

    def draw(self, count: int, random: np.random.Generator) -> Ints: ...


@dataclass(frozen=True, slots=True)
class Lognormal:
    """median: tokens, >= 1. sigma: of the logarithm, >= 0; else ConfigError."""

    median: float
    sigma: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.median) and self.median >= 1 and math.isfinite(self.sigma) and self.sigma >= 0):
            raise ConfigError(f"lengths need a median of at least 1 and a sigma of 0 or more, got {self}")

    def draw(self, count: int, random: np.random.Generator) -> Ints:
        return _whole(self.median * np.exp(self.sigma * random.standard_normal(count)))


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Tokens at `PROBABILITIES`; straight in between, on a logarithmic axis."""

    tokens: tuple[int, ...]

    def draw(self, count: int, random: np.random.Generator) -> Ints:
        return _whole(np.exp(np.interp(random.random(count), PROBABILITIES, np.log(self.tokens))))


@dataclass(frozen=True, slots=True)
class Uniform:
    """Whole numbers from `low` to `high`, both possible."""

    low: int
    high: int

    def draw(self, count: int, random: np.random.Generator) -> Ints:
        return random.integers(self.low, self.high, count, endpoint=True)


@dataclass(frozen=True, slots=True)
class TaskMix:
    """share: relative to those of the other tasks, > 0."""

    share: float
    prompt: Lengths
    output: Lengths


@dataclass(frozen=True, slots=True)
class Arrivals:
    """A renewal process with gamma gaps. rate_rps: requests per second, > 0. cv: coefficient of variation of the gaps,
    > 0: 1 is Poisson, more is bursty, less is regular. Else ConfigError."""

    rate_rps: float
    cv: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate_rps) and self.rate_rps > 0 and math.isfinite(self.cv) and self.cv > 0):
            raise ConfigError(f"arrivals need a rate and a coefficient of variation above 0, got {self}")

    def draw(self, count: int, random: np.random.Generator) -> npt.NDArray[np.float64]:
        """Instants in seconds, the first at 0."""
        shape = 1 / self.cv**2
        gaps = random.gamma(shape, 1 / (self.rate_rps * shape), max(0, count - 1))
        return np.concatenate([[0.0], np.cumsum(gaps)])[:count]


@dataclass(frozen=True, slots=True)
class Preset:
    """tasks and a rate that suits them; source: where they come from."""

    tasks: Mapping[str, TaskMix]
    rate_rps: float
    source: str


PRESETS: dict[str, Preset] = {
    "azure": Preset(
        {
            task: TaskMix(azure_shares()[task], Quantiles(prompt), Quantiles(output))
            for task, (prompt, output) in azure_lengths().items()
        },
        8.0,
        "AzureLLMInferenceTrace_code and _conv of Azure/AzurePublicDataset (2023, CC-BY-4.0): one hour of a production "
        "service; see generated.py",
    ),
    "paper": Preset(
        {
            "code": TaskMix(0.5, Lognormal(101, 0.85), Lognormal(350, 0.41)),
            "chat": TaskMix(
                0.5,
                Quantiles((1, 4, 8, 11, 20, 53, 232, 950, 1613, 3011, 3788, 3973)),
                Quantiles((1, 6, 27, 53, 149, 304, 488, 733, 872, 1010, 1147, 2384)),
            ),
        },
        1.0,
        "the two datasets of Huang et al. (arXiv 2504.14966), half each. code: Python-Code-23k-ShareGPT, a lognormal "
        "fit (of maximum likelihood) to the 30 requests of class codegen in EfficientServe's mixed sample "
        "(chiahao-huang/EfficientServe, Apache-2.0). chat: ShareGPT_Vicuna_unfiltered, quantiles of the 25,964 "
        "different length pairs in vidur_opt_scheduler's processed traces (AKafakA/vidur_opt_scheduler, MIT)",
    ),
    "classification": Preset(
        {"classify": TaskMix(1.0, Quantiles(azure_lengths()["chat"][0]), Uniform(1, 4))},
        20.0,
        "online classification: a label of 1 to 4 tokens, all equally likely (assumed), for texts as long as the chat "
        "prompts of the Azure trace above",
    ),
}


def generate(tasks: Mapping[str, TaskMix], arrivals: Arrivals, requests: int, seed: int = 0) -> list[TraceRow]:
    """`requests` rows; each belongs to a task by its share, independently of all others.

    Raises ConfigError for a count below 1, a negative seed, no task, and a share that is not positive.
    """
    if requests < 1:
        raise ConfigError(f"a workload needs at least 1 request, got {requests}")
    if seed < 0:
        raise ConfigError(f"seed: must be 0 or more, got {seed}")
    at_s = arrivals.draw(requests, _random(seed, "arrivals"))
    names, drawn = draw_tasks({name: mix.share for name, mix in tasks.items()}, requests, seed)
    prompts = np.zeros(requests, dtype=np.int64)
    outputs = np.zeros(requests, dtype=np.int64)
    for number, name in enumerate(names):
        own = np.flatnonzero(drawn == number)
        prompts[own] = tasks[name].prompt.draw(len(own), _random(seed, f"prompt {name}"))
        outputs[own] = tasks[name].output.draw(len(own), _random(seed, f"output {name}"))
    columns = (at_s.tolist(), prompts.tolist(), outputs.tolist(), drawn.tolist())
    return [
        TraceRow(index, at, prompt, output, names[number])
        for index, (at, prompt, output, number) in enumerate(zip(*columns, strict=True))
    ]


def draw_tasks(shares: Mapping[str, float], requests: int, seed: int) -> tuple[list[str], Ints]:
    """(names, the number of each request's task among them); raises ConfigError for shares that are not positive."""
    if not shares or not all(math.isfinite(share) and share > 0 for share in shares.values()):
        raise ConfigError(f"a workload needs tasks with positive shares, got {dict(shares)}")
    edges = np.cumsum(list(shares.values())) / sum(shares.values())
    drawn = np.searchsorted(edges, _random(seed, "tasks").random(requests), side="right")
    return list(shares), np.minimum(drawn, len(shares) - 1).astype(np.int64)


def parse_task(text: str) -> tuple[str, TaskMix]:
    """`NAME=share:S,prompt:MEDIAN/SIGMA,output:MEDIAN/SIGMA`; share may be left out (1). Raises ConfigError."""
    name, equals, body = text.partition("=")
    values: dict[str, str] = {}
    for part in body.split(","):
        key, colon, value = part.partition(":")
        if not colon or key.strip() not in ("share", "prompt", "output") or key.strip() in values:
            equals = ""
        values[key.strip()] = value
    try:
        if not equals or not name.strip():
            raise ValueError
        mix = TaskMix(
            float(values.get("share", "1")), _parse_lengths(values["prompt"]), _parse_lengths(values["output"])
        )
    except (ValueError, KeyError):
        raise ConfigError(
            f"--task {text!r}: expected NAME=share:S,prompt:MEDIAN/SIGMA,output:MEDIAN/SIGMA, tokens and the sigma of "
            "their logarithm"
        ) from None
    return name.strip(), mix


def parse_arrivals(text: str, rate_rps: float) -> Arrivals:
    """`poisson` or `gamma:CV` at that rate; raises ConfigError."""
    kind, colon, value = text.partition(":")
    if kind == "poisson" and not colon:
        return Arrivals(rate_rps)
    try:
        if kind != "gamma":
            raise ValueError
        return Arrivals(rate_rps, float(value))
    except ValueError:
        raise ConfigError(f"--arrivals {text!r}: expected poisson, or gamma:CV such as gamma:2.5") from None


def renumbered(rows: Sequence[TraceRow]) -> list[TraceRow]:
    """The rows by arrival, their places counted from 0."""
    return [replace(row, index=index) for index, row in enumerate(sorted(rows, key=lambda row: row.arrival_s))]


def _parse_lengths(text: str) -> Lognormal:
    median, _, sigma = text.partition("/")
    return Lognormal(float(median), float(sigma))


def _whole(values: npt.NDArray[np.float64]) -> Ints:
    return np.maximum(1, np.rint(values)).astype(np.int64)


def _random(seed: int, quantity: str) -> np.random.Generator:
    return np.random.default_rng([_STREAM, seed, *quantity.encode()])
