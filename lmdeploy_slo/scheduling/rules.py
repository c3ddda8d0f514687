"""Fixed rules: sort by one key, smallest first, and keep the engine full up to its in-flight cap.

Keys, on predictions (l prompt, o predicted output tokens, model coefficients as in `core.latency_model`):

    fcfs  arrival
    sjf   predicted wall time: prefill + o x step time
    swf   predicted engine time g = p1 l + p2 l^2 + o (d1 + d2 (l + o/2) + c0/64)
    edf   arrival + the smallest of e2e and ttft
    llf   the latest start that still meets every objective

Prompts count without what is expected in the prefix cache, contexts with it. Step time is that of the sequences that
decode now, of one where none do; the share of c0 is that of a batch of 64.
With `feasible_first`, requests that can no longer meet their SLO go last, in order of engine time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.core.latency_model import REFERENCE_BATCH, StepModel
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.snapshot import Rows, Snapshot

Column = npt.NDArray[Any]


def prefill_s(rows: Rows, model: StepModel) -> Column:
    """Predicted stall of each prompt's prefill, seconds."""
    return np.asarray(model.prefill_stall_s(rows["prompt_tokens"], rows["cached_tokens"]))


def engine_time_s(rows: Rows, model: StepModel, batch_size: float = REFERENCE_BATCH) -> Column:
    """Of each row; see `StepModel.engine_time_s`."""
    return np.asarray(
        model.engine_time_s(rows["prompt_tokens"], rows["output_tokens"], rows["cached_tokens"], batch_size)
    )


def step_time_s(snapshot: Snapshot) -> float:
    """Duration of a pure decode step of what runs now (of one sequence where nothing runs), seconds."""
    running = snapshot.running
    decoding = running[running["generated_tokens"] > 0]
    context = float(np.sum(decoding["prompt_tokens"] + decoding["cached_tokens"] + decoding["generated_tokens"]))
    return snapshot.model.step_s(0, 0, max(1, len(decoding)), context)


def wall_time_s(rows: Rows, model: StepModel, step_s: float | Column) -> Column:
    """Predicted time from dispatch to last token with decode steps of `step_s`, seconds."""
    return np.asarray(prefill_s(rows, model) + rows["output_tokens"] * step_s)


def latest_start_s(rows: Rows, model: StepModel, step_s: float | Column) -> Column:
    """The last instant of dispatch at which TTFT and E2E are still predicted to be met with decode steps of `step_s`;
    inf without either."""
    first_token_s = prefill_s(rows, model) + model.c0
    by_ttft = rows["ttft_s"] - first_token_s
    by_e2e = rows["e2e_s"] - wall_time_s(rows, model, step_s)
    return np.asarray(rows["arrival_at_s"] + np.minimum(by_ttft, by_e2e))


def _fcfs(snapshot: Snapshot) -> Column:
    return np.asarray(snapshot.waiting["arrival_at_s"])


def _sjf(snapshot: Snapshot) -> Column:
    return wall_time_s(snapshot.waiting, snapshot.model, step_time_s(snapshot))


def _swf(snapshot: Snapshot) -> Column:
    return engine_time_s(snapshot.waiting, snapshot.model)


def _edf(snapshot: Snapshot) -> Column:
    rows = snapshot.waiting
    return np.asarray(rows["arrival_at_s"] + np.minimum(rows["e2e_s"], rows["ttft_s"]))


def _llf(snapshot: Snapshot) -> Column:
    return latest_start_s(snapshot.waiting, snapshot.model, step_time_s(snapshot))


RULES: dict[str, Callable[[Snapshot], Column]] = {
    "fcfs": _fcfs,
    "sjf": _sjf,
    "swf": _swf,
    "edf": _edf,
    "llf": _llf,
}


def rule_order(snapshot: Snapshot, name: str, *, feasible_first: bool = False) -> npt.NDArray[np.int64]:
    """Row numbers of `snapshot.waiting` in the order of rule `name`; higher tiers first, ties by arrival."""
    rows = snapshot.waiting
    key = RULES[name](snapshot)
    hopeless = np.zeros(len(rows), dtype=np.int64)
    if feasible_first:
        late = latest_start_s(rows, snapshot.model, step_time_s(snapshot)) < snapshot.now_s
        hopeless = late.astype(np.int64)
        key = np.where(late, engine_time_s(rows, snapshot.model), key)
    order = np.lexsort((rows["handle"], rows["arrival_at_s"], key, hopeless, -rows["tier"]))
    return np.asarray(order, dtype=np.int64)


class RulePolicy:
    """A fixed rule by name; `name` as in `RULES`, else KeyError."""

    wants_ticks = False
    few_at_once = 16

    def __init__(self, rule: str, *, feasible_first: bool = False) -> None:
        RULES[rule]
        self._rule = rule
        self._feasible_first = feasible_first

    @property
    def name(self) -> str:
        return f"{self._rule}-feasible" if self._feasible_first else self._rule

    def plan(self, snapshot: Snapshot) -> Plan:
        order = rule_order(snapshot, self._rule, feasible_first=self._feasible_first)
        handles = snapshot.waiting["handle"][order]
        return Plan(order=handles, send_now=min(len(handles), snapshot.free_slots))

    def warm_up(self) -> None:
        return None
