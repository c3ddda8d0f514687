"""The one place that wires everything: configuration -> engine, policy, scheduler, runtime, gateway.

`serving` is a server inside a program that has an event loop of its own; `lifecycle` makes a process of it.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lmdeploy_slo import __version__
from lmdeploy_slo.clock import Clock, MonotonicClock
from lmdeploy_slo.config import Config, is_loopback
from lmdeploy_slo.core.clients import ClientPolicies
from lmdeploy_slo.core.model_range import RangeWatch
from lmdeploy_slo.core.request import ClientId
from lmdeploy_slo.core.slo import Slo, seconds_of
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import Engine, EngineInfo
from lmdeploy_slo.engines import Engines
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.frontend.gate import HttpAccess
from lmdeploy_slo.frontend.openai_door import HttpServer, build_http_app
from lmdeploy_slo.gateway.identity import Identifier, name_in_peer_certificate
from lmdeploy_slo.gateway.options import GatewayOptions
from lmdeploy_slo.gateway.policy_file import read_policies
from lmdeploy_slo.gateway.security import Security
from lmdeploy_slo.gateway.server import Gateway
from lmdeploy_slo.gateway.tls import TlsCredentials, TlsFiles
from lmdeploy_slo.gateway.tokens import Tokens, read_tokens
from lmdeploy_slo.gateway.watched import Watched
from lmdeploy_slo.observability.watch import Watch, WatchOptions
from lmdeploy_slo.prediction.length import LengthPredictor
from lmdeploy_slo.prediction.length_predictors import make_length_predictor
from lmdeploy_slo.prediction.prefix import PrefixPredictor
from lmdeploy_slo.prediction.profiles import Profile, load_profile
from lmdeploy_slo.prediction.state import Learner, StateFile
from lmdeploy_slo.runtime.autoscale import AutoscaleOptions, AutoscaleRule
from lmdeploy_slo.runtime.keeper import Keeper
from lmdeploy_slo.runtime.live import RuntimeOptions
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.runtime.scaling import Parts, Scaling
from lmdeploy_slo.scheduling.fleet import Fleet
from lmdeploy_slo.scheduling.limits import Limiter, Limits
from lmdeploy_slo.scheduling.placement import make_placement
from lmdeploy_slo.scheduling.policy import Policy, SearchBudget, make_policy, policy_names
from lmdeploy_slo.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)

_REPORTED = ("grpcio", "protobuf", "numpy", "numba", "lmdeploy", "torch")


@dataclass(frozen=True, slots=True)
class Protection:
    """Who is let in and how far, by the files that say so. policies: of each client, as the files say by then."""

    security: Security
    policies: Callable[[], ClientPolicies]
    files: Sequence[Watched[Any] | TlsCredentials]

    def reload(self) -> None:
        """Reads the files now rather than when they are looked at next; the log tells what came of it."""
        for files in self.files:
            files.reload()


@dataclass(frozen=True, slots=True)
class Server:
    """A server that takes requests at `address` (host:port), and over HTTP at `http_address` where it is asked to;
    likewise its metrics. task_slos, budget: may be changed while it serves, as `reload` does."""

    config: Config
    runtime: Runtime
    gateway: Gateway
    protection: Protection
    task_slos: dict[str, Slo]
    budget: SearchBudget
    address: str
    http_address: str | None = None
    metrics_address: str | None = None

    def __str__(self) -> str:
        engine, info = self.config.engine, self.runtime.engine.info
        device = f", device {info.details['device']}" if "device" in info.details else ""
        serves = (
            f"{info.name} engine, tokens are synthetic" if info.synthetic else f"{info.model} on {info.name}{device}"
        )
        http = "" if self.http_address is None else f"; HTTP on {self.http_address}"
        http += "" if self.metrics_address is None else f"; metrics on {self.metrics_address}"
        many = len(self.runtime.replicas)
        serves = f"{many} x {serves}" if many > 1 else serves
        return f"{self.address} ({serves}; profile {engine.profile}; policy {self.runtime.policy.name}{http})"


def check(config: Config) -> None:
    """Raises ConfigError for names that only the modules behind them know: of profiles, policy and placement."""
    for profile in (config.engine.profile, *config.engine.replica_profiles):
        load_profile(profile)
    policy, known = config.scheduler.policy, policy_names()
    if policy not in known:
        raise ConfigError(f"policy: {policy!r} is unknown; choose one of {', '.join(known)}")
    make_placement(config.scheduler.placement)


def build_protection(config: Config, clock: Clock) -> Protection:
    """Raises ConfigError where a file cannot be used."""
    options, base = config.security, config.limits.client_policy
    files: list[Watched[Any] | TlsCredentials] = []
    tls: TlsCredentials | None = None
    tokens: Watched[Tokens] | None = None
    policies: Callable[[], ClientPolicies] = partial(ClientPolicies, base)
    if options.tls_cert is not None and options.tls_key is not None:
        tls = TlsCredentials(TlsFiles(options.tls_cert, options.tls_key, options.tls_client_ca), clock)
        files.append(tls)
    if (tokens_file := options.tokens_file) is not None:
        tokens = Watched("tokens", [tokens_file], lambda: read_tokens(tokens_file), clock)
        files.append(tokens)
    if (policy_file := options.client_policy) is not None:
        watched = Watched("client policies", [policy_file], lambda: read_policies(policy_file, base), clock)
        policies = watched
        files.append(watched)
    identifier = Identifier(tokens, certificates=options.tls_client_ca is not None)
    return Protection(Security(identifier, tls, options.reflection), policies, files)


def build_runtime(
    config: Config,
    engine: Engine,
    clock: Clock,
    policies: Callable[[], ClientPolicies] | None = None,
    budget: SearchBudget | None = None,
    fleet: Fleet | None = None,
) -> Runtime:
    """Scheduler and policy on an engine, not started. policies: None for one policy for all, the configuration's.
    budget: of plans, where it is to be changed later; None: the configuration's. fleet: where there may be more
    engines."""
    options = config.scheduler
    lengths = make_length_predictor(options.length_predictor)
    runtime_options = RuntimeOptions(
        flush_interval_s=config.stream.flush_interval_ms / 1e3,
        shed=options.shed,
        calibrate=options.calibrate,
        explain_requests=config.observability.explain_requests,
        hold_s=config.engine.restart_hold_s,
        retries=config.engine.retries,
    )
    limiter = Limiter(limits_of(config), policies or partial(ClientPolicies, config.limits.client_policy))
    return Runtime(
        engine,
        _scheduler(config, engine.info, 0, lengths, fleet),
        _policy(config, budget or _budget(config), 0),
        clock,
        runtime_options,
        limiter=limiter,
        fleet=fleet,
    )


def _policy(config: Config, budget: SearchBudget, number: int) -> Policy:
    options = config.scheduler
    return make_policy(options.policy, seed=options.seed + number, budget=budget, patience=options.patience)


def _scheduler(
    config: Config, info: EngineInfo, number: int, lengths: LengthPredictor, fleet: Fleet | None
) -> Scheduler:
    """Of one engine. Of several, the limiter alone bounds how many may wait, wherever they do."""
    options, profile = config.scheduler, load_profile(config.engine.profile_of(number))
    return Scheduler(
        limits=replace(info.limits, max_batch_size=info.limits.max_batch_size + info.look_ahead),
        model=profile.step_model,
        lengths=lengths,
        prefixes=PrefixPredictor() if options.calibrate else None,
        max_queued_requests=options.max_queued_requests if fleet is None else None,
        range_watch=None if info.synthetic else _range_watch(profile, info.limits),
        numbers=None if fleet is None else fleet.numbers,
    )


class _Replicas:
    """The engines of a server on Ray, made one after the other."""

    def __init__(self, config: Config, engines: Engines, clock: Clock, budget: SearchBudget) -> None:
        self._config = config
        self._engines = engines
        self._clock = clock
        self._budget = budget
        self._fleet = Fleet(make_placement(config.scheduler.placement))
        self._next = itertools.count(1)

    def runtime(self, policies: Callable[[], ClientPolicies]) -> Runtime:
        """Of as many as are configured, not started."""
        config, first = self._config, self._engines.supervised(0)
        runtime = build_runtime(config, first, self._clock, policies, self._budget, self._fleet)
        for _ in range(config.engine.replicas - 1):
            runtime.add(*self._parts(runtime.scheduler.lengths))
        return runtime

    def scaling(self, runtime: Runtime) -> Scaling:
        """More of them, and fewer."""
        options, rule = self._config.autoscale, None
        if (most := options.max_replicas) is not None:
            bounds = AutoscaleOptions(options.min_replicas, most, options.attainment, options.up_s, options.down_s)
            rule = AutoscaleRule(bounds)
        build = partial(self._parts, runtime.scheduler.lengths)
        return Scaling(runtime, build, self._clock, grace_s=options.grace_s, rule=rule)

    def _parts(self, lengths: LengthPredictor) -> Parts:
        """Of the next one; lengths: what all of them learn of output lengths."""
        number = next(self._next)
        engine = self._engines.supervised(number)
        scheduler = _scheduler(self._config, engine.info, number, lengths, self._fleet)
        return engine, scheduler, _policy(self._config, self._budget, number)


def _budget(config: Config) -> SearchBudget:
    return SearchBudget(time_s=config.scheduler.plan_budget_ms / 1e3)


def limits_of(config: Config) -> Limits:
    """How much all clients together may have open and waiting."""
    limits = config.limits
    return Limits(
        max_streams=limits.max_streams,
        max_queued_requests=config.scheduler.max_queued_requests,
        max_queued_tokens=limits.max_queued_tokens,
        max_wait_s=None if limits.max_wait_ms is None else seconds_of(limits.max_wait_ms),
        queue_share=limits.queue_share,
    )


def _range_watch(profile: Profile, limits: EngineLimits) -> RangeWatch:
    """Warns where the engine takes more than its profile was fitted on. The emulated engine is its profile."""
    watch = RangeWatch(profile.name, profile.fitted_range)
    watch.note(batch_size=limits.max_batch_size, prefill_tokens=limits.max_prefill_tokens)
    return watch


def http_access(config: Config, protection: Protection) -> HttpAccess:
    """The same demands over HTTP."""
    identifier, tls = protection.security.identifier, protection.security.tls

    def is_operator(name: str | None) -> bool:
        if name is None:
            return is_loopback(config.server.host)
        return protection.policies().of(ClientId(name)).operator

    return HttpAccess(
        name_of=lambda token, certificate: identifier.name_of(token, lambda: name_in_peer_certificate(certificate())),
        is_operator=is_operator,
        max_body_bytes=config.server.max_message_bytes,
        tls=None if tls is None else tls.for_http(),
    )


def gateway_options(config: Config) -> GatewayOptions:
    """What the gateway is told."""
    timeout_ms = config.scheduler.queue_timeout_ms
    return GatewayOptions(
        default_max_new_tokens=config.server.default_max_new_tokens,
        default_queue_timeout_s=None if timeout_ms is None else seconds_of(timeout_ms),
        task_slos={name: task.slo for name, task in config.tasks.items()},
        max_queued_requests=config.scheduler.max_queued_requests,
        strangers_scale=is_loopback(config.server.host),
        max_message_bytes=config.server.max_message_bytes,
        version=__version__,
        versions=_versions(),
    )


def watch_options(config: Config, runtime: Runtime) -> WatchOptions:
    """What is told of the server."""
    options, info = config.observability, runtime.engine.info
    return WatchOptions(
        metrics_host=options.metrics_host or config.server.host,
        metrics_port=options.metrics_port,
        otlp_traces_endpoint=options.otlp_traces_endpoint,
        log_requests=options.log_requests,
        info={"version": __version__, "policy": runtime.policy.name, "engine": info.name, "model": info.model},
    )


def state_file(config: Config, runtime: Runtime) -> StateFile | None:
    """Where what the runtime learns is kept, None for nowhere. Raises ConfigError for a folder that cannot be used."""
    if config.server.state_dir is None:
        return None
    info = runtime.engine.info

    def learners() -> dict[str, Learner]:
        """Of the engines there are by now, by their places: those that come later go on where others were."""
        found: dict[str, object] = {"output_lengths": runtime.scheduler.lengths, "forecasts": runtime.forecaster}
        for place, replica in enumerate(runtime.replicas.values()):
            of = f"_{place}" if place else ""
            found[f"step_model{of}"] = replica.learning.calibration if config.scheduler.calibrate else None
            found[f"prefix_cache{of}"] = replica.scheduler.prefixes
        return {name: learner for name, learner in found.items() if isinstance(learner, Learner)}

    return StateFile(config.server.state_dir, engine=info.name, model=info.model, learners=learners)


@asynccontextmanager
async def serving(config: Config, clock: Clock | None = None) -> AsyncIterator[Server]:
    """A server that takes requests inside the block: engine started, policy compiled, port bound.

    On leaving, requests that have not ended get UNAVAILABLE at once; `Server.gateway.drain` before that lets them
    end. Raises ConfigError, and EngineUnavailable where the engine does not start.
    """
    clock = clock or MonotonicClock()
    protection = build_protection(config, clock)
    budget, task_slos = _budget(config), {name: task.slo for name, task in config.tasks.items()}
    engines = Engines(config, clock)
    replicas = _Replicas(config, engines, clock, budget) if config.engine.on_ray else None
    if replicas is None:
        runtime = build_runtime(config, engines.supervised(), clock, protection.policies, budget)
    else:
        runtime = replicas.runtime(protection.policies)
    runtime.journal.know_tasks(config.tasks)
    gateway = Gateway(runtime, gateway_options(config), protection.security)
    watch = Watch(runtime, watch_options(config, runtime))
    http: HttpServer | None = None
    http_address: str | None = None
    file = state_file(config, runtime)
    keeper = None if file is None else Keeper(file)
    try:
        if file is not None and keeper is not None:
            restored = file.load()
            logger.info("state: %s, of %s", file.path, ", ".join(restored) or "nothing yet")
            keeper.start()
        if config.server.health_port is not None:
            health_port = await gateway.start_health(config.server.host, config.server.health_port)
            logger.info("health checks on port %d", health_port)
        await runtime.start()
        if replicas is not None:
            gateway.scaling = replicas.scaling(runtime)
            gateway.scaling.start()
        watch.start()
        port = await gateway.start(config.server.host, config.server.port)
        host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host
        if config.server.http_port is not None:
            access = http_access(config, protection)
            routes = build_http_app(runtime, task_slos=task_slos, access=access)
            http = HttpServer(routes, config.server.host, config.server.http_port, access.tls)
            http_address = f"{host}:{await http.start()}"
        address = f"{host}:{port}"
        yield Server(
            config, runtime, gateway, protection, task_slos, budget, address, http_address, watch.metrics_address
        )
    finally:
        await gateway.close()
        if http is not None:
            await http.close()
        if gateway.scaling is not None:
            await gateway.scaling.close()
        await runtime.close()
        await engines.close()
        await watch.close()
        if keeper is not None:
            await keeper.close()


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _REPORTED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
