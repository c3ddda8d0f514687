"""Many simulated runs side by side: traces x speedups x policies x placements x in-flight caps x seeds.

Two contenders are compared in pairs: under one seed they get the same requests at the same instants with the same
length hints, so the difference between them is taken seed by seed, and its confidence interval is that of the mean of
these differences (Student's t, 95 %). It tells what another draw of the hints would change, not what another trace
would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmdeploy_slo.offline.experiment import Fleet, Load
from lmdeploy_slo.offline.parallel import Job, Trace, Workers

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy with an in-flight cap and, where placements are compared, one of these."""

    policy: str
    max_batch_size: int
    placement: str | None = None  # None: the fleet's

    def __str__(self) -> str:
        return f"{self.name} at {self.max_batch_size}"

    @property
    def name(self) -> str:
        """Without the cap."""
        return self.policy if self.placement is None else f"{self.policy}/{self.placement}"


@dataclass(frozen=True, slots=True)
class Column:
    """What the contenders are compared on."""

    trace: str
    speedup: float


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its confidence interval; low and high are None for a single value."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Grid:
    """Every combination is run."""

    contenders: Sequence[Contender]
    columns: Sequence[Column]
    seeds: Sequence[int]

    def jobs(self, load: Load, fleet: Fleet) -> list[Job]:
        """In order of columns, contenders, seeds; `load.speedup` and the fleet's cap are those of the grid."""
        return [
            Job(
                column.trace,
                replace(load, speedup=column.speedup),
                replace(
                    fleet,
                    limits=replace(fleet.limits, max_batch_size=contender.max_batch_size),
                    placement=contender.placement or fleet.placement,
                ),
                contender.policy,
                seed,
            )
            for column in self.columns
            for contender in self.contenders
            for seed in self.seeds
        ]


class Comparison:
    """The runs of a grid, as entries of a result file with `trace` and `max_batch_size` in addition."""

    def __init__(self, grid: Grid, runs: Sequence[dict[str, Any]]) -> None:
        self.grid = grid
        self.runs = list(runs)
        keys = [(column, contender) for column in grid.columns for contender in grid.contenders for _ in grid.seeds]
        self._by_key: dict[tuple[Column, Contender], list[dict[str, Any]]] = {}
        for key, run in zip(keys, runs, strict=True):
            self._by_key.setdefault(key, []).append(run)

    def values(self, column: Column, contender: Contender, metric: Metric) -> list[float]:
        """One value per seed, without those that are missing."""
        values = [metric.of(run) for run in self._by_key[column, contender]]
        return [value for value in values if value is not None]

    def mean(self, column: Column, contender: Contender, metric: Metric) -> float | None:
        """Over the seeds; None where any is missing."""
        values = self.values(column, contender, metric)
        return sum(values) / len(values) if len(values) == len(self.grid.seeds) else None

    def difference(self, column: Column, contender: Contender, baseline: Contender, metric: Metric) -> Interval | None:
        """Contender less baseline, in pairs; None where a value is missing."""
        ours, theirs = self.values(column, contender, metric), self.values(column, baseline, metric)
        if len(ours) != len(self.grid.seeds) or len(theirs) != len(ours):
            return None
        return interval([a - b for a, b in zip(ours, theirs, strict=True)])

    def best(self, column: Column, metric: Metric, among: Sequence[Contender] | None = None) -> Contender | None:
        """The contender with the best mean; the first of equals, None where nobody has one."""
        means = [(c, self.mean(column, c, metric)) for c in (among or self.grid.contenders)]
        known = [(c, value) for c, value in means if value is not None]
        if not known:
            return None
        return (max if metric.more_is_better else min)(known, key=lambda pair: pair[1])[0]


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of a run."""

    name: str
    more_is_better: bool
    of: Callable[[Mapping[str, Any]], float | None]


ATTAINMENT = Metric("SLO attainment", True, lambda run: run["slo_attainment"])
MEAN_E2E_S = Metric(
    "E2E mean, s", False, lambda run: None if run["e2e_ms"]["mean"] is None else run["e2e_ms"]["mean"] / 1e3
)


def run_grid(
    grid: Grid, load: Load, fleet: Fleet, pool: Workers, on_done: Callable[[], None] | None = None
) -> Comparison:
    """Runs the grid. on_done: called after each run. Raises what a run raises."""
    jobs = grid.jobs(load, fleet)
    runs: list[dict[str, Any]] = [{}] * len(jobs)
    for position, run in pool.map(run_job, jobs):
        job = jobs[position]
        runs[position] = {"trace": job.trace, "max_batch_size": job.fleet.limits.max_batch_size, **run}
        if on_done is not None:
            on_done()
    return Comparison(grid, runs)


def run_job(job: Job, traces: Mapping[str, Trace]) -> dict[str, Any]:
    """`job.run` as a function of a module, which another process can be asked to call."""
    return job.run(traces)


def interval(values: Sequence[float]) -> Interval:
    """Mean of at least one value, and where it lies with a confidence of 95 % if the values are normal."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Interval(mean, None, None)
    from scipy.special import stdtrit  # the quantile of Student's t

    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    reach = float(stdtrit(len(values) - 1, 0.5 + CONFIDENCE / 2)) * math.sqrt(variance / len(values))
    return Interval(mean, mean - reach, mean + reach)
