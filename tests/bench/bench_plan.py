"""How long the static search takes on ten requests at the paper's parameters, and how good its plans are.

    python tests/bench/bench_plan.py [--seeds 100] [--first-seed 0] [--requests 10] [--json FILE]
                                     [--cp-sat SECONDS [--cp-sat-seeds 10]]

Time: the warm kernels, one search a seed on a problem of its own that cannot be fully met, and the plain Python twin on
the same problem right after it, so that other load on the machine falls on both. Quality: how often the plan is the
best of all plans, and, where there are too many to try, its G beside that of the best of three searches of two million
plans each. --cp-sat asks OR-Tools' CP-SAT (`pip install ortools`) for a plan with a higher G than the best of both,
for so long on the first problems of each size: a plan it finds counts as the best, and where it shows that there is
none, the best is proven to be.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lmdeploy_slo.offline.results import write_json
from lmdeploy_slo.scheduling.paper_setting import LENGTH_SIGMA, SCHEDULE, SLO_SCALE, draw_problem
from lmdeploy_slo.scheduling.static_model import StaticPlan, StaticProblem, score, weigh
from lmdeploy_slo.scheduling.static_planner import MAX_ENUMERATED, anneal, can_meet_all, enumerate_all, warm_up

sys.path.insert(0, str(Path(__file__).parents[1]))
import plain_static

SIZES = (10, 12, 15, 20)
LONG_RUNS, LONG_MOVES = 3, 2_000_000
LEVELS = 63
"""Temperatures of the schedule."""


@dataclass
class Quality:
    """G relative to the best plan known, over the seeds. improved, proven: by CP-SAT, of so many that it was asked."""

    requests: int
    mean: float
    least: float
    reached: int
    within_one_percent: int
    median_ms: float
    asked: int = 0
    improved: int = 0
    proven: int = 0


def measure_time(requests: int, seeds: range) -> dict[str, float]:
    kernel_s, twin_s, evaluations = [], [], []
    for seed in seeds:
        problem = draw_problem(requests, np.random.default_rng(seed), unless=can_meet_all)
        plan = anneal(problem, seed=seed)
        begun_at_s = time.perf_counter()
        twin = plain_static.plan(problem, seed)
        twin_s.append(time.perf_counter() - begun_at_s)
        kernel_s.append(plan.elapsed_s)
        evaluations.append(plan.evaluations)
        if (twin.met, twin.evaluations) != (plan.met, plan.evaluations):
            raise SystemExit(f"seed {seed}: the twin found another plan")
    median_s = statistics.median(kernel_s)
    ratio = statistics.median(t / k for t, k in zip(twin_s, kernel_s))
    print(f"{requests} requests, {len(seeds)} seeds, lengths sigma {LENGTH_SIGMA}, SLOs x {SLO_SCALE}, none fully met")
    print(f"  plans scored       from {min(evaluations)} to {max(evaluations)}")
    print(f"  kernels, median    {median_s * 1e3:.3f} ms, from {min(kernel_s) * 1e3:.3f} to {max(kernel_s) * 1e3:.3f}")
    print(f"  a plan             {median_s / statistics.median(evaluations) * 1e9:.1f} ns")
    print(f"  plain Python twin  {statistics.median(twin_s) * 1e3:.1f} ms, {ratio:.0f} times the kernels")
    return {"median_ms": median_s * 1e3, "least_evaluations": min(evaluations), "twin_ratio": ratio}


def measure_optimum(seeds: range) -> dict[int, int]:
    print("best of all plans reached")
    reached = {}
    for requests in range(4, MAX_ENUMERATED + 1):
        reached[requests] = 0
        for seed in seeds:
            problem = draw_problem(requests, np.random.default_rng(seed))
            reached[requests] += anneal(problem, seed=seed).objective >= enumerate_all(problem).objective * (1 - 1e-12)
        print(f"  {requests:2} requests  {reached[requests]} of {len(seeds)}", flush=True)
    return reached


def measure_quality(requests: int, seeds: range, cp_sat_s: float, cp_sat_seeds: int) -> Quality:
    effort = max(1.0, (requests / 10) ** 2)  # so much longer is every search of so many requests
    long = replace(SCHEDULE, moves_per_level=round(LONG_MOVES / LEVELS / effort))
    shares, times_ms = [], []
    quality = Quality(requests, 0, 0, 0, 0, 0)
    for seed in seeds:
        problem = draw_problem(requests, np.random.default_rng(seed))
        ours = anneal(problem, seed=seed)
        searches = [anneal(problem, seed=seed + 1 + run, schedule=long) for run in range(LONG_RUNS)]
        best = max((ours, *searches), key=lambda plan: plan.objective)
        objective = best.objective
        if quality.asked < cp_sat_seeds and cp_sat_s:
            quality.asked += 1
            better, proven = ask_cp_sat(problem, best, cp_sat_s)
            quality.improved += better > objective * (1 + 1e-9)
            quality.proven += proven
            objective = max(objective, better)
        shares.append(ours.objective / objective)
        times_ms.append(ours.elapsed_s * 1e3)
    quality.mean, quality.least = statistics.mean(shares), min(shares)
    quality.reached = sum(share >= 1 - 1e-9 for share in shares)
    quality.within_one_percent = sum(share >= 0.99 for share in shares)
    quality.median_ms = statistics.median(times_ms)
    told = f"  {requests:2} requests  mean {quality.mean:.5f}, least {quality.least:.4f}, reached {quality.reached}"
    told += f", within 1 % {quality.within_one_percent} of {len(seeds)}, {quality.median_ms:.2f} ms"
    if quality.asked:
        told += f"; CP-SAT: {quality.improved} better, {quality.proven} proven of {quality.asked}"
    print(told, flush=True)
    return quality


def ask_cp_sat(problem: StaticProblem, best: StaticPlan, limit_s: float) -> tuple[float, bool]:
    """(the highest G found, per second; whether that is proven to be the highest).

    Maximizes met T - m sum, with m and T those of the best plan known: above 0 for the plans with a higher G alone.
    Times are whole microseconds there; what is found is scored again as every plan.
    """
    from ortools.sat.python import cp_model

    tables, n, size = weigh(problem), len(problem.requests), problem.largest_batch
    tick = round(1e-6 / tables.tick_s)
    run = np.rint(tables.run_time / tick).astype(int)
    limit = np.where(tables.limit < 0, -1, np.minimum(tables.limit // tick, 10**12))
    batches = min(n, -(-n // size) + 3)  # a few more than are needed, if all were full
    horizon = int(run[size].sum())
    model = cp_model.CpModel()
    waits = [model.new_int_var(0, horizon, f"wait{k}") for k in range(batches)]
    sizes = [[model.new_bool_var(f"size{k}_{b}") for b in range(size + 1)] for k in range(batches)]
    entries, met, e2e = [], [], []
    of_batch: list[list[Any]] = [[] for _ in range(batches)]
    for k in range(batches):
        model.add_exactly_one(sizes[k])
        if k:
            model.add_implication(sizes[k - 1][0], sizes[k][0])  # empty ones last
    for r in range(n):
        mine = []
        meets = model.new_bool_var(f"met{r}")
        time_of = model.new_int_var(0, 2 * horizon, f"e2e{r}")
        for k in range(batches):
            for b in range(1, size + 1):
                here = model.new_bool_var(f"at{r}_{k}_{b}")
                model.add_implication(here, sizes[k][b])
                model.add(time_of >= waits[k] + int(run[b, r])).only_enforce_if(here)
                if k + 1 < batches:
                    model.add(waits[k + 1] >= waits[k] + int(run[b, r])).only_enforce_if(here)
                if limit[b, r] < 0:
                    model.add_bool_or(here.negated(), meets.negated())
                else:
                    model.add(waits[k] <= int(limit[b, r])).only_enforce_if(here, meets)
                mine.append(here)
                of_batch[k].append(here)
        model.add_exactly_one(mine)
        entries.append(mine)
        met.append(meets)
        e2e.append(time_of)
    for k in range(batches):
        model.add(sum(of_batch[k]) == sum(b * sizes[k][b] for b in range(size + 1)))
        if k + 1 < batches:
            model.add(waits[k + 1] >= waits[k])
    model.add(waits[0] == 0)
    known = round(best.sum_e2e_s * 1e6)
    model.maximize(known * sum(met) - best.met * sum(e2e))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = limit_s
    solver.parameters.num_workers = 2
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return 0.0, False
    chosen = [[r for r in range(n) if any(solver.value(v) for v in entries[r][k * size : k * size + size])]
              for k in range(batches)]  # fmt: skip
    count, total = score(tables, [batch for batch in chosen if batch])
    return count / (total * tables.tick_s), status == cp_model.OPTIMAL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--cp-sat", type=float, default=0.0, metavar="SECONDS", help="for each problem; 0: do not ask")
    parser.add_argument("--cp-sat-seeds", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    warm_up()
    document: dict[str, Any] = {"seeds": [seeds.start, seeds.stop - 1]}
    document["time"] = measure_time(arguments.requests, seeds)
    document["optimum_reached"] = measure_optimum(seeds)
    print(f"G beside the best of {LONG_RUNS} searches of {LONG_MOVES:,} plans")
    document["quality"] = [
        asdict(measure_quality(requests, seeds, arguments.cp_sat, arguments.cp_sat_seeds)) for requests in SIZES
    ]
    if arguments.json:
        write_json(arguments.json, document)


if __name__ == "__main__":
    main()
