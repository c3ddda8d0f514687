"""Counts of how requests ended, how fast they are dispatched, and what the runtime is doing."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.runtime.planner import PlannerStatistics

RETRY_AFTER_RANGE_S = (0.1, 30.0)
_MEMORY = 0.9  # weight of what was known in the mean time between dispatches


@dataclass(slots=True)
class DispatchRate:
    """The recent mean time between dispatches."""

    gap_s: float | None = None
    last_at_s: float | None = None

    def note(self, at_s: float) -> None:
        """A request was dispatched."""
        if self.last_at_s is not None:
            gap_s = at_s - self.last_at_s
            self.gap_s = gap_s if self.gap_s is None else _MEMORY * self.gap_s + (1 - _MEMORY) * gap_s
        self.last_at_s = at_s

    def retry_after_s(self, waiting: int) -> float:
        """When a tenth of the queue will be gone, within `RETRY_AFTER_RANGE_S`."""
        shortest_s, longest_s = RETRY_AFTER_RANGE_S
        return min(max(0.1 * waiting * (self.gap_s or 0.0), shortest_s), longest_s)


@dataclass(slots=True)
class EndCounts:
    """Since the start. with_slo and slo_met leave out cancelled requests and those without an objective."""

    by_status: dict[EndStatus, int] = field(default_factory=lambda: dict.fromkeys(EndStatus, 0))
    with_slo: int = 0
    slo_met: int = 0

    def count(self, status: EndStatus, slo_met: bool | None) -> None:
        """slo_met: None where the request carried no objective."""
        self.by_status[status] += 1
        if slo_met is not None and status is not EndStatus.CANCELLED:
            self.with_slo += 1
            self.slo_met += slo_met and status is EndStatus.FINISHED


@dataclass(frozen=True, slots=True)
class RuntimeLoad:
    """waiting: accepted, not in the engine. kv_usage: 0 to 1, None where the engine does not say."""

    waiting: int
    in_flight: int
    waiting_prompt_tokens: int
    kv_usage: float | None
    ended: dict[EndStatus, int]
    with_slo: int
    slo_met: int
    planner: PlannerStatistics
    draining: bool
