"""What the runtime is told once, and what it keeps of each request that has not ended."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmdeploy_slo.core.request import FinishReason, RequestSpec
from lmdeploy_slo.core.slo import Timing
from lmdeploy_slo.engine.base import EngineRequest
from lmdeploy_slo.runtime.stream import Completion, RequestStream
from lmdeploy_slo.scheduling.admission import Forecast
from lmdeploy_slo.scheduling.limits import Ticket

if TYPE_CHECKING:
    from lmdeploy_slo.runtime.replica import Replica


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """flush_interval_s: 0 to 60, see `runtime.stream`; 0: one token a delta. plan_gap_s: 0 to 1, see
    `runtime.plan_loop`. shed: refuse sheddable requests whose forecast breaks their SLO. instance: name of the engine
    instance, None for "<engine>-0"; where there may be several, followed by their numbers. calibrate: what is believed
    of the engine is refined by what it is seen to need; else that is only watched. explain_requests: >= 0, so many that
    have ended can be explained. hold_s: >= 0, so long requests without a token wait for an engine that is being
    replaced. retries: >= 0, how often a request whose engine is gone is started over, or, where there are several
    engines, goes on with the tokens it has."""

    flush_interval_s: float = 0.007
    plan_gap_s: float = 0.005
    shed: bool = False
    instance: str | None = None
    calibrate: bool = False
    explain_requests: int = 4096
    hold_s: float = 30.0
    retries: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.flush_interval_s < 60:
            raise ValueError(f"flush_interval_s must be from 0 to 60 seconds, got {self.flush_interval_s}")
        if not 0 <= self.plan_gap_s <= 1:
            raise ValueError(f"plan_gap_s must be from 0 to 1 second, got {self.plan_gap_s}")
        if not self.hold_s >= 0:
            raise ValueError(f"hold_s must not be negative, got {self.hold_s}")
        for name in ("explain_requests", "retries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(slots=True, eq=False)
class Live:
    """A request that has not ended.

    replica: whose queue it is in, or whose engine. started: that engine has shown a token of it. generated: its output,
    where it may have to go on in another engine. resumed_tokens: of its output, those of engines that are gone.
    """

    spec: RequestSpec
    request: EngineRequest
    handle: int
    ticket: Ticket
    stream: RequestStream
    timing: Timing
    predicted: Forecast
    replica: Replica
    generated: array[int] | None = None
    started: bool = False
    resumed_tokens: int = 0
    rank: int = -1
    output_tokens: int = 0
    reported_tokens: int = 0  # of them, those the scheduler knows of
    cached_tokens: int | None = None
    last_token_at_s: float | None = None
    queue_timer: asyncio.TimerHandle | None = None
    deadline_timer: asyncio.TimerHandle | None = None
    traceparent: str | None = None  # its caller's, W3C Trace Context
    attempts: int = 0  # engines that took it
    ended: bool = False

    def complete(self, reason: FinishReason, at_s: float, instance: str) -> Completion:
        """How it went: it ran to its end, which became known at `at_s`."""
        self.timing.output_tokens = self.output_tokens
        self.timing.ended_at_s = at_s if self.last_token_at_s is None else self.last_token_at_s
        return Completion(
            request_id=self.spec.request_id,
            finish_reason=reason,
            prompt_tokens=self.spec.prompt_tokens,
            cached_tokens=self.cached_tokens,
            timing=self.timing,
            slo=self.spec.slo,
            slo_met=self.spec.slo.met_by(self.timing),
            predicted=self.predicted,
            rank=self.rank,
            instance=instance,
        )
