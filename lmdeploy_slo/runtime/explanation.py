"""What is told of one request: how it waited, what went before it, and at what price. Pure data.

Instants are seconds from the arrival of the request, so that they can be told to whoever knows no clock of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lmdeploy_slo.core.request import EndStatus, PriorityClass, RequestSpec
from lmdeploy_slo.core.slo import Timing
from lmdeploy_slo.scheduling.admission import Forecast


class RequestState(str, Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Place:
    """Its place among the waiting requests, by a plan.

    position: 0 first, of `waiting`. sent: requests dispatched since its arrival. spare_s: until the last instant at
    which it could be sent and was still predicted to meet TTFT and E2E; negative where that was past, None without
    either.
    """

    at_s: float
    position: int
    waiting: int
    in_flight: int
    sent: int
    spare_s: float | None


@dataclass(frozen=True, slots=True)
class Sent:
    """A request that was sent to the engine.

    arrived_s: its arrival, negative where that was before ours. output_tokens: predicted. engine_s: engine time it was
    predicted to need. spare_s: as in Place, when it was sent. cost: what sending it was expected to cost all others, in
    requests met; None where the policy did not say.
    """

    at_s: float
    arrived_s: float
    rank: int
    priority_class: PriorityClass
    prompt_tokens: int
    output_tokens: float
    engine_s: float
    spare_s: float | None
    cost: float | None


@dataclass(frozen=True, slots=True)
class Queued:
    """What went before it while it waited, in all.

    requests: how many were sent. overtook: of those still remembered, how many had arrived after it. prompt_tokens,
    engine_s and cost: sums over those remembered; cost is None where the policy told none.
    """

    requests: int
    overtook: int
    prompt_tokens: int
    engine_s: float
    cost: float | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a request waited.

    waited_s: arrival to dispatch, to its end where it was never sent, or to now; of it planning_s until a plan knew
    anything of the queue it came into, full_s with every slot of the engine taken, held_s with slots free, because the
    policy held back. places: oldest first, at most 64. before: the dearest of those that went before it, oldest first,
    at most 20. complete: nothing that went before it has been forgotten. sent: as it was sent itself.
    """

    spec: RequestSpec
    state: RequestState
    status: EndStatus | None
    reason: str
    timing: Timing
    slo_met: bool | None
    predicted: Forecast
    arrival_position: int
    waited_s: float
    planning_s: float
    full_s: float
    held_s: float
    places: tuple[Place, ...]
    queued: Queued
    before: tuple[Sent, ...]
    sent: Sent | None
    complete: bool
    moves: int = 0
