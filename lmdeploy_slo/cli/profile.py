"""`lmdeploy_slo profile`: step-model profiles."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lmdeploy_slo.config import Config
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.offline.results import check_writable
from lmdeploy_slo.offline.timelines import COLUMNS, read_timelines
from lmdeploy_slo.prediction.fitting import StepFit, fit_step_model
from lmdeploy_slo.prediction.profiles import FORMAT, Profile, StepCoefficients

profile = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


class Unit(str, Enum):
    """Of recorded instants."""

    SECONDS = "s"
    MILLISECONDS = "ms"
    MICROSECONDS = "us"
    NANOSECONDS = "ns"


_SECONDS = {Unit.SECONDS: 1.0, Unit.MILLISECONDS: 1e-3, Unit.MICROSECONDS: 1e-6, Unit.NANOSECONDS: 1e-9}
_DIGITS = 6  # significant ones, of a coefficient


@profile.callback()
def _profiles() -> None:
    """Make step-model profiles: how long a forward pass of an engine takes."""


def _column(what: str, text: str) -> typer.models.OptionInfo:
    usual = ", ".join(COLUMNS[what])
    option: typer.models.OptionInfo = typer.Option(metavar="COLUMN", help=f"{text}; else one of {usual}.")
    return option


@profile.command()
def fit(
    requests: Annotated[
        Path, typer.Argument(metavar="REQUESTS", help="CSV or JSON lines, one request each; gzipped or not.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Write the profile, a .json file.")],
    max_prefill_tokens: Annotated[
        int, typer.Option(metavar="M", min=1, help="Prompt tokens the engine computed per forward pass, at most.")
    ] = Config().engine.max_prefill_tokens,
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
    name: Annotated[str | None, typer.Option(help="Name of the profile; default: that of FILE.")] = None,
    engine: Annotated[str, typer.Option(help="To be noted in the profile.")] = "",
    gpu: Annotated[str, typer.Option(help="To be noted in the profile.")] = "",
    model: Annotated[str, typer.Option(help="To be noted in the profile.")] = "",
) -> None:
    """Fit step-model coefficients to recorded request timelines.

    Needs, of each request, when it was queued and how long its prompt was; of most when their first token came; of some
    when they were scheduled and ended. An empty or null field is not known. docs/simulator.md says how it is done and
    how good it was on recorded runs.
    """
    check_writable([out])
    if out.suffix != ".json":
        raise ConfigError(f"--out {out}: a profile is a .json file")
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
    coefficients = StepCoefficients(
        **{key: _rounded(1e3 * getattr(found.model, key)) for key in StepCoefficients.model_fields}
    )
    fitted = Profile(
        format=FORMAT,
        name=name or out.stem,
        engine=engine,
        gpu=gpu,
        model=model,
        source=f"fitted to {found.requests} requests of {requests.name}, {found.finished} of them finished",
        step_ms=coefficients,
    )
    try:
        out.write_text(fitted.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror or error}") from error
    Console().print(fit_table(fitted, found))


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def fit_table(fitted: Profile, found: StepFit) -> Table:
    """What was found, and on what it rests."""
    table = Table(title=f"{fitted.name}: {fitted.source}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    units = {"c0": "ms", "p1": "ms/token", "p2": "ms/token^2", "d1": "ms/sequence", "d2": "ms/token"}
    for key, unit in units.items():
        table.add_row(f"{key}, {unit}", f"{getattr(fitted.step_ms, key):.4g}")
    table.add_row("intervals between steps used", str(found.intervals))
    table.add_row("median error of those of decode", _percent(found.decode_error))
    table.add_row("median error of those with prompts", _percent(found.prefill_error))
    table.add_row("sequences decoding", "{} to {}".format(*found.batch_range))
    table.add_row("tokens in their cache", "{:,} to {:,}".format(*found.context_range))
    table.add_row("schedules one step ahead", "yes" if found.steps_ahead else "no")
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
