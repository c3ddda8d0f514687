"""`lmdeploy_slo patch`: which LMDeploy is here, whether the patches fit it, and the patched source."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lmdeploy_slo.engine.patching.export import context_diff, export_tree, patched_sources
from lmdeploy_slo.engine.patching.installed import Installation, inspect_installation
from lmdeploy_slo.engine.patching.series import Series, load_series
from lmdeploy_slo.errors import ConfigError


class Action(str, Enum):
    """What to do."""

    STATUS = "status"
    CHECK = "check"
    EXPORT = "export"
    DIFF = "diff"


def patch(
    action: Annotated[
        Action,
        typer.Argument(
            help="status: what is installed and what each patch gives. check: status 0 where the patches fit. "
            "export: a patched source tree in DIRECTORY. diff: what the patches change."
        ),
    ],
    directory: Annotated[
        Path | None, typer.Argument(metavar="[DIRECTORY]", help="Where export writes to; new or empty.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            metavar="TREE",
            help="A source tree of LMDeploy, with the package in it.",
            show_default="the installed package",
            exists=True,
            file_okay=False,
        ),
    ] = None,
) -> None:
    """Show, check or export the patches that lmdeploy_slo puts into LMDeploy.

    Nothing installed is ever changed: patches are applied in memory, when LMDeploy is imported.
    """
    if (directory is not None) != (action is Action.EXPORT):
        raise typer.BadParameter("export needs a DIRECTORY, and nothing else takes one")
    series = load_series()
    installation = inspect_installation(series, source)
    if action is Action.STATUS:
        _print_status(series, installation)
    elif action is Action.CHECK:
        _check(series, installation)
    elif action is Action.DIFF:
        typer.echo(context_diff(series, installation), nl=False)
    elif directory is not None:
        changed = export_tree(series, installation, directory, whole_root=source is not None)
        typer.echo(
            f"{directory}: {series.package} {series.version} with {len(series.patches)} patches, {changed} files"
        )


def _check(series: Series, installation: Installation) -> None:
    problem = installation.problem(series)
    if problem is not None:
        raise ConfigError(f"patches: {problem}")
    if not installation.patched_on_disk:
        patched_sources(series, installation)
    typer.echo(f"all {len(series.patches)} patches fit {series.package} {installation.version}")


def _print_status(series: Series, installation: Installation) -> None:
    """Ends with status 1 where the patches do not fit."""
    problem = installation.problem(series)
    typer.echo(f"{series.package} {installation.version} at {installation.root / series.package}")
    for file in installation.files:
        typer.echo(f"  {file.path}: {file.state.value}")
    typer.echo(f"{len(series.patches)} patches for {series.package} {series.version}")
    for one in series.patches:
        typer.echo(f"  {one.name}: {one.header['Subject']}")
        typer.echo(f"    without it: {one.header['Lost without']}")
        typer.echo(f"    drop when: {one.header['Drop when']}")
    if problem is not None:
        typer.echo(f"they do not fit: {problem}")
        raise typer.Exit(1)
    typer.echo("they are in it already" if installation.patched_on_disk else "they fit, and are applied on import")
