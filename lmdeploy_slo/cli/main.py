"""The entry point: a table of commands, each in a module of its own that is imported when it is called.

What the user did wrong is told in one line on stderr, with status 2 (a wrong configuration or command line) or 1;
a traceback is a defect of this package.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.main import get_command

import lmdeploy_slo
from lmdeploy_slo.errors import ConfigError, MissingExtra, SloError

COMMANDS = {
    "serve": "Serve a model, or the emulated engine, over gRPC.",
    "generate": "Send one prompt to a server and stream the answer.",
    "top": "Watch a server: queue, running, SLO attainment by task, plan quality.",
    "explain": "Tell why a request waited, what went before it and at what price.",
    "scale": "Have a server run more engines, or fewer.",
    "replay": "Replay recorded traces against a server and report SLO attainment.",
    "simulate": "Replay recorded traces in virtual time, without a server.",
    "compare": "Simulate many combinations in parallel and compare them in pairs.",
    "capacity": "Find how much load, or how few instances, hold a target attainment.",
    "profile": "Measure, fit, list and show what forward passes of an engine take.",
    "workload": "Make a trace from presets, lognormal lengths or conversations.",
    "plan": "Print the static plan for a list of requests.",
    "demo": "FCFS and annealing side by side on a generated workload.",
    "token": "Make bearer tokens for serve --tokens-file.",
    "patch": "Show, check or export the patches that are put into LMDeploy.",
    "tiny-model": "Write a small random checkpoint for trials, offline.",
}
"""Command -> summary. `lmdeploy_slo.cli.NAME` has a function NAME, a hyphen written as _, that typer makes the command
of, or a Typer NAME with commands of its own."""

EXTRAS = {
    "lmdeploy": "turbomind",
    "torch": "turbomind",
    "transformers": "turbomind",
    "tokenizers": "turbomind",
    "safetensors": "turbomind",
    "ray": "ray",
    "matplotlib": "report",
    "opentelemetry": "otel",
}
"""Optional package -> the extra that installs it."""


class _LazyGroup(TyperGroup):
    """Lists commands from the table; imports the one that is run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else _load(name), rest


def _load(name: str) -> Any:
    function = name.replace("-", "_")
    command = getattr(import_module(f"lmdeploy_slo.cli.{function}"), function)
    if isinstance(command, typer.Typer):  # with commands of its own
        return get_command(command)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name)(command)
    return get_command(single)


def _placeholder() -> None:
    """Stands in a listing for a command that is not imported."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lmdeploy_slo {lmdeploy_slo.__version__}")
        raise typer.Exit


app = typer.Typer(cls=_LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False)
for _name, _summary in COMMANDS.items():
    app.command(_name, help=_summary)(_placeholder)


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """SLO-aware serving for LMDeploy's TurboMind."""


def main() -> None:
    """Runs the command line; ends the process with its status."""
    try:
        app()
    except SloError as error:
        _fail(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        _fail(MissingExtra(f"this command ({package})", EXTRAS[package]))
    except BrokenPipeError:
        sys.exit(1)


def _fail(error: SloError) -> NoReturn:
    print(f"lmdeploy_slo: {error}", file=sys.stderr)
    sys.exit(2 if isinstance(error, ConfigError) else 1)
