"""Misbehaviour on purpose: what the emulated engine can be told to get wrong, for tests of whatever drives it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Faults:
    """Each off by default; ValueError where a value is out of range.

    fail_after_tokens: request id -> tokens after which it ends with EngineError, >= 0. Read on submit.
    slow_factor: durations of coming steps are this many times as long, finite, >= 0.
    crash_after_steps: all in flight end with EngineUnavailable after so many more steps, >= 1; None: never.
    lost_aborts: so many aborts are ignored, >= 0.
    duplicate_ends: so many finished requests send their last event twice, >= 0.
    """

    fail_after_tokens: Mapping[str, int] = field(default_factory=dict)
    slow_factor: float = 1.0
    crash_after_steps: int | None = None
    lost_aborts: int = 0
    duplicate_ends: int = 0

    def __post_init__(self) -> None:
        if any(tokens < 0 for tokens in self.fail_after_tokens.values()):
            raise ValueError(f"fail_after_tokens must not be negative, got {dict(self.fail_after_tokens)}")
        if not (math.isfinite(self.slow_factor) and self.slow_factor >= 0):
            raise ValueError(f"slow_factor must be a finite number >= 0, got {self.slow_factor}")
        if self.crash_after_steps is not None and self.crash_after_steps < 1:
            raise ValueError(f"crash_after_steps must be at least 1, got {self.crash_after_steps}")
        if self.lost_aborts < 0 or self.duplicate_ends < 0:
            raise ValueError("lost_aborts and duplicate_ends must not be negative")


NO_FAULTS = Faults()
