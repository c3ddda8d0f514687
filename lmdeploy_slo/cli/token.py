"""`lmdeploy_slo token`: bearer tokens for `serve --tokens-file`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.gateway.tokens import new_token, read_tokens

token = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@token.callback()
def _tokens() -> None:
    """Make bearer tokens for `serve --tokens-file`."""


@token.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The client that will hold it.")],
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Append its line there; else it is printed.")
    ] = None,
) -> None:
    """Make a token for a client. It is printed once and kept nowhere: the server knows its hash.

    Without --file the line for the tokens file follows on stdout. A running server takes a new line within a second.
    """
    made, line = new_token(name)
    if file is not None:
        _append(file, line)
    typer.echo(made)
    if file is None:
        typer.echo(line)


def _append(file: Path, line: str) -> None:
    """Raises ConfigError where the file is not one of tokens, or cannot be written."""
    try:
        file.touch(mode=0o600)
        read_tokens(file)
        begun = file.read_bytes()
        with file.open("a", encoding="utf-8") as opened:
            opened.write(f"{line}\n" if not begun or begun.endswith(b"\n") else f"\n{line}\n")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from error
