"""The options of commands that call a server: how it is trusted, and how they show who calls."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from lmdeploy_slo.client.channel import Access, tls_credentials
from lmdeploy_slo.config import ENV_TOKEN

_PANEL = "How the server is reached"

Tls: TypeAlias = Annotated[
    bool, typer.Option("--tls", help="Use TLS; implied by --ca and --cert.", rich_help_panel=_PANEL)
]
Ca: TypeAlias = Annotated[
    Path | None,
    typer.Option("--ca", metavar="FILE", help="Who signed the server's certificate, PEM.", rich_help_panel=_PANEL),
]
Cert: TypeAlias = Annotated[
    Path | None, typer.Option("--cert", metavar="FILE", help="A certificate of your own, PEM.", rich_help_panel=_PANEL)
]
Key: TypeAlias = Annotated[
    Path | None, typer.Option("--key", metavar="FILE", help="Its private key, PEM.", rich_help_panel=_PANEL)
]
Token: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="TOKEN",
        envvar=ENV_TOKEN,
        help="Bearer token; others on this machine can read a command line, so the variable is the better place.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Insecure: TypeAlias = Annotated[
    bool,
    typer.Option("--insecure", help="Send the token also in plain text to another machine.", rich_help_panel=_PANEL),
]


def access(
    *, tls: bool, ca: Path | None, cert: Path | None, key: Path | None, token: str | None, insecure: bool
) -> Access:
    """What the options say. Raises ConfigError where a file cannot be read."""
    protected = tls or ca is not None or cert is not None or key is not None
    return Access(tls_credentials(ca, cert, key) if protected else None, token or None, insecure)
