"""What the runtime is told once, and what it keeps of each request that has not ended."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.core.slo import Timing
from lmdeploy_slo.engine.base import EngineRequest
from lmdeploy_slo.runtime.stream import RequestStream
from lmdeploy_slo.scheduling.admission import Forecast
from lmdeploy_slo.scheduling.limits import Ticket


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """flush_interval_s: 0 to 60, see `runtime.stream`; 0: one token a delta. plan_gap_s: 0 to 1, see
    `runtime.plan_loop`. shed: refuse sheddable requests whose forecast breaks their SLO. instance: name
    of the engine instance, None for "<engine>-0". calibrate: what is believed of the engine is refined by what it is
    seen to need; else that is only watched. explain_requests: >= 0, so many that have ended can be explained."""

    flush_interval_s: float = 0.007
    plan_gap_s: float = 0.005
    shed: bool = False
    instance: str | None = None
    calibrate: bool = False
    explain_requests: int = 4096

    def __post_init__(self) -> None:
        if not 0 <= self.flush_interval_s < 60:
            raise ValueError(f"flush_interval_s must be from 0 to 60 seconds, got {self.flush_interval_s}")
        if not 0 <= self.plan_gap_s <= 1:
            raise ValueError(f"plan_gap_s must be from 0 to 1 second, got {self.plan_gap_s}")
        if self.explain_requests < 0:
            raise ValueError(f"explain_requests must not be negative, got {self.explain_requests}")


@dataclass(slots=True, eq=False)
class Live:
    """A request that has not ended."""

    spec: RequestSpec
    request: EngineRequest
    handle: int
    ticket: Ticket
    stream: RequestStream
    timing: Timing
    predicted: Forecast
    rank: int = -1
    output_tokens: int = 0
    reported_tokens: int = 0  # of them, those the scheduler knows of
    cached_tokens: int | None = None
    last_token_at_s: float | None = None
    queue_timer: asyncio.TimerHandle | None = None
    deadline_timer: asyncio.TimerHandle | None = None
    traceparent: str | None = None  # its caller's, W3C Trace Context
    ended: bool = False
