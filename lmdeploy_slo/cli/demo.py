"""`lmdeploy_slo demo`: the main job with nothing from outside, FCFS and annealing on the same generated workload.

Each run has a server of its own, a real `serve` process with the emulated engine, and a real replay against it.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated

import typer
from rich.console import Console

from lmdeploy_slo.cli.replay import remarks, replay_with_progress
from lmdeploy_slo.core.metrics import summarize
from lmdeploy_slo.errors import SloError
from lmdeploy_slo.offline.generated import generate_workload
from lmdeploy_slo.offline.report import runs_table
from lmdeploy_slo.offline.results import check_writable, write_results
from lmdeploy_slo.offline.slo_grammar import parse_slo_options
from lmdeploy_slo.offline.workload import OfferedRequest, build_workload

PROFILE = "a100-qwen2.5-7b"
CONTENDERS = (("fcfs", 128), ("annealing", 256))
"""(policy, requests in flight at most): LMDeploy's defaults, and ours."""

SLOS = ("code=e2e:2000", "chat=ttft:1000,tpot:50")
SPEEDUP = 1.5  # of the recorded rate: about 12 requests a second, more than this engine serves in time
LENGTH_NOISE = 0.3
DEFAULT_SEED = 8  # its first minute has the rate and the share of code of the recorded hour

_STARTUP_LIMIT_S = 120.0  # the first start on a machine compiles the annealing kernel
_SHUTDOWN_LIMIT_S = 15.0
_READY = re.compile(r"serving on (\S+:\d+)")


def demo(
    seconds: Annotated[float, typer.Option(min=1.0, help="How long requests arrive in each run.")] = 25.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the workload and the length hints.")] = DEFAULT_SEED,
    json_out: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the result file.")] = None,
) -> None:
    """FCFS and annealing side by side on a generated workload.

    Starts a server with the emulated engine (synthetic tokens, timed like an A100 with a 7B model) for each of the two
    policies and replays the same requests against both: code completion and chat, as bursty as in production, with a
    length hint that is off by 30 %. Ctrl-C ends the demo.
    """
    check_writable([json_out])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left behind
    requests = demo_workload(seconds, seed)
    tasks = [request.task for request in requests]
    console = Console()
    console.print(
        f"{len(requests)} requests in {requests[-1].due_s:.0f} s: {tasks.count('code')} code completion, "
        f"{tasks.count('chat')} chat; SLOs {', '.join(SLOS)} (ms)",
        highlight=False,
    )
    runs = []
    for policy, max_batch_size in CONTENDERS:
        label = f"{policy}, {max_batch_size} in flight"
        with running_server(policy, max_batch_size) as target:
            replayed = replay_with_progress(target, requests, label=label)
        if replayed.interrupted:
            raise typer.Exit(130)
        for line in remarks(replayed):
            console.print(f"{label}: {line}", markup=False, highlight=False)
        runs.append(summarize(replayed.records, policy=replayed.policy, speedup=SPEEDUP, seed=seed))
    console.print(runs_table(runs, title=f"the same requests, emulated {PROFILE}"))
    if json_out is not None:
        write_results(json_out, runs)


def demo_workload(seconds: float, seed: int) -> list[OfferedRequest]:
    """The requests that are due within `seconds` (at least one)."""
    rows = generate_workload(max(64, int(64 * seconds * SPEEDUP)), seed)  # far more than arrive in that time
    due = sum(row.arrival_s <= seconds * SPEEDUP for row in rows)
    return build_workload(
        rows, slos=parse_slo_options(SLOS), speedup=SPEEDUP, limit=due, length_noise=LENGTH_NOISE, seed=seed
    )


@contextmanager
def running_server(policy: str, max_batch_size: int) -> Iterator[str]:
    """A `serve` process with the emulated engine on a free port, as HOST:PORT; it is gone afterwards.

    Raises SloError with what the process said last where it does not get ready.
    """
    command = [
        *(sys.executable, "-m", "lmdeploy_slo", "serve", "--engine", "emulated", "--profile", PROFILE),
        *("--policy", policy, "--max-batch-size", str(max_batch_size), "--host", "127.0.0.1", "--port", "0"),
    ]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            yield _address_of(process, log)
        finally:
            process.terminate()
            try:
                process.wait(_SHUTDOWN_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _address_of(process: subprocess.Popen[str], log: IO[str]) -> str:
    """Reads what the process says until it names its address; kills it where that takes too long."""
    assert process.stdout is not None
    limit = threading.Timer(_STARTUP_LIMIT_S, process.kill)
    limit.start()
    try:
        for line in process.stdout:
            ready = _READY.search(line)
            if ready is not None:
                return ready[1]
    finally:
        limit.cancel()
    log.seek(0)
    last_words = log.read().strip().splitlines()[-1:] or ["it said nothing"]
    raise SloError(f"the server did not start: {last_words[0]}")
