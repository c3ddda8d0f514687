"""A prefix cache of prompt blocks: least recently used blocks go first, a hit is an unbroken run from the start.

Traces name the blocks of a prompt by ids (Mooncake's `hash_ids`, 512 tokens each), where equal ids mean equal text
with equal text before it. Only prompts are cached; generated text has no ids in a trace.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

BLOCK_TOKENS = 512
"""Tokens of a block in Mooncake's traces."""


class PrefixCache:
    """capacity_tokens: >= 0; what it holds never exceeds it. Memory grows with the blocks it holds."""

    def __init__(self, capacity_tokens: int, block_tokens: int = BLOCK_TOKENS) -> None:
        if capacity_tokens < 0:
            raise ValueError(f"capacity_tokens must be 0 or more, got {capacity_tokens}")
        self._capacity = capacity_tokens // block_tokens
        self._block_tokens = block_tokens
        self._blocks: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.looked_up_tokens = 0
        self.hit_tokens = 0

    def __len__(self) -> int:
        """Blocks held."""
        return len(self._blocks)

    def match(self, blocks: Sequence[int], prompt_tokens: int) -> int:
        """How many tokens at the start of a prompt are cached, < `prompt_tokens`; they become recently used.

        The last token is always computed: its pass yields the first output token.
        """
        hits = 0
        for block in blocks:
            if block not in self._blocks:
                break
            self._blocks.move_to_end(block)
            hits += 1
        tokens = min(hits * self._block_tokens, prompt_tokens - 1)
        self.looked_up_tokens += prompt_tokens
        self.hit_tokens += tokens
        return tokens

    def insert(self, blocks: Sequence[int]) -> None:
        """Takes in the blocks of a prompt that was computed; the first of them is the last to go."""
        for block in reversed(blocks[: self._capacity]):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
