"""What a policy is given: an immutable picture of the waiting and the running requests.

Requests are rows of one numpy record array, so that a snapshot is two memory copies and a policy can work in
columns. Nothing here says how long an output really is, or what arrives next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.core.latency_model import StepModel

Rows: TypeAlias = npt.NDArray[Any]
"""One-dimensional array of `ROW_DTYPE`."""

ROW_DTYPE = np.dtype(
    [
        ("handle", np.int64),  # the scheduler's number of the request; grows with arrival
        ("tier", np.int64),  # PriorityClass
        ("arrival_at_s", np.float64),
        ("prompt_tokens", np.float64),  # those that must be prefilled: without what the prefix cache holds
        ("output_tokens", np.float64),  # predicted total
        ("ttft_s", np.float64),  # objectives; inf: none
        ("tpot_s", np.float64),
        ("e2e_s", np.float64),
        ("dispatched_at_s", np.float64),  # nan while it waits
        ("first_token_at_s", np.float64),  # nan until then
        ("generated_tokens", np.float64),
        ("length_sigma", np.float64),  # relative spread of the length forecast (sigma of its logarithm)
        ("cached_tokens", np.float64),  # of the prompt, expected in the prefix cache: not prefilled, but read each step
        ("client", np.int64),  # a number that stands for who sent it; 0: nobody in particular
    ]
)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What one engine takes.

    max_batch_size: requests in flight, >= 1. max_prefill_tokens: prompt tokens a step, >= 1.
    kv_tokens: KV cache, tokens; None for no bound.
    """

    max_batch_size: int = 256
    max_prefill_tokens: int = 8192
    kv_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_prefill_tokens", "kv_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state at `now_s`. `waiting` and `running` are read-only rows, in no particular order."""

    now_s: float
    waiting: Rows
    running: Rows
    limits: EngineLimits
    model: StepModel

    @property
    def free_slots(self) -> int:
        """How many more requests the engine takes before it is at its cap."""
        return max(0, self.limits.max_batch_size - len(self.running))
