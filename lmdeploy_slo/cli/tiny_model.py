"""`lmdeploy_slo tiny-model`: a small random checkpoint for trials without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmdeploy_slo.engine.tiny_model import ARCHITECTURES, TinyModelOptions, write_tiny_model


def tiny_model(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where it is written; new or empty.")],
    architecture: Annotated[str, typer.Option(help=" or ".join(ARCHITECTURES) + ".")] = "qwen2",
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers.")] = 2,
    hidden_size: Annotated[int, typer.Option(min=8, help="Width; a multiple of 8.")] = 32,
    context_tokens: Annotated[int, typer.Option(min=16, help="Longest prompt and output together.")] = 4096,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights; equal seeds give equal weights.")] = 0,
) -> None:
    """Write a small random checkpoint with tokenizer and chat template, offline.

    Its text means nothing. Serve it with: lmdeploy_slo serve DIRECTORY --device cpu
    """
    options = TinyModelOptions(architecture, layers, hidden_size, context_tokens, seed)
    size = write_tiny_model(directory, options)
    typer.echo(f"{directory}: {architecture}, {layers} layers, {size / 1e6:.1f} MB")
