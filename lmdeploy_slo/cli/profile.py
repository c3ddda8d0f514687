"""`lmdeploy_slo profile`: what an engine costs, measured, fitted, listed and shown; one module a command."""

from __future__ import annotations

import typer

from lmdeploy_slo.cli.profile_fit import fit, fit_table
from lmdeploy_slo.cli.profile_run import run
from lmdeploy_slo.cli.profile_show import list_profiles, show

profile = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@profile.callback()
def _profiles() -> None:
    """Measure and fit how long an engine takes, and look at what is known of it."""


profile.command("list")(list_profiles)
profile.command()(show)
profile.command()(run)
profile.command()(fit)
profile.command("fit-table")(fit_table)
