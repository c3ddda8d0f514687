"""Options that the commands around the simulator share, and how they are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lmdeploy_slo.cli.replay import find_traces
from lmdeploy_slo.config import ENV_TRACES_DIR, Config, traces_dir
from lmdeploy_slo.core.plan import DEFAULT_PATIENCE, DEFAULT_PLACEMENT
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.offline.experiment import Fleet
from lmdeploy_slo.offline.simulation.drift import Drift
from lmdeploy_slo.offline.simulator import EngineKind
from lmdeploy_slo.offline.traces import TraceRow, read_traces
from lmdeploy_slo.prediction.length_predictors import LENGTH_PREDICTORS
from lmdeploy_slo.prediction.profiles import load_profile
from lmdeploy_slo.scheduling.placement import make_placement, placement_names
from lmdeploy_slo.scheduling.policy import policy_names

DEFAULTS = Config()
_LEARNED = DEFAULTS.scheduler.length_predictor

_ENGINE = re.compile(r"([^*@]+)(?:\*(\d{1,6}))?(?:@(\d{1,12}))?")

COEFFICIENTS = ("c0", "p1", "p2", "d1", "d2")

T = TypeVar("T")

Traces = Annotated[
    list[str],
    typer.Argument(
        metavar="TRACE...",
        help="Azure CSV, Mooncake JSON lines or arrival_s,input_tokens,output_tokens,task_class; gzipped or not. "
        "Several are merged on the instants they recorded.",
    ),
]
Task = Annotated[
    list[str] | None,
    typer.Option(metavar="TASK", help="Task of all rows of a trace; once per TRACE, in the same order."),
]
TracesFolder = Annotated[
    Path | None,
    typer.Option(
        "--traces",
        metavar="DIR",
        help=f"Where a TRACE is looked for that is not found as named; else {ENV_TRACES_DIR}.",
    ),
]
Limit = Annotated[int | None, typer.Option(help="Only the first so many requests.")]
Slos = Annotated[
    list[str] | None,
    typer.Option(
        "--slo",
        metavar="TASK=KIND:MS,...",
        help="SLO of a task, such as code=e2e:2000 or chat=ttft:1000,tpot:50; default=... for tasks not named. "
        "May be repeated; a task without one has no SLO.",
    ),
]
SloScale = Annotated[float, typer.Option(help="Multiplies every objective.")]
LengthNoise = Annotated[
    float | None,
    typer.Option(
        metavar="SIGMA",
        help="Each request comes with a hint: its true output length times lognormal(0, SIGMA), 0 for exact. Without "
        "it, lengths are foretold without hints.",
    ),
]
LengthPredictorName = Annotated[
    str,
    typer.Option(
        metavar="|".join(LENGTH_PREDICTORS),
        help="Who foretells output lengths: what is learnt by task, prompt and client, or the paper's Gaussian.",
    ),
]
LengthBias = Annotated[float, typer.Option(help="Multiplies the hints; with --length-noise.")]
Profile = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE[*N][@KV],...",
        help="Step-model profile of the engine. Several make a fleet of different engines: *N for so many of one, @KV "
        "for its KV cache in tokens where it is not --kv-tokens. More instances than are named take them in turn.",
    ),
]
MaxBatchSize = Annotated[int, typer.Option(metavar="B", min=1, help="Requests in flight per instance, at most.")]
MaxPrefillTokens = Annotated[int, typer.Option(metavar="M", min=1, help="Prompt tokens per forward pass, at most.")]
KvTokens = Annotated[
    int | None, typer.Option(metavar="K", min=1, help="KV cache of each instance, tokens; default: no bound.")
]
PrefixCacheTokens = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        min=0,
        help="Prefix cache of each instance, for traces that name prompt blocks of 512 tokens (Mooncake's hash_ids); "
        "default: none.",
    ),
]
Instances = Annotated[
    int | None, typer.Option(metavar="I", min=1, help="Engines; default: as many as --profile names.")
]
Placement = Annotated[
    str,
    typer.Option(metavar="|".join(placement_names()), help="On which of several instances a request is served."),
]
PlannerProfile = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE[*N],...",
        help="What the planner believes of the engine, or of each that --profile names; default: the truth.",
    ),
]
PlannerScale = Annotated[float, typer.Option(metavar="X", help="Multiplies the coefficients the planner believes.")]
Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate/--no-calibrate",
        help="Refine what the planner believes by what the steps took and what the prefix cache held, as serve does.",
    ),
]
DriftAt = Annotated[
    float | None,
    typer.Option(metavar="S", min=0.0, help="The engines change this many seconds after the start, in silence."),
]
DriftScale = Annotated[
    str,
    typer.Option(
        metavar="X|C0,P1,P2,D1,D2",
        help="With --drift-at: multiplies all coefficients of the engines, or each by its own factor.",
    ),
]
DriftTold = Annotated[
    bool, typer.Option("--drift-told", help="With --drift-at: the planner is told at once, as a yardstick.")
]
PlanEvaluations = Annotated[
    int, typer.Option(metavar="N", min=1, help="Planning budget: plans scored in one search, at most.")
]
Patience = Annotated[
    float,
    typer.Option(
        metavar="X",
        min=0.01,
        help="Of annealing: the longest wait of requests whose SLO is lost, in terms of first come, first served.",
    ),
]
PlanLatencyMs = Annotated[
    float, typer.Option(metavar="T", min=0.0, help="Virtual time from a snapshot to its plan being applied.")
]
Jobs = Annotated[int | None, typer.Option(metavar="N", min=1, help="Processes; default: as many as there are cores.")]


def read_rows(traces: Sequence[str], tasks: Sequence[str] | None, folder: Path | None) -> list[TraceRow]:
    """The rows of the traces named, looked for as `replay` does."""
    return read_traces(find_traces(traces, folder or traces_dir()), tasks or [])


def build_fleet(
    *,
    profile: str,
    planner_profile: str | None,
    planner_scale: float,
    max_batch_size: int,
    max_prefill_tokens: int,
    kv_tokens: int | None,
    instances: int | None,
    prefix_cache_tokens: int | None,
    plan_evaluations: int,
    plan_latency_ms: float,
    patience: float = DEFAULT_PATIENCE,
    calibrate: bool = False,
    drift: Drift | None = None,
    length_predictor: str = _LEARNED,
    placement: str = DEFAULT_PLACEMENT,
) -> Fleet:
    """The engines the options describe; raises ConfigError."""
    if length_predictor not in LENGTH_PREDICTORS:
        known = ", ".join(LENGTH_PREDICTORS)
        raise ConfigError(f"--length-predictor: {length_predictor!r} is unknown; choose one of {known}")
    make_placement(placement)  # raises for an unknown name
    if not 0 < planner_scale < float("inf"):
        raise ConfigError(f"--planner-scale: must be a positive number, got {planner_scale}")
    kinds = read_engines(profile, planner_profile, planner_scale)
    first = kinds[0]
    return Fleet(
        model=first.model,
        planner_model=first.planner_model,
        limits=EngineLimits(max_batch_size, max_prefill_tokens, kv_tokens),
        instances=instances or len(kinds),
        prefix_cache_tokens=prefix_cache_tokens,
        plan_evaluations=plan_evaluations,
        plan_latency_s=plan_latency_ms / 1e3,
        patience=patience,
        calibrate=calibrate,
        drift=drift,
        length_predictor=length_predictor,
        mixed=tuple(kinds) if len(kinds) > 1 or first.kv_tokens is not None else (),
        placement=placement,
    )


def read_engines(profile: str, planner_profile: str | None, planner_scale: float) -> list[EngineKind]:
    """The engines that `--profile` names, one entry each, and what is believed of them; raises ConfigError."""
    named = _named_engines("--profile", profile)
    believed = named
    if planner_profile is not None:
        believed = _named_engines("--planner-profile", planner_profile)
        if len(believed) == 1:
            believed *= len(named)
        if len(believed) != len(named):
            raise ConfigError(
                f"--planner-profile: names {len(believed)} engines, --profile {len(named)}: name one, or one for each"
            )
    models = {name: load_profile(name).step_model for name, _ in [*named, *believed]}
    kinds = []
    for (name, kv_tokens), (belief, _) in zip(named, believed, strict=True):
        planner_model = models[belief] if planner_scale == 1 else models[belief].scaled(planner_scale)
        kinds.append(EngineKind(models[name], planner_model, kv_tokens, name))
    return kinds


def _named_engines(option: str, text: str) -> list[tuple[str, int | None]]:
    """(profile, KV tokens) of each engine in `NAME[*N][@KV],...`."""
    engines: list[tuple[str, int | None]] = []
    for part in text.split(","):
        match = _ENGINE.fullmatch(part.strip())
        count, kv_tokens = (match[2], match[3]) if match else ("0", None)
        if match is None or count == "0" or kv_tokens == "0":
            raise ConfigError(f"{option}: NAME, NAME*N or NAME*N@KV is expected, got {part.strip()!r} in {text!r}")
        engines += [(match[1], None if kv_tokens is None else int(kv_tokens))] * int(count or 1)
    return engines


def read_drift(at_s: float | None, scale: str, *, told: bool) -> Drift | None:
    """The change of the engines the options describe, None for none; raises ConfigError."""
    if at_s is None:
        if told:
            raise ConfigError("--drift-told: there is nothing to tell without --drift-at")
        return None
    try:
        factors = [float(part) for part in scale.split(",")]
    except ValueError:
        raise ConfigError(f"--drift-scale: cannot read {scale!r}") from None
    if len(factors) == 1:
        factors *= len(COEFFICIENTS)
    if len(factors) != len(COEFFICIENTS) or not all(0 < factor < float("inf") for factor in factors):
        raise ConfigError(
            f"--drift-scale: one positive number or five, for {', '.join(COEFFICIENTS)}, are expected, got {scale!r}"
        )
    c0, p1, p2, d1, d2 = factors
    return Drift(at_s, (c0, p1, p2, d1, d2), told)


def split_list(option: str, text: str, convert: Callable[[str], T]) -> list[T]:
    """The values of `A,B,...`; raises ConfigError for one that cannot be read, an empty list and a repetition."""
    values: list[T] = []
    for part in text.split(","):
        try:
            value = convert(part.strip())
        except ValueError:
            raise ConfigError(f"{option}: cannot read {part.strip()!r} in {text!r}") from None
        if value in values:
            raise ConfigError(f"{option}: {part.strip()} is named twice")
        values.append(value)
    return values


def split_placements(text: str) -> list[str]:
    """Placements of `A,B,...`; raises ConfigError, listing the names, for an unknown one."""
    names = split_list("--placement", text, str)
    for name in names:
        make_placement(name)
    return names


def split_policies(text: str) -> list[str]:
    """Policy names of `A,B,...`; raises ConfigError, listing the names, for an unknown one."""
    known = policy_names()
    names = split_list("--policy", text, str)
    for name in names:
        if name not in known:
            raise ConfigError(f"--policy: {name!r} is unknown; choose one of {', '.join(known)}")
    return names


def at_least_one(option: str, values: Sequence[int]) -> int:
    """The smallest of the values; raises ConfigError where it is below 1."""
    smallest = min(values)
    if smallest < 1:
        raise ConfigError(f"{option}: must be at least 1, got {smallest}")
    return smallest


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr; the function moves it on by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
        line = progress.add_task(label, total=total)
        yield lambda: progress.advance(line)
