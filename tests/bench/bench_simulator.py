"""How fast the simulator is, how much memory it takes, and how many evaluations the planning time of `serve` buys.

    python tests/bench/bench_simulator.py [--traces DIR] [--requests 1000000] [--skip hour|million|budget ...]

hour: the whole hour of Azure's code and conversation traces of 2023, merged (azure2023_mixed.csv.gz), under fcfs,
slack-guard, and annealing at the default budget. million: so many generated requests under fcfs. budget: plans of
annealing bounded by 2 ms of wall time instead of a number, on the way through 1,500 requests at x2. Runs use one core.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lmdeploy_slo.config import ENV_TRACES_DIR
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.snapshot import EngineLimits, Snapshot
from lmdeploy_slo.offline.experiment import Fleet, Load, offered_requests, run_once
from lmdeploy_slo.offline.generated import generate_workload
from lmdeploy_slo.offline.simulation.requests import simulated_requests
from lmdeploy_slo.offline.simulator import PLAN_EVALUATIONS, PLAN_LATENCY_S, Simulator
from lmdeploy_slo.offline.slo_grammar import parse_slo_options
from lmdeploy_slo.offline.traces import TraceRow, read_traces
from lmdeploy_slo.prediction.profiles import load_profile
from lmdeploy_slo.scheduling.policy import Policy, SearchBudget, make_policy

PROFILE = "a100-qwen2.5-7b"
SLOS = parse_slo_options(["code=e2e:2000", "chat=ttft:1000,tpot:50"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--traces", type=Path, default=Path(os.environ.get(ENV_TRACES_DIR, ".")))
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--skip", nargs="*", default=[], choices=["hour", "million", "budget"])
    options = parser.parse_args()
    make_policy("annealing").warm_up()
    trace = options.traces / "azure2023_mixed.csv.gz"
    rows = read_traces([trace]) if trace.exists() else generate_workload(28_185)
    print(f"{len(rows):,} requests of {trace if trace.exists() else 'a generated workload'}, {PROFILE}")
    if "budget" not in options.skip:
        measure_budget(rows)
    if "hour" not in options.skip:
        for policy in ("fcfs", "slack-guard", "annealing"):
            measure_run(rows, policy)
    if "million" not in options.skip:
        measure_run(generate_workload(options.requests), "fcfs")


def measure_run(rows: Sequence[TraceRow], policy: str) -> None:
    model = load_profile(PROFILE).step_model
    load, fleet = Load(SLOS, length_noise=0.3), Fleet(model, model, EngineLimits())
    begun_s, cpu_s = time.perf_counter(), time.process_time()
    outcome = run_once(rows, load, fleet, policy, 0)
    wall_s, cpu_s = time.perf_counter() - begun_s, time.process_time() - cpu_s
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{policy:12s} {len(rows):>9,} requests: {cpu_s:7.1f} s CPU, {wall_s:7.1f} s wall, {outcome.plans:,} plans, "
        f"{outcome.evaluations:,} evaluations, attainment {outcome.run['slo_attainment']:.3f}, peak {peak_gb:.2f} GB"
    )


class Timed:
    """A policy whose plans are timed."""

    def __init__(self, inner: Policy) -> None:
        self._inner = inner
        self.name, self.wants_ticks = inner.name, inner.wants_ticks
        self.plans: list[tuple[float, int]] = []

    def plan(self, snapshot: Snapshot) -> Plan:
        begun_s = time.perf_counter()
        plan = self._inner.plan(snapshot)
        self.plans.append((time.perf_counter() - begun_s, plan.quality.evaluations))
        return plan

    def warm_up(self) -> None:
        self._inner.warm_up()


def measure_budget(rows: Sequence[TraceRow]) -> None:
    timed = Timed(make_policy("annealing", budget=SearchBudget(time_s=PLAN_LATENCY_S)))
    simulator = Simulator(timed, model=load_profile(PROFILE).step_model, limits=EngineLimits())
    simulator.run(simulated_requests(offered_requests(rows, Load(SLOS, 2.0, 1500, length_noise=0.3), 0)))
    used = np.array([evaluations for elapsed_s, evaluations in timed.plans if elapsed_s > 0.95 * PLAN_LATENCY_S])
    quartiles = ", ".join(f"{value:.0f}" for value in np.percentile(used, [25, 50, 75]))
    print(
        f"{1e3 * PLAN_LATENCY_S:g} ms buy {quartiles} evaluations (quartiles of the {len(used):,} of "
        f"{len(timed.plans):,} plans that use them up); the default is {PLAN_EVALUATIONS}"
    )


if __name__ == "__main__":
    main()
