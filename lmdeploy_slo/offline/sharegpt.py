"""Conversations in the form of ShareGPT: a JSON list (or JSON lines) of {"conversations": [{"from", "value"}, ...]}.

A turn is what a human says and what the model answers: one request, its prompt everything said until then, its output
the answer. Python-Code-23k-ShareGPT and ShareGPT_Vicuna_unfiltered have this form. Chat templates are not added: they
cost a handful of tokens a message and differ by model.

Without a tokenizer tokens are estimated from characters: `ASCII_PER_TOKEN` of ASCII and `OTHER_PER_TOKEN` of anything
else make a token. That is the usual rule of thumb for English text with today's vocabularies of 100,000 and more; code
has somewhat more tokens than it says, and no single request should be judged by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import count
from pathlib import Path
from typing import Any

from lmdeploy_slo.errors import TraceError
from lmdeploy_slo.offline.simulation.prefix_cache import BLOCK_TOKENS
from lmdeploy_slo.offline.traces import json_of, text_of

ASCII_PER_TOKEN = 4.0
OTHER_PER_TOKEN = 1.5

_HUMAN = {"human", "user"}
_MODEL = {"gpt", "assistant", "chatgpt", "bing", "bard", "model"}


class Turns(str, Enum):
    """Which turns of a conversation become requests."""

    FIRST = "first"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Turn:
    """prompt_tokens, output_tokens: >= 1. prefix_blocks: of `BLOCK_TOKENS` prompt tokens each; those that turns of one
    conversation have in common have equal ids."""

    prompt_tokens: int
    output_tokens: int
    prefix_blocks: tuple[int, ...]


def estimate_tokens(text: str) -> int:
    """The estimate of the module, at least 1 for any text."""
    ascii_characters = sum(character.isascii() for character in text)
    return max(1, math.ceil(ascii_characters / ASCII_PER_TOKEN + (len(text) - ascii_characters) / OTHER_PER_TOKEN))


def read_conversations(
    path: Path, turns: Turns = Turns.FIRST, count_tokens: Callable[[str], int] = estimate_tokens
) -> list[list[Turn]]:
    """The conversations of a file that have a turn, in its order.

    Messages of neither side count towards the prompts that follow them; a turn with an empty side is none. Raises
    TraceError, which names the file and the conversation.
    """
    block_ids = count()
    conversations = []
    for number, messages in _conversations(path):
        found = list(_turns(path, number, messages, count_tokens, block_ids))
        if found:
            conversations.append(found[:1] if turns is Turns.FIRST else found)
    if not conversations:
        raise TraceError(f"{path}: there is no conversation with a turn in it")
    return conversations


def _conversations(path: Path) -> Iterator[tuple[int, list[Any]]]:
    text = text_of(path)
    try:
        records = json_of(text) if text.lstrip().startswith("[") else [json_of(x) for x in text.splitlines() if x]
    except ValueError as error:
        raise TraceError(f"{path}: not JSON: {error}") from error
    for number, record in enumerate(records, 1):
        messages = record.get("conversations") if isinstance(record, dict) else None
        if not isinstance(messages, list):
            raise TraceError(f"{path}, conversation {number}: expected an object with a list named conversations")
        yield number, messages


def _turns(
    path: Path, number: int, messages: list[Any], count_tokens: Callable[[str], int], block_ids: Iterator[int]
) -> Iterator[Turn]:
    said = 0  # tokens of everything before
    asked = False  # whether the last message is a human's
    shared: list[int] = []  # blocks that are full by now
    for message in messages:
        side, text = (message.get("from"), message.get("value")) if isinstance(message, dict) else (None, None)
        if not isinstance(side, str) or not isinstance(text, str):
            raise TraceError(f"{path}, conversation {number}: expected messages with from and value")
        tokens = count_tokens(text) if text.strip() else 0
        if side in _MODEL and asked and tokens:
            shared.extend(next(block_ids) for _ in range(said // BLOCK_TOKENS - len(shared)))
            last = () if said % BLOCK_TOKENS == 0 else (next(block_ids),)
            yield Turn(said, tokens, (*shared, *last))
        asked = side in _HUMAN and tokens > 0
        said += tokens
