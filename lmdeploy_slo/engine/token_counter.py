"""Counts tokens with a model's own tokenizer; for offline tools, which need numbers and no engine."""

from __future__ import annotations

from collections.abc import Callable

from lmdeploy_slo.errors import ConfigError


def token_counter(model: str) -> Callable[[str], int]:
    """Counts the tokens of a text with the tokenizer of a model: a directory or a Hugging Face id.

    Special tokens are not counted. Raises ModuleNotFoundError where transformers is not installed, and ConfigError
    where there is no such tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--tokenizer {model}: {error}") from error
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))
