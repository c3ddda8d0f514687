"""How many prompt tokens a step may prefill so that requests that decode in the same step keep their TPOT.

A running request gets one token per step, so its TPOT is the mean duration of the steps it takes part in. A step
that also prefills P prompt tokens is longer by their work. With b decoding sequences, `context_tokens` in their KV
caches together, and the last chunk of a prompt of `prompt_tokens` as the worst case,

    t_mixed(P) = c0 + d1 b + d2 context_tokens + p1 P + p2 P (P + 2 (prompt_tokens - P))

(the step model of `core.latency_model`). If a share f of all steps is mixed, the mean is t_decode + f (t_mixed -
t_decode), and the largest P that keeps it within the TPOT is a root of a quadratic. f = 1 is safe under any load;
a smaller share allows larger chunks, hence shorter TTFT, on the assumption that prefills are rarer than that.
"""

from __future__ import annotations

import math

from lmdeploy_slo.core.latency_model import StepModel

REFERENCE_BATCH = 64
REFERENCE_CONTEXT = 1024
"""What runs beside a prefill where nothing better is known: so many sequences with so many tokens each."""

SMALLEST_LIMIT = 64
"""Below one KV block of prompt tokens a step, prompts starve and no TPOT is gained."""


def prefill_token_limit(
    model: StepModel,
    tpot_s: float,
    *,
    batch_size: int,
    context_tokens: int,
    prompt_tokens: int = 2048,
    mixed_share: float = 1.0,
    ceiling: int = 8192,
) -> int:
    """The largest max_prefill_token_num, within SMALLEST_LIMIT..ceiling, with which `tpot_s` holds; see the module.

    SMALLEST_LIMIT also where the TPOT cannot be held at this batch size at all: then fewer requests have to run.
    tpot_s > 0 seconds, 0 < mixed_share <= 1, ceiling >= SMALLEST_LIMIT, counts >= 0; else ValueError.
    """
    if tpot_s <= 0 or not 0 < mixed_share <= 1 or ceiling < SMALLEST_LIMIT:
        raise ValueError(f"tpot_s {tpot_s}, mixed_share {mixed_share} or ceiling {ceiling} is out of range")
    if min(batch_size, context_tokens, prompt_tokens) < 0:
        raise ValueError("batch_size, context_tokens and prompt_tokens must not be negative")
    spare_s = (tpot_s - model.step_s(0, 0, batch_size, context_tokens)) / mixed_share
    if spare_s <= 0:
        return SMALLEST_LIMIT
    # p1 P + p2 P (2 L - P) = spare for P <= L; for P >= L the whole prompt fits: p1 P + p2 P L, several prompts.
    slope = model.p1 + 2 * model.p2 * prompt_tokens
    discriminant = slope * slope - 4 * model.p2 * spare_s
    limit = math.inf
    if discriminant >= 0 and slope > 0:
        limit = 2 * spare_s / (slope + math.sqrt(discriminant))  # the smaller root, also for p2 = 0
    if limit > prompt_tokens:
        per_token = model.p1 + model.p2 * prompt_tokens
        limit = spare_s / per_token if per_token > 0 else math.inf
    return max(SMALLEST_LIMIT, int(min(limit, ceiling)))
