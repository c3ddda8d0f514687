"""Counts of how requests ended, and what the runtime is doing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.errors import DeadlineExceeded, RequestError, RequestIdInUse
from lmdeploy_slo.prediction.calibration import CalibrationStatistics
from lmdeploy_slo.runtime.last_minute import TaskCounts
from lmdeploy_slo.runtime.observer import AppliedPlan
from lmdeploy_slo.runtime.planner import PlannerStatistics


@dataclass(slots=True)
class EndCounts:
    """Since the start. with_slo and slo_met leave out cancelled requests and those without an objective.

    retried: started over because their engine was gone; resumed: went on in another one, for the same reason.
    refused: by the `reason` of the error. A request whose id is in use stands there alone: as far as anybody can tell
    it is the one that has that id already.
    """

    by_status: dict[EndStatus, int] = field(default_factory=lambda: dict.fromkeys(EndStatus, 0))
    with_slo: int = 0
    slo_met: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    retried: int = 0
    resumed: int = 0

    def refuse(self, error: RequestError, with_slo: bool) -> None:
        """A request that was not accepted."""
        self.refused[error.reason] += 1
        if not isinstance(error, RequestIdInUse):
            status = EndStatus.TIMED_OUT if isinstance(error, DeadlineExceeded) else EndStatus.REJECTED
            self.count(status, False if with_slo else None)

    def count(self, status: EndStatus, slo_met: bool | None) -> None:
        """slo_met: None where the request carried no objective."""
        self.by_status[status] += 1
        if slo_met is not None and status is not EndStatus.CANCELLED:
            self.with_slo += 1
            self.slo_met += slo_met and status is EndStatus.FINISHED


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One engine, and those who wait for it. up: it takes requests. draining: it takes no more, and will be removed.
    output_tokens: it has generated since it was added. The rest as in RuntimeLoad."""

    name: str
    up: bool
    draining: bool
    waiting: int
    in_flight: int
    waiting_prompt_tokens: int
    max_in_flight: int
    kv_usage: float | None
    output_tokens: int
    engine_restarts: int
    calibration: CalibrationStatistics


@dataclass(frozen=True, slots=True)
class RuntimeLoad:
    """waiting: accepted, not in the engine. kv_usage: 0 to 1, None where the engine does not say. refused: as in
    EndCounts. max_in_flight: the cap. oldest_wait_s: since the arrival of whoever waits longest, None where nobody
    does. output_tokens: generated since the start. last_plan: None before the first. last_minute: how requests ended,
    by task. serving: as of the runtime. engine_restarts: how often an engine was replaced. retried, resumed: as in
    EndCounts. kv_usage, calibration: of the engine that is used most, and of the first one; replicas: of each.
    predicted_attainment: of the requests of the last minute, as in `runtime.demand`.
    """

    waiting: int
    in_flight: int
    waiting_prompt_tokens: int
    kv_usage: float | None
    ended: dict[EndStatus, int]
    refused: Mapping[str, int]
    with_slo: int
    slo_met: int
    planner: PlannerStatistics
    draining: bool
    max_in_flight: int
    oldest_wait_s: float | None
    output_tokens: int
    last_plan: AppliedPlan | None
    last_minute: Mapping[str, TaskCounts]
    calibration: CalibrationStatistics
    serving: bool = True
    engine_restarts: int = 0
    retried: int = 0
    resumed: int = 0
    replicas: tuple[ReplicaLoad, ...] = ()
    predicted_attainment: float | None = None

    @property
    def price_s(self) -> float | None:
        """What a second of engine time is worth by the last plan, in requests met; None where it tells no price."""
        return None if self.last_plan is None else self.last_plan.plan.quality.price_s
