"""What the runtime tells those that watch it: once a request at its end, once a plan, never once a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import EndStatus, RequestSpec
from lmdeploy_slo.core.slo import Timing
from lmdeploy_slo.scheduling.admission import Forecast
from lmdeploy_slo.scheduling.scheduler import Dispatch


@dataclass(frozen=True, slots=True)
class EndedRequest:
    """An accepted request as it ended.

    task: its task type, one of a bounded number of names. reason: why it ended, in one word of a fixed set: the finish
    reason (stop, length) or the `reason` of the error it ended with. timing: `ended_at_s` is set however it ended.
    slo_met: None without an objective, or where its client cancelled. rank: its place in the plan that sent it, None
    where it was not sent. traceparent: as the caller sent it (W3C Trace Context). instance: of the engine it was in, or
    waited for.
    """

    spec: RequestSpec
    task: str
    status: EndStatus
    reason: str
    timing: Timing
    slo_met: bool | None
    predicted: Forecast
    rank: int | None
    cached_tokens: int | None = None
    traceparent: str | None = None
    instance: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that was never accepted; nothing was done for it.

    reason: the `reason` of the error its caller got. task: as in EndedRequest. request_id: empty where it could not be
    read. counted: it was well-formed, and so is one of the requests that were offered. with_slo: it is, and carried an
    objective, which it has missed.
    """

    reason: str
    status: EndStatus
    task: str
    request_id: str
    arrival_at_s: float
    at_s: float
    counted: bool = True
    with_slo: bool = False
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class AppliedPlan:
    """A plan that was carried out. took_s: its wall time in the planner's thread. dispatches: who went, best first.
    failed: the policy failed, and arrival order stood in."""

    at_s: float
    plan: Plan
    took_s: float
    dispatches: Sequence[Dispatch]
    failed: bool


class Observer(Protocol):
    """Called on the runtime's loop; must be quick. What it raises is logged, and harms no request."""

    def on_end(self, ended: EndedRequest) -> None: ...

    def on_refusal(self, refusal: Refusal) -> None: ...

    def on_plan(self, applied: AppliedPlan) -> None: ...
