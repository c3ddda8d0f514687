"""Requests, rows and snapshots with sensible defaults: a test names only what it is about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.core.slo import Slo
from lmdeploy_slo.core.snapshot import ROW_DTYPE, EngineLimits, Rows, Snapshot
from lmdeploy_slo.engine.base import EngineRequest, Sampling, Stopping

NO_TIME = StepModel(0.0, 0.0, 0.0, 0.0, 0.0)
"""An engine whose steps take no time."""

A100 = StepModel(c0=10.25e-3, p1=0.04752e-3, p2=1.13e-9, d1=0.02377e-3, d2=3.67e-8)
"""The coefficients of the profile `a100-qwen2.5-7b`."""


def make_slo(ttft_ms: float | None = None, tpot_ms: float | None = None, e2e_ms: float | None = None) -> Slo:
    """Objectives in milliseconds."""
    return Slo(*(None if value is None else value / 1e3 for value in (ttft_ms, tpot_ms, e2e_ms)))


def make_spec(request_id: str = "r", **changes: Any) -> RequestSpec:
    """A RequestSpec: due at 0, prompt of 100 tokens, at most 1000 new ones; `changes` by field name."""
    fields: dict[str, Any] = {"arrival_at_s": 0.0, "prompt_tokens": 100, "max_new_tokens": 1000}
    return RequestSpec(request_id, **(fields | changes))


def make_request(
    request_id: str = "r",
    *,
    prompt_tokens: int = 10,
    output_tokens: int | None = None,
    max_new_tokens: int = 1000,
    sampling: Sampling | None = None,
    **stopping: Any,
) -> EngineRequest:
    """An EngineRequest with a prompt of equal tokens; `output_tokens` is for the emulated engine alone."""
    return EngineRequest(
        request_id,
        prompt_token_ids=[97] * prompt_tokens,
        stopping=Stopping(max_new_tokens=max_new_tokens, **stopping),
        sampling=sampling or Sampling(),
        emulated_output_tokens=output_tokens,
    )


def make_rows(*rows: Mapping[str, float]) -> Rows:
    """Rows as in a snapshot. Each names the fields it sets; the rest is a waiting request without objective, due at 0,
    with 100 prompt and 100 output tokens; handles count from 1."""
    table = np.zeros(len(rows), dtype=ROW_DTYPE)
    for number, row in enumerate(rows):
        defaults: dict[str, float] = {
            "handle": number + 1,
            "tier": 1,
            "arrival_at_s": 0.0,
            "prompt_tokens": 100.0,
            "output_tokens": 100.0,
            "ttft_s": math.inf,
            "tpot_s": math.inf,
            "e2e_s": math.inf,
            "dispatched_at_s": math.nan,
            "first_token_at_s": math.nan,
            "generated_tokens": 0.0,
            "length_sigma": 0.3,
            "cached_tokens": 0.0,
        }
        unknown = row.keys() - defaults.keys()
        if unknown:
            raise KeyError(f"no such fields: {sorted(unknown)}")
        for name, value in {**defaults, **row}.items():
            table[number][name] = value
    table.flags.writeable = False
    return table


def make_snapshot(
    waiting: Sequence[Mapping[str, float]] = (),
    running: Sequence[Mapping[str, float]] = (),
    *,
    now_s: float = 0.0,
    limits: EngineLimits | None = None,
    model: StepModel = A100,
) -> Snapshot:
    """A snapshot; rows as `make_rows` takes them. Running ones were dispatched at 0, and count on from the waiting."""
    started = [
        {"handle": len(waiting) + number, "dispatched_at_s": 0.0, **row} for number, row in enumerate(running, start=1)
    ]
    return Snapshot(now_s, make_rows(*waiting), make_rows(*started), limits or EngineLimits(), model)
