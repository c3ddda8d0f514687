"""What is measured: points of batch x prompt x output within the limits of an engine.

Four kinds of points, by what the measured forward passes hold:

    prefill 1 x 4096             one prompt by itself
    prefill 16 x 512             prompts computed together in one pass
    decode 64 x 1024             sequences that began with a context each, a token per pass
    mixed 1 x 512 + 64 x 1024    a prompt computed beside decoding sequences

Levels are geometric between the smallest and the largest that the engine takes: the largest batch, a whole pass of
prompt tokens, the longest session, and as many tokens as the KV cache holds without evicting anyone. Points between the
levels are held out: they are measured but not fitted, and say how good a prediction is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lmdeploy_slo.prediction.observations import Kind

SHOTS = 3
"""Repeats of one visit to a point."""

GAP_STEPS = 16
"""Passes that may go by between two probes of the same background; more end the visit early."""

_LEAST_PROMPT, _LEAST_CONTEXT, _LEAST_TOGETHER = 16, 32, 8
_PROMPT_LEVELS, _BATCH_LEVELS, _CONTEXT_LEVELS = 6, 5, 4
_TOGETHER = (2, 4, 16)
_KV_SHARE = 0.9  # of the cache: its blocks are never filled to the last token


@dataclass(frozen=True, slots=True)
class GridLimits:
    """max_batch_size: sequences in flight, >= 1. max_prefill_tokens: prompt tokens of a pass, >= 1.
    max_session_tokens: prompt plus output of one sequence, >= 8. kv_tokens: of all; None for no bound.

    Raises ValueError for less.
    """

    max_batch_size: int
    max_prefill_tokens: int
    max_session_tokens: int
    kv_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_batch_size < 1 or self.max_prefill_tokens < 1 or self.max_session_tokens < 8:
            raise ValueError(f"an engine within {self} leaves nothing to measure")

    @property
    def room_tokens(self) -> float:
        """Tokens that all sequences together may have."""
        return math.inf if self.kv_tokens is None else _KV_SHARE * self.kv_tokens

    @property
    def longest_prompt(self) -> int:
        return int(min(self.max_session_tokens, self.room_tokens)) - 1

    @property
    def opener_tokens(self) -> int:
        """Prompt of a sequence that keeps the engine busy while others arrive."""
        return int(min(self.max_prefill_tokens, self.longest_prompt, self.room_tokens / 2))

    @property
    def probe_tokens(self) -> int:
        """Output of the sequence whose decoding is timed: long enough that a late message hardly counts."""
        return max(4, min(32, self.max_session_tokens // 16))

    def passes(self, prompts: int, prompt_tokens: int) -> int:
        """Forward passes that `prompts` of `prompt_tokens` each take."""
        return -(-prompts * prompt_tokens // self.max_prefill_tokens)

    def hold_tokens(self, sequences: int, context_tokens: int) -> int:
        """Output of sequences that are to decode beside all shots of a visit, the first of them from the beginning."""
        shot = self.probe_tokens + self.passes(1, context_tokens) + GAP_STEPS
        return SHOTS * shot + self.passes(sequences, context_tokens) + GAP_STEPS

    def fits(self, sequences: int, context_tokens: int, beside_tokens: int = 0) -> bool:
        """Whether so many sequences can decode, from that context on, for a whole visit, and leave room for others."""
        output = self.hold_tokens(sequences, context_tokens) if sequences > 1 else self.probe_tokens
        longest = context_tokens + output
        return longest <= self.max_session_tokens and sequences * longest + beside_tokens <= self.room_tokens

    def longest_context(self, sequences: int, beside_tokens: int = 0) -> int:
        """The largest context that `fits`; 0 where none does."""
        low, high = 0, self.max_session_tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits(sequences, middle, beside_tokens) else (low, middle - 1)
        return low


@dataclass(frozen=True, slots=True)
class Point:
    """prompts of prompt_tokens each are computed while `decoding` sequences, that began with context_tokens each,
    decode; without prompts the decoding itself is measured. held_out: not for the fit."""

    prompts: int = 0
    prompt_tokens: int = 0
    decoding: int = 0
    context_tokens: int = 0
    held_out: bool = False

    @property
    def kind(self) -> Kind:
        if not self.prompts:
            return Kind.DECODE
        return Kind.MIXED if self.decoding else Kind.PREFILL

    @property
    def name(self) -> str:
        """As in the module; no two points of a grid have the same."""
        parts = [f"{self.prompts} x {self.prompt_tokens}"] if self.prompts else []
        parts += [f"{self.decoding} x {self.context_tokens}"] if self.decoding else []
        return f"{self.kind.value} {' + '.join(parts)}"


def design(limits: GridLimits) -> list[Point]:
    """The points in the order they are first measured: cheap ones first, so that what they say helps to plan on."""
    points = [*_prefills(limits), *_decodes(limits), *_mixed(limits)]
    unique = {point.name: point for point in reversed(points)}  # held out only where it is not on the grid, too
    order = {Kind.PREFILL: 0, Kind.DECODE: 1, Kind.MIXED: 2}
    return sorted(unique.values(), key=lambda p: (order[p.kind], _tokens(p), p.name))


def _tokens(point: Point) -> int:
    return point.prompts * point.prompt_tokens + point.decoding * point.context_tokens


def _prefills(limits: GridLimits) -> list[Point]:
    a_pass, longest = limits.max_prefill_tokens, limits.longest_prompt
    singles = _levels(min(_LEAST_PROMPT, longest), min(a_pass, longest), _PROMPT_LEVELS)
    points = [Point(1, tokens) for tokens in singles]
    points += [Point(1, 2 * a_pass)] if longest >= 2 * a_pass else []
    points += [Point(1, tokens, held_out=True) for tokens in _between(singles)[-2:]]
    together = min(a_pass, limits.room_tokens - limits.opener_tokens)
    groups = [Point(count, int(min(together * share // count, longest))) for count in _TOGETHER for share in (0.25, 1)]
    groups.append(Point(8, int(min(together // 16, longest)), held_out=True))
    points += [p for p in groups if p.prompts < limits.max_batch_size and p.prompt_tokens >= _LEAST_TOGETHER]
    return points


def _decodes(limits: GridLimits) -> list[Point]:
    batches = _levels(1, limits.max_batch_size, _BATCH_LEVELS)
    points = [Point(decoding=b, context_tokens=c) for b in batches for c in _contexts(limits, b)]
    for batch in _between(batches)[-3:]:
        contexts = _between(_contexts(limits, batch))
        points += [Point(decoding=batch, context_tokens=contexts[-1], held_out=True)] if contexts else []
    return points


def _mixed(limits: GridLimits) -> list[Point]:
    most, points = limits.max_batch_size - 2, []  # a slot for the opener, one for the prompt
    for batch in sorted({most // 4, most}):
        contexts = _contexts(limits, batch, 2 * limits.opener_tokens) if batch >= 2 else []
        for context in contexts[len(contexts) // 2 :][:1]:
            points += [Point(1, max(1, limits.opener_tokens // share), batch, context) for share in (8, 2)]
            points.append(Point(1, max(1, limits.opener_tokens // 4), batch, context, held_out=True))
    return points


def _contexts(limits: GridLimits, batch: int, beside_tokens: int = 0) -> list[int]:
    longest = limits.longest_context(batch, beside_tokens)
    return _levels(min(_LEAST_CONTEXT, longest), longest, _CONTEXT_LEVELS) if longest else []


def _levels(low: int, high: int, count: int) -> list[int]:
    """`count` whole numbers from low to high, each about the same multiple of the one before; fewer where they meet."""
    if high <= low:
        return [high]
    ratio = (high / low) ** (1 / (count - 1))
    return sorted({*(round(low * ratio**k) for k in range(count - 1)), high})


def _between(levels: Sequence[int]) -> list[int]:
    """A whole number between each two neighbours, where there is one."""
    middles = [round(math.sqrt(low * high)) for low, high in itertools.pairwise(levels)]
    return [middle for middle in middles if middle not in levels]
