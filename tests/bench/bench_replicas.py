"""Several emulated engines under Ray behind one gateway: attainment beside one engine at its share of the load, and a
replica killed in the middle.

    python tests/bench/bench_replicas.py [TRACE] [--replicas 4] [--slowed 4] [--speedup 1] [--limit 2000]
        [--kill] [--only many|one] [--seed 0] [--json OUT]

Everything is slowed: the engines' profile, the objectives and the arrivals by `--slowed`, so that the machine is not
the limit. Many replicas get `--speedup`, one gets the same over their number; of the trace, the same first requests.
Both are real `serve` processes and real replays. With --kill one replica's process is killed (SIGKILL) a third of the
way through, and it is told how every stream ended. Takes limit / rate: 2,000 requests of the Azure trace at x1, slowed
4 times and shared by 4, about 5 minutes; those for one, 21.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lmdeploy_slo.cli.demo import PROFILE
from lmdeploy_slo.cli.replay import find_traces, replay_with_progress
from lmdeploy_slo.client import Client
from lmdeploy_slo.config import traces_dir
from lmdeploy_slo.core.metrics import summarize
from lmdeploy_slo.offline.generated import generate_workload
from lmdeploy_slo.offline.results import write_results
from lmdeploy_slo.offline.slo_grammar import parse_slo_options
from lmdeploy_slo.offline.traces import read_traces
from lmdeploy_slo.offline.workload import build_workload
from lmdeploy_slo.prediction.profiles import load_profile

SLOS = ("code=e2e:2000", "chat=ttft:1000,tpot:50")
READY = re.compile(r"serving on (\S+:\d+)")
PROCESS = re.compile(r"replica (\d+) is process (\d+)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trace", nargs="?")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--slowed", type=float, default=4.0)
    parser.add_argument("--speedup", type=float, default=1.0, help="of the load on each engine, before it is slowed")
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--only", choices=("many", "one"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    rows = (
        read_traces(find_traces([options.trace], traces_dir())) if options.trace else generate_workload(options.limit)
    )
    slos = parse_slo_options(SLOS, options.slowed)
    table = Table(title=f"{PROFILE} and SLOs slowed {options.slowed:g} times, annealing, {options.limit} requests")
    for column in ("engines", "speedup", "attainment", "chat", "code", "TTFT mean, ms", "E2E mean, ms", "ended"):
        table.add_column(column, justify="right")
    runs: list[dict[str, Any]] = []
    for replicas in {"many": [options.replicas], "one": [1], None: [options.replicas, 1]}[options.only]:
        speedup = options.speedup * replicas / options.slowed
        requests = build_workload(
            rows, slos=slos, speedup=speedup, limit=options.limit, length_noise=0.3, seed=options.seed
        )
        with serving(replicas, options.slowed) as (target, pids):
            if options.kill and replicas > 1:
                threading.Timer(requests[-1].due_s / 3, kill, [pids, 1]).start()
            replayed = replay_with_progress(target, requests, label=f"{replicas} engines")
            with Client(target) as client:
                load = client.load()
        run = summarize(replayed.records, policy="annealing", speedup=speedup, seed=options.seed)
        statuses = Counter(record.status.value for record in replayed.records)
        ended = ", ".join(f"{count} {status}" for status, count in statuses.items())
        if load.resumed or load.retried:
            ended += f"; {load.resumed} resumed, {load.retried} started over"
        tasks = [run["by_task"].get(task) for task in ("chat", "code")]
        by_task = ["-" if task is None else f"{task['slo_attainment']:.4f}" for task in tasks]
        latencies = [f"{run[metric]['mean']:,.0f}" for metric in ("ttft_ms", "e2e_ms")]
        table.add_row(str(replicas), f"x{speedup:g}", f"{run['slo_attainment']:.4f}", *by_task, *latencies, ended)
        runs.append({"engines": replicas, "resumed": load.resumed, "retried": load.retried, **run})
    Console(width=150).print(table)
    if options.json is not None:
        write_results(options.json, runs)


@contextlib.contextmanager
def serving(replicas: int, slowed: float) -> Iterator[tuple[str, dict[int, int]]]:
    """(address, process id by number of the replica) of a server; it is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "slowed.json"
        coefficients = zip(("c0", "p1", "p2", "d1", "d2"), astuple(load_profile(PROFILE).step_model), strict=True)
        step = {name: value * slowed * 1e3 for name, value in coefficients}
        profile.write_text(json.dumps({"format": 1, "name": "slowed", "step_ms": step}))
        command = [
            *(sys.executable, "-m", "lmdeploy_slo", "serve", "--profile", str(profile), "--port", "0"),
            *("--replicas", str(replicas), "--ray-address", "local", "--replica-resources", "CPU=0.1"),
        ]
        log = (Path(folder) / "log").open("w+")
        with log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
            try:
                assert process.stdout is not None
                ready = READY.search(process.stdout.readline())
                if ready is None:
                    sys.exit((Path(folder) / "log").read_text())
                told = (Path(folder) / "log").read_text()
                yield ready[1], {int(number): int(pid) for number, pid in PROCESS.findall(told)}
            finally:
                process.terminate()
                process.wait(60)


def kill(pids: dict[int, int], number: int) -> None:
    os.kill(pids[number], signal.SIGKILL)
    print(f"replica {number} killed at {time.strftime('%H:%M:%S')}", file=sys.stderr)


if __name__ == "__main__":
    main()
