"""The configuration of a server: a TOML file, then the environment, then command-line flags; read once.

    [server]          host, port, http_port, drain_grace_s, default_max_new_tokens, max_message_bytes
    [engine]          kind, model, profile, max_batch_size, max_prefill_tokens, prefill_for_tpot_ms, kv_tokens,
                      max_session_tokens; of LMDeploy alone: device, patched, look_ahead, chat_template,
                      trust_remote_code
    [engine.turbomind]  further fields of LMDeploy's TurbomindEngineConfig, by its names
    [scheduler]       policy, seed, plan_budget_ms, max_queued_requests, queue_timeout_ms, shed
    [stream]          flush_interval_ms
    [observability]   metrics_port, metrics_host, otlp_traces_endpoint, log_format, log_level, log_requests,
                      log_content, explain_requests
    [tasks.NAME]      ttft_ms, tpot_ms, e2e_ms: objectives of requests that name this task and carry none

`engine.max_batch_size` is LMDEPLOY_SLO_ENGINE_MAX_BATCH_SIZE in the environment and --max-batch-size as a flag;
`tasks.chat.ttft_ms` is LMDEPLOY_SLO_TASKS_CHAT_TTFT_MS, and `engine.turbomind.tp` LMDEPLOY_SLO_ENGINE_TURBOMIND_TP and
--turbomind tp=2; the value `none` in the environment unsets an optional key.
What is not a key is refused, and so is a value out of range, both with the place they came from. No other module
reads the environment.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lmdeploy_slo.core.slo import Slo
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.lmdeploy_options import Device
from lmdeploy_slo.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENV_PREFIX = "LMDEPLOY_SLO_"
ENV_CONFIG_FILE = f"{ENV_PREFIX}CONFIG"
ENV_TRACES_DIR = f"{ENV_PREFIX}TRACES"

MAX_DURATION_MS = 86_400_000.0
"""A day: the longest objective or timeout, as in the wire protocol."""

# A Kubernetes service called lmdeploy-slo puts these into the environment of every pod beside it.
_KUBERNETES = re.compile(r"(SERVICE_(HOST|PORT.*)|PORT|PORT_\d.*)")


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


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ServerConfig(_Section):
    """Where the server listens, and how it ends. port 0: the operating system chooses.

    http_port: where LMDeploy's own HTTP routes (OpenAI's among them) are served as well; unset: nowhere.
    """

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=50051, ge=0, le=65535)
    http_port: int | None = Field(default=None, ge=0, le=65535)
    drain_grace_s: float = Field(default=30.0, ge=0)  # how long SIGTERM waits for requests that have not ended
    default_max_new_tokens: int = Field(default=512, ge=1)  # of requests that name none
    max_message_bytes: int = Field(default=16 * 1024 * 1024, ge=4096)  # longest request taken


_OF_LMDEPLOY = ("device", "patched", "look_ahead", "chat_template", "trust_remote_code", "turbomind")


class EngineConfig(_Section):
    """What runs the model. Unset `kind`: lmdeploy with a model, emulated without one.

    profile: a step-model profile, by name or file: the emulated engine's truth, and what is believed of any other.
    kv_tokens, max_session_tokens: unset is no bound for the emulated engine, LMDeploy's own for LMDeploy.
    prefill_for_tpot_ms: lowers max_prefill_tokens so far that this TPOT holds, as `engine.prefill_limit` says; set it
    to the tightest one that is promised.
    device, patched, look_ahead, chat_template, trust_remote_code, turbomind: as in `engine.lmdeploy_options`.
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


class SchedulerConfig(_Section):
    """How requests are ordered.

    plan_budget_ms: wall time of one plan. max_queued_requests, queue_timeout_ms (of requests that name none): unset is
    no bound. shed: refuse a sheddable request at once when its forecast breaks its SLO.
    """

    policy: str = Field(default="annealing", min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    plan_budget_ms: float = Field(default=2.0, gt=0, le=1000)
    max_queued_requests: int | None = Field(default=None, ge=1)
    queue_timeout_ms: float | None = Field(default=None, gt=0, le=MAX_DURATION_MS)
    shed: bool = False


class StreamConfig(_Section):
    """flush_interval_ms: tokens of a stream that come faster than this share a message; 0: one token a message."""

    flush_interval_ms: float = Field(default=7.0, ge=0, le=1000)


class ObservabilityConfig(_Section):
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


class TaskConfig(_Section):
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
        return Slo(*(None if v is None else v / 1e3 for v in (self.ttft_ms, self.tpot_ms, self.e2e_ms)))


TaskName = Annotated[str, Field(min_length=1, max_length=64)]


class _Sections(_Section):
    server: ServerConfig = ServerConfig()
    engine: EngineConfig = EngineConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    stream: StreamConfig = StreamConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    tasks: dict[TaskName, TaskConfig] = Field(default_factory=dict)


class Config(_Sections):
    """The whole configuration, in which the sections agree with each other; `load` makes one."""

    @model_validator(mode="after")
    def _model_and_engine_agree(self) -> Config:
        kind, model = self.engine.effective_kind, self.engine.model
        if kind is EngineKind.EMULATED and model is not None:
            raise ValueError(f"the emulated engine takes no model: leave {model!r} out, or choose the engine lmdeploy")
        if kind is EngineKind.LMDEPLOY and model is None:
            raise ValueError("the engine lmdeploy needs a model")
        if kind is EngineKind.EMULATED and self.server.http_port is not None:
            raise ValueError("http_port: the HTTP routes are LMDeploy's, the emulated engine has gRPC alone")
        if kind is EngineKind.EMULATED and (of_lmdeploy := self.engine.set_for_lmdeploy):
            raise ValueError(f"the emulated engine has no {', '.join(of_lmdeploy)}: leave it out, or name a model")
        return self

    def to_toml(self) -> str:
        """What is in effect; `load` reads it back to an equal configuration."""
        values = self.model_dump(mode="json")
        values["engine"]["kind"] = self.engine.effective_kind.value
        unset = [f"{s}.{k}" for s, keys in values.items() if s != "tasks" for k, v in keys.items() if v is None]
        header = f"# not set: {', '.join(unset)}\n\n" if unset else ""
        return header + tomli_w.dumps(_without_unset(values))


KeyPath: TypeAlias = tuple[str, ...]


class _Layers:
    """Values by path, each with the place it came from; later layers win."""

    def __init__(self) -> None:
        self.values: dict[KeyPath, Any] = {}
        self.origins: dict[KeyPath, str] = {}

    def put(self, path: KeyPath, value: Any, origin: str) -> None:
        self.values[path] = value
        self.origins[path] = origin

    def nested(self) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for path, value in self.values.items():
            node = tree
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = value
        return tree

    def origin_of(self, path: KeyPath) -> str:
        """Where a value came from, else the nearest thing around it, else the last thing inside it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        inside = [origin for known, origin in self.origins.items() if known[: len(path)] == path]
        return inside[-1] if inside else "configuration"


def load(
    file: Path | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """The effective configuration.

    file: else the one the environment names, else none. environ: that of the process where it is None.
    flags: `section.key` -> value, None where the flag was not given. Raises ConfigError.
    """
    environ = os.environ if environ is None else environ
    if file is None and environ.get(ENV_CONFIG_FILE):
        file = Path(environ[ENV_CONFIG_FILE])
    layers = _Layers()
    if file is not None:
        _read_file(file, layers)
    _read_environment(environ, layers)
    for key, value in (flags or {}).items():
        if value is not None:
            layers.put(tuple(key.split(".")), value, _flag_of(key))
    try:
        return Config.model_validate(layers.nested())
    except ValidationError as error:
        raise ConfigError(_explain(error, layers)) from error


def traces_dir(environ: Mapping[str, str] | None = None) -> Path | None:
    """Where the environment says that recorded traces lie, for benchmarks; None where it does not."""
    named = (os.environ if environ is None else environ).get(ENV_TRACES_DIR)
    return Path(named) if named else None


def toml_value(text: str) -> Any:
    """What the text says as a TOML value: a number, true, a list ...; else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _read_file(file: Path, layers: _Layers) -> None:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"{file}: not TOML: {error}") from error
    for section, keys in document.items():
        if isinstance(keys, dict):
            for key, value in keys.items():
                layers.put((section, key), value, str(file))
        else:
            layers.put((section,), keys, str(file))
    # In a file a number is written as a number; in the environment it can only be text. Each section by itself:
    # what two sections must agree on may still come from the environment or a flag.
    try:
        _Sections.model_validate(document, strict=True)
    except ValidationError as error:
        raise ConfigError(_explain(error, layers)) from error


def _read_environment(environ: Mapping[str, str], layers: _Layers) -> None:
    for variable in sorted(v for v in environ if v.startswith(ENV_PREFIX)):
        rest = variable.removeprefix(ENV_PREFIX)
        if variable in (ENV_CONFIG_FILE, ENV_TRACES_DIR) or _KUBERNETES.fullmatch(rest):
            continue
        path = _env_path(rest.lower())
        if path is None:
            known = [f"{ENV_PREFIX}{section}_{key}".upper() for section, key in _keys()]
            raise ConfigError(f"environment variable {variable} is unknown{_suggest(variable, known, listed=False)}")
        text = environ[variable]
        value = None if text.lower() == "none" else toml_value(text) if path[1] == "turbomind" else text
        layers.put(path, value, f"environment variable {variable}")


def _env_path(rest: str) -> KeyPath | None:
    section, _, key = rest.partition("_")
    if section == "tasks":
        for objective in TaskConfig.model_fields:
            name = key.removesuffix(f"_{objective}")
            if name and name != key:
                return "tasks", name, objective
    if section == "engine" and key.startswith("turbomind_"):
        return "engine", "turbomind", key.removeprefix("turbomind_")
    return (section, key) if (section, key) in _keys() else None


def _keys() -> list[tuple[str, str]]:
    return [
        (section, key)
        for section, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for key in field.annotation.model_fields
    ]


def _flag_of(key: str) -> str:
    special = {"engine.model": "MODEL", "engine.kind": "--engine"}
    return special.get(key, f"--{key.rpartition('.')[2].replace('_', '-')}")


def _explain(error: ValidationError, layers: _Layers) -> str:
    return "; ".join(_explain_one(dict(e), layers) for e in error.errors())


def _explain_one(problem: dict[str, Any], layers: _Layers) -> str:
    path = tuple(str(part) for part in problem["loc"])
    if not path:  # two sections disagree
        return str(problem["msg"]).removeprefix("Value error, ")
    origin, key = layers.origin_of(path), ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"{origin}: {key} is unknown{_suggest(path[-1], _siblings(path))}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{origin}: {key} = {problem['input']!r}: {message[0].lower()}{message[1:]}"


def _siblings(path: KeyPath) -> list[str]:
    if len(path) == 1:
        return list(Config.model_fields)
    if path[0] == "tasks":
        return list(TaskConfig.model_fields)
    return [key for section, key in _keys() if section == path[0]]


def _suggest(name: str, known: Iterable[str], *, listed: bool = True) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return hint + (f" (known: {', '.join(known)})" if listed or not close else "")


def _without_unset(values: dict[str, Any]) -> dict[str, Any]:
    """Without None and without empty tables, neither of which TOML needs to say."""
    kept = {k: _without_unset(v) if isinstance(v, dict) else v for k, v in values.items()}
    return {k: v for k, v in kept.items() if v is not None and v != {}}
