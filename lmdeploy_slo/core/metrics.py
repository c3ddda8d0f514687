"""From finished requests to the figures of a run: one place for attainment, goodput and latency statistics.

Definitions. SLO attainment: requests that met every objective they carried / offered requests that carried at least
one; rejected, timed out and failed ones count as missed, those cancelled by their client are left out and counted.
Goodput: met / (last arrival - first arrival). Latency statistics: over requests that ran to their end.
Duration: first arrival to the last end of any request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.core.slo import Slo, Timing


@dataclass(slots=True)
class RequestRecord:
    """One request as it ended.

    timing.ended_at_s is when it ended, however it did; a latency may only be read from it where status is FINISHED.
    predicted_output_tokens: what it was planned with, None where that is not known.
    """

    request_id: str
    task: str
    prompt_tokens: int
    slo: Slo
    timing: Timing
    status: EndStatus
    predicted_output_tokens: float | None = None

    @property
    def slo_met(self) -> bool | None:
        """None without an objective, or when the client cancelled."""
        if self.status is EndStatus.CANCELLED or not self.slo.has_objective:
            return None
        return self.status is EndStatus.FINISHED and bool(self.slo.met_by(self.timing))


def attainment(records: Iterable[RequestRecord]) -> tuple[int, int, float | None]:
    """(with_slo, met, met / with_slo); the ratio is None where no request carried an objective."""
    verdicts = [r.slo_met for r in records if r.slo_met is not None]
    met = sum(verdicts)
    return len(verdicts), met, met / len(verdicts) if verdicts else None


def distribution_ms(values_s: Sequence[float]) -> dict[str, float | None]:
    """Mean and percentiles in milliseconds of values in seconds; None everywhere where there are none."""
    if not values_s:
        return {"mean": None, "p50": None, "p90": None, "p99": None}
    values_ms = np.sort(np.asarray(values_s) * 1e3)  # sorted: the sum's last digit depends on the order
    p50, p90, p99 = np.percentile(values_ms, [50, 90, 99])
    return {"mean": float(values_ms.mean()), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def summarize(records: Sequence[RequestRecord], *, policy: str, speedup: float, seed: int) -> dict[str, Any]:
    """One entry of a result file's `runs`; missing data is None, never 0."""
    with_slo, met, ratio = attainment(records)
    arrivals = [r.timing.arrival_at_s for r in records]
    span_s = max(arrivals) - min(arrivals) if arrivals else 0.0
    ends = [r.timing.ended_at_s for r in records if r.timing.ended_at_s is not None]
    finished = [r.timing for r in records if r.status is EndStatus.FINISHED]
    by_task: dict[str, dict[str, Any]] = {}
    for task in sorted({r.task for r in records}):
        of_task = [r for r in records if r.task == task]
        _, task_met, task_ratio = attainment(of_task)
        by_task[task] = {"offered": len(of_task), "met": task_met, "slo_attainment": task_ratio}
    return {
        "policy": policy,
        "speedup": speedup,
        "seed": seed,
        "offered": len(records),
        "with_slo": with_slo,
        "met": met,
        "slo_attainment": ratio,
        **{status.value: sum(r.status is status for r in records) for status in EndStatus},
        "goodput_rps": met / span_s if with_slo and span_s > 0 else None,
        "by_task": by_task,
        "ttft_ms": distribution_ms([t.ttft_s for t in finished if t.ttft_s is not None]),
        "tpot_ms": distribution_ms([t.tpot_s for t in finished if t.tpot_s is not None]),
        "e2e_ms": distribution_ms([t.e2e_s for t in finished if t.e2e_s is not None]),
        "queue_ms": distribution_ms([t.queue_s for t in finished if t.queue_s is not None]),
        "duration_s": max(ends) - min(arrivals) if ends else None,
    }
