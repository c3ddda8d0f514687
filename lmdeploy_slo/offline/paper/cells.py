"""Cells of the paper's setting: one engine, its instances, a batch size and a load, under one scheduler or another.

All schedulers of a cell get the same requests with the same length hints. The engine is one of static batches, or the
persistent batch of the simulator with the policies that `serve` has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lmdeploy_slo.core.slo import NO_SLO
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.offline.experiment import Fleet, Load, offered_requests, run_once
from lmdeploy_slo.offline.paper import setting
from lmdeploy_slo.offline.paper.batches import Served, fcfs, serve
from lmdeploy_slo.offline.paper.workload import Pairs, draw_rows
from lmdeploy_slo.offline.traces import TraceRow
from lmdeploy_slo.scheduling.static_model import StaticProblem
from lmdeploy_slo.scheduling.static_planner import anneal

ENGINES = ("static", "persistent")
ARRIVALS = ("at once", "Poisson")
SCHEDULERS = ("fcfs", "annealing", "shortest")
"""`fcfs` as vLLM and LMDeploy serve; `annealing` as this project does; `shortest` as it would do without SLOs, for the
mean E2E alone: about the least there is with these hints."""


@dataclass(frozen=True, slots=True)
class Cell:
    """load: requests at once, or Poisson arrivals in multiples of capacity."""

    engine: str
    arrivals: str
    instances: int
    batch_size: int
    load: float

    @property
    def family(self) -> str:
        return f"{self.engine}, {self.arrivals}, {self.instances} instance{'s' if self.instances > 1 else ''}"

    @property
    def seeds(self) -> tuple[int, ...]:
        return setting.AT_ONCE_SEEDS if self.arrivals == "at once" else setting.POISSON_SEEDS


@dataclass(frozen=True, slots=True)
class Result:
    """Of one run, over all its requests. makespan_s: from the first arrival to the last end."""

    attainment: float
    mean_e2e_s: float
    p99_e2e_s: float
    by_task: dict[str, float]
    makespan_s: float


def all_cells() -> Iterator[Cell]:
    """Every cell of the setting, family by family."""
    for engine in ENGINES:
        for arrivals in ARRIVALS:
            loads = setting.AT_ONCE if arrivals == "at once" else setting.LOADS
            for instances in setting.INSTANCES:
                for batch_size in setting.BATCH_SIZES:
                    for load in loads:
                        yield Cell(engine, arrivals, instances, batch_size, load)


def capacity_rps(engine: str, batch_size: int, chat: Pairs | None = None) -> float:
    """Requests a second of one instance that is never idle, under FCFS."""
    rows = draw_rows(setting.CAPACITY_REQUESTS, setting.CAPACITY_SEED, chat=chat)
    return len(rows) / _run(engine, rows, "fcfs", setting.CAPACITY_SEED, batch_size, 1).makespan_s


def run_cell(cell: Cell, scheduler: str, seed: int, capacity_rps: float, chat: Pairs | None = None) -> Result:
    """One run of a cell under one of `SCHEDULERS`. capacity_rps, chat: see the function and `draw_rows`."""
    if cell.arrivals == "at once":
        rows = draw_rows(round(cell.load), seed, chat=chat)
    else:
        rate_rps = cell.load * cell.instances * capacity_rps
        rows = draw_rows(setting.POISSON_REQUESTS, seed, rate_rps=rate_rps, chat=chat)
    return _run(cell.engine, rows, scheduler, seed, cell.batch_size, cell.instances)


def _run(engine: str, rows: list[TraceRow], scheduler: str, seed: int, batch_size: int, instances: int) -> Result:
    load = Load(slos=setting.SLOS, length_noise=setting.LENGTH_NOISE)
    if engine == "static":
        offered = offered_requests(rows, load, seed)

        def planner(problem: StaticProblem) -> Sequence[Sequence[int]]:
            if scheduler == "fcfs":
                return fcfs(problem)
            if scheduler == "shortest":
                problem = replace(problem, requests=tuple(replace(r, slo=NO_SLO) for r in problem.requests))
            return anneal(problem, seed=seed).batches

        hold_back = scheduler != "fcfs"
        served = serve(offered, planner, setting.STATIC_MODEL, batch_size, instances=instances, hold_back=hold_back)
        makespan_s = max(request.due_s + one.e2e_s for request, one in zip(offered, served, strict=True))
        return _result(served, makespan_s)
    limits = EngineLimits(max_batch_size=batch_size)
    fleet = Fleet(
        setting.STEP_MODEL,
        setting.STEP_MODEL,
        limits,
        instances,
        plan_evaluations=setting.PLAN_EVALUATIONS,
        placement="least-work",
    )
    outcome = run_once(rows, load, fleet, {"shortest": "sjf"}.get(scheduler, scheduler), seed)
    served = [
        Served(record.task, record.timing.e2e_s or 0.0, record.timing.ttft_s or 0.0, bool(record.slo_met))
        for record in outcome.records
    ]
    return _result(served, outcome.run["duration_s"])


def _result(served: Sequence[Served], makespan_s: float) -> Result:
    e2e_s = np.array([one.e2e_s for one in served])
    tasks = sorted({one.task for one in served})
    return Result(
        attainment=float(np.mean([one.met for one in served])),
        mean_e2e_s=float(e2e_s.mean()),
        p99_e2e_s=float(np.percentile(e2e_s, 99)),
        by_task={task: float(np.mean([one.met for one in served if one.task == task])) for task in tasks},
        makespan_s=makespan_s,
    )
