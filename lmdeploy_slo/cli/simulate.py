"""`lmdeploy_slo simulate`: recorded traces in virtual time, one run per policy and speedup."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lmdeploy_slo import __version__
from lmdeploy_slo.cli import simulation_options as options
from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.plan import DEFAULT_PATIENCE, DEFAULT_PLACEMENT
from lmdeploy_slo.offline.experiment import Load, Outcome, run_once
from lmdeploy_slo.offline.report import runs_table
from lmdeploy_slo.offline.results import check_writable, write_requests, write_results
from lmdeploy_slo.offline.simulator import PLAN_EVALUATIONS, PLAN_LATENCY_S
from lmdeploy_slo.offline.slo_grammar import parse_slo_options
from lmdeploy_slo.offline.workload import check_slo_tasks

_DEFAULTS = options.DEFAULTS


def simulate(
    traces: options.Traces,
    profile: options.Profile = _DEFAULTS.engine.profile,
    policy: Annotated[
        str, typer.Option(metavar="P[,P...]", help="Policies, one run each.")
    ] = _DEFAULTS.scheduler.policy,
    speedup: Annotated[str, typer.Option(metavar="X[,X...]", help="Divides all arrival times; one run each.")] = "1",
    limit: options.Limit = None,
    task: options.Task = None,
    slo: options.Slos = None,
    slo_scale: options.SloScale = 1.0,
    max_batch_size: options.MaxBatchSize = _DEFAULTS.engine.max_batch_size,
    max_prefill_tokens: options.MaxPrefillTokens = _DEFAULTS.engine.max_prefill_tokens,
    kv_tokens: options.KvTokens = _DEFAULTS.engine.kv_tokens,
    prefix_cache_tokens: options.PrefixCacheTokens = None,
    instances: options.Instances = None,
    placement: options.Placement = DEFAULT_PLACEMENT,
    length_noise: options.LengthNoise = None,
    length_bias: options.LengthBias = 1.0,
    length_predictor: options.LengthPredictorName = _DEFAULTS.scheduler.length_predictor,
    seed: Annotated[int, typer.Option(min=0, help="Of the hints and of the policies.")] = 0,
    planner_profile: options.PlannerProfile = None,
    planner_scale: options.PlannerScale = 1.0,
    plan_evaluations: options.PlanEvaluations = PLAN_EVALUATIONS,
    patience: options.Patience = DEFAULT_PATIENCE,
    plan_latency_ms: options.PlanLatencyMs = PLAN_LATENCY_S * 1e3,
    calibrate: options.Calibrate = False,
    drift_at: options.DriftAt = None,
    drift_scale: options.DriftScale = "1.3",
    drift_told: options.DriftTold = False,
    json_out: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the result file.")] = None,
    requests_out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv",
            help="Write one line per request; of several runs each to a file of its own, FILE.POLICY.xSPEEDUP.csv.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write a page with plots, index.html, and the plots as PNG; needs lmdeploy-slo[report].",
        ),
    ] = None,
    traces_folder: options.TracesFolder = None,
) -> None:
    """Replay recorded traces in virtual time, without a server.

    The scheduling code and the engine's batch are those of serve with the emulated engine; the options shared with
    serve and replay mean the same, and the requests are the same for the same options. The same seed gives the same
    files, byte for byte; how long it took goes to the terminal alone.
    """
    policies = options.split_policies(policy)
    speedups = options.split_list("--speedup", speedup, float)
    slos = parse_slo_options(slo or [], slo_scale)
    fleet = options.build_fleet(
        profile=profile,
        planner_profile=planner_profile,
        planner_scale=planner_scale,
        max_batch_size=max_batch_size,
        max_prefill_tokens=max_prefill_tokens,
        kv_tokens=kv_tokens,
        instances=instances,
        prefix_cache_tokens=prefix_cache_tokens,
        plan_evaluations=plan_evaluations,
        patience=patience,
        placement=placement,
        plan_latency_ms=plan_latency_ms,
        calibrate=calibrate,
        drift=options.read_drift(drift_at, drift_scale, told=drift_told),
        length_predictor=length_predictor,
    )
    runs = [(name, factor) for factor in speedups for name in policies]
    request_files = [requests_out and request_file(requests_out, *run, several=len(runs) > 1) for run in runs]
    check_writable([json_out, *request_files])
    if report is not None:
        from lmdeploy_slo.offline.html_report import check_folder

        check_folder(report)
    rows = options.read_rows(traces, task, traces_folder)
    check_slo_tasks(slos, rows)

    outcomes: list[Outcome] = []
    remarks: list[str] = []
    clock = MonotonicClock()
    total = len(rows) if limit is None else min(limit, len(rows))
    with _progress() as progress:
        for (name, factor), file in zip(runs, request_files, strict=True):
            label = f"{name} x{factor:g}"
            began_at_s = clock.now_s()
            outcome = run_once(
                rows,
                Load(slos, factor, limit, length_noise, length_bias),
                fleet,
                name,
                seed,
                on_progress=_bar(progress, label, total),
            )
            remarks.append(f"{label}: {_remark(outcome, clock.now_s() - began_at_s)}")
            if file is not None:
                write_requests(file, outcome.records)
            if report is None:
                outcome.records.clear()
            outcomes.append(outcome)
    results = [outcome.run for outcome in outcomes]
    if json_out is not None:
        write_results(json_out, results)
    console = Console()
    console.print(runs_table(results))
    for text in remarks:
        console.print(text, markup=False, highlight=False)
    for (name, factor), outcome in zip(runs, outcomes, strict=True):
        for text in _by_kind(outcome.run.get("by_instance", ())):
            console.print(f"{name} x{factor:g}: {text}", markup=False, highlight=False, soft_wrap=True)
        for number, text in enumerate(_forecasts(outcome, drifted=fleet.drift is not None)):
            instance = f" instance {number}" if fleet.instances > 1 else ""
            console.print(f"{name} x{factor:g}{instance}: {text}", markup=False, highlight=False, soft_wrap=True)
    if report is not None:
        settings = {
            "traces": ", ".join(traces),
            "requests": f"{total:,}",
            "SLOs": " ".join(slo or []) or "none",
            "SLO scale": f"{slo_scale:g}",
            "profile": profile,
            "instances": f"{fleet.instances}",
            "placement": placement if fleet.instances > 1 else "none",
            "in flight per instance": f"{max_batch_size}",
            "prompt tokens per step": f"{max_prefill_tokens}",
            "KV cache, tokens": "unlimited" if kv_tokens is None else f"{kv_tokens:,}",
            "prefix cache, tokens": "none" if prefix_cache_tokens is None else f"{prefix_cache_tokens:,}",
            "length hints": "none"
            if length_noise is None
            else f"true length x {length_bias:g} x lognormal(0, {length_noise:g})",
            "lengths": length_predictor,
            "seed": f"{seed}",
            "planner's profile": planner_profile or profile,
            "planner's scale": f"{planner_scale:g}",
            "planning budget": f"{plan_evaluations} evaluations, {plan_latency_ms:g} ms",
            "calibration": "on" if calibrate else "off",
            "engines change": "never"
            if drift_at is None
            else f"after {drift_at:g} s by {drift_scale}{', the planner is told' if drift_told else ''}",
            "version": __version__,
        }
        page = _write_page(report, runs, outcomes, settings)
        console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)


def _write_page(
    folder: Path, runs: Sequence[tuple[str, float]], outcomes: Sequence[Outcome], settings: Mapping[str, str]
) -> Path:
    from lmdeploy_slo.offline.html_report import Report, write_report
    from lmdeploy_slo.offline.plots import Case

    policies = list(dict.fromkeys(name for name, _ in runs))
    page = Report(
        title=f"{', '.join(policies)} on {', '.join(Path(trace).name for trace in settings['traces'].split(', '))}",
        subtitle=f"{settings['requests']} requests, {settings['profile']}, simulated by lmdeploy_slo {__version__}",
        cases=[
            Case(name, factor, outcome.run, outcome.records)
            for (name, factor), outcome in zip(runs, outcomes, strict=True)
        ],
        settings=settings,
        command=f"lmdeploy_slo {shlex.join(sys.argv[1:])}",
    )
    return write_report(folder, page)


def request_file(path: Path, policy: str, speedup: float, *, several: bool) -> Path:
    """Where the requests of a run are written."""
    return path.with_suffix(f".{policy}.x{speedup:g}{path.suffix}") if several else path


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("arrived"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
        yield progress


def _bar(progress: Progress, label: str, total: int) -> Callable[[int], None]:
    """A bar for one run, and what moves it."""
    line = progress.add_task(label, total=total)
    stride = max(1, total // 200)

    def on_progress(arrived: int) -> None:
        if arrived % stride == 0 or arrived == total:
            progress.update(line, completed=arrived)

    return on_progress


def _remark(outcome: Outcome, elapsed_s: float) -> str:
    parts = (
        f"simulated in {elapsed_s:.1f} s",
        f"{outcome.plans:,} plans",
        f"{outcome.evaluations:,} evaluations" if outcome.evaluations else "",
        f"{outcome.moves:,} moves between instances" if outcome.moves else "",
        f"{outcome.evictions:,} evictions" if outcome.evictions else "",
        "" if outcome.prefix_hit_ratio is None else f"{outcome.prefix_hit_ratio:.1%} of prompt tokens cached",
        ""
        if outcome.prefix_error_tokens is None
        else f"expected to within {outcome.prefix_error_tokens:,.0f} tokens a prompt",
    )
    return ", ".join(part for part in parts if part)


def _by_kind(instances: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the instances of each kind did."""
    for kind in dict.fromkeys(one["profile"] for one in instances):
        of_kind = [one for one in instances if one["profile"] == kind]
        attained = [one["slo_attainment"] for one in of_kind if one["slo_attainment"] is not None]
        requests = sum(one["requests"] for one in of_kind) / len(of_kind)
        shares = f", attainment {min(attained):.3f} to {max(attained):.3f}" if attained else ""
        yield f"{len(of_kind)} instances{f' of {kind}' if kind else ''}: {requests:,.0f} requests each{shares}"


def _forecasts(outcome: Outcome, *, drifted: bool) -> Iterator[str]:
    """How right the forecasts of each instance's steps were, where that was watched."""
    for statistics, recovery in zip(outcome.calibrations, outcome.recoveries, strict=True):
        text = f"steps took {statistics.slowness:.3g} times what the profile says" if statistics.learning else ""
        text += f"{', ' if text else ''}forecasts of them are {statistics.relative_error:.2%} off"
        if drifted:
            text += (
                ", not back within 5 %"
                if recovery is None
                else f", back within 5 % after {recovery} requests that finished"
            )
        yield text
