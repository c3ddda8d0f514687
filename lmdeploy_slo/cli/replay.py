"""`lmdeploy_slo replay`: a recorded trace against a running server, and how many requests met their SLO."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lmdeploy_slo.cli import connection
from lmdeploy_slo.cli.generate import check_target, check_timeout
from lmdeploy_slo.client.channel import OPEN_ACCESS, Access
from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.config import ENV_TRACES_DIR, traces_dir
from lmdeploy_slo.core.metrics import summarize
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.offline.replay import Replayed
from lmdeploy_slo.offline.replay import replay as replay_requests
from lmdeploy_slo.offline.report import runs_table
from lmdeploy_slo.offline.results import check_writable, write_requests, write_results
from lmdeploy_slo.offline.slo_grammar import parse_slo_options
from lmdeploy_slo.offline.traces import read_traces
from lmdeploy_slo.offline.workload import OfferedRequest, build_workload, check_slo_tasks

_REFRESH_PER_S = 2  # drawing takes time from the messages
_FAILURES_SHOWN = 3
_INTERRUPTED = 130

T = TypeVar("T")


def replay(
    traces: Annotated[
        list[str],
        typer.Argument(
            metavar="TRACE...",
            help="Azure CSV, Mooncake JSON lines or arrival_s,input_tokens,output_tokens,task_class; gzipped or not. "
            "Several are merged on the instants they recorded.",
        ),
    ],
    target: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="The server.", callback=check_target)
    ] = "127.0.0.1:50051",
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="Task of all rows of a trace; once per TRACE, in the same order."),
    ] = None,
    speedup: Annotated[float, typer.Option(help="Divides all arrival times.")] = 1.0,
    limit: Annotated[int | None, typer.Option(help="Only the first so many requests.")] = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK=KIND:MS,...",
            help="SLO of a task, such as code=e2e:2000 or chat=ttft:1000,tpot:50; default=... for tasks not named. "
            "May be repeated; a task without one has no SLO.",
        ),
    ] = None,
    slo_scale: Annotated[float, typer.Option(help="Multiplies every objective.")] = 1.0,
    length_noise: Annotated[
        float | None,
        typer.Option(
            metavar="SIGMA",
            help="Send a hint: the true output length times lognormal(0, SIGMA), 0 for exact. Without it, no hint.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the hints.")] = 0,
    timeout_s: Annotated[
        float | None,
        typer.Option(help="Hard limit of each request (its gRPC deadline); default: none.", callback=check_timeout),
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the result file.")] = None,
    requests_out: Annotated[Path | None, typer.Option(metavar="FILE.csv", help="Write one line per request.")] = None,
    traces_folder: Annotated[
        Path | None,
        typer.Option(
            "--traces",
            metavar="DIR",
            help=f"Where a TRACE is looked for that is not found as named; else {ENV_TRACES_DIR}.",
        ),
    ] = None,
    tls: connection.Tls = False,
    ca: connection.Ca = None,
    cert: connection.Cert = None,
    key: connection.Key = None,
    token: connection.Token = None,
    insecure: connection.Insecure = False,
) -> None:
    """Replay recorded traces against a server and report SLO attainment.

    Open loop: each request is sent when it is due, and its latencies count from that moment. The true output length is
    known to an emulated engine alone; max_new_tokens is the longest output of the trace for every request.

    Ctrl-C cancels what is open; what was sent until then is still reported and written, open requests as cancelled.
    """
    slos = parse_slo_options(slo or [], slo_scale)
    rows = read_traces(find_traces(traces, traces_folder or traces_dir()), task or [])
    check_slo_tasks(slos, rows)
    requests = build_workload(rows, slos=slos, speedup=speedup, limit=limit, length_noise=length_noise, seed=seed)
    check_writable([json_out, requests_out])
    access = connection.access(tls=tls, ca=ca, cert=cert, key=key, token=token, insecure=insecure)

    replayed = replay_with_progress(target, requests, timeout_s=timeout_s, access=access)

    run = summarize(replayed.records, policy=replayed.policy, speedup=speedup, seed=seed)
    if json_out is not None:
        write_results(json_out, [run])
    if requests_out is not None:
        write_requests(requests_out, replayed.records)
    console = Console()
    console.print(runs_table([run]))
    for line in remarks(replayed):
        console.print(line, markup=False, highlight=False)
    if replayed.interrupted:
        raise typer.Exit(_INTERRUPTED)


def find_traces(names: Sequence[str], folder: Path | None) -> list[Path]:
    """Each name as a path; one that does not exist is taken to lie in `folder`, where it does."""
    paths = [Path(name) for name in names]
    return [folder / path if folder and not path.exists() and (folder / path).exists() else path for path in paths]


def replay_with_progress(
    target: str,
    requests: Sequence[OfferedRequest],
    *,
    timeout_s: float | None = None,
    label: str = "replay",
    access: Access = OPEN_ACCESS,
) -> Replayed:
    """Replays with a progress bar on stderr; the first Ctrl-C stops the replay."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ended, {task.fields[open]} open"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=_REFRESH_PER_S) as bar:
        line = bar.add_task(label, total=len(requests), open=0)

        async def run() -> Replayed:
            stop = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGINT, stop.set)
            try:
                return await replay_requests(
                    target,
                    requests,
                    clock=MonotonicClock(),
                    timeout_s=timeout_s,
                    stop=stop,
                    access=access,
                    on_progress=lambda sent, ended: bar.update(line, completed=ended, open=sent - ended),
                )
            finally:
                loop.remove_signal_handler(signal.SIGINT)

        return run_event_loop(run())


def run_event_loop(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run, on uvloop where there is one."""
    if sys.platform == "win32":
        return asyncio.run(main)
    import uvloop

    return uvloop.run(main)


def remarks(replayed: Replayed) -> list[str]:
    """What the table does not say: how late the replayer was, what went wrong, and what the server is."""
    lines = []
    if replayed.lateness_s:
        p50, p99, latest = np.percentile(np.asarray(replayed.lateness_s) * 1e3, [50, 99, 100])
        lines.append(f"sent late by p50 {p50:.1f} ms, p99 {p99:.1f} ms, at most {latest:.1f} ms")
    for reason, count in replayed.failures.most_common(_FAILURES_SHOWN):
        lines.append(f"{count} x {reason}")
    left_out = len(replayed.failures) - _FAILURES_SHOWN
    if left_out > 0:
        lines.append(f"and {left_out} other reasons")
    if not replayed.synthetic:
        lines.append("the engine is not emulated: outputs are as long as the model made them, not as in the trace")
    if replayed.interrupted:
        cancelled = sum(record.status is EndStatus.CANCELLED for record in replayed.records)
        lines.append(f"interrupted: {cancelled} requests were cancelled, later ones were not sent")
    return lines
