from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PriorityClass(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_CLASS_UNSPECIFIED: _ClassVar[PriorityClass]
    PRIORITY_CLASS_BULK: _ClassVar[PriorityClass]
    PRIORITY_CLASS_DEFAULT: _ClassVar[PriorityClass]
    PRIORITY_CLASS_INTERACTIVE: _ClassVar[PriorityClass]
    PRIORITY_CLASS_SYSTEM: _ClassVar[PriorityClass]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]

class RequestState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REQUEST_STATE_UNSPECIFIED: _ClassVar[RequestState]
    REQUEST_STATE_WAITING: _ClassVar[RequestState]
    REQUEST_STATE_RUNNING: _ClassVar[RequestState]
    REQUEST_STATE_ENDED: _ClassVar[RequestState]
PRIORITY_CLASS_UNSPECIFIED: PriorityClass
PRIORITY_CLASS_BULK: PriorityClass
PRIORITY_CLASS_DEFAULT: PriorityClass
PRIORITY_CLASS_INTERACTIVE: PriorityClass
PRIORITY_CLASS_SYSTEM: PriorityClass
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
REQUEST_STATE_UNSPECIFIED: RequestState
REQUEST_STATE_WAITING: RequestState
REQUEST_STATE_RUNNING: RequestState
REQUEST_STATE_ENDED: RequestState

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "model", "text", "token_ids", "messages", "sampling", "stopping", "slo", "task_type", "expected_output_tokens", "queue_timeout_ms", "fairness_id", "priority_class", "sheddable", "emulation", "conversation_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    SLO_FIELD_NUMBER: _ClassVar[int]
    TASK_TYPE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    FAIRNESS_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_CLASS_FIELD_NUMBER: _ClassVar[int]
    SHEDDABLE_FIELD_NUMBER: _ClassVar[int]
    EMULATION_FIELD_NUMBER: _ClassVar[int]
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    text: str
    token_ids: TokenIds
    messages: Conversation
    sampling: SamplingParams
    stopping: StoppingParams
    slo: Slo
    task_type: str
    expected_output_tokens: int
    queue_timeout_ms: float
    fairness_id: str
    priority_class: PriorityClass
    sheddable: bool
    emulation: Emulation
    conversation_id: str
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., messages: _Optional[_Union[Conversation, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., stopping: _Optional[_Union[StoppingParams, _Mapping]] = ..., slo: _Optional[_Union[Slo, _Mapping]] = ..., task_type: _Optional[str] = ..., expected_output_tokens: _Optional[int] = ..., queue_timeout_ms: _Optional[float] = ..., fairness_id: _Optional[str] = ..., priority_class: _Optional[_Union[PriorityClass, str]] = ..., sheddable: bool = ..., emulation: _Optional[_Union[Emulation, _Mapping]] = ..., conversation_id: _Optional[str] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Conversation(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Slo(_message.Message):
    __slots__ = ("ttft_ms", "tpot_ms", "e2e_ms")
    TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    TPOT_MS_FIELD_NUMBER: _ClassVar[int]
    E2E_MS_FIELD_NUMBER: _ClassVar[int]
    ttft_ms: float
    tpot_ms: float
    e2e_ms: float
    def __init__(self, ttft_ms: _Optional[float] = ..., tpot_ms: _Optional[float] = ..., e2e_ms: _Optional[float] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logprobs", "n")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int
    logprobs: int
    n: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., logprobs: _Optional[int] = ..., n: _Optional[int] = ...) -> None: ...

class StoppingParams(_message.Message):
    __slots__ = ("max_new_tokens", "min_new_tokens", "stop", "stop_token_ids", "ignore_eos", "include_stop", "skip_special_tokens")
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_STOP_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_new_tokens: int
    min_new_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    include_stop: bool
    skip_special_tokens: bool
    def __init__(self, max_new_tokens: _Optional[int] = ..., min_new_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., include_stop: bool = ..., skip_special_tokens: bool = ...) -> None: ...

class Emulation(_message.Message):
    __slots__ = ("output_tokens",)
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    output_tokens: int
    def __init__(self, output_tokens: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("text", "token_ids", "logprobs", "completion")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    completion: Completion
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., completion: _Optional[_Union[Completion, _Mapping]] = ...) -> None: ...

class GenerateStreamResponse(_message.Message):
    __slots__ = ("token_ids", "text", "logprobs", "completion")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    completion: Completion
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., completion: _Optional[_Union[Completion, _Mapping]] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("candidates",)
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    candidates: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, candidates: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob", "text")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    text: str
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., text: _Optional[str] = ...) -> None: ...

class Completion(_message.Message):
    __slots__ = ("request_id", "finish_reason", "usage", "timing", "predicted", "slo_met", "effective_priority", "instance", "slo")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    SLO_MET_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_PRIORITY_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    SLO_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    finish_reason: FinishReason
    usage: Usage
    timing: Timing
    predicted: Prediction
    slo_met: bool
    effective_priority: int
    instance: str
    slo: Slo
    def __init__(self, request_id: _Optional[str] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., predicted: _Optional[_Union[Prediction, _Mapping]] = ..., slo_met: bool = ..., effective_priority: _Optional[int] = ..., instance: _Optional[str] = ..., slo: _Optional[_Union[Slo, _Mapping]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "cached_tokens", "output_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_ms", "ttft_ms", "tpot_ms", "e2e_ms")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    TPOT_MS_FIELD_NUMBER: _ClassVar[int]
    E2E_MS_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    ttft_ms: float
    tpot_ms: float
    e2e_ms: float
    def __init__(self, queue_ms: _Optional[float] = ..., ttft_ms: _Optional[float] = ..., tpot_ms: _Optional[float] = ..., e2e_ms: _Optional[float] = ...) -> None: ...

class Prediction(_message.Message):
    __slots__ = ("output_tokens", "queue_ms", "ttft_ms", "tpot_ms", "e2e_ms", "output_tokens_interval", "queue_ms_interval", "ttft_ms_interval", "tpot_ms_interval", "e2e_ms_interval", "slo_probability")
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    TPOT_MS_FIELD_NUMBER: _ClassVar[int]
    E2E_MS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    TTFT_MS_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    TPOT_MS_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    E2E_MS_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    SLO_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    output_tokens: float
    queue_ms: float
    ttft_ms: float
    tpot_ms: float
    e2e_ms: float
    output_tokens_interval: Interval
    queue_ms_interval: Interval
    ttft_ms_interval: Interval
    tpot_ms_interval: Interval
    e2e_ms_interval: Interval
    slo_probability: float
    def __init__(self, output_tokens: _Optional[float] = ..., queue_ms: _Optional[float] = ..., ttft_ms: _Optional[float] = ..., tpot_ms: _Optional[float] = ..., e2e_ms: _Optional[float] = ..., output_tokens_interval: _Optional[_Union[Interval, _Mapping]] = ..., queue_ms_interval: _Optional[_Union[Interval, _Mapping]] = ..., ttft_ms_interval: _Optional[_Union[Interval, _Mapping]] = ..., tpot_ms_interval: _Optional[_Union[Interval, _Mapping]] = ..., e2e_ms_interval: _Optional[_Union[Interval, _Mapping]] = ..., slo_probability: _Optional[float] = ...) -> None: ...

class Interval(_message.Message):
    __slots__ = ("low", "high")
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    low: float
    high: float
    def __init__(self, low: _Optional[float] = ..., high: _Optional[float] = ...) -> None: ...

class PredictRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: GenerateRequest
    def __init__(self, request: _Optional[_Union[GenerateRequest, _Mapping]] = ...) -> None: ...

class PredictResponse(_message.Message):
    __slots__ = ("predicted", "would_meet_slo", "queue_position", "reason", "slo")
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    WOULD_MEET_SLO_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SLO_FIELD_NUMBER: _ClassVar[int]
    predicted: Prediction
    would_meet_slo: bool
    queue_position: int
    reason: str
    slo: Slo
    def __init__(self, predicted: _Optional[_Union[Prediction, _Mapping]] = ..., would_meet_slo: bool = ..., queue_position: _Optional[int] = ..., reason: _Optional[str] = ..., slo: _Optional[_Union[Slo, _Mapping]] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("aborted",)
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    aborted: bool
    def __init__(self, aborted: bool = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("model", "engine", "synthetic", "max_session_tokens", "vocab_size", "max_batch_size", "max_prefill_tokens", "kv_tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    SYNTHETIC_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    engine: str
    synthetic: bool
    max_session_tokens: int
    vocab_size: int
    max_batch_size: int
    max_prefill_tokens: int
    kv_tokens: int
    def __init__(self, model: _Optional[str] = ..., engine: _Optional[str] = ..., synthetic: bool = ..., max_session_tokens: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_batch_size: _Optional[int] = ..., max_prefill_tokens: _Optional[int] = ..., kv_tokens: _Optional[int] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "policy", "versions", "task_slos", "uptime_s", "max_queued_requests")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class TaskSlosEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Slo
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Slo, _Mapping]] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    TASK_SLOS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    version: str
    policy: str
    versions: _containers.ScalarMap[str, str]
    task_slos: _containers.MessageMap[str, Slo]
    uptime_s: float
    max_queued_requests: int
    def __init__(self, version: _Optional[str] = ..., policy: _Optional[str] = ..., versions: _Optional[_Mapping[str, str]] = ..., task_slos: _Optional[_Mapping[str, Slo]] = ..., uptime_s: _Optional[float] = ..., max_queued_requests: _Optional[int] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("waiting", "in_flight", "waiting_prompt_tokens", "kv_usage", "finished", "rejected", "timed_out", "failed", "cancelled", "with_slo", "slo_met", "plans", "last_plan_ms", "mean_plan_ms", "draining", "failed_plans", "max_in_flight", "oldest_wait_ms", "output_tokens", "last_plan", "last_minute", "step_forecasts", "refused", "retried", "resumed", "replicas", "predicted_attainment")
    class RefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    WAITING_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    WAITING_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    TIMED_OUT_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    WITH_SLO_FIELD_NUMBER: _ClassVar[int]
    SLO_MET_FIELD_NUMBER: _ClassVar[int]
    PLANS_FIELD_NUMBER: _ClassVar[int]
    LAST_PLAN_MS_FIELD_NUMBER: _ClassVar[int]
    MEAN_PLAN_MS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    FAILED_PLANS_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    OLDEST_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAST_PLAN_FIELD_NUMBER: _ClassVar[int]
    LAST_MINUTE_FIELD_NUMBER: _ClassVar[int]
    STEP_FORECASTS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    RETRIED_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_ATTAINMENT_FIELD_NUMBER: _ClassVar[int]
    waiting: int
    in_flight: int
    waiting_prompt_tokens: int
    kv_usage: float
    finished: int
    rejected: int
    timed_out: int
    failed: int
    cancelled: int
    with_slo: int
    slo_met: int
    plans: int
    last_plan_ms: float
    mean_plan_ms: float
    draining: bool
    failed_plans: int
    max_in_flight: int
    oldest_wait_ms: float
    output_tokens: int
    last_plan: PlanQuality
    last_minute: _containers.RepeatedCompositeFieldContainer[TaskLoad]
    step_forecasts: StepForecasts
    refused: _containers.ScalarMap[str, int]
    retried: int
    resumed: int
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaLoad]
    predicted_attainment: float
    def __init__(self, waiting: _Optional[int] = ..., in_flight: _Optional[int] = ..., waiting_prompt_tokens: _Optional[int] = ..., kv_usage: _Optional[float] = ..., finished: _Optional[int] = ..., rejected: _Optional[int] = ..., timed_out: _Optional[int] = ..., failed: _Optional[int] = ..., cancelled: _Optional[int] = ..., with_slo: _Optional[int] = ..., slo_met: _Optional[int] = ..., plans: _Optional[int] = ..., last_plan_ms: _Optional[float] = ..., mean_plan_ms: _Optional[float] = ..., draining: bool = ..., failed_plans: _Optional[int] = ..., max_in_flight: _Optional[int] = ..., oldest_wait_ms: _Optional[float] = ..., output_tokens: _Optional[int] = ..., last_plan: _Optional[_Union[PlanQuality, _Mapping]] = ..., last_minute: _Optional[_Iterable[_Union[TaskLoad, _Mapping]]] = ..., step_forecasts: _Optional[_Union[StepForecasts, _Mapping]] = ..., refused: _Optional[_Mapping[str, int]] = ..., retried: _Optional[int] = ..., resumed: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[ReplicaLoad, _Mapping]]] = ..., predicted_attainment: _Optional[float] = ...) -> None: ...

class ReplicaLoad(_message.Message):
    __slots__ = ("instance", "up", "draining", "waiting", "in_flight", "max_in_flight", "waiting_prompt_tokens", "kv_usage", "output_tokens", "engine_restarts", "step_forecasts")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    WAITING_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    STEP_FORECASTS_FIELD_NUMBER: _ClassVar[int]
    instance: str
    up: bool
    draining: bool
    waiting: int
    in_flight: int
    max_in_flight: int
    waiting_prompt_tokens: int
    kv_usage: float
    output_tokens: int
    engine_restarts: int
    step_forecasts: StepForecasts
    def __init__(self, instance: _Optional[str] = ..., up: bool = ..., draining: bool = ..., waiting: _Optional[int] = ..., in_flight: _Optional[int] = ..., max_in_flight: _Optional[int] = ..., waiting_prompt_tokens: _Optional[int] = ..., kv_usage: _Optional[float] = ..., output_tokens: _Optional[int] = ..., engine_restarts: _Optional[int] = ..., step_forecasts: _Optional[_Union[StepForecasts, _Mapping]] = ...) -> None: ...

class PlanQuality(_message.Message):
    __slots__ = ("start", "start_score", "score", "evaluations", "engine_second_price")
    START_FIELD_NUMBER: _ClassVar[int]
    START_SCORE_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_SECOND_PRICE_FIELD_NUMBER: _ClassVar[int]
    start: str
    start_score: float
    score: float
    evaluations: int
    engine_second_price: float
    def __init__(self, start: _Optional[str] = ..., start_score: _Optional[float] = ..., score: _Optional[float] = ..., evaluations: _Optional[int] = ..., engine_second_price: _Optional[float] = ...) -> None: ...

class StepForecasts(_message.Message):
    __slots__ = ("relative_error", "slowness", "drifting", "windows")
    RELATIVE_ERROR_FIELD_NUMBER: _ClassVar[int]
    SLOWNESS_FIELD_NUMBER: _ClassVar[int]
    DRIFTING_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    relative_error: float
    slowness: float
    drifting: bool
    windows: int
    def __init__(self, relative_error: _Optional[float] = ..., slowness: _Optional[float] = ..., drifting: bool = ..., windows: _Optional[int] = ...) -> None: ...

class TaskLoad(_message.Message):
    __slots__ = ("task", "requests", "finished", "with_slo", "slo_met", "broke_ttft", "broke_tpot", "broke_e2e", "unfinished", "prompt_tokens", "output_tokens", "mean_ttft_ms", "mean_tpot_ms")
    TASK_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    WITH_SLO_FIELD_NUMBER: _ClassVar[int]
    SLO_MET_FIELD_NUMBER: _ClassVar[int]
    BROKE_TTFT_FIELD_NUMBER: _ClassVar[int]
    BROKE_TPOT_FIELD_NUMBER: _ClassVar[int]
    BROKE_E2E_FIELD_NUMBER: _ClassVar[int]
    UNFINISHED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MEAN_TTFT_MS_FIELD_NUMBER: _ClassVar[int]
    MEAN_TPOT_MS_FIELD_NUMBER: _ClassVar[int]
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
    mean_ttft_ms: float
    mean_tpot_ms: float
    def __init__(self, task: _Optional[str] = ..., requests: _Optional[int] = ..., finished: _Optional[int] = ..., with_slo: _Optional[int] = ..., slo_met: _Optional[int] = ..., broke_ttft: _Optional[int] = ..., broke_tpot: _Optional[int] = ..., broke_e2e: _Optional[int] = ..., unfinished: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., mean_ttft_ms: _Optional[float] = ..., mean_tpot_ms: _Optional[float] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("replicas", "drain")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    replicas: int
    drain: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, replicas: _Optional[int] = ..., drain: _Optional[_Iterable[str]] = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ("wanted", "up")
    WANTED_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    wanted: int
    up: int
    def __init__(self, wanted: _Optional[int] = ..., up: _Optional[int] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("request_id", "state", "reason", "task_type", "priority_class", "prompt_tokens", "output_tokens", "slo", "slo_met", "predicted", "timing", "arrival_position", "wait", "places", "sent_before", "dearest", "sent", "complete", "moves")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TASK_TYPE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_CLASS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SLO_FIELD_NUMBER: _ClassVar[int]
    SLO_MET_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_POSITION_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    SENT_BEFORE_FIELD_NUMBER: _ClassVar[int]
    DEAREST_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    state: RequestState
    reason: str
    task_type: str
    priority_class: PriorityClass
    prompt_tokens: int
    output_tokens: int
    slo: Slo
    slo_met: bool
    predicted: Prediction
    timing: Timing
    arrival_position: int
    wait: WaitTime
    places: _containers.RepeatedCompositeFieldContainer[QueuePlace]
    sent_before: SentBefore
    dearest: _containers.RepeatedCompositeFieldContainer[SentRequest]
    sent: SentRequest
    complete: bool
    moves: int
    def __init__(self, request_id: _Optional[str] = ..., state: _Optional[_Union[RequestState, str]] = ..., reason: _Optional[str] = ..., task_type: _Optional[str] = ..., priority_class: _Optional[_Union[PriorityClass, str]] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., slo: _Optional[_Union[Slo, _Mapping]] = ..., slo_met: bool = ..., predicted: _Optional[_Union[Prediction, _Mapping]] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., arrival_position: _Optional[int] = ..., wait: _Optional[_Union[WaitTime, _Mapping]] = ..., places: _Optional[_Iterable[_Union[QueuePlace, _Mapping]]] = ..., sent_before: _Optional[_Union[SentBefore, _Mapping]] = ..., dearest: _Optional[_Iterable[_Union[SentRequest, _Mapping]]] = ..., sent: _Optional[_Union[SentRequest, _Mapping]] = ..., complete: bool = ..., moves: _Optional[int] = ...) -> None: ...

class WaitTime(_message.Message):
    __slots__ = ("total_ms", "planning_ms", "engine_full_ms", "held_back_ms")
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    PLANNING_MS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FULL_MS_FIELD_NUMBER: _ClassVar[int]
    HELD_BACK_MS_FIELD_NUMBER: _ClassVar[int]
    total_ms: float
    planning_ms: float
    engine_full_ms: float
    held_back_ms: float
    def __init__(self, total_ms: _Optional[float] = ..., planning_ms: _Optional[float] = ..., engine_full_ms: _Optional[float] = ..., held_back_ms: _Optional[float] = ...) -> None: ...

class QueuePlace(_message.Message):
    __slots__ = ("at_ms", "position", "waiting", "in_flight", "sent", "spare_ms")
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    SPARE_MS_FIELD_NUMBER: _ClassVar[int]
    at_ms: float
    position: int
    waiting: int
    in_flight: int
    sent: int
    spare_ms: float
    def __init__(self, at_ms: _Optional[float] = ..., position: _Optional[int] = ..., waiting: _Optional[int] = ..., in_flight: _Optional[int] = ..., sent: _Optional[int] = ..., spare_ms: _Optional[float] = ...) -> None: ...

class SentBefore(_message.Message):
    __slots__ = ("requests", "overtook", "prompt_tokens", "engine_ms", "cost")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    OVERTOOK_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_MS_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    requests: int
    overtook: int
    prompt_tokens: int
    engine_ms: float
    cost: float
    def __init__(self, requests: _Optional[int] = ..., overtook: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., engine_ms: _Optional[float] = ..., cost: _Optional[float] = ...) -> None: ...

class SentRequest(_message.Message):
    __slots__ = ("at_ms", "arrived_ms", "rank", "priority_class", "prompt_tokens", "output_tokens", "engine_ms", "spare_ms", "cost")
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_MS_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_CLASS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_MS_FIELD_NUMBER: _ClassVar[int]
    SPARE_MS_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    at_ms: float
    arrived_ms: float
    rank: int
    priority_class: PriorityClass
    prompt_tokens: int
    output_tokens: float
    engine_ms: float
    spare_ms: float
    cost: float
    def __init__(self, at_ms: _Optional[float] = ..., arrived_ms: _Optional[float] = ..., rank: _Optional[int] = ..., priority_class: _Optional[_Union[PriorityClass, str]] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[float] = ..., engine_ms: _Optional[float] = ..., spare_ms: _Optional[float] = ..., cost: _Optional[float] = ...) -> None: ...
