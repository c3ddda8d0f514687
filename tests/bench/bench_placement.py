"""Which placement meets most SLOs, what it costs to plan for many engines, and how fast many engines are simulated.

    python tests/bench/bench_placement.py [--traces DIR] [--only scale|table|affinity|cost|minutes ...]
        [--instances 4,16,64] [--json OUT]

Setting: Azure's 2023 code and conversation traces merged (azure2023_mixed.csv.gz), code 2 s E2E, chat 1 s TTFT and 50
ms TPOT, length noise 0.3, policy annealing with 100 evaluations a plan, 256 in flight, one seed.

scale: 24,000 requests, 4 instances at x4 against 1 at x1. table: every placement on several fleets at several loads;
load 1 is x1 for each a100-qwen2.5-7b, and as much more or less for other engines as the trace's engine time is less or
more on them. affinity: Mooncake's trace (mooncake_synthetic_trace.jsonl.gz) with a prefix cache. cost: rounds of
planning at 64 instances with 256 running each and 5,000 waiting in all. minutes: 64 instances over ten minutes of
generated requests. One core; a cell of the table takes seconds to a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmdeploy_slo.config import ENV_TRACES_DIR
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.offline.experiment import Fleet as SimulatedFleet
from lmdeploy_slo.offline.experiment import Load, Outcome, run_once
from lmdeploy_slo.offline.generated import generate_workload
from lmdeploy_slo.offline.simulator import EngineKind
from lmdeploy_slo.offline.slo_grammar import parse_slo_options
from lmdeploy_slo.offline.traces import TraceRow, read_traces
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.prediction.profiles import load_profile
from lmdeploy_slo.scheduling.fleet import Fleet
from lmdeploy_slo.scheduling.placement import make_placement, placement_names
from lmdeploy_slo.scheduling.policy import SearchBudget, make_policy
from lmdeploy_slo.scheduling.scheduler import Scheduler

PARTS = ("scale", "table", "affinity", "cost", "minutes")
EQUAL = ("a100-qwen2.5-7b",)
MIXED = ("a100-qwen2.5-7b", "h200-qwen2.5-7b", "a100-llama2-7b-turbomind")
SLOS = parse_slo_options(["code=e2e:2000", "chat=ttft:1000,tpot:50"])
LOADS = (0.8, 1.0, 1.5)
REQUESTS = {4: 4000, 16: 8000, 64: 16_000}
EVALUATIONS = 100
SHARED_BY = 128  # sequences that share a pass, when engine times are compared


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--traces", type=Path, default=Path(os.environ.get(ENV_TRACES_DIR, ".")))
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--instances", default="4,16,64")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    make_policy("annealing").warm_up()
    rows = read_traces([options.traces / "azure2023_mixed.csv.gz"])
    found: list[dict[str, Any]] = []

    def keep(**figures: Any) -> None:
        found.append(figures)
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    if "scale" in options.only:
        for instances, placement in ((1, "slo"), (4, "slo"), (4, "least-work")):
            outcome, _ = simulate(rows, EQUAL, instances, float(instances), placement, limit=24_000)
            keep(part="scale", instances=instances, placement=placement, **figures_of(outcome))
    if "table" in options.only:
        for instances in map(int, options.instances.split(",")):
            for profiles in (EQUAL, MIXED):
                for load in LOADS:
                    speedup = load * capacity(rows, profiles, instances)
                    for placement in placement_names():
                        limit = REQUESTS.get(instances, 250 * instances)
                        outcome, cpu_s = simulate(rows, profiles, instances, speedup, placement, limit=limit)
                        keep(
                            part="table", instances=instances, profiles="+".join(profiles), load=load,
                            placement=placement, requests=limit, **figures_of(outcome), moves=outcome.moves,
                            cpu_s=cpu_s,
                        )  # fmt: skip
    if "affinity" in options.only:
        conversations = read_traces([options.traces / "mooncake_synthetic_trace.jsonl.gz"])
        slos = parse_slo_options(["default=ttft:3000,tpot:50"])
        for speedup in (4.0, 8.0):
            for placement in placement_names():
                outcome, cpu_s = simulate(
                    conversations, ("h200-qwen2.5-7b",), 4, speedup, placement, limit=2500, slos=slos, cached=400_000
                )
                hits = outcome.prefix_hit_ratio
                keep(
                    part="affinity", speedup=speedup, placement=placement, hits=hits, **figures_of(outcome), cpu_s=cpu_s
                )
    if "cost" in options.only:
        measure_cost(rows)
    if "minutes" in options.only:
        made = generate_workload(140_000)
        span_s = made[-1].arrival_s - made[0].arrival_s
        begun_s = time.perf_counter()
        outcome, cpu_s = simulate(made, EQUAL, 64, span_s / 600.0, "slo", limit=None)
        keep(
            part="minutes", requests=len(made), wall_s=time.perf_counter() - begun_s, cpu_s=cpu_s,
            peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, plans=outcome.plans, moves=outcome.moves,
            **figures_of(outcome),
        )  # fmt: skip


def simulate(
    rows: Sequence[TraceRow],
    profiles: Sequence[str],
    instances: int,
    speedup: float,
    placement: str,
    *,
    limit: int | None,
    slos: Any = SLOS,
    cached: int | None = None,
) -> tuple[Outcome, float]:
    """(what came of it, seconds of processor time)."""
    kinds = [EngineKind(model_of(name), model_of(name), name=name) for name in profiles]
    fleet = SimulatedFleet(
        kinds[0].model,
        kinds[0].model,
        EngineLimits(),
        instances,
        plan_evaluations=EVALUATIONS,
        prefix_cache_tokens=cached,
        calibrate=cached is not None,
        mixed=tuple(kinds),
        placement=placement,
    )
    begun_s = time.process_time()
    load = Load(slos, speedup, limit, length_noise=0.3)
    return run_once(rows, load, fleet, "annealing", 0), time.process_time() - begun_s


def figures_of(outcome: Outcome) -> dict[str, Any]:
    run = outcome.run
    return {
        "attainment": run["slo_attainment"],
        "mean_e2e_s": run["e2e_ms"]["mean"] / 1e3,
        "p99_e2e_s": run["e2e_ms"]["p99"] / 1e3,
        "duration_s": run["duration_s"],
    }


def model_of(name: str) -> StepModel:
    return load_profile(name).step_model


def capacity(rows: Sequence[TraceRow], profiles: Sequence[str], instances: int) -> float:
    """Of a fleet, in terms of one a100-qwen2.5-7b."""
    prompt = np.array([row.input_tokens for row in rows], dtype=np.float64)
    output = np.array([row.output_tokens for row in rows], dtype=np.float64)

    def seconds(name: str) -> float:
        model = model_of(name)
        decode_s = output * (model.d1 + model.d2 * (prompt + output / 2) + model.c0 / SHARED_BY)
        return float(np.sum(model.p1 * prompt + model.p2 * prompt**2 + decode_s))

    one = seconds(EQUAL[0])
    return sum(one / seconds(profiles[number % len(profiles)]) for number in range(instances))


def measure_cost(rows: Sequence[TraceRow], instances: int = 64, waiting: int = 5000, running: int = 256) -> None:
    """Rounds of planning: requests are placed, waiting ones moved, and one replica's policy plans."""
    fleet = Fleet(make_placement("slo"))
    fleet.warm_up()
    lengths = TaskLengthPredictor()
    model = model_of(EQUAL[0])
    policies = [make_policy("annealing", seed=n, budget=SearchBudget(time_s=0.002)) for n in range(instances)]
    for policy in policies:
        limits = EngineLimits(running + 64)
        fleet.add(Scheduler(limits=limits, model=model, lengths=lengths, numbers=fleet.numbers), policy)
    rng = np.random.default_rng(0)
    picked = rng.integers(0, len(rows), instances * running + waiting + 2000)
    specs = []
    for number, at in enumerate(picked.tolist()):
        row, hint = rows[at], float(rows[at].output_tokens * rng.lognormal(0, 0.3))
        slo = SLOS[row.task]
        specs.append(
            RequestSpec(str(number), 0.0, row.input_tokens, 4096, slo, expected_output_tokens=hint, task_type=row.task)
        )
    for number, spec in enumerate(specs[: instances * running]):
        scheduler = fleet.scheduler(number % instances)
        handle = scheduler.add(spec)
        scheduler.apply(Plan(np.array([handle]), 1), 0.0)
        scheduler.on_tokens(handle, 1 + int(rng.integers(0, 20)), 0.3)
    now_s = 0.5
    for number, spec in enumerate(specs[instances * running : instances * running + waiting]):
        fleet.scheduler(number % instances).add(spec)
    times: dict[str, list[float]] = {"place": [], "rebalance": [], "policy": [], "round": []}
    for number, spec in enumerate(specs[-2000:]):
        now_s += 0.0005
        if number % 40 == 0:
            now_s += 0.02
        replica = number % instances
        scheduler = fleet.scheduler(replica)
        began = time.perf_counter()
        fleet.scheduler(fleet.place(spec, now_s)).add(spec)
        placed = time.perf_counter()
        fleet.rebalance(now_s)
        moved = time.perf_counter()
        plan = policies[replica].plan(scheduler.snapshot(now_s))
        sent = scheduler.apply(plan, now_s)
        fleet.note_plan(replica, plan, now_s)
        ended = time.perf_counter()
        for key, value in zip(times, (placed - began, moved - placed, ended - moved, ended - began), strict=True):
            times[key].append(value * 1e3)
        for dispatch in sent:
            scheduler.on_tokens(dispatch.handle, 1, now_s)
    held = sum(fleet.scheduler(n).waiting for n in fleet.replicas())
    print(f"cost at {instances} instances, {running} running each, {held:,} waiting at the end; ms p50 / p99 / most")
    for key, values in times.items():
        print(f"  {key}: {np.percentile(values, 50):.2f} / {np.percentile(values, 99):.2f} / {max(values):.2f}")


if __name__ == "__main__":
    main()
