"""What would happen to a request that arrived now: a forecast of its times, and whether it could meet its SLO.

A rough model, made from one snapshot and the step model alone. It assumes that the engine is kept full up to its cap,
and that a new request goes behind all waiting requests of its tier or a higher one, whatever the policy would do.
Policies that hold requests back, or let this one overtake, do better or worse than it says.

Prompts count without what is expected in the prefix cache, contexts with it.

With R requests running, A waiting ahead and B the cap, r_i the tokens still to come of each running request, o and l
outputs and prompts, and b = min(B, R + W + 1) sequences decoding:

    step   s = c0 + d1 b + d2 b (mean context of running, waiting and the new request)
    stall  p = mean prefill stall of the waiting requests; each of them stalls the others once per slot it takes,
               so that a step lasts s + p b / (mean o) while a queue lasts, and s without one
    start  0 steps where R + A < B; else the smaller of two upper bounds of list scheduling,
               (sum of r_i + sum of o ahead) / B and, for A - (B - R) = k < R, the k-th smallest r_i (from 0)
    TTFT   start + prefill of running requests without a token + its own prefill + s
    E2E    TTFT + (o - 1) steps
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.request import PriorityClass, RequestSpec
from lmdeploy_slo.core.slo import Slo
from lmdeploy_slo.core.snapshot import ROW_DTYPE, EngineLimits, Rows, Snapshot
from lmdeploy_slo.scheduling.rules import prefill_s


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is expected of a request; durations in seconds from its arrival, each >= 0.

    output_tokens: >= 1. queue_position: waiting requests that would go before it.
    tpot_s: None for an output of one token.
    """

    output_tokens: float
    queue_position: int
    queue_s: float
    ttft_s: float
    tpot_s: float | None
    e2e_s: float


class Outlook:
    """A snapshot in a few sums: with it a forecast is a handful of operations, however long the queue is."""

    __slots__ = (
        "_ahead_output_tokens",
        "_ahead_requests",
        "_cap",
        "_context_tokens",
        "_model",
        "_prefill_first_s",
        "_remaining_steps",
        "_waiting_prefill_s",
    )

    def __init__(self, snapshot: Snapshot) -> None:
        model, running, waiting = snapshot.model, snapshot.running, snapshot.waiting
        self._model = model
        self._cap = snapshot.limits.max_batch_size
        self._remaining_steps = np.sort(
            np.maximum(running["output_tokens"] - running["generated_tokens"], 1.0)
        ).tolist()
        self._prefill_first_s = float(prefill_s(running[running["generated_tokens"] == 0], model).sum())
        self._context_tokens = _context_tokens(running) + _context_tokens(waiting)
        self._waiting_prefill_s = float(prefill_s(waiting, model).sum())
        tiers = waiting["tier"]
        self._ahead_requests = np.bincount(tiers, minlength=len(PriorityClass)).tolist()
        self._ahead_output_tokens = np.bincount(
            tiers, weights=waiting["output_tokens"], minlength=len(PriorityClass)
        ).tolist()

    @classmethod
    def of_nobody(cls, limits: EngineLimits, model: StepModel) -> Outlook:
        """That of an engine without a request: what breaks an SLO there, no waiting will mend."""
        nobody = np.empty(0, ROW_DTYPE)
        return cls(Snapshot(0.0, nobody, nobody, limits, model))

    def add(self, spec: RequestSpec, output_tokens: float, cached_tokens: float = 0.0) -> None:
        """One more request waits; so much of its prompt is expected in the prefix cache."""
        self._ahead_requests[spec.priority_class] += 1
        self._ahead_output_tokens[spec.priority_class] += output_tokens
        self._context_tokens += spec.prompt_tokens + output_tokens / 2
        self._waiting_prefill_s += self._model.prefill_stall_s(spec.prompt_tokens - cached_tokens, cached_tokens)

    def forecast(self, spec: RequestSpec, output_tokens: float, cached_tokens: float = 0.0) -> Forecast:
        """The model above for a request that arrives now and was not added."""
        model, cap, running = self._model, self._cap, len(self._remaining_steps)
        waiting = sum(self._ahead_requests)
        ahead = sum(self._ahead_requests[spec.priority_class :])

        everyone = running + waiting + 1
        batch = min(cap, everyone)
        context_tokens = self._context_tokens + spec.prompt_tokens + output_tokens / 2
        decode_s = model.step_s(0, 0, batch, context_tokens * batch / everyone)
        step_s = decode_s
        if waiting:
            mean_output_tokens = sum(self._ahead_output_tokens) / waiting
            step_s += self._waiting_prefill_s / waiting * batch / max(1.0, mean_output_tokens)

        queue_s = self._start_steps(ahead, sum(self._ahead_output_tokens[spec.priority_class :])) * step_s
        ttft_s = (
            queue_s
            + self._prefill_first_s
            + model.prefill_stall_s(spec.prompt_tokens - cached_tokens, cached_tokens)
            + decode_s
        )
        return Forecast(
            output_tokens=output_tokens,
            queue_position=ahead,
            queue_s=queue_s,
            ttft_s=ttft_s,
            tpot_s=step_s if output_tokens > 1 else None,
            e2e_s=ttft_s + (output_tokens - 1) * step_s,
        )

    def _start_steps(self, ahead: int, ahead_output_tokens: float) -> float:
        """Decode steps until a request behind `ahead` gets a slot."""
        remaining = self._remaining_steps
        before_it = ahead - (self._cap - len(remaining))  # departures needed beyond the first
        if before_it < 0:
            return 0.0
        start: float = (sum(remaining) + ahead_output_tokens) / self._cap
        return min(start, remaining[before_it]) if before_it < len(remaining) else start


def unmet_objectives(slo: Slo, expected: Forecast) -> list[str]:
    """In words, every objective the forecast breaks; empty where it breaks none."""
    pairs = (
        ("ttft", expected.ttft_s, slo.ttft_s),
        ("tpot", expected.tpot_s, slo.tpot_s),
        ("e2e", expected.e2e_s, slo.e2e_s),
    )
    return [
        f"{name} is expected to be {value * 1e3:.1f} ms, above the objective of {limit * 1e3:g} ms"
        for name, value, limit in pairs
        if limit is not None and value is not None and value > limit
    ]


def _context_tokens(rows: Rows) -> float:
    """Tokens in the KV cache of each request halfway through its output, summed."""
    return float((rows["prompt_tokens"] + rows["cached_tokens"] + rows["output_tokens"] / 2).sum())
