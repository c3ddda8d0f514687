"""`slack-guard`: prefill only as much as the running requests can stand.

Every prefill stalls all running requests by its own duration, and each of them can absorb so much stall before it falls
behind (its slack). Requests are taken cheapest first among those that can still meet, and admitted while the smallest
slack, times a safety factor, is not spent. Those that can no longer meet, or carry no objective, go last, and leave a
reserve of slack for whoever comes.

Of a TPOT only the next few tokens lend slack. All that an output has still to come would lend more than there is: it is
spent at once on prefills, and none is left for the requests that arrive meanwhile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.snapshot import Rows, Snapshot
from lmdeploy_slo.scheduling.rules import engine_time_s, prefill_s

SAFETY = 0.5
"""Share of the smallest slack that prefills may use up."""

AHEAD_TOKENS = 10
"""Tokens still to come whose TPOT lends slack."""

RESERVE_S = 0.2
"""Slack that a request with nothing to gain leaves unused."""

DECODE_SHARE = 0.5
"""Part of the time in which a loaded engine decodes, by which it is judged who can still meet an E2E objective."""

SHARED_BY = 128
"""Sequences taken to share the fixed cost of a pass when engine times are compared."""


def running_slack_s(snapshot: Snapshot, batch_size: int, context_tokens: float) -> npt.NDArray[Any]:
    """Stall each running request can still absorb, seconds, one entry a row of `snapshot.running`.

    Steps take as long as those of `batch_size` sequences with `context_tokens` in the cache, after all prefills that
    were submitted. Slack by E2E is what is left at the predicted end; by TPOT, at the token AHEAD_TOKENS from now or
    the last. inf where it carries no objective that a stall can break; negative where it is behind as things stand.
    """
    rows, model, now_s = snapshot.running, snapshot.model, snapshot.now_s
    started = rows["generated_tokens"] > 0
    pending_s = float(np.sum(np.where(started, 0.0, prefill_s(rows, model))))
    step_s = model.step_s(0, 0, batch_size, context_tokens)
    first_s = np.where(started, rows["first_token_at_s"], now_s + pending_s + model.c0)
    from_s = np.where(started, now_s + pending_s, first_s)
    generated = np.maximum(rows["generated_tokens"], 1.0)
    remaining = np.maximum(rows["output_tokens"] - generated, 0.0)
    ahead = np.minimum(remaining, AHEAD_TOKENS)
    gaps = np.maximum(generated - 1.0 + ahead, 1e-9)  # never 0: it may be multiplied with inf
    by_ttft = np.where(started, np.inf, rows["arrival_at_s"] + rows["ttft_s"] - first_s)
    by_tpot = np.where(remaining > 0, first_s + rows["tpot_s"] * gaps - from_s - ahead * step_s, np.inf)
    by_e2e = rows["arrival_at_s"] + rows["e2e_s"] - from_s - remaining * step_s
    return np.asarray(np.minimum(np.minimum(by_ttft, by_tpot), by_e2e))


def can_gain(rows: Rows, snapshot: Snapshot, step_s: float) -> npt.NDArray[np.bool_]:
    """Which of the waiting `rows` carry an objective and can still meet all of them if sent now, with decode steps of
    `step_s`."""
    running, model = snapshot.running, snapshot.model
    submitted = running[running["generated_tokens"] <= 0]
    first_s = float(np.sum(prefill_s(submitted, model))) + prefill_s(rows, model) + step_s
    end_s = first_s + np.maximum(rows["output_tokens"] - 1.0, 0.0) * step_s / DECODE_SHARE
    waited_s = snapshot.now_s - rows["arrival_at_s"]
    meets = (waited_s + first_s <= rows["ttft_s"]) & (waited_s + end_s <= rows["e2e_s"]) & (step_s <= rows["tpot_s"])
    carries = np.isfinite(np.minimum(np.minimum(rows["ttft_s"], rows["tpot_s"]), rows["e2e_s"]))
    return np.asarray(meets & carries)


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
        rows, running = snapshot.waiting, snapshot.running
        if not len(rows):
            return Plan(order=rows["handle"].copy(), send_now=0)
        context = float(np.sum(running["prompt_tokens"] + running["cached_tokens"] + running["generated_tokens"]))
        newcomer = float(np.mean(rows["prompt_tokens"] + rows["cached_tokens"]))
        batch_size = len(running) + 1
        gains = can_gain(rows, snapshot, snapshot.model.step_s(0, 0, batch_size, context + newcomer))
        cost_s = engine_time_s(rows, snapshot.model, SHARED_BY)
        order = np.lexsort((rows["handle"], rows["arrival_at_s"], cost_s, -rows["tier"], ~gains))
        slack = running_slack_s(snapshot, batch_size, context + newcomer)
        at_stake = slack[slack > 0]
        budget_s = self._safety * float(np.min(at_stake)) if len(at_stake) else np.inf
        needed_s = np.cumsum(prefill_s(rows[order], snapshot.model)) + np.where(gains[order], 0.0, RESERVE_S)
        send_now = min(int(np.searchsorted(needed_s, budget_s, side="right")), snapshot.free_slots)
        if send_now == 0 and len(running) == 0:
            send_now = 1
        return Plan(order=rows["handle"][order], send_now=send_now)
