"""Prefix cache of the stand-in: KV blocks by the tokens they follow from, the longest unused forgotten first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

_Key = tuple[int, ...]


class PrefixCache:
    """Blocks of `block_tokens` tokens; at most `max_blocks` are kept. A block's key is the whole text up to its end."""

    def __init__(self, block_tokens: int, max_blocks: int) -> None:
        self._block_tokens = block_tokens
        self._max_blocks = max_blocks
        self._blocks: OrderedDict[_Key, list[torch.Tensor]] = OrderedDict()
        self.asked_tokens = 0
        self.found_tokens = 0

    @property
    def hit_rate(self) -> float:
        """Prompt tokens found / prompt tokens asked for; 0 before the first."""
        return self.found_tokens / self.asked_tokens if self.asked_tokens else 0.0

    def match(self, tokens: Sequence[int]) -> list[list[torch.Tensor]]:
        """The longest run of known blocks at the start of `tokens` that leaves at least one token over."""
        found: list[list[torch.Tensor]] = []
        for end in range(self._block_tokens, len(tokens), self._block_tokens):
            key = tuple(tokens[:end])
            block = self._blocks.get(key)
            if block is None:
                break
            self._blocks.move_to_end(key)
            found.append(block)
        self.asked_tokens += len(tokens)
        self.found_tokens += len(found) * self._block_tokens
        return found

    def missing(self, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """(start, end) of the full blocks of `tokens` that are not known."""
        ends = range(self._block_tokens, len(tokens) + 1, self._block_tokens)
        return [(end - self._block_tokens, end) for end in ends if tuple(tokens[:end]) not in self._blocks]

    def add(self, tokens: Sequence[int], block: list[torch.Tensor]) -> None:
        """Remembers the block that ends `tokens`."""
        self._blocks[tuple(tokens)] = block
        if len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)
