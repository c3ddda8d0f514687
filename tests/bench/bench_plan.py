"""How long the static search takes on ten requests at the paper's parameters, and how good its plans are.

    python tests/bench/bench_plan.py [--seeds 100] [--requests 10]

Time: the warm kernel, one search a seed on a problem of its own that cannot be fully met, and the plain Python twin on
the same problem right after it, so that other load on the machine falls on both. Quality: how often the plan is the
best of all plans, and, where there are too many to try, its G beside that of a search of two million plans.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from lmdeploy_slo.scheduling.paper_setting import LENGTH_SIGMA, SCHEDULE, SLO_SCALE, draw_problem
from lmdeploy_slo.scheduling.static_planner import MAX_ENUMERATED, anneal, can_meet_all, enumerate_all, warm_up

sys.path.insert(0, str(Path(__file__).parents[1]))
import plain_static

LONG = replace(SCHEDULE, moves_per_level=32_000)


def measure_time(requests: int, seeds: int) -> None:
    kernel_s, twin_s, evaluations = [], [], []
    for seed in range(seeds):
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
    print(f"{requests} requests, {seeds} seeds, lengths sigma {LENGTH_SIGMA}, SLOs x {SLO_SCALE}, none fully met")
    print(f"  plans scored       {min(evaluations)} each")
    print(f"  kernel, median     {median_s * 1e3:.3f} ms, from {min(kernel_s) * 1e3:.3f} to {max(kernel_s) * 1e3:.3f}")
    print(f"  a plan             {median_s / min(evaluations) * 1e9:.1f} ns")
    print(f"  plain Python twin  {statistics.median(twin_s) * 1e3:.1f} ms")
    print(f"  ratio, median      {statistics.median(t / k for t, k in zip(twin_s, kernel_s)):.0f}")


def measure_quality(seeds: int) -> None:
    print("best of all plans reached")
    for requests in range(4, MAX_ENUMERATED + 1):
        reached = 0
        for seed in range(seeds):
            problem = draw_problem(requests, np.random.default_rng(seed))
            reached += anneal(problem, seed=seed).objective >= enumerate_all(problem).objective * (1 - 1e-12)
        print(f"  {requests:2} requests  {reached} of {seeds}")
    print("G beside a search of two million plans")
    for requests in (10, 12, 15, 20):
        shares = []
        for seed in range(seeds):
            problem = draw_problem(requests, np.random.default_rng(seed))
            long = anneal(problem, seed=seed + 1, schedule=LONG)
            shares.append(anneal(problem, seed=seed).objective / long.objective)
        reached = sum(share >= 1 - 1e-12 for share in shares)
        print(
            f"  {requests:2} requests  mean {statistics.mean(shares):.4f}, least {min(shares):.3f}, reached {reached}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--requests", type=int, default=10)
    arguments = parser.parse_args()
    warm_up()
    measure_time(arguments.requests, arguments.seeds)
    measure_quality(arguments.seeds)


if __name__ == "__main__":
    main()
