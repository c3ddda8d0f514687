"""The same requests through `serve --engine emulated` and `replay`, and through the simulator: do they agree?

    python tests/bench/bench_live_vs_simulated.py [TRACE] [--policy fcfs swf-feasible slack-guard annealing]
        [--speedup 2] [--limit 2000] [--max-batch-size 256] [--seed 0] [--json OUT]

TRACE is looked for in LMDEPLOY_SLO_TRACES; without one, a generated workload is used. Every live run takes as long as
the requests take to arrive and be served (2,000 of the Azure trace at x2: about 155 s), and wants two cores for itself.
Prints both attainments and their difference in points, by task as well, and the mean latencies.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lmdeploy_slo.cli.demo import PROFILE, running_server
from lmdeploy_slo.cli.replay import find_traces, replay_with_progress
from lmdeploy_slo.config import traces_dir
from lmdeploy_slo.core.metrics import summarize
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.offline.experiment import Fleet, Load, offered_requests, run_once
from lmdeploy_slo.offline.generated import generate_workload
from lmdeploy_slo.offline.results import write_results
from lmdeploy_slo.offline.slo_grammar import parse_slo_options
from lmdeploy_slo.offline.traces import read_traces
from lmdeploy_slo.prediction.profiles import load_profile

SLOS = ("code=e2e:2000", "chat=ttft:1000,tpot:50")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trace", nargs="?")
    parser.add_argument("--policy", nargs="+", default=["fcfs", "swf-feasible", "slack-guard", "annealing"])
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--max-batch-size", type=int, default=256)
    parser.add_argument("--length-noise", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    rows = (
        read_traces(find_traces([options.trace], traces_dir())) if options.trace else generate_workload(options.limit)
    )
    load = Load(parse_slo_options(SLOS), options.speedup, options.limit, options.length_noise)
    model = load_profile(PROFILE).step_model
    fleet = Fleet(model, model, EngineLimits(options.max_batch_size))
    requests = offered_requests(rows, load, options.seed)

    runs: list[dict[str, Any]] = []
    table = Table(title=f"{len(requests)} requests at x{options.speedup:g}, {PROFILE}, cap {options.max_batch_size}")
    for column in (
        "policy",
        "",
        "attainment",
        "chat",
        "code",
        "TTFT mean",
        "TPOT mean",
        "E2E mean",
        "sent late p99, ms",
    ):
        table.add_column(column, justify="left" if column in ("policy", "") else "right")
    for policy in options.policy:
        with running_server(policy, options.max_batch_size) as target:
            replayed = replay_with_progress(target, requests, label=policy)
        live = summarize(replayed.records, policy=policy, speedup=options.speedup, seed=options.seed)
        simulated = run_once(rows, load, fleet, policy, options.seed).run
        late_ms = 1e3 * sorted(replayed.lateness_s)[int(0.99 * (len(replayed.lateness_s) - 1))]
        table.add_row(policy, "live", *_cells(live), f"{late_ms:.1f}")
        table.add_row("", "simulated", *_cells(simulated), "")
        points = [
            f"{100 * (ours - theirs):+.1f}" for ours, theirs in zip(_shares(simulated), _shares(live), strict=True)
        ]
        table.add_row("", "difference, points", *points, "", "", "", "", end_section=True)
        runs += [{"where": "live", **live}, {"where": "simulated", **simulated}]
    Console(width=130).print(table)
    if options.json is not None:
        write_results(options.json, runs)


def _shares(run: dict[str, Any]) -> list[float]:
    shares = [run["slo_attainment"], *(run["by_task"].get(task, {}).get("slo_attainment") for task in ("chat", "code"))]
    return [0.0 if share is None else share for share in shares]


def _cells(run: dict[str, Any]) -> list[str]:
    latencies = [f"{run[metric]['mean']:,.1f}" for metric in ("ttft_ms", "tpot_ms", "e2e_ms")]
    return [*(f"{share:.4f}" for share in _shares(run)), *latencies]


if __name__ == "__main__":
    main()
