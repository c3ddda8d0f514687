"""What a server answers, as frozen dataclasses: units in the names, None where the server left something unset.

Read from the wire messages here and nowhere else; programs never touch a protobuf message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeAlias

from google.protobuf.message import Message

from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.v1 import inference_pb2 as pb

_FINISH_REASONS = {pb.FINISH_REASON_STOP: FinishReason.STOP, pb.FINISH_REASON_LENGTH: FinishReason.LENGTH}


@dataclass(frozen=True, slots=True)
class Objectives:
    """An SLO as the wire carries it, each > 0 ms; None is "no such objective"."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens. `cached_tokens`: of the prompt, found in the prefix cache; None where the server does not say."""

    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """As measured in the server, from the arrival of the request there; tpot_ms is None for fewer than two tokens."""

    queue_ms: float | None
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float | None


class Interval(NamedTuple):
    """Where eight in ten end up that are told so, one below and one above."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The same durations as the server expected them, and the tokens: medians, then where they may end up; None where
    it made no forecast. slo_probability: of meeting every objective, None where it carries none."""

    output_tokens: float | None
    queue_ms: float | None
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float | None
    output_tokens_interval: Interval | None = None
    queue_ms_interval: Interval | None = None
    ttft_ms_interval: Interval | None = None
    tpot_ms_interval: Interval | None = None
    e2e_ms_interval: Interval | None = None
    slo_probability: float | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """How a request that ran to its end went.

    finish_reason: None for one this client does not know. predicted: what was expected of it when it arrived.
    slo: the objectives it was held to, its own or its task's default. slo_met: None where it carried none.
    effective_priority: its place in the plan when it was dispatched, 0 first.
    """

    request_id: str
    finish_reason: FinishReason | None
    usage: Usage
    timing: Timing
    predicted: Prediction
    slo: Objectives
    slo_met: bool | None
    effective_priority: int | None
    instance: str


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability (<= 0) of one token id, with its text."""

    token_id: int
    logprob: float
    text: str


Logprobs: TypeAlias = "tuple[tuple[TokenLogprob, ...], ...]"
"""Per token the chosen candidate first, then others, best first; empty where none were asked for."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: Logprobs
    completion: Completion


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """One message of a stream: what is new since the last one. `completion` is set on the last one alone."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: Logprobs
    completion: Completion | None


@dataclass(frozen=True, slots=True)
class Forecast:
    """What would become of a request sent now.

    would_meet_slo: that is at least as likely as not, and it would be taken; None where it carries no objective.
    queue_position: waiting requests that would go before it. reason: why it would not meet its objectives, in words;
    empty otherwise. slo: the objectives it would be held to.
    """

    predicted: Prediction
    would_meet_slo: bool | None
    queue_position: int
    reason: str
    slo: Objectives


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model and the engine. `synthetic`: its tokens mean nothing. None in a limit: no bound."""

    model: str
    engine: str
    synthetic: bool
    max_session_tokens: int | None
    vocab_size: int | None
    max_batch_size: int
    max_prefill_tokens: int
    kv_tokens: int | None


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The server. `versions`: of what it runs on, by package. `task_slos`: the default SLO of each configured task."""

    version: str
    policy: str
    versions: Mapping[str, str]
    task_slos: Mapping[str, Objectives]
    uptime_s: float
    max_queued_requests: int | None


@dataclass(frozen=True, slots=True)
class PlanQuality:
    """How the last plan was found. start: the rule its search began with, empty where the policy does not search.

    start_score, score: requests expected to meet, weighted, less the price of their engine time. evaluations: plans
    scored. engine_second_price: requests met that a second of engine time is worth, None where the policy does not say.
    """

    start: str
    start_score: float
    score: float
    evaluations: int
    engine_second_price: float | None


@dataclass(frozen=True, slots=True)
class StepForecasts:
    """How right the forecasts of the engine's steps are; as StepForecasts of the wire protocol."""

    relative_error: float
    slowness: float
    drifting: bool
    windows: int


@dataclass(frozen=True, slots=True)
class TaskLoad:
    """Requests of a task that ended or were refused within about a minute; as TaskLoad of the wire protocol."""

    task: str
    requests: int
    finished: int
    with_slo: int
    slo_met: int
    broke_ttft: int
    broke_tpot: int
    broke_e2e: int
    unfinished: int
    prompt_tokens: int
    output_tokens: int
    mean_ttft_ms: float | None
    mean_tpot_ms: float | None


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One engine, and who waits for it; as ReplicaLoad of the wire protocol."""

    instance: str
    up: bool
    draining: bool
    waiting: int
    in_flight: int
    max_in_flight: int
    waiting_prompt_tokens: int
    kv_usage: float | None
    output_tokens: int
    engine_restarts: int
    step_forecasts: StepForecasts


@dataclass(frozen=True, slots=True)
class Scaled:
    """wanted: how many engines there shall be. up: how many take requests by now."""

    wanted: int
    up: int


@dataclass(frozen=True, slots=True)
class Load:
    """What the server is doing. Counters run since it started; `with_slo` leaves cancelled requests out.

    failed_plans: of `plans`, those where the policy failed and arrival order stood in. output_tokens: generated.
    oldest_wait_ms: None where none waits. last_plan: None before the first. last_minute: by task. refused: by reason;
    also malformed requests and those whose id was in use, which are not among `rejected`. retried, resumed: of accepted
    requests whose engine was gone, those that started over and those that went on elsewhere. predicted_attainment: the
    mean chance of meeting their SLO that requests of the last minute were told, None where there were none.
    """

    waiting: int
    in_flight: int
    waiting_prompt_tokens: int
    kv_usage: float | None
    finished: int
    rejected: int
    timed_out: int
    failed: int
    cancelled: int
    with_slo: int
    slo_met: int
    plans: int
    last_plan_ms: float | None
    mean_plan_ms: float | None
    draining: bool
    failed_plans: int
    max_in_flight: int
    oldest_wait_ms: float | None
    output_tokens: int
    last_plan: PlanQuality | None
    last_minute: tuple[TaskLoad, ...]
    step_forecasts: StepForecasts
    refused: dict[str, int]
    retried: int = 0
    resumed: int = 0
    replicas: tuple[ReplicaLoad, ...] = ()
    predicted_attainment: float | None = None


def generation_of(message: pb.GenerateResponse) -> Generation:
    return Generation(
        message.text, tuple(message.token_ids), _logprobs(message.logprobs), _completion(message.completion)
    )


def chunk_of(message: pb.GenerateStreamResponse) -> StreamChunk:
    return StreamChunk(
        message.text,
        tuple(message.token_ids),
        _logprobs(message.logprobs) if message.logprobs else (),
        _completion(message.completion) if message.HasField("completion") else None,
    )


def forecast_of(message: pb.PredictResponse) -> Forecast:
    nested = {"predicted": prediction_of(message.predicted), "slo": plain(Objectives, message.slo)}
    return Forecast(**values(Forecast, message, nested))


def model_info_of(message: pb.GetModelInfoResponse) -> ModelInfo:
    return ModelInfo(**values(ModelInfo, message))


def server_info_of(message: pb.GetServerInfoResponse) -> ServerInfo:
    task_slos = {task: plain(Objectives, slo) for task, slo in message.task_slos.items()}
    return ServerInfo(**values(ServerInfo, message, {"versions": dict(message.versions), "task_slos": task_slos}))


def load_of(message: pb.GetLoadResponse) -> Load:
    nested = {
        "last_plan": plain(PlanQuality, message.last_plan) if message.HasField("last_plan") else None,
        "step_forecasts": plain(StepForecasts, message.step_forecasts),
        "last_minute": tuple(plain(TaskLoad, task) for task in message.last_minute),
        "refused": dict(message.refused),
        "replicas": tuple(_replica(replica) for replica in message.replicas),
    }
    return Load(**values(Load, message, nested))


def scaled_of(message: pb.ScaleResponse) -> Scaled:
    return Scaled(**values(Scaled, message))


def _replica(message: pb.ReplicaLoad) -> ReplicaLoad:
    nested = {"step_forecasts": plain(StepForecasts, message.step_forecasts)}
    return ReplicaLoad(**values(ReplicaLoad, message, nested))


def _completion(message: pb.Completion) -> Completion:
    nested = {
        "finish_reason": _FINISH_REASONS.get(message.finish_reason),
        "usage": plain(Usage, message.usage),
        "timing": plain(Timing, message.timing),
        "predicted": prediction_of(message.predicted),
        "slo": plain(Objectives, message.slo),
    }
    return Completion(**values(Completion, message, nested))


def prediction_of(message: pb.Prediction) -> Prediction:
    intervals = [field.name for field in fields(Prediction) if field.name.endswith("_interval")]
    nested = {
        name: Interval(getattr(message, name).low, getattr(message, name).high) if message.HasField(name) else None
        for name in intervals
    }
    return Prediction(**values(Prediction, message, nested))


def _logprobs(entries: Any) -> Logprobs:
    return tuple(tuple(plain(TokenLogprob, c) for c in entry.candidates) for entry in entries)


def plain(cls: Any, message: Message) -> Any:
    """A dataclass whose fields are scalars of the same names in the message."""
    return cls(**values(cls, message))


def values(cls: Any, message: Message, nested: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The message's fields by the names of the dataclass's; None for a field that has presence and is unset."""
    values = dict(nested or {})
    for field in fields(cls):
        if field.name not in values:
            tracked = message.DESCRIPTOR.fields_by_name[field.name].has_presence
            unset = tracked and not message.HasField(field.name)
            values[field.name] = None if unset else getattr(message, field.name)
    return values
