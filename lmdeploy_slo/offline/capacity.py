"""How much load holds a target: the highest speedup, or the fewest instances, by bisection on simulated runs.

Attainment falls with load only on the whole: near the target a little more load may do a little better by chance. What
is found is a load that holds, with one just above it (by the tolerance, or by an instance) that does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.offline.parallel import Job, Trace

SPEEDUP_RANGE = (1 / 1024, 1024.0)
MOST_INSTANCES = 1024


class Vary(str, Enum):
    """What is looked for."""

    SPEEDUP = "speedup"  # the highest that holds
    INSTANCES = "instances"  # the fewest that hold


@dataclass(frozen=True, slots=True)
class Question:
    """`job` with its speedup or number of instances varied. target: attainment, above 0, at most 1. tolerance: of the
    speedup, relative, > 0. seeds: attainment is the mean over as many, counted from that of the job."""

    job: Job
    vary: Vary
    target: float
    tolerance: float = 0.02
    seeds: int = 1


@dataclass(slots=True)
class Capacity:
    """value: None where no load in range holds. attainment: there. runs: all that were made, in that order."""

    policy: str
    value: float | None = None
    attainment: float | None = None
    rate_rps: float | None = None
    runs: list[dict[str, Any]] = field(default_factory=list)


def find_capacity(question: Question, traces: Mapping[str, Trace]) -> Capacity:
    """Answers the question. Raises ConfigError where no request carries an objective, and what a run raises."""
    search = _Search(question, traces)
    value = search.highest_speedup() if question.vary is Vary.SPEEDUP else search.fewest_instances()
    found = Capacity(question.job.policy, value, runs=search.runs)
    if value is not None:
        found.attainment, found.rate_rps = search.attained[value], search.rates[value]
    return found


class _Search:
    def __init__(self, question: Question, traces: Mapping[str, Trace]) -> None:
        self._question = question
        self._traces = traces
        self.runs: list[dict[str, Any]] = []
        self.attained: dict[float, float] = {}
        self.rates: dict[float, float | None] = {}

    def holds(self, value: float) -> bool:
        """Whether the target is held at this speedup, or with so many instances."""
        job = self._question.job
        if self._question.vary is Vary.SPEEDUP:
            job = replace(job, load=replace(job.load, speedup=value))
        else:
            job = replace(job, fleet=replace(job.fleet, instances=int(value)))
        attained = []
        for seed in range(job.seed, job.seed + self._question.seeds):
            run = replace(job, seed=seed).run(self._traces)
            if run["slo_attainment"] is None:
                raise ConfigError("capacity needs requests with an objective: name one with --slo")
            attained.append(run["slo_attainment"])
            self.runs.append({**run, "instances": job.fleet.instances})
        rows = self._traces[job.trace][: job.load.limit]
        span_s = (rows[-1].arrival_s - rows[0].arrival_s) / job.load.speedup
        self.attained[value] = sum(attained) / len(attained)
        self.rates[value] = len(rows) / span_s if span_s > 0 else None
        return self.attained[value] >= self._question.target

    def highest_speedup(self) -> float | None:
        """Doubles or halves from 1 until the edge lies in between, then bisects on a logarithmic scale."""
        low, high = SPEEDUP_RANGE
        good, bad = 1.0, 1.0
        if self.holds(1.0):
            while good == bad or self.holds(bad):
                good, bad = bad, 2 * bad
                if bad > high:
                    return good
        else:
            while good == bad or not self.holds(good):
                good, bad = good / 2, good
                if good < low:
                    return None
        while bad / good > 1 + self._question.tolerance:
            middle = math.sqrt(good * bad)
            good, bad = (middle, bad) if self.holds(middle) else (good, middle)
        return good

    def fewest_instances(self) -> int | None:
        """Doubles from 1 until it holds, then bisects."""
        bad, good = 0, 1
        while not self.holds(good):
            bad, good = good, 2 * good
            if good > MOST_INSTANCES:
                return None
        while good - bad > 1:
            middle = (good + bad) // 2
            bad, good = (bad, middle) if self.holds(middle) else (middle, good)
        return good
