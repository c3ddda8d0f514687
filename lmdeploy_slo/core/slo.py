"""Service level objectives and the instants they are judged by."""

from __future__ import annotations

import math
from dataclasses import dataclass

SHORTEST_S = 1e-9


def seconds_of(value_ms: float) -> float:
    """Of a duration in milliseconds, > 0. Shorter ones than a nanosecond are taken for one: the shortest would be 0."""
    return max(value_ms / 1e3, SHORTEST_S)


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request promises its user; None is "no such objective".

    ttft_s: arrival to first token, seconds, > 0.
    tpot_s: mean time per output token after the first, seconds, > 0.
    e2e_s:  arrival to last token, seconds, > 0.
    Raises ValueError where a value is not a positive finite number.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number of seconds, got {value}")

    @property
    def has_objective(self) -> bool:
        """Whether at least one objective is set."""
        return self.ttft_s is not None or self.tpot_s is not None or self.e2e_s is not None

    def scaled(self, factor: float) -> Slo:
        """The same objectives, each `factor` (> 0) times as long."""
        return Slo(*(None if v is None else v * factor for v in (self.ttft_s, self.tpot_s, self.e2e_s)))

    def met_by(self, timing: Timing) -> bool | None:
        """Whether a finished request met every objective it carries (<=); None where it carries none.

        A request that produced no token, or did not end, has missed. A one-token output meets any TPOT.
        """
        if not self.has_objective:
            return None
        if timing.ttft_s is None or timing.e2e_s is None:
            return False
        return not self.broken_by(timing)

    def broken_by(self, timing: Timing) -> list[str]:
        """The names (ttft, tpot, e2e) of the objectives that the times known so far break; empty where none."""
        pairs = (
            ("ttft", timing.ttft_s, self.ttft_s),
            ("tpot", timing.tpot_s, self.tpot_s),
            ("e2e", timing.e2e_s, self.e2e_s),
        )
        return [name for name, took_s, most_s in pairs if most_s is not None and took_s is not None and took_s > most_s]


NO_SLO = Slo()


@dataclass(slots=True)
class Timing:
    """The instants of one request, seconds on one clock; None until they happen."""

    arrival_at_s: float
    dispatched_at_s: float | None = None
    first_token_at_s: float | None = None
    ended_at_s: float | None = None
    output_tokens: int = 0

    @property
    def queue_s(self) -> float | None:
        """Arrival to dispatch into the engine."""
        return None if self.dispatched_at_s is None else self.dispatched_at_s - self.arrival_at_s

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token."""
        return None if self.first_token_at_s is None else self.first_token_at_s - self.arrival_at_s

    @property
    def e2e_s(self) -> float | None:
        """Arrival to last token."""
        return None if self.ended_at_s is None else self.ended_at_s - self.arrival_at_s

    @property
    def tpot_s(self) -> float | None:
        """(E2E - TTFT) / (output tokens - 1); None for fewer than two tokens, which meet any TPOT."""
        if self.ended_at_s is None or self.first_token_at_s is None or self.output_tokens < 2:
            return None
        return (self.ended_at_s - self.first_token_at_s) / (self.output_tokens - 1)
