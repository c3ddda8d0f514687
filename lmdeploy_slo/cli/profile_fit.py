"""`lmdeploy_slo profile fit` and `fit-table`: profiles from what others have recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lmdeploy_slo.cli.profile_show import UNITS, percent, show_errors
from lmdeploy_slo.config import Config
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.offline import benchmark_table
from lmdeploy_slo.offline.benchmark_table import read_table
from lmdeploy_slo.offline.profiler.artifact import in_file
from lmdeploy_slo.offline.results import check_writable
from lmdeploy_slo.offline.timelines import COLUMNS, read_timelines
from lmdeploy_slo.prediction.fit_errors import errors_by_kind, predicted_by_bilinear, predicted_by_step
from lmdeploy_slo.prediction.fitting import StepFit, fit_step_model
from lmdeploy_slo.prediction.least_squares import fit_bilinear, fit_models
from lmdeploy_slo.prediction.observations import Kind, Observation, range_of
from lmdeploy_slo.prediction.profile_format import BilinearCoefficients, Errors, FitErrors, RangeSpans, Samples
from lmdeploy_slo.prediction.profiles import Profile, StepCoefficients, save_profile

_MAX_PREFILL_TOKENS = Config().engine.max_prefill_tokens
_FEWEST_FOR_BILINEAR = 8  # intervals of a kind


class Unit(str, Enum):
    """Of recorded times."""

    SECONDS = "s"
    MILLISECONDS = "ms"
    MICROSECONDS = "us"
    NANOSECONDS = "ns"


_SECONDS = {Unit.SECONDS: 1.0, Unit.MILLISECONDS: 1e-3, Unit.MICROSECONDS: 1e-6, Unit.NANOSECONDS: 1e-9}


def _column(what: str, text: str, columns: Mapping[str, Sequence[str]] = COLUMNS) -> typer.models.OptionInfo:
    usual = ", ".join(columns[what])
    option: typer.models.OptionInfo = typer.Option(metavar="COLUMN", help=f"{text}; else one of {usual}.")
    return option


_Out = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Write the profile, a .json file.")]
_MaxPrefill = Annotated[
    int, typer.Option(metavar="M", min=1, help="Prompt tokens the engine computed per forward pass, at most.")
]
_Name = Annotated[str | None, typer.Option(help="Name of the profile; default: that of FILE.")]
_Noted = Annotated[str, typer.Option(help="To be noted in the profile.")]


def fit(
    requests: Annotated[
        Path, typer.Argument(metavar="REQUESTS", help="CSV or JSON lines, one request each; gzipped or not.")
    ],
    out: _Out,
    max_prefill_tokens: _MaxPrefill = _MAX_PREFILL_TOKENS,
    first: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Only the first N requests, and of them only what was known when the next one arrived.",
        ),
    ] = None,
    unit: Annotated[Unit, typer.Option(help="Of the instants.")] = Unit.SECONDS,
    queued: Annotated[str | None, _column("queued", "When the engine got it")] = None,
    scheduled: Annotated[str | None, _column("scheduled", "When it left the engine's queue, optional")] = None,
    first_token: Annotated[str | None, _column("first_token", "Instant of the first token")] = None,
    last_token: Annotated[str | None, _column("last_token", "Instant of the last token, optional")] = None,
    prompt_tokens: Annotated[str | None, _column("prompt_tokens", "Prompt tokens")] = None,
    output_tokens: Annotated[str | None, _column("output_tokens", "Output tokens, with the last token")] = None,
    arrival: Annotated[str | None, _column("arrival", "When it arrived, with --first; may be another clock")] = None,
    name: _Name = None,
    engine: _Noted = "",
    gpu: _Noted = "",
    model: _Noted = "",
) -> None:
    """Fit step-model coefficients to recorded request timelines.

    Needs, of each request, when it was queued and how long its prompt was; of most when their first token came; of some
    when they were scheduled and ended. An empty or null field is not known. docs/simulator.md says how it is done and
    how good it was on recorded runs.
    """
    _check_out(out)
    names = {
        "arrival": arrival,
        "queued": queued,
        "scheduled": scheduled,
        "first_token": first_token,
        "last_token": last_token,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
    }
    recorded = read_timelines(requests, names, _SECONDS[unit])
    timelines = recorded.timelines if first is None else recorded.until_arrival_of(first)
    found = fit_step_model(timelines, max_prefill_tokens)
    step_errors = errors_by_kind(found.observations, predicted_by_step(found.model, found.observations))
    bilinear, bilinear_errors = _bilinear_of(found.observations)
    fitted = Profile(
        name=name or out.stem,
        engine=engine,
        gpu=gpu,
        model=model,
        source=f"fitted to {found.requests} requests of {requests.name}, {found.finished} of them finished",
        step_ms=StepCoefficients.of(found.model),
        bilinear_ms=bilinear,
        max_prefill_tokens=max_prefill_tokens,
        range=RangeSpans.of(range_of(found.observations)),
        errors=FitErrors(step=in_file(step_errors), bilinear=bilinear_errors),
        samples=Samples(count=found.intervals, set_aside=0, digest=_digest(requests)) if found.intervals else None,
    )
    save_profile(fitted, out)
    Console().print(timelines_table(fitted, found))


def fit_table(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="CSV, a static batch a line; gzipped or not.")],
    out: _Out,
    max_prefill_tokens: _MaxPrefill = _MAX_PREFILL_TOKENS,
    kv_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Leave out batches that are larger than a KV cache of N tokens."),
    ] = None,
    unit: Annotated[Unit, typer.Option(help="Of the times.")] = Unit.SECONDS,
    batch: Annotated[str | None, _column("batch", "Sequences at once", benchmark_table.COLUMNS)] = None,
    prompt_tokens: Annotated[str | None, _column("prompt_tokens", "Of each", benchmark_table.COLUMNS)] = None,
    output_tokens: Annotated[str | None, _column("output_tokens", "Of each", benchmark_table.COLUMNS)] = None,
    token: Annotated[str | None, _column("token_s", "Time per output token", benchmark_table.COLUMNS)] = None,
    first_token: Annotated[
        str | None, _column("first_token_s", "Time to first token, optional", benchmark_table.COLUMNS)
    ] = None,
    name: _Name = None,
    engine: _Noted = "",
    gpu: _Noted = "",
    model: _Noted = "",
    lmdeploy_version: Annotated[str | None, typer.Option(help="To be noted in the profile.")] = None,
) -> None:
    """Fit both models to a table of static benchmarks, such as LMDeploy's profile_generation.py writes.

    The time per token is taken at the context halfway through the output; the time to first token counts for batches
    of one.
    """
    _check_out(out)
    names = {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "token_s": token,
        "first_token_s": first_token,
    }
    read = read_table(
        table, max_prefill_tokens=max_prefill_tokens, kv_tokens=kv_tokens, names=names, unit_s=_SECONDS[unit]
    )
    found = fit_models(read.observations)
    bilinear_errors = (
        {} if found.bilinear is None else errors_by_kind(found.kept, predicted_by_bilinear(found.bilinear, found.kept))
    )
    left_out = f", {read.left_out} left out that the KV cache cannot hold" if read.left_out else ""
    fitted = Profile(
        name=name or out.stem,
        engine=engine,
        lmdeploy_version=lmdeploy_version,
        gpu=gpu,
        model=model,
        source=f"fitted to {sum(o.kind is Kind.DECODE for o in read.observations)} batches of {table.name}{left_out}",
        step_ms=StepCoefficients.of(found.step),
        bilinear_ms=None if found.bilinear is None else BilinearCoefficients.of(found.bilinear),
        max_prefill_tokens=max_prefill_tokens,
        range=RangeSpans.of(found.range),
        errors=FitErrors(
            step=in_file(errors_by_kind(found.kept, predicted_by_step(found.step, found.kept))),
            bilinear=in_file(bilinear_errors),
        ),
        samples=Samples(count=len(read.observations), set_aside=len(found.set_aside), digest=_digest(table)),
    )
    save_profile(fitted, out)
    console = Console()
    console.print(_coefficients(fitted))
    show_errors(console, fitted)


def _check_out(out: Path) -> None:
    if out.suffix != ".json":
        raise ConfigError(f"--out {out}: a profile is a .json file")
    check_writable([out])


def _digest(path: Path) -> str:
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def _bilinear_of(observations: Sequence[Observation]) -> tuple[BilinearCoefficients | None, dict[str, Errors]]:
    """The paper's model of what was recorded, where prompts were computed by themselves, and decoding too, often."""
    often = all(
        sum(o.kind is kind for o in observations) >= _FEWEST_FOR_BILINEAR for kind in (Kind.PREFILL, Kind.DECODE)
    )
    model = fit_bilinear(observations) if often else None
    if model is None:
        return None, {}
    errors = errors_by_kind(observations, predicted_by_bilinear(model, observations))
    return BilinearCoefficients.of(model), in_file(errors)


def _coefficients(fitted: Profile) -> Table:
    table = Table(title=f"{fitted.name}: {fitted.source}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for key, unit in UNITS.items():
        table.add_row(f"{key}, {unit}", f"{getattr(fitted.step_ms, key):.4g}")
    return table


def timelines_table(fitted: Profile, found: StepFit) -> Table:
    """What was found, and on what it rests."""
    table = _coefficients(fitted)
    table.add_row("intervals between steps used", str(found.intervals))
    table.add_row("median error of those of decode", percent(found.decode_error))
    table.add_row("median error of those with prompts", percent(found.prefill_error))
    table.add_row("sequences decoding", "{} to {}".format(*found.batch_range))
    table.add_row("tokens in their cache", "{:,} to {:,}".format(*found.context_range))
    table.add_row("schedules one step ahead", "yes" if found.steps_ahead else "no")
    return table
