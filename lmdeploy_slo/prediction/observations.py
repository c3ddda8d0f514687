"""Measured durations of forward passes with what was computed in them, as equations in the coefficients of a model.

Both models are linear in their coefficients, so that a duration of any number of passes is one row of a linear system.
The symbols are those of `core.latency_model`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.core.model_range import ModelRange, Span

Floats = npt.NDArray[np.float64]


class Kind(str, Enum):
    """What the passes did."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class Observation:
    """That `steps` >= 1 forward passes took `seconds` > 0.

    prompts, prefill_tokens, prefill_square: prompts computed in them, together; their tokens, and the sum of
    x (x + 2 ctx). batch_size: sequences that decoded in each pass. context_tokens: tokens in the KV caches of all of
    these before a pass, summed over the passes. point: repeats of one measurement have the same.
    Raises ValueError for negative numbers, and for passes in which nothing was computed.
    """

    steps: int
    seconds: float
    prompts: int = 0
    prefill_tokens: float = 0.0
    prefill_square: float = 0.0
    batch_size: float = 0.0
    context_tokens: float = 0.0
    point: str = ""

    def __post_init__(self) -> None:
        figures = (self.prompts, self.prefill_tokens, self.prefill_square, self.batch_size, self.context_tokens)
        if self.steps < 1 or not 0 < self.seconds < np.inf or not all(0 <= figure < np.inf for figure in figures):
            raise ValueError(f"an observation out of range: {self}")
        if not self.prompts and not self.batch_size:
            raise ValueError(f"nothing was computed in the passes of {self}")

    @property
    def kind(self) -> Kind:
        if not self.prompts:
            return Kind.DECODE
        return Kind.MIXED if self.batch_size else Kind.PREFILL

    @property
    def mean_prompt_tokens(self) -> float:
        """Tokens of one prompt; 0 without prompts."""
        return self.prefill_tokens / self.prompts if self.prompts else 0.0

    @property
    def mean_context_tokens(self) -> float:
        """Tokens in the KV cache of one decoding sequence before a pass; 0 where none decoded."""
        return self.context_tokens / (self.steps * self.batch_size) if self.batch_size else 0.0


def prefill_observation(
    prompts: int, prompt_tokens: int, seconds: float, *, max_prefill_tokens: int, point: str = ""
) -> Observation:
    """`prompts` equal prompts computed in as few passes as hold them, nobody decoding."""
    tokens = prompts * prompt_tokens
    return Observation(
        steps=-(-tokens // max_prefill_tokens),
        seconds=seconds,
        prompts=prompts,
        prefill_tokens=tokens,
        prefill_square=tokens * prompt_tokens,
        point=point,
    )


def decode_observation(
    batch_size: float, context_tokens: float, seconds: float, *, steps: int = 1, point: str = ""
) -> Observation:
    """`steps` passes in which each of `batch_size` sequences grows by a token; `context_tokens`: all of them together
    before the first pass."""
    grown = batch_size * steps * (steps - 1) / 2
    return Observation(
        steps=steps, seconds=seconds, batch_size=batch_size, context_tokens=steps * context_tokens + grown, point=point
    )


def seconds_of(observations: Sequence[Observation]) -> Floats:
    return np.array([o.seconds for o in observations], dtype=np.float64)


def step_rows(observations: Sequence[Observation]) -> Floats:
    """What multiplies (c0, p1, p2, d1, d2) in the duration of each; shape (n, 5)."""
    rows = [
        (o.steps, o.prefill_tokens, o.prefill_square, o.steps * o.batch_size, o.context_tokens) for o in observations
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 5)


def bilinear_prefill_rows(observations: Sequence[Observation]) -> Floats:
    """What multiplies (a_p, b_p, c_p, d_p); shape (n, 4). The prompts of one observation are the batch."""
    rows = [(o.prefill_tokens, o.prompts, o.mean_prompt_tokens, 1.0) for o in observations]
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def bilinear_decode_rows(observations: Sequence[Observation]) -> Floats:
    """What multiplies (a_d, b_d, c_d, d_d); shape (n, 4).

    The paper's context counts the token that is computed as well: the k-th token after a prompt of l has l + k.
    """
    rows = [
        (
            o.context_tokens + o.steps * o.batch_size,
            o.steps * o.batch_size,
            o.steps * (o.mean_context_tokens + 1),
            o.steps,
        )
        for o in observations
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def range_of(observations: Iterable[Observation]) -> ModelRange:
    """What the observations span. Prompts longer than a pass count as what one pass took of them."""
    known = list(observations)
    prompts = [o for o in known if o.prompts]
    decoding = [o for o in known if o.batch_size]
    return ModelRange(
        prompt_tokens=_span([o.mean_prompt_tokens for o in prompts]),
        prefill_tokens=_span([o.prefill_tokens / o.steps for o in prompts]),
        batch_size=_span([o.batch_size for o in decoding]),
        context_tokens=_span([o.mean_context_tokens for o in decoding]),
    )


def _span(values: Sequence[float]) -> Span | None:
    return (float(min(values)), float(max(values))) if values else None
