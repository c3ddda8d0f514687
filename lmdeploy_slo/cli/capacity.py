"""`lmdeploy_slo capacity`: how much load, or how few instances, hold a target attainment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lmdeploy_slo.cli import simulation_options as options
from lmdeploy_slo.core.plan import DEFAULT_PATIENCE, DEFAULT_PLACEMENT
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.offline.capacity import Capacity, Question, Vary, find_capacity
from lmdeploy_slo.offline.experiment import Load
from lmdeploy_slo.offline.parallel import Job, workers
from lmdeploy_slo.offline.results import check_writable, write_json
from lmdeploy_slo.offline.simulator import PLAN_EVALUATIONS, PLAN_LATENCY_S
from lmdeploy_slo.offline.slo_grammar import parse_slo_options
from lmdeploy_slo.offline.workload import check_slo_tasks

_DEFAULTS = options.DEFAULTS
_TRACE = "trace"


def capacity(
    traces: options.Traces,
    profile: options.Profile = _DEFAULTS.engine.profile,
    policy: Annotated[str, typer.Option(metavar="P[,P...]", help="Policies.")] = f"fcfs,{_DEFAULTS.scheduler.policy}",
    target: Annotated[float, typer.Option(min=0.0, max=1.0, help="SLO attainment to hold.")] = 0.95,
    vary: Annotated[
        Vary, typer.Option(help="speedup: the highest that holds the target; instances: the fewest.")
    ] = Vary.SPEEDUP,
    tolerance: Annotated[float, typer.Option(help="Of the speedup, relative: where the bisection stops.")] = 0.02,
    speedup: Annotated[float, typer.Option(help="Divides all arrival times; with --vary instances.")] = 1.0,
    instances: options.Instances = None,
    placement: options.Placement = DEFAULT_PLACEMENT,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Attainment is the mean over so many seeds.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The first of the seeds, of the hints and of the policies.")] = 0,
    limit: options.Limit = None,
    task: options.Task = None,
    slo: options.Slos = None,
    slo_scale: options.SloScale = 1.0,
    max_batch_size: options.MaxBatchSize = _DEFAULTS.engine.max_batch_size,
    max_prefill_tokens: options.MaxPrefillTokens = _DEFAULTS.engine.max_prefill_tokens,
    kv_tokens: options.KvTokens = _DEFAULTS.engine.kv_tokens,
    prefix_cache_tokens: options.PrefixCacheTokens = None,
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
        typer.Option("--json", metavar="OUT", help="Write what was found, and every run made on the way."),
    ] = None,
    traces_folder: options.TracesFolder = None,
) -> None:
    """Find by bisection the highest speedup, or the fewest instances, at which each policy holds the target.

    Every step is a simulated run over the whole trace (or --limit).
    """
    if not 0 < tolerance < 1:
        raise ConfigError(f"--tolerance: must be above 0 and below 1, got {tolerance}")
    policies = options.split_policies(policy)
    load = Load(parse_slo_options(slo or [], slo_scale), speedup, limit, length_noise, length_bias)
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
    )
    check_writable([json_out])
    rows = options.read_rows(traces, task, traces_folder)
    check_slo_tasks(load.slos, rows)
    questions = [Question(Job(_TRACE, load, fleet, name, seed), vary, target, tolerance, seeds) for name in policies]
    found: dict[int, Capacity] = {}
    with workers({_TRACE: rows}, jobs) as pool, options.progress_bar("policies", len(policies)) as advance:
        for position, answer in pool.map(find_capacity, questions):
            found[position] = answer
            advance()
    answers = [found[position] for position in range(len(policies))]
    if json_out is not None:
        write_json(json_out, capacity_document(vary, target, answers))
    Console().print(capacity_table(vary, target, answers))


def capacity_document(vary: Vary, target: float, answers: list[Capacity]) -> dict[str, object]:
    """What goes into the file: one entry per policy, and all runs in the form of a result file."""
    return {
        "vary": vary.value,
        "target": target,
        "capacity": [
            {
                "policy": answer.policy,
                vary.value: answer.value,
                "slo_attainment": answer.attainment,
                "rate_rps": answer.rate_rps,
            }
            for answer in answers
        ],
        "runs": [run for answer in answers for run in answer.runs],
    }


def capacity_table(vary: Vary, target: float, answers: list[Capacity]) -> Table:
    """One line per policy."""
    what = "highest speedup" if vary is Vary.SPEEDUP else "fewest instances"
    table = Table(title=f"{what} with an attainment of at least {target:g}", title_justify="left", header_style="bold")
    for label in ("policy", what, "requests/s", "attainment there", "runs"):
        table.add_column(label, justify="left" if label == "policy" else "right")
    for answer in answers:
        value = "none" if answer.value is None else f"{answer.value:.3g}"
        rate = "-" if answer.rate_rps is None else f"{answer.rate_rps:.2f}"
        attainment = "-" if answer.attainment is None else f"{answer.attainment:.3f}"
        table.add_row(answer.policy, value, rate, attainment, str(len(answer.runs)))
    return table
