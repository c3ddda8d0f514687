"""The configuration of a server: a TOML file, then the environment, then command-line flags; read once.

    [server]          host, port, http_port, health_port, drain_grace_s, default_max_new_tokens, max_message_bytes,
                      state_dir
    [engine]          kind, model, profile, max_batch_size, max_prefill_tokens, prefill_for_tpot_ms, kv_tokens,
                      max_session_tokens, stall_timeout_s, restarts, restart_hold_s, retries, replicas, ray_address,
                      replica_resources, replica_profiles; of LMDeploy alone: device, patched, look_ahead,
                      chat_template, trust_remote_code
    [engine.turbomind]  further fields of LMDeploy's TurbomindEngineConfig, by its names
    [scheduler]       policy, seed, plan_budget_ms, patience, max_queued_requests, queue_timeout_ms, shed, calibrate,
                      length_predictor, placement
    [autoscale]       min_replicas, max_replicas, attainment, up_s, down_s, grace_s
    [stream]          flush_interval_ms
    [limits]          max_streams, max_queued_tokens, max_wait_ms, queue_share, client_max_streams,
                      client_max_queued_requests, client_max_queued_tokens, client_tokens_per_s, client_burst_tokens
    [security]        tls_cert, tls_key, tls_client_ca, tokens_file, client_policy, reflection, insecure
    [observability]   metrics_port, metrics_host, otlp_traces_endpoint, log_format, log_level, log_requests,
                      log_content, explain_requests
    [tasks.NAME]      ttft_ms, tpot_ms, e2e_ms: objectives of requests that name this task and carry none

`engine.max_batch_size` is LMDEPLOY_SLO_ENGINE_MAX_BATCH_SIZE in the environment and --max-batch-size as a flag;
`tasks.chat.ttft_ms` is LMDEPLOY_SLO_TASKS_CHAT_TTFT_MS, and `engine.turbomind.tp` LMDEPLOY_SLO_ENGINE_TURBOMIND_TP and
--turbomind tp=2; the value `none` in the environment unsets an optional key.
What is not a key is refused, and so is a value out of range, both with the place they came from. No other module
reads the environment. What the keys mean stands in `config_sections`.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import tomli_w
from pydantic import BaseModel, ValidationError, model_validator

from lmdeploy_slo.config_sections import (
    EngineConfig,
    EngineKind,
    LogFormat,
    LogLevel,
    ObservabilityConfig,
    SchedulerConfig,
    Sections,
    ServerConfig,
    StreamConfig,
    TaskConfig,
    is_loopback,
)
from lmdeploy_slo.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "ENV_CONFIG_FILE",
    "ENV_PREFIX",
    "ENV_TOKEN",
    "ENV_TRACES_DIR",
    "Config",
    "EngineConfig",
    "EngineKind",
    "LogFormat",
    "LogLevel",
    "ObservabilityConfig",
    "SchedulerConfig",
    "ServerConfig",
    "StreamConfig",
    "TaskConfig",
    "is_loopback",
    "load",
    "toml_value",
    "traces_dir",
]

ENV_PREFIX = "LMDEPLOY_SLO_"
ENV_CONFIG_FILE = f"{ENV_PREFIX}CONFIG"
ENV_TRACES_DIR = f"{ENV_PREFIX}TRACES"
ENV_TOKEN = f"{ENV_PREFIX}TOKEN"  # of commands that call a server

# A Kubernetes service called lmdeploy-slo puts these into the environment of every pod beside it.
_KUBERNETES = re.compile(r"(SERVICE_(HOST|PORT.*)|PORT|PORT_\d.*)")


class Config(Sections):
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

    @model_validator(mode="after")
    def _replicas_are_possible(self) -> Config:
        engine = self.engine
        if engine.on_ray and self.server.http_port is not None:
            raise ValueError("http_port: LMDeploy's HTTP routes need the engine in this process: one replica, no Ray")
        if engine.on_ray and "devices" in engine.turbomind:
            raise ValueError("turbomind.devices: Ray gives each replica its devices; leave it out")
        if not engine.on_ray and self.autoscale.max_replicas is not None:
            raise ValueError("autoscale: of replicas on Ray; set replicas, or ray_address (local: this machine)")
        if not engine.on_ray and engine.replica_resources:
            raise ValueError("replica_resources: of replicas on Ray; set replicas or ray_address")
        return self

    @model_validator(mode="after")
    def _strangers_are_kept_out(self) -> Config:
        missing = self.security.missing_for_strangers
        if missing and not self.security.insecure and not is_loopback(self.server.host):
            needed = ", and ".join(missing)
            raise ValueError(
                f"others can reach {self.server.host}: [security] needs {needed}, or insecure (--insecure)"
            )
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
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, or nested too deeply
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
        Sections.model_validate(document, strict=True)
    except ValidationError as error:
        raise ConfigError(_explain(error, layers)) from error


def _read_environment(environ: Mapping[str, str], layers: _Layers) -> None:
    for variable in sorted(v for v in environ if v.startswith(ENV_PREFIX)):
        rest = variable.removeprefix(ENV_PREFIX)
        if variable in (ENV_CONFIG_FILE, ENV_TRACES_DIR, ENV_TOKEN) or _KUBERNETES.fullmatch(rest):
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
