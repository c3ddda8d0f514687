"""The two latency models: the step model of a persistent batch, and the bilinear model of the paper.

Both are plain coefficients with formulas; where they come from (a fit, a shipped profile, online calibration) is
`prediction`'s business. All coefficients are in seconds here; files and reports use milliseconds.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Number = TypeVar("Number", float, npt.NDArray[np.float64])
"""One value, or a column of them."""

REFERENCE_BATCH = 64
"""Sequences taken to share the fixed cost of a step where requests are compared by the engine time they need."""


def _check_coefficients(model: object) -> None:
    for field in fields(model):  # type: ignore[arg-type]
        value = getattr(model, field.name)
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{field.name} must be a finite number >= 0, got {value!r}")


@dataclass(frozen=True, slots=True)
class StepModel:
    """Duration of one forward pass of a persistent batch.

        t_step = c0 + p1 P + p2 sum(x_i (x_i + 2 ctx_i)) + d1 b + d2 sum(ctx_j)

    x_i: prompt tokens of request i prefilled in this step, ctx_i its tokens already in the KV cache, P = sum of x_i;
    b: decoding sequences, ctx_j the tokens in the KV cache of each before the step.
    c0, d1: s; p1, d2: s per token; p2: s per token squared. Each finite and >= 0, else ValueError.
    """

    c0: float
    p1: float
    p2: float
    d1: float
    d2: float

    def __post_init__(self) -> None:
        _check_coefficients(self)

    def step_s(self, prefill_tokens: float, prefill_square: float, batch_size: float, context_tokens: float) -> float:
        """The formula above, seconds; `prefill_square` is sum(x (x + 2 ctx)), `context_tokens` sum(ctx)."""
        return (
            self.c0
            + self.p1 * prefill_tokens
            + self.p2 * prefill_square
            + self.d1 * batch_size
            + self.d2 * context_tokens
        )

    def decode_stretch_s(self, steps: float, batch_size: float, context_tokens: float) -> float:
        """Sum of `steps` pure decode steps in which each of `batch_size` contexts grows by one token a step."""
        growth = 0.5 * batch_size * steps * (steps - 1)
        return steps * (self.c0 + self.d1 * batch_size) + self.d2 * (steps * context_tokens + growth)

    def prefill_stall_s(self, prompt_tokens: Number, cached_tokens: Number | float = 0.0) -> Number:
        """What `prompt_tokens` behind `cached_tokens` of the same prompt add to the step (or steps) they are prefilled
        in; the sum telescopes over chunks."""
        return self.p1 * prompt_tokens + self.p2 * prompt_tokens * (prompt_tokens + 2 * cached_tokens)

    def engine_time_s(
        self,
        prompt_tokens: Number,
        output_tokens: Number,
        cached_tokens: Number | float = 0.0,
        batch_size: float = REFERENCE_BATCH,
    ) -> Number:
        """g: the engine's time a request needs, seconds; of its prompt `prompt_tokens` are computed behind
        `cached_tokens`, and `batch_size` sequences share the fixed cost of a step."""
        per_token = self.d1 + self.d2 * (prompt_tokens + cached_tokens + output_tokens / 2) + self.c0 / batch_size
        return self.prefill_stall_s(prompt_tokens, cached_tokens) + output_tokens * per_token

    def scaled(self, factor: float) -> StepModel:
        """The same engine, `factor` (> 0) times as slow."""
        return StepModel(*(factor * c for c in astuple(self)))


@dataclass(frozen=True, slots=True)
class BilinearModel:
    """Duration of a static batch, as in Huang et al. (arXiv 2504.14966).

    With b the batch size, l the prompt and o the output length of a request:
        prefill  t_p = a_p b l + b_p b + c_p l + d_p
        decode of one token at context l:  tau(b, l) = a_d b l + b_d b + c_d l + d_d
        decode   t_d = sum over k = 1..o of tau(b, l + k)
    `prefill` and `decode` are (a, b, c, d), seconds; each finite and >= 0, else ValueError.
    """

    prefill: tuple[float, float, float, float]
    decode: tuple[float, float, float, float]

    def __post_init__(self) -> None:
        for name in ("prefill", "decode"):
            values = getattr(self, name)
            if len(values) != 4 or not all(math.isfinite(v) and v >= 0 for v in values):
                raise ValueError(f"{name} must be four finite numbers >= 0, got {values!r}")

    def prefill_s(self, batch_size: float, prompt_tokens: Number) -> Number:
        a, b, c, d = self.prefill
        return a * batch_size * prompt_tokens + b * batch_size + c * prompt_tokens + d

    def decode_s(self, batch_size: float, prompt_tokens: Number, output_tokens: Number) -> Number:
        """The sum over k = 1..o in closed form: o tau(b, l) + (a_d b + c_d) o (o + 1) / 2."""
        a, b, c, d = self.decode
        per_context = a * batch_size + c
        at_prompt = per_context * prompt_tokens + b * batch_size + d
        return output_tokens * at_prompt + per_context * output_tokens * (output_tokens + 1) / 2
