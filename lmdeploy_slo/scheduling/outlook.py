"""What would happen to a request that arrived now: two rough models, made from one snapshot and the step model alone.

`in_turn` assumes that the engine is kept full up to its cap, and that a new request goes behind all waiting requests of
its tier or a higher one. `overtaking` assumes that it goes before all of them, at the pace that running requests see.
Policies that keep an order are near the first; those that choose who can meet its SLO serve a new request at once or
late, and are described by neither: `forecaster` learns which one to start from, and how far off it is.

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

Overtaking, A = W = 0, and a step is the mean time per token of the requests that have emitted a few, at least s.
"""

from __future__ import annotations

from copy import copy

import numpy as np

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.request import PriorityClass, RequestSpec
from lmdeploy_slo.core.snapshot import ROW_DTYPE, EngineLimits, Rows, Snapshot
from lmdeploy_slo.scheduling.admission import Forecast
from lmdeploy_slo.scheduling.rules import prefill_s

_NOBODY = np.empty(0, ROW_DTYPE)

PACE_TOKENS = 4
"""A running request tells of the pace once it has emitted so many."""


class Outlook:
    """A snapshot in a few sums: with it a forecast is a handful of operations, however long the queue is.

    pending_s: prefill of running requests without a token. waiting_s: of all that wait; hopeful_s: of those of them
    that could meet their SLO if they were sent now. pace_s: time per token that running requests see.
    """

    __slots__ = (
        "_ahead_output_tokens",
        "_ahead_requests",
        "_cap",
        "_context_tokens",
        "_hopeful_requests",
        "_model",
        "_remaining_steps",
        "_running_context_tokens",
        "hopeful_s",
        "pace_s",
        "pending_s",
        "waiting_s",
    )

    def __init__(self, snapshot: Snapshot) -> None:
        """Where nobody runs or nobody waits, which is so of most snapshots at light load, nothing is summed up."""
        running, model = snapshot.running, snapshot.model
        self._model = model
        self._cap = snapshot.limits.max_batch_size
        self._remaining_steps: list[float] = []
        self.pending_s = self._running_context_tokens = observed_s = 0.0
        if len(running):
            remaining = np.maximum(running["output_tokens"] - running["generated_tokens"], 1.0)
            self._remaining_steps = np.sort(remaining).tolist()
            self.pending_s = float(prefill_s(running[running["generated_tokens"] == 0], model).sum())
            self._running_context_tokens = _context_tokens(running)
            observed_s = _observed_pace_s(running, snapshot.now_s)
        step_s = self._decode_s(len(running) + 1, self._running_context_tokens)
        self.pace_s = max(step_s, observed_s)
        self._context_tokens = self._running_context_tokens
        self.waiting_s = self.hopeful_s = 0.0
        self._ahead_requests, self._hopeful_requests = [0] * len(PriorityClass), [0] * len(PriorityClass)
        self._ahead_output_tokens = [0.0] * len(PriorityClass)
        if len(snapshot.waiting):
            self._look_at_waiting(snapshot, step_s)

    def _look_at_waiting(self, snapshot: Snapshot, step_s: float) -> None:
        waiting, classes = snapshot.waiting, len(PriorityClass)
        stalls_s, tiers = prefill_s(waiting, snapshot.model), waiting["tier"]
        self._context_tokens += _context_tokens(waiting)
        self.waiting_s = float(stalls_s.sum())
        self._ahead_requests = np.bincount(tiers, minlength=classes).tolist()
        self._ahead_output_tokens = np.bincount(tiers, weights=waiting["output_tokens"], minlength=classes).tolist()
        hopeful = _can_meet(waiting, stalls_s, snapshot.now_s + self.pending_s, step_s)
        self.hopeful_s = float(stalls_s[hopeful].sum())
        self._hopeful_requests = np.bincount(tiers[hopeful], minlength=classes).tolist()

    @classmethod
    def of_nobody(cls, limits: EngineLimits, model: StepModel) -> Outlook:
        """That of an engine without a request: what breaks an SLO there, no waiting will mend."""
        return cls(Snapshot(0.0, _NOBODY, _NOBODY, limits, model))

    def copy(self) -> Outlook:
        """One that `add` does not change."""
        other = copy(self)
        other._ahead_requests, other._hopeful_requests = self._ahead_requests.copy(), self._hopeful_requests.copy()
        other._ahead_output_tokens = self._ahead_output_tokens.copy()
        return other

    def add(self, spec: RequestSpec, output_tokens: float, cached_tokens: float = 0.0) -> None:
        """One more request waits; so much of its prompt is expected in the prefix cache."""
        stall_s = self.own_s(spec, cached_tokens)
        self._ahead_requests[spec.priority_class] += 1
        self._ahead_output_tokens[spec.priority_class] += output_tokens
        self._context_tokens += spec.prompt_tokens + output_tokens / 2
        self.waiting_s += stall_s
        if spec.slo.has_objective:
            self.hopeful_s += stall_s
            self._hopeful_requests[spec.priority_class] += 1

    def own_s(self, spec: RequestSpec, cached_tokens: float = 0.0) -> float:
        """Prefill of a request."""
        return self._model.prefill_stall_s(spec.prompt_tokens - cached_tokens, cached_tokens)

    def in_turn(self, spec: RequestSpec, output_tokens: float, cached_tokens: float = 0.0) -> Forecast:
        """For a request that arrives now and was not added: behind those that wait."""
        running, waiting = len(self._remaining_steps), sum(self._ahead_requests)
        ahead = sum(self._ahead_requests[spec.priority_class :])
        everyone = running + waiting + 1
        batch = min(self._cap, everyone)
        context_tokens = self._context_tokens + spec.prompt_tokens + output_tokens / 2
        decode_s = self._decode_s(batch, context_tokens * batch / everyone)
        step_s = decode_s
        if waiting:
            mean_output_tokens = sum(self._ahead_output_tokens) / waiting
            step_s += self.waiting_s / waiting * batch / max(1.0, mean_output_tokens)
        start_steps = self._start_steps(ahead, sum(self._ahead_output_tokens[spec.priority_class :]))
        first_s = self.pending_s + self.own_s(spec, cached_tokens) + decode_s
        return _forecast(output_tokens, ahead, start_steps * step_s, first_s, step_s)

    def overtaking(self, spec: RequestSpec, output_tokens: float, cached_tokens: float = 0.0) -> Forecast:
        """For a request that arrives now: before those that wait. Its position is among those that can still meet."""
        running = len(self._remaining_steps)
        context_tokens = self._running_context_tokens + spec.prompt_tokens + output_tokens / 2
        decode_s = self._decode_s(running + 1, context_tokens)
        first_s = self.pending_s + self.own_s(spec, cached_tokens) + decode_s
        position = sum(self._hopeful_requests[spec.priority_class :])
        step_s = max(decode_s, self.pace_s)
        return _forecast(output_tokens, position, self._start_steps(0, 0.0) * step_s, first_s, step_s)

    def _decode_s(self, batch: int, context_tokens: float) -> float:
        return self._model.step_s(0, 0, min(batch, self._cap), context_tokens)

    def _start_steps(self, ahead: int, ahead_output_tokens: float) -> float:
        """Decode steps until a request behind `ahead` gets a slot."""
        remaining = self._remaining_steps
        before_it = ahead - (self._cap - len(remaining))  # departures needed beyond the first
        if before_it < 0:
            return 0.0
        start: float = (sum(remaining) + ahead_output_tokens) / self._cap
        return min(start, remaining[before_it]) if before_it < len(remaining) else start


def _forecast(output_tokens: float, position: int, queue_s: float, first_s: float, step_s: float) -> Forecast:
    ttft_s = queue_s + first_s
    return Forecast(
        output_tokens=output_tokens,
        queue_position=position,
        queue_s=queue_s,
        ttft_s=ttft_s,
        tpot_s=step_s if output_tokens > 1 else None,
        e2e_s=ttft_s + (output_tokens - 1) * step_s,
    )


def _context_tokens(rows: Rows) -> float:
    """Tokens in the KV cache of each request halfway through its output, summed."""
    return float((rows["prompt_tokens"] + rows["cached_tokens"] + rows["output_tokens"] / 2).sum())


def _observed_pace_s(running: Rows, now_s: float) -> float:
    """Mean time per token since the first, of the requests that have emitted a few; 0 where none has."""
    telling = running[(running["generated_tokens"] >= PACE_TOKENS) & np.isfinite(running["first_token_at_s"])]
    if not len(telling):
        return 0.0
    return float(np.mean((now_s - telling["first_token_at_s"]) / (telling["generated_tokens"] - 1.0)))


def _can_meet(waiting: Rows, stalls_s: Rows, from_s: float, step_s: float) -> Rows:
    """Which rows could meet their SLO if each were sent alone, behind what is pending, at the present step time."""
    first_s = from_s + stalls_s + step_s - waiting["arrival_at_s"]
    end_s = first_s + (waiting["output_tokens"] - 1.0) * step_s
    carries = np.isfinite(np.minimum(np.minimum(waiting["ttft_s"], waiting["tpot_s"]), waiting["e2e_s"]))
    can: Rows = carries & (first_s <= waiting["ttft_s"]) & (step_s <= waiting["tpot_s"]) & (end_s <= waiting["e2e_s"])
    return can
