"""From the configuration to engines: what each is, whether it lives in this process or on Ray, who watches over it.

`app` wires them to everything else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.config import Config, EngineKind
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import Engine
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.engine.lmdeploy import LmdeployEngine
from lmdeploy_slo.engine.lmdeploy_face import LmdeployFace
from lmdeploy_slo.engine.lmdeploy_options import Device, LmdeployOptions
from lmdeploy_slo.engine.prefill_limit import REFERENCE_BATCH, REFERENCE_CONTEXT, SMALLEST_LIMIT, prefill_token_limit
from lmdeploy_slo.engine.ray_replica import RayCluster, ReplicaResources, ray_engine
from lmdeploy_slo.engine.remote import EngineFace, Face
from lmdeploy_slo.engine.supervised import SupervisedEngine, Supervision
from lmdeploy_slo.errors import MissingExtra
from lmdeploy_slo.prediction.profiles import load_profile

LOCAL_CPUS = 64
"""What a Ray that is started here is said to have, at least, so that replicas may be added. It is counted, not used."""


class Engines:
    """The engines of a server, by number from 0: in this process, or on one Ray that they share. A Ray is reached when
    the first of them starts."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        options = config.engine
        cpus = max(LOCAL_CPUS, options.replicas * options.replica_resources.get("CPU", 1.0))
        self._cluster = RayCluster(options.ray_address, cpus=cpus)

    def build(self, number: int = 0) -> Engine:
        """One engine, not started; numbers may be used again. Raises MissingExtra where LMDeploy is asked for and
        missing, ConfigError for a profile that is unknown."""
        if not self._config.engine.on_ray:
            return build_engine(self._config, self._clock, number)
        return build_replica(self._config, self._clock, number, self._cluster)

    def supervised(self, number: int = 0) -> SupervisedEngine:
        """The same, replaced where it is gone; with LMDeploy's HTTP routes, which hold on to the one they were given,
        it is not."""
        options = self._config.engine
        restarts = options.restarts if self._config.server.http_port is None else 0
        supervision = Supervision(stall_timeout_s=options.stall_timeout_s, restarts=restarts)
        return SupervisedEngine(partial(self.build, number), self._clock, supervision)

    async def close(self) -> None:
        """Once all are closed."""
        await self._cluster.close()


def build_engine(config: Config, clock: Clock, number: int = 0) -> Engine:
    """An engine of the configuration in this process, not started. Raises as `engine_maker`."""
    return engine_maker(config, number)(clock=clock)


def build_replica(config: Config, clock: Clock, number: int, cluster: RayCluster) -> Engine:
    """The same on Ray."""
    options = config.engine
    face: Face
    if options.effective_kind is EngineKind.LMDEPLOY:
        face = LmdeployFace(_lmdeploy_options(config, number))
    else:
        face = EngineFace(build_engine(config, clock, number))
    return ray_engine(
        cluster,
        engine_maker(config, number),
        face,
        clock,
        resources=replica_resources(config),
        name=str(number),
        silence_s=options.stall_timeout_s,
    )


def engine_maker(config: Config, number: int = 0) -> Callable[..., Engine]:
    """What gives the engine when it is called with clock=..., here or, pickled, in another process. Raises MissingExtra
    where LMDeploy is asked for and missing."""
    if config.engine.effective_kind is EngineKind.LMDEPLOY:
        return partial(LmdeployEngine, _lmdeploy_options(config, number))
    profile = load_profile(config.engine.profile_of(number))
    return partial(
        EmulatedEngine,
        profile.step_model,
        _limits(config, number),
        seed=config.scheduler.seed,
        max_session_tokens=config.engine.max_session_tokens,
        profile=profile.name,
    )


def replica_resources(config: Config) -> ReplicaResources:
    """What a replica takes: the configuration's word, else one CPU, and of GPUs as many as the model is spread over,
    where it runs on any."""
    options = config.engine
    turbomind = options.turbomind
    spread = float(turbomind.get("device_num") or turbomind.get("tp", 1) * turbomind.get("dp", 1))
    gpus: float | None = 0.0
    if options.effective_kind is EngineKind.LMDEPLOY:
        gpus = {Device.CPU: 0.0, Device.CUDA: spread, Device.AUTO: None}[options.device]
    return ReplicaResources.of(options.replica_resources, gpus=gpus, gpus_if_any=spread)


def _lmdeploy_options(config: Config, number: int) -> LmdeployOptions:
    options = config.engine
    if importlib.util.find_spec("lmdeploy") is None:
        raise MissingExtra(f"serving {options.model} with LMDeploy", "turbomind")
    assert options.model is not None, "the configuration has checked that"
    return LmdeployOptions(
        model=options.model,
        device=options.device,
        limits=_limits(config, number),
        max_session_tokens=options.max_session_tokens,
        turbomind=options.turbomind,
        patched=options.patched,
        look_ahead=options.look_ahead,
        trust_remote_code=options.trust_remote_code,
        chat_template=options.chat_template,
        stall_timeout_s=options.stall_timeout_s,
    )


def _limits(config: Config, number: int) -> EngineLimits:
    """Those of the configuration; the prefill limit no higher than the TPOT asked for allows."""
    options = config.engine
    if options.prefill_for_tpot_ms is None:
        return options.limits
    batch_size = min(options.max_batch_size, REFERENCE_BATCH)
    limit = prefill_token_limit(
        load_profile(options.profile_of(number)).step_model,
        options.prefill_for_tpot_ms / 1e3,
        batch_size=batch_size,
        context_tokens=batch_size * REFERENCE_CONTEXT,
        ceiling=max(options.max_prefill_tokens, SMALLEST_LIMIT),
    )
    return replace(options.limits, max_prefill_tokens=min(limit, options.max_prefill_tokens))
