"""The sections of a server's configuration: keys, ranges, defaults, and what they mean."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from lmdeploy_slo.core.clients import ClientPolicy
from lmdeploy_slo.core.plan import DEFAULT_PATIENCE, DEFAULT_PLACEMENT
from lmdeploy_slo.core.slo import Slo, seconds_of
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.lmdeploy_options import Device

MAX_DURATION_MS = 86_400_000.0
"""A day: the longest objective or timeout, as in the wire protocol."""


class EngineKind(str, Enum):
    """What generates the tokens."""

    EMULATED = "emulated"
    LMDEPLOY = "lmdeploy"


class LogFormat(str, Enum):
    """How a line of the log looks."""

    HUMAN = "human"
    JSON = "json"


class LogLevel(str, Enum):
    """The least that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _choice_of(choices: type[Enum]) -> Callable[[object], Enum]:
    """Takes the text of a choice also where other fields are read strictly."""

    def choose(value: object) -> Enum:
        try:
            return choices(value)
        except ValueError:
            raise ValueError(f"input should be {' or '.join(repr(choice.value) for choice in choices)}") from None

    return choose


def _resources(value: object) -> object:
    """NAME=AMOUNT,... as a table."""
    if not isinstance(value, str):
        return value
    pairs = [pair.partition("=") for pair in value.split(",") if pair.strip()]
    try:
        return {name.strip(): float(amount) for name, _, amount in pairs}
    except ValueError:
        raise ValueError("pairs NAME=AMOUNT are expected, such as GPU=2,CPU=4") from None


def _listed(value: object) -> object:
    """Names with commas between them as a list, also where other fields are read strictly."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return tuple(value) if isinstance(value, list) else value


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


File = Annotated[Path, BeforeValidator(lambda value: Path(value) if isinstance(value, str) and value else value)]
"""A path, also where other fields are read strictly."""


class ServerConfig(Section):
    """Where the server listens, and how it ends. port 0: the operating system chooses.

    http_port: where LMDeploy's own HTTP routes (OpenAI's among them) are served as well; unset: nowhere. health_port:
    where health checks are answered in plain text, and nothing else, for probes without TLS; unset: nowhere. state_dir:
    folder where what was learnt is kept over a restart; unset: it is not.
    """

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=50051, ge=0, le=65535)
    http_port: int | None = Field(default=None, ge=0, le=65535)
    health_port: int | None = Field(default=None, ge=0, le=65535)
    drain_grace_s: float = Field(default=30.0, ge=0)  # how long SIGTERM waits for requests that have not ended
    default_max_new_tokens: int = Field(default=512, ge=1)  # of requests that name none
    max_message_bytes: int = Field(default=16 * 1024 * 1024, ge=4096)  # longest request taken
    state_dir: File | None = None


_OF_LMDEPLOY = ("device", "patched", "look_ahead", "chat_template", "trust_remote_code", "turbomind")


class EngineConfig(Section):
    """What runs the model. Unset `kind`: lmdeploy with a model, emulated without one.

    profile: a step-model profile, by name or file: the emulated engine's truth, and what is believed of any other.
    kv_tokens, max_session_tokens: unset is no bound for the emulated engine, LMDeploy's own for LMDeploy.
    prefill_for_tpot_ms: lowers max_prefill_tokens so far that this TPOT holds, as `engine.prefill_limit` says; set it
    to the tightest one that is promised.
    device, patched, look_ahead, chat_template, trust_remote_code, turbomind: as in `engine.lmdeploy_options`.
    stall_timeout_s: an engine that has work and makes no progress for so long is gone. restarts: so often in a row it
    is started anew, then the process ends. restart_hold_s: so long requests without a token wait for that. retries: how
    often a request whose engine is gone starts over or, with several engines, goes on in another one.
    replicas: engines side by side; more than one run on Ray, and so does one with a ray_address (host:port of a
    cluster's head, or "auto"; unset: Ray is started on this machine). replica_resources: what each takes of Ray's,
    "GPU=2,CPU=4" or a table. replica_profiles: of replica 0, 1 ..., over again; unset: `profile` for all.
    """

    kind: Annotated[EngineKind, BeforeValidator(_choice_of(EngineKind))] | None = None
    model: str | None = Field(default=None, min_length=1)
    profile: str = Field(default="a100-qwen2.5-7b", min_length=1)
    max_batch_size: int = Field(default=256, ge=1, le=65536)
    max_prefill_tokens: int = Field(default=8192, ge=1)
    prefill_for_tpot_ms: float | None = Field(default=None, gt=0, le=MAX_DURATION_MS)
    kv_tokens: int | None = Field(default=None, ge=1)
    max_session_tokens: int | None = Field(default=None, ge=2)
    device: Annotated[Device, BeforeValidator(_choice_of(Device))] = Device.AUTO
    patched: bool = True
    look_ahead: int | None = Field(default=None, ge=0, le=65536)
    chat_template: str | None = Field(default=None, min_length=1)
    trust_remote_code: bool = False
    turbomind: dict[str, Any] = Field(default_factory=dict)
    stall_timeout_s: float = Field(default=120.0, gt=0, le=86_400)
    restarts: int = Field(default=3, ge=0, le=1000)
    restart_hold_s: float = Field(default=30.0, ge=0, le=86_400)
    retries: int = Field(default=1, ge=0, le=100)
    replicas: int = Field(default=1, ge=1, le=1024)
    ray_address: str | None = Field(default=None, min_length=1)
    replica_resources: Annotated[dict[str, float], BeforeValidator(_resources)] = Field(default_factory=dict)
    replica_profiles: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()

    @field_validator("replica_resources")
    @classmethod
    def _amounts(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, amount in resources.items():
            if not (math.isfinite(amount) and amount >= 0 and (amount < 1 or amount == int(amount))):
                raise ValueError(f"the amount of {name} must be a whole number, or between 0 and 1")
        return resources

    @field_validator("turbomind")
    @classmethod
    def _finite(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name, value in options.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number")
        return options

    @property
    def on_ray(self) -> bool:
        return self.replicas > 1 or self.ray_address is not None

    def profile_of(self, number: int) -> str:
        """Of one replica, counted from 0."""
        return self.replica_profiles[number % len(self.replica_profiles)] if self.replica_profiles else self.profile

    @property
    def effective_kind(self) -> EngineKind:
        return self.kind or (EngineKind.LMDEPLOY if self.model else EngineKind.EMULATED)

    @property
    def set_for_lmdeploy(self) -> list[str]:
        """The keys that LMDeploy alone reads and that differ from their defaults."""
        return [
            key
            for key in _OF_LMDEPLOY
            if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True)
        ]

    @property
    def limits(self) -> EngineLimits:
        return EngineLimits(self.max_batch_size, self.max_prefill_tokens, self.kv_tokens)


class SchedulerConfig(Section):
    """How requests are ordered.

    plan_budget_ms: wall time of one plan. patience: between the most SLOs met and the shortest of the longest waits; of
    `annealing` alone, as in `scheduling.annealing.AnnealingOptions`. max_queued_requests, queue_timeout_ms (of requests
    that name none): unset is no bound. shed: refuse a sheddable request at once when its forecast breaks its SLO.
    calibrate: what is believed of the engine's speed and of its prefix cache is refined by what is seen of them.
    length_predictor: "learned" by task, prompt and client, or "gaussian", as in the paper. placement: on which of
    several replicas a request is served, by the names of `scheduling.placement`.
    """

    policy: str = Field(default="annealing", min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    plan_budget_ms: float = Field(default=2.0, gt=0, le=1000)
    patience: float = Field(default=DEFAULT_PATIENCE, gt=0, le=1000)
    max_queued_requests: int | None = Field(default=None, ge=1)
    queue_timeout_ms: float | None = Field(default=None, gt=0, le=MAX_DURATION_MS)
    shed: bool = False
    calibrate: bool = True
    length_predictor: Literal["learned", "gaussian"] = "learned"
    placement: str = Field(default=DEFAULT_PLACEMENT, min_length=1)


class AutoscaleConfig(Section):
    """How many replicas there are, by what requests are foretold; `runtime.autoscale` has the rule. Unset max_replicas:
    off. attainment: the target. up_s, down_s: how long it is looked at before there are more, or fewer.
    grace_s: so long what runs in a replica that is taken away may end, before it goes on elsewhere; also where an
    operator takes it away.
    """

    min_replicas: int = Field(default=1, ge=1, le=1024)
    max_replicas: int | None = Field(default=None, ge=1, le=1024)
    attainment: float = Field(default=0.9, gt=0, le=1)
    up_s: float = Field(default=15.0, ge=1, le=600)
    down_s: float = Field(default=300.0, ge=1, le=600)
    grace_s: float = Field(default=60.0, ge=0, le=86_400)

    @model_validator(mode="after")
    def _in_order(self) -> AutoscaleConfig:
        if self.max_replicas is not None and self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})")
        return self


class StreamConfig(Section):
    """flush_interval_ms: tokens of a stream that come faster than this share a message; 0: one token a message."""

    flush_interval_ms: float = Field(default=7.0, ge=0, le=1000)


class ObservabilityConfig(Section):
    """What is told of the server, and to whom. Unset metrics_port: no metrics; 0: a free one. Unset metrics_host: the
    server's. otlp_traces_endpoint: http:// or https:// URL of an OpenTelemetry collector; unset: no traces.

    log_requests: a line for each request, not only for those the engine failed. log_content: exceptions are logged in
    full though they may quote a prompt. explain_requests: so many that have ended can be explained.
    """

    metrics_host: str | None = Field(default=None, min_length=1)
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    otlp_traces_endpoint: str | None = Field(default=None, pattern="^https?://[^/]+/?$")
    log_format: Annotated[LogFormat, BeforeValidator(_choice_of(LogFormat))] = LogFormat.HUMAN
    log_level: Annotated[LogLevel, BeforeValidator(_choice_of(LogLevel))] = LogLevel.INFO
    log_requests: bool = False
    log_content: bool = False
    explain_requests: int = Field(default=4096, ge=0, le=1_000_000)


class LimitsConfig(Section):
    """How much clients may have open, waiting and use; unset is no bound. `scheduler.limits` says how each works.

    max_streams, max_queued_tokens, max_wait_ms, queue_share: of all clients together, beside
    scheduler.max_queued_requests. client_*: of each client whose policy does not say otherwise.
    """

    max_streams: int | None = Field(default=None, ge=1)
    max_queued_tokens: int | None = Field(default=None, ge=1)
    max_wait_ms: float | None = Field(default=None, gt=0, le=MAX_DURATION_MS)
    queue_share: float | None = Field(default=None, gt=0, le=1000)
    client_max_streams: int | None = Field(default=None, ge=1)
    client_max_queued_requests: int | None = Field(default=None, ge=1)
    client_max_queued_tokens: int | None = Field(default=None, ge=1)
    client_tokens_per_s: float | None = Field(default=None, gt=0)
    client_burst_tokens: float | None = Field(default=None, ge=1)

    @property
    def client_policy(self) -> ClientPolicy:
        return ClientPolicy(
            max_streams=self.client_max_streams,
            max_queued_requests=self.client_max_queued_requests,
            max_queued_tokens=self.client_max_queued_tokens,
            tokens_per_s=self.client_tokens_per_s,
            burst_tokens=self.client_burst_tokens,
        )


class SecurityConfig(Section):
    """Who may call, and how calls are protected. Files are read again when they change.

    tls_cert, tls_key: the server's certificate chain and private key, PEM; unset: plain text. tls_client_ca: who signs
    clients' certificates, which are demanded then. tokens_file: as `token new` makes its lines; a token is demanded
    then. client_policy: what each client may claim and use, see `gateway.policy_file`. reflection: whether the port
    describes its services. insecure: serve strangers, or in plain text, on an address that others can reach.
    """

    tls_cert: File | None = None
    tls_key: File | None = None
    tls_client_ca: File | None = None
    tokens_file: File | None = None
    client_policy: File | None = None
    reflection: bool = True
    insecure: bool = False

    @model_validator(mode="after")
    def _agrees(self) -> SecurityConfig:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key are set together or not at all")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        return self

    @property
    def missing_for_strangers(self) -> list[str]:
        """What an address needs that others can reach."""
        missing = [] if self.tls_cert else ["tls_cert with tls_key"]
        return missing if self.tokens_file or self.tls_client_ca else [*missing, "tokens_file or tls_client_ca"]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; a name other than localhost may be anything."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class TaskConfig(Section):
    """Objectives of a task; at least one."""

    ttft_ms: float | None = Field(default=None, gt=0, le=MAX_DURATION_MS)
    tpot_ms: float | None = Field(default=None, gt=0, le=MAX_DURATION_MS)
    e2e_ms: float | None = Field(default=None, gt=0, le=MAX_DURATION_MS)

    @model_validator(mode="after")
    def _carries_one(self) -> TaskConfig:
        if not self.slo.has_objective:
            raise ValueError("at least one of ttft_ms, tpot_ms and e2e_ms is needed")
        return self

    @property
    def slo(self) -> Slo:
        """The same in seconds."""
        return Slo(*(None if v is None else seconds_of(v) for v in (self.ttft_ms, self.tpot_ms, self.e2e_ms)))


TaskName = Annotated[str, Field(min_length=1, max_length=64)]


class Sections(Section):
    server: ServerConfig = ServerConfig()
    engine: EngineConfig = EngineConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    autoscale: AutoscaleConfig = AutoscaleConfig()
    stream: StreamConfig = StreamConfig()
    limits: LimitsConfig = LimitsConfig()
    security: SecurityConfig = SecurityConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    tasks: dict[TaskName, TaskConfig] = Field(default_factory=dict)
