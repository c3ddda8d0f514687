"""Why a request waited, as the server tells it: the answer of `explain`. Instants are ms since the request arrived."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lmdeploy_slo.client.results import Objectives, Prediction, Timing, plain, prediction_of, values
from lmdeploy_slo.core.request import PriorityClass
from lmdeploy_slo.v1 import inference_pb2 as pb


class RequestState(str, Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class WaitTime:
    """Where the time from arrival to dispatch (to the end, to now) went: until a plan had looked at the queue it came
    into, with all places in the engine taken, and with free places, because the policy held back."""

    total_ms: float
    planning_ms: float
    engine_full_ms: float
    held_back_ms: float


@dataclass(frozen=True, slots=True)
class QueuePlace:
    """Its place in the queue by a plan, 0 first. sent: requests sent to the engine since it arrived. spare_ms: how long
    it could still wait and be expected to meet TTFT and E2E; negative where it could not, None without either."""

    at_ms: float
    position: int
    waiting: int
    in_flight: int
    sent: int
    spare_ms: float | None


@dataclass(frozen=True, slots=True)
class SentBefore:
    """All that were sent while it waited. overtook: those that arrived after it. cost: the sum of theirs."""

    requests: int
    overtook: int
    prompt_tokens: int
    engine_ms: float
    cost: float | None


@dataclass(frozen=True, slots=True)
class SentRequest:
    """A request sent to the engine. arrived_ms: negative where it came earlier. output_tokens: expected. cost: what
    sending it was expected to cost all others, in requests met; None where the policy did not say."""

    at_ms: float
    arrived_ms: float
    rank: int
    priority_class: PriorityClass
    prompt_tokens: int
    output_tokens: float
    engine_ms: float
    spare_ms: float | None
    cost: float | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """See the module, and ExplainResponse of the wire protocol.

    state: None for one this client does not know. reason: how it ended, "stop", "length" or the reason of its error;
    empty until then. dearest: of those sent before it, the ones that cost most. sent: itself, None where it was not
    sent or that is forgotten. complete: nothing that was sent before it is forgotten. moves: from engine to engine.
    """

    request_id: str
    state: RequestState | None
    reason: str
    task_type: str
    priority_class: PriorityClass
    prompt_tokens: int
    output_tokens: int | None
    slo: Objectives
    slo_met: bool | None
    predicted: Prediction
    timing: Timing
    arrival_position: int
    wait: WaitTime
    places: tuple[QueuePlace, ...]
    sent_before: SentBefore
    dearest: tuple[SentRequest, ...]
    sent: SentRequest | None
    complete: bool
    moves: int = 0


_STATES = {
    pb.REQUEST_STATE_WAITING: RequestState.WAITING,
    pb.REQUEST_STATE_RUNNING: RequestState.RUNNING,
    pb.REQUEST_STATE_ENDED: RequestState.ENDED,
}


def explanation_of(message: pb.ExplainResponse) -> Explanation:
    nested = {
        "state": _STATES.get(message.state),
        "priority_class": _priority_class(message.priority_class),
        "slo": plain(Objectives, message.slo),
        "predicted": prediction_of(message.predicted),
        "timing": plain(Timing, message.timing),
        "wait": plain(WaitTime, message.wait),
        "places": tuple(plain(QueuePlace, place) for place in message.places),
        "sent_before": plain(SentBefore, message.sent_before),
        "dearest": tuple(_sent(sent) for sent in message.dearest),
        "sent": _sent(message.sent) if message.HasField("sent") else None,
    }
    return Explanation(**values(Explanation, message, nested))


def _sent(message: pb.SentRequest) -> SentRequest:
    nested = {"priority_class": _priority_class(message.priority_class)}
    return SentRequest(**values(SentRequest, message, nested))


def _priority_class(value: int) -> PriorityClass:
    """The wire counts from 1."""
    return PriorityClass(value - 1) if value else PriorityClass.DEFAULT
