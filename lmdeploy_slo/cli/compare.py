"""`lmdeploy_slo compare`: many simulated runs in parallel, paired differences, one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lmdeploy_slo.cli import simulation_options as options
from lmdeploy_slo.core.plan import DEFAULT_PATIENCE, DEFAULT_PLACEMENT
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.offline.compare import (
    ATTAINMENT,
    MEAN_E2E_S,
    Column,
    Comparison,
    Contender,
    Grid,
    Interval,
    Metric,
    run_grid,
)
from lmdeploy_slo.offline.experiment import Load
from lmdeploy_slo.offline.parallel import workers
from lmdeploy_slo.offline.results import check_writable, write_results
from lmdeploy_slo.offline.simulator import PLAN_EVALUATIONS, PLAN_LATENCY_S
from lmdeploy_slo.offline.slo_grammar import parse_slo_options
from lmdeploy_slo.offline.workload import check_slo_tasks
from lmdeploy_slo.scheduling.placement import placement_names

_DEFAULTS = options.DEFAULTS


def compare(
    traces: Annotated[
        list[str],
        typer.Argument(
            metavar="TRACE...", help="Traces, each by itself; A+B are merged on the instants they recorded."
        ),
    ],
    profile: options.Profile = _DEFAULTS.engine.profile,
    policy: Annotated[str, typer.Option(metavar="P[,P...]", help="Policies.")] = f"fcfs,{_DEFAULTS.scheduler.policy}",
    speedup: Annotated[str, typer.Option(metavar="X[,X...]", help="Speedups: each divides all arrival times.")] = "1",
    max_batch_size: Annotated[str, typer.Option(metavar="B[,B...]", help="In-flight caps per instance.")] = str(
        _DEFAULTS.engine.max_batch_size
    ),
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="So many seeds, counted from --seed.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="The first of the seeds, of the hints and of the policies.")] = 0,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="P[/L][@B]", help="What the others are compared with; default: the first policy, placement and cap."
        ),
    ] = None,
    best_cap: Annotated[
        bool, typer.Option("--best-cap", help="Show each policy at the cap with its best attainment, column by column.")
    ] = False,
    limit: options.Limit = None,
    task: options.Task = None,
    slo: options.Slos = None,
    slo_scale: options.SloScale = 1.0,
    max_prefill_tokens: options.MaxPrefillTokens = _DEFAULTS.engine.max_prefill_tokens,
    kv_tokens: options.KvTokens = _DEFAULTS.engine.kv_tokens,
    prefix_cache_tokens: options.PrefixCacheTokens = None,
    instances: options.Instances = None,
    placement: Annotated[
        str, typer.Option(metavar="L[,L...]", help=f"On which of several instances: {', '.join(placement_names())}.")
    ] = DEFAULT_PLACEMENT,
    length_noise: options.LengthNoise = None,
    length_bias: options.LengthBias = 1.0,
    planner_profile: options.PlannerProfile = None,
    planner_scale: options.PlannerScale = 1.0,
    plan_evaluations: options.PlanEvaluations = PLAN_EVALUATIONS,
    patience: options.Patience = DEFAULT_PATIENCE,
    plan_latency_ms: options.PlanLatencyMs = PLAN_LATENCY_S * 1e3,
    jobs: options.Jobs = None,
    json_out: Annotated[
        Path | None,
        typer.Option("--json", metavar="OUT", help="Write the result file: every run, with its trace and cap."),
    ] = None,
    traces_folder: options.TracesFolder = None,
) -> None:
    """Simulate every combination of traces, speedups, policies, placements, in-flight caps and seeds, and compare.

    The table has attainment and mean E2E, each a mean over the seeds; * marks the best of its column. Beside it stands
    the difference to the baseline (in points, and as a factor), paired by seed, with its 95 % confidence interval.
    """
    policies = options.split_policies(policy)
    placements = options.split_placements(placement)
    several = placements if len(placements) > 1 else [None]
    caps = options.split_list("--max-batch-size", max_batch_size, int)
    grid = Grid(
        [Contender(name, cap, where) for name in policies for where in several for cap in caps],
        [Column(name, factor) for name in traces for factor in options.split_list("--speedup", speedup, float)],
        range(seed, seed + seeds),
    )
    reference = find_contender(baseline, grid.contenders)
    load = Load(parse_slo_options(slo or [], slo_scale), 1.0, limit, length_noise, length_bias)
    fleet = options.build_fleet(
        profile=profile,
        planner_profile=planner_profile,
        planner_scale=planner_scale,
        max_batch_size=options.at_least_one("--max-batch-size", caps),
        max_prefill_tokens=max_prefill_tokens,
        kv_tokens=kv_tokens,
        instances=instances,
        prefix_cache_tokens=prefix_cache_tokens,
        plan_evaluations=plan_evaluations,
        patience=patience,
        placement=placements[0],
        plan_latency_ms=plan_latency_ms,
    )
    check_writable([json_out])
    rows = {name: options.read_rows(name.split("+"), task, traces_folder) for name in traces}
    check_slo_tasks(load.slos, [row for trace in rows.values() for row in trace])
    runs = len(grid.contenders) * len(grid.columns) * len(grid.seeds)
    with workers(rows, jobs) as pool, options.progress_bar("runs", runs) as advance:
        comparison = run_grid(grid, load, fleet, pool, advance)
    if json_out is not None:
        write_results(json_out, comparison.runs)
    Console().print(comparison_table(comparison, reference, best_cap=best_cap))


def find_contender(text: str | None, contenders: Sequence[Contender]) -> Contender:
    """`P`, `P@B`, `P/L` or `P/L@B` among the contenders, the first where there is no text; raises ConfigError."""
    if text is None:
        return contenders[0]
    name, _, cap = text.partition("@")
    for contender in contenders:
        if name in (contender.policy, contender.name) and (not cap or str(contender.max_batch_size) == cap):
            return contender
    raise ConfigError(
        f"--baseline: {text!r} is none of {', '.join(f'{c.name}@{c.max_batch_size}' for c in contenders)}"
    )


def comparison_table(comparison: Comparison, baseline: Contender, *, best_cap: bool = False) -> Table:
    """A column per trace and speedup; for each contender (with `best_cap`: each policy) a line per metric."""
    grid = comparison.grid
    title = (
        f"mean of {len(grid.seeds)} seeds, * best of its column; beside it the difference to {baseline}: "
        "points of attainment, factor of mean E2E (s), paired, 95 % confidence"
    )
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("")
    several = len({column.trace for column in grid.columns}) > 1
    for column in grid.columns:
        name = f"{Path(column.trace).name.partition('.')[0]} " if several else ""
        table.add_column(f"{name}x{column.speedup:g}")
    lines: dict[str, list[Contender]] = {}
    for contender in grid.contenders:
        lines.setdefault(contender.name if best_cap else str(contender), []).append(contender)
    for label, contenders in lines.items():
        cells = []
        for column in grid.columns:
            contender = comparison.best(column, ATTAINMENT, contenders) or contenders[0]
            cell = "\n".join(
                _line(comparison, column, contender, baseline, metric) for metric in (ATTAINMENT, MEAN_E2E_S)
            )
            cells.append(f"{cell}\n[dim]at {contender.max_batch_size}[/dim]" if best_cap else cell)
        table.add_row(label, *cells)
    return table


def _line(comparison: Comparison, column: Column, contender: Contender, baseline: Contender, metric: Metric) -> str:
    value = comparison.mean(column, contender, metric)
    if value is None:
        return "-"
    best = comparison.best(column, metric)
    marked = best is not None and value == comparison.mean(column, best, metric)
    text = f"{value:,.{3 if metric is ATTAINMENT else 2}f}{'*' if marked else ' '}"
    if marked:
        text = f"[bold]{text}[/bold]"
    difference = comparison.difference(column, contender, baseline, metric)
    reference = comparison.mean(column, baseline, metric)
    if contender == baseline or difference is None or reference is None:
        return text
    return f"{text} [dim]{_points(difference) if metric is ATTAINMENT else _factor(difference, reference)}[/dim]"


def _points(difference: Interval) -> str:
    reach = "" if difference.high is None else f" ±{100 * (difference.high - difference.mean):.1f}"
    return f"{100 * difference.mean:+.1f}{reach}"


def _factor(difference: Interval, reference: float) -> str:
    if not reference:
        return ""
    reach = "" if difference.high is None else f" ±{(difference.high - difference.mean) / reference:.2f}"
    return f"x{1 + difference.mean / reference:.2f}{reach}"
