"""`slack-guard`: prefill only as much as the running requests can stand.

Every prefill stalls all running requests by its own duration. Each of them can absorb so much stall before it misses
its SLO (its slack). Requests are taken cheapest first among those that can still meet, and admitted while the
smallest slack, times a safety factor, is not spent; those that can no longer meet go last, under the same guard.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.snapshot import Snapshot
from lmdeploy_slo.scheduling.rules import prefill_s, rule_order

SAFETY = 0.5
"""Share of the smallest slack that prefills may use up."""


def running_slack_s(snapshot: Snapshot, batch_size: int, context_tokens: float) -> npt.NDArray[Any]:
    """Stall each running request can still absorb, seconds, one entry a row of `snapshot.running`.

    Its predicted end is now + prefills not yet done + remaining tokens x step time at `batch_size` sequences with
    `context_tokens` in the cache. inf where it carries no objective that a stall can break; negative where it is
    predicted to miss as things stand.
    """
    rows, model, now_s = snapshot.running, snapshot.model, snapshot.now_s
    started = rows["generated_tokens"] > 0
    pending_s = float(np.sum(np.where(started, 0.0, prefill_s(rows, model))))
    step_s = model.step_s(0, 0, batch_size, context_tokens)
    first_s = np.where(started, rows["first_token_at_s"], now_s + pending_s + model.c0)
    remaining = np.maximum(rows["output_tokens"] - np.maximum(rows["generated_tokens"], 1.0), 0.0)
    end_s = np.where(started, now_s + pending_s, first_s) + remaining * step_s
    by_ttft = np.where(started, np.inf, rows["arrival_at_s"] + rows["ttft_s"] - first_s)
    gaps = np.maximum(rows["output_tokens"] - 1, 1e-9)  # never 0: it may be multiplied with inf
    by_tpot = np.where(remaining > 0, first_s + rows["tpot_s"] * gaps - end_s, np.inf)
    by_e2e = rows["arrival_at_s"] + rows["e2e_s"] - end_s
    return np.asarray(np.minimum(np.minimum(by_ttft, by_tpot), by_e2e))


class SlackGuardPolicy:
    """See the module. safety: in (0, 1]."""

    wants_ticks = True

    def __init__(self, safety: float = SAFETY) -> None:
        if not 0 < safety <= 1:
            raise ValueError(f"safety must be above 0 and at most 1, got {safety}")
        self._safety = safety

    @property
    def name(self) -> str:
        return "slack-guard"

    def warm_up(self) -> None:
        return None

    def plan(self, snapshot: Snapshot) -> Plan:
        order = rule_order(snapshot, "swf", feasible_first=True)
        waiting, running = snapshot.waiting[order], snapshot.running
        context = float(np.sum(running["prompt_tokens"] + running["cached_tokens"] + running["generated_tokens"]))
        newcomer = float(np.mean(waiting["prompt_tokens"] + waiting["cached_tokens"]))
        slack = running_slack_s(snapshot, len(running) + 1, context + newcomer)
        at_stake = slack[slack > 0]
        budget_s = self._safety * float(np.min(at_stake)) if len(at_stake) else np.inf
        stalls_s = np.cumsum(prefill_s(waiting, snapshot.model))
        send_now = min(int(np.searchsorted(stalls_s, budget_s, side="right")), snapshot.free_slots)
        if send_now == 0 and len(running) == 0:
            send_now = min(1, len(waiting))
        return Plan(order=waiting["handle"].copy(), send_now=send_now)
