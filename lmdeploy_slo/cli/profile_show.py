"""`lmdeploy_slo profile list` and `show`: what is known of engines."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lmdeploy_slo.core.model_range import ModelRange
from lmdeploy_slo.prediction.profile_format import Errors, Profile
from lmdeploy_slo.prediction.profiles import load_profile, profile_names

UNITS = {"c0": "ms", "p1": "ms/token", "p2": "ms/token^2", "d1": "ms/sequence", "d2": "ms/token"}
"""Coefficient of the step model -> its unit in files and reports."""

_PROMPTS = (128, 512, 2048, 8192)
_BATCHES = (1, 16, 64, 256)
_CONTEXTS = (512, 2048, 8192)


def list_profiles() -> None:
    """List the profiles that ship with the package."""
    table = Table()
    for heading in ("profile", "model", "GPU", "engine"):
        table.add_column(heading, no_wrap=True)
    known = [load_profile(name) for name in profile_names()]
    for profile in known:
        table.add_row(profile.name, profile.model, profile.gpu, profile.engine)
    console = Console()
    console.print(table)
    for profile in known:
        console.print(f"{profile.name}: {profile.source}", markup=False, highlight=False)
    console.print(
        "Wherever a profile is named, the path of a .json file does as well: see profile run and profile fit.",
        highlight=False,
    )


def show(
    profile: Annotated[str, typer.Argument(metavar="PROFILE", help="Name of a shipped profile, or a .json file.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the profile as a file of this version has it.")
    ] = False,
) -> None:
    """Show a profile: coefficients, what they rest on, and what forward passes take by them."""
    known = load_profile(profile)
    if as_json:
        typer.echo(json.dumps(known.model_dump(), indent=2))
        return
    console = Console()
    console.print(_about(known))
    console.print(_coefficients(known))
    show_errors(console, known)
    for table in _times(known):
        console.print(table)
    console.print("In brackets: outside what the coefficients were fitted on.", highlight=False)


def show_errors(console: Console, known: Profile) -> None:
    """How far the models are off what they were fitted to, where the profile says."""
    if known.errors is None:
        console.print("How far the model is off is not known.")
        return
    table = Table(title="Errors, predicted / measured - 1", title_justify="left")
    for heading in ("model", "of"):
        table.add_column(heading)
    for heading in ("measured", "R2", "MAPE", "median", "worst"):
        table.add_column(heading, justify="right")
    for label, by_kind in (
        ("step", known.errors.step),
        ("bilinear", known.errors.bilinear),
        ("step, held out", known.errors.held_out),
    ):
        for kind, figures in by_kind.items():
            table.add_row(label, kind, *_figures(figures))
    console.print(table)


def percent(value: float | None) -> str:
    """As reports show it."""
    return "-" if value is None else f"{100 * value:.1f} %"


def _figures(figures: Errors) -> tuple[str, ...]:
    r2 = "-" if figures.r2 is None else f"{figures.r2:.4f}"
    return f"{figures.count:,}", r2, percent(figures.mape), percent(figures.median), percent(figures.worst)


def _about(known: Profile) -> Table:
    table = Table(title=known.name, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    samples = known.samples
    facts = {
        "model": known.model,
        "GPU": known.gpu,
        "engine": known.engine,
        "LMDeploy": known.lmdeploy_version or "",
        "tensor parallel": str(known.tensor_parallel),
        "dtype": known.dtype,
        "date": known.date or "",
        "source": known.source,
        "samples": f"{samples.count:,}, {samples.set_aside:,} set aside, {samples.digest}" if samples else "",
        **_spans(known.fitted_range),
    }
    for label, text in facts.items():
        if text:
            table.add_row(label, text)
    return table


def _spans(fitted: ModelRange) -> dict[str, str]:
    labelled = {
        "prompt tokens": fitted.prompt_tokens,
        "prompt tokens per pass": fitted.prefill_tokens,
        "sequences decoding": fitted.batch_size,
        "tokens in the cache of one": fitted.context_tokens,
    }
    return {
        label: "not known" if span is None else f"{span[0]:,.0f} to {span[1]:,.0f}" for label, span in labelled.items()
    }


def _coefficients(known: Profile) -> Table:
    table = Table(title="Coefficients", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for key, unit in UNITS.items():
        table.add_row(f"{key}, {unit}", f"{getattr(known.step_ms, key):.5g}")
    if known.bilinear_ms is not None:
        for part in ("prefill", "decode"):
            values = ", ".join(f"{value:.5g}" for value in getattr(known.bilinear_ms, part))
            table.add_row(f"bilinear {part}: a, b, c, d, ms", values)
    return table


def _times(known: Profile) -> tuple[Table, Table]:
    """A decode pass by batch and context, and a prompt by itself."""
    model, fitted = known.ranged_step_model(), known.fitted_range
    decode = Table(title="A pass of sequences that decode, ms", title_justify="left")
    decode.add_column("sequences", justify="right")
    for context in _CONTEXTS:
        decode.add_column(f"context {context:,}", justify="right")
    for batch in _BATCHES:
        cells = []
        for context in _CONTEXTS:
            step_s = model.model.step_s(0, 0, batch, batch * context)
            cells.append(_cell(step_s, bool(fitted.outside(batch_size=batch, context_tokens=context))))
        decode.add_row(str(batch), *cells)
    prefill = Table(title="A prompt by itself, ms", title_justify="left")
    prefill.add_column("tokens", justify="right")
    prefill.add_column("to its first token", justify="right")
    for tokens in _PROMPTS:
        steps = -(-tokens // model.max_prefill_tokens)
        alone_s = steps * model.model.c0 + model.model.prefill_stall_s(tokens)
        prefill.add_row(f"{tokens:,}", _cell(alone_s, bool(fitted.outside(prompt_tokens=tokens))))
    return decode, prefill


def _cell(seconds: float, outside: bool) -> str:
    text = f"{1e3 * seconds:,.2f}"
    return f"({text})" if outside else text
