"""`lmdeploy_slo serve`: flags over the environment over a file; then `app` does the rest."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import typer

from lmdeploy_slo.config import Config, load, toml_value
from lmdeploy_slo.errors import ConfigError

_DEFAULTS = Config()


def _option(key: str, text: str, **extra: Any) -> Any:
    """A flag for `section.key` of the configuration; unset unless it is given, so that the other sources count."""
    section, _, name = key.partition(".")
    default = getattr(getattr(_DEFAULTS, section), name)
    shown = default.value if isinstance(default, Enum) else "none" if default is None else str(default)
    return typer.Option(None, help=text, show_default=shown, **extra)


def serve(
    model: str | None = typer.Argument(
        None,
        help="Model for LMDeploy: a directory or a Hugging Face id. Without one the emulated engine answers, "
        "with synthetic tokens.",
        show_default=False,
    ),
    engine: str | None = typer.Option(
        None, help="emulated or lmdeploy.", show_default="lmdeploy with a MODEL, emulated without"
    ),
    profile: str | None = _option(
        "engine.profile", "Step-model profile, by name or file: how fast the engine is, or is believed to be."
    ),
    policy: str | None = _option("scheduler.policy", "Who goes first, and how many at a time."),
    max_batch_size: int | None = _option("engine.max_batch_size", "Requests in flight, at most."),
    max_prefill_tokens: int | None = _option("engine.max_prefill_tokens", "Prompt tokens per forward pass, at most."),
    prefill_for_tpot_ms: float | None = _option(
        "engine.prefill_for_tpot_ms", "Prefill no more per forward pass than keeps this TPOT; the tightest promised."
    ),
    kv_tokens: int | None = _option("engine.kv_tokens", "KV cache of the engine, tokens."),
    max_session_tokens: int | None = _option("engine.max_session_tokens", "Prompt and output of a request, at most."),
    max_queued_requests: int | None = _option("scheduler.max_queued_requests", "Waiting requests, at most."),
    queue_timeout_ms: float | None = _option(
        "scheduler.queue_timeout_ms", "Longest wait before dispatch of requests that name none."
    ),
    shed: bool | None = typer.Option(
        None,
        "--shed/--no-shed",
        help="Refuse sheddable requests whose SLO cannot be met.",
        show_default="no-shed",
    ),
    plan_budget_ms: float | None = _option("scheduler.plan_budget_ms", "Wall time of one plan."),
    patience: float | None = _option(
        "scheduler.patience",
        "Longest wait of requests whose SLO is lost, in terms of first come, first served; less serves them sooner, "
        "and fewer SLOs are met.",
    ),
    seed: int | None = _option("scheduler.seed", "Of the annealing, and of lengths the emulated engine makes up."),
    calibrate: bool | None = typer.Option(
        None,
        "--calibrate/--no-calibrate",
        help="Refine what is believed of the engine by what it is seen to need.",
        show_default="calibrate",
    ),
    flush_interval_ms: float | None = _option(
        "stream.flush_interval_ms", "Tokens of a stream that come faster share a message; 0: one token a message."
    ),
    default_max_new_tokens: int | None = _option(
        "server.default_max_new_tokens", "Output limit of requests that name none."
    ),
    device: str | None = _option("engine.device", "Of LMDeploy: auto, cuda or cpu."),
    unpatched: bool = typer.Option(False, "--unpatched", help="Serve with LMDeploy as released, without priorities."),
    look_ahead: int | None = _option(
        "engine.look_ahead", "Requests beyond the batch that wait in LMDeploy's line; none: a few."
    ),
    chat_template: str | None = _option("engine.chat_template", "Of LMDeploy, instead of the model's own."),
    trust_remote_code: bool = typer.Option(False, "--trust-remote-code", help="Run Python code that is in the model."),
    turbomind: list[str] = typer.Option(
        [], help="A field of LMDeploy's TurbomindEngineConfig, KEY=VALUE; may be repeated.", show_default=False
    ),
    replicas: int | None = _option("engine.replicas", "Engines side by side; more than one run on Ray."),
    ray_address: str | None = _option(
        "engine.ray_address", "Ray cluster that hosts them, host:port of its head, or auto; none: this machine."
    ),
    replica_resources: str | None = typer.Option(
        None,
        help="What each replica takes of Ray's resources, such as GPU=2,CPU=4.",
        show_default="CPU=1, and the GPUs of the model's parallelism",
    ),
    replica_profiles: str | None = typer.Option(
        None, help="Profiles of the replicas in turn, with commas between.", show_default="--profile for all"
    ),
    placement: str | None = _option("scheduler.placement", "On which replica a request is served."),
    min_replicas: int | None = _option(
        "autoscale.min_replicas", "Replicas, at least, where there is a --max-replicas."
    ),
    max_replicas: int | None = _option(
        "autoscale.max_replicas", "Add replicas, up to so many, while too few SLOs are foretold to be met."
    ),
    host: str | None = _option("server.host", "Address to listen on."),
    port: int | None = _option("server.port", "Port to listen on; 0: a free one."),
    http_port: int | None = _option(
        "server.http_port", "Port of LMDeploy's own HTTP routes (OpenAI's among them); 0: a free one."
    ),
    health_port: int | None = _option(
        "server.health_port", "Port of health checks alone, in plain text, for probes without TLS; 0: a free one."
    ),
    tls_cert: str | None = _option("security.tls_cert", "Certificate chain of the server, PEM."),
    tls_key: str | None = _option("security.tls_key", "Its private key, PEM."),
    tls_client_ca: str | None = _option(
        "security.tls_client_ca", "Who signs clients' certificates, PEM; then every client needs one."
    ),
    tokens_file: str | None = _option(
        "security.tokens_file", "Bearer tokens, hashed (see `token new`); then every call needs one."
    ),
    client_policy: str | None = _option("security.client_policy", "What each client may claim and use, TOML."),
    no_reflection: bool = typer.Option(False, "--no-reflection", help="Do not describe the services to callers."),
    insecure: bool = typer.Option(
        False, "--insecure", help="Serve strangers, or in plain text, also where other machines can reach it."
    ),
    max_streams: int | None = _option("limits.max_streams", "Open requests, at most."),
    max_queued_tokens: int | None = _option("limits.max_queued_tokens", "Tokens of waiting requests, at most."),
    max_wait_ms: float | None = _option(
        "limits.max_wait_ms", "Take no new requests while one of their class waits for longer."
    ),
    metrics_port: int | None = _option("observability.metrics_port", "Port of Prometheus metrics; 0: a free one."),
    metrics_host: str | None = _option("observability.metrics_host", "Address of the metrics; none: that of --host."),
    otlp_traces_endpoint: str | None = _option(
        "observability.otlp_traces_endpoint", "OpenTelemetry collector that traces go to, such as http://host:4317."
    ),
    log_format: str | None = _option("observability.log_format", "human or json."),
    log_level: str | None = _option("observability.log_level", "debug, info, warning or error."),
    log_requests: bool = typer.Option(False, "--log-requests", help="Log a line for each request at its end."),
    log_content: bool = typer.Option(
        False, "--log-content", help="Log exceptions in full, though they may quote a prompt."
    ),
    state_dir: str | None = _option("server.state_dir", "Folder where what was learnt is kept over a restart."),
    drain_grace_s: float | None = _option("server.drain_grace_s", "How long a shutdown waits for running requests."),
    stall_timeout_s: float | None = _option(
        "engine.stall_timeout_s", "An engine that has work and makes no progress for so long is started anew."
    ),
    restarts: int | None = _option("engine.restarts", "How often in a row, before the server ends with status 3."),
    config: Path | None = typer.Option(
        None, help="TOML file; environment variables and flags overrule it.", show_default=False
    ),
    print_config: bool = typer.Option(False, "--print-config", help="Print the effective configuration and exit."),
) -> None:
    """Serve MODEL with LMDeploy, or the emulated engine, over gRPC.

    One line on stdout tells the address when requests are taken. SIGTERM and SIGINT let requests end, then exit; a
    second one does not wait. SIGHUP reads the configuration again. Status 3: the engine is lost.
    """
    flags: dict[str, Any] = {
        "engine.model": model,
        "engine.kind": engine,
        "engine.profile": profile,
        "engine.max_batch_size": max_batch_size,
        "engine.max_prefill_tokens": max_prefill_tokens,
        "engine.prefill_for_tpot_ms": prefill_for_tpot_ms,
        "engine.kv_tokens": kv_tokens,
        "engine.max_session_tokens": max_session_tokens,
        "engine.device": device,
        "engine.patched": False if unpatched else None,
        "engine.look_ahead": look_ahead,
        "engine.chat_template": chat_template,
        "engine.trust_remote_code": trust_remote_code or None,
        "engine.stall_timeout_s": stall_timeout_s,
        "engine.restarts": restarts,
        "engine.replicas": replicas,
        "engine.ray_address": ray_address,
        "engine.replica_resources": replica_resources,
        "engine.replica_profiles": replica_profiles,
        "scheduler.placement": placement,
        "autoscale.min_replicas": min_replicas,
        "autoscale.max_replicas": max_replicas,
        "scheduler.policy": policy,
        "scheduler.max_queued_requests": max_queued_requests,
        "scheduler.queue_timeout_ms": queue_timeout_ms,
        "scheduler.shed": shed,
        "scheduler.calibrate": calibrate,
        "scheduler.plan_budget_ms": plan_budget_ms,
        "scheduler.patience": patience,
        "scheduler.seed": seed,
        "stream.flush_interval_ms": flush_interval_ms,
        "server.default_max_new_tokens": default_max_new_tokens,
        "server.host": host,
        "server.port": port,
        "server.http_port": http_port,
        "server.drain_grace_s": drain_grace_s,
        "server.state_dir": state_dir,
        "server.health_port": health_port,
        "security.tls_cert": tls_cert,
        "security.tls_key": tls_key,
        "security.tls_client_ca": tls_client_ca,
        "security.tokens_file": tokens_file,
        "security.client_policy": client_policy,
        "security.reflection": False if no_reflection else None,
        "security.insecure": insecure or None,
        "limits.max_streams": max_streams,
        "limits.max_queued_tokens": max_queued_tokens,
        "limits.max_wait_ms": max_wait_ms,
        "observability.metrics_port": metrics_port,
        "observability.metrics_host": metrics_host,
        "observability.otlp_traces_endpoint": otlp_traces_endpoint,
        "observability.log_format": log_format,
        "observability.log_level": log_level,
        "observability.log_requests": log_requests or None,
        "observability.log_content": log_content or None,
    }
    for field in turbomind:
        key, equals, value = field.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"--turbomind {field}: KEY=VALUE is expected")
        flags[f"engine.turbomind.{key}"] = toml_value(value)

    def read() -> Config:
        """Also when the server is told to read its configuration again."""
        from lmdeploy_slo import app  # grpc, numba and the engines: only now

        effective = load(config, flags=flags)
        app.check(effective)
        return effective

    effective = read()
    if print_config:
        typer.echo(effective.to_toml(), nl=False)
    else:
        from lmdeploy_slo import lifecycle

        raise typer.Exit(lifecycle.run(effective, announce=typer.echo, read=read))
