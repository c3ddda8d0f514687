"""Replicas on Ray: where an engine's process runs, what it takes, that it died. The only module that imports ray, and
only when a replica starts.

Each replica is one Ray actor that hosts one engine (`remote_host.EngineHost`), owned by this process: it dies with it.
Ray is not asked to restart it; `engine.supervised` builds another replica, which Ray places anew, on another node if
need be.

One machine: without an address Ray is started here, quietly: for this process alone, on the loopback interface,
without dashboard, with an object store of `OBJECT_STORE_BYTES`, for nothing large passes, and shut down by
`RayCluster.close`. A Ray that this process is connected to already is used as it is, and left.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from uuid import uuid4

from lmdeploy_slo import __version__
from lmdeploy_slo.clock import Clock
from lmdeploy_slo.engine.base import Engine, EngineInfo
from lmdeploy_slo.engine.remote import Face, LinkLost, RemoteEngine
from lmdeploy_slo.engine.remote_host import EngineHost
from lmdeploy_slo.errors import ConfigError, EngineUnavailable, MissingExtra

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100_000_000
PLACE_TIMEOUT_S = 120.0
"""How long a cluster may take to give a replica its process; one that grows by demand needs minutes for a machine."""

_NO_PRINTING = {"RAY_DEDUP_LOGS_SKIP_REGEX": "."}
"""Or Ray tells on stdout of every worker that died."""

_OF_A_LOCAL_RAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a machine that is no part of a cluster: listens on loopback alone
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is told to anybody
    "RAY_worker_niceness": "0",  # or whatever else runs here comes before the engines
}


@dataclass(frozen=True, slots=True)
class ReplicaResources:
    """What one replica takes of Ray's resources. gpus: None for `gpus_if_any` of them where the cluster has any, and
    none elsewhere. custom: by name, as nodes were started with (`ray start --resources`)."""

    cpus: float = 1.0
    gpus: float | None = 0.0
    gpus_if_any: float = 1.0
    custom: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, resources: Mapping[str, float], *, gpus: float | None, gpus_if_any: float = 1.0) -> ReplicaResources:
        """resources: by Ray's names; what they do not say is as given."""
        custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
        return cls(resources.get("CPU", 1.0), resources.get("GPU", gpus), gpus_if_any, custom)

    def wanted(self, total: Mapping[str, float]) -> dict[str, float]:
        """By Ray's names, where the cluster has `total`; without what is 0."""
        gpus = self.gpus
        if gpus is None:
            gpus = self.gpus_if_any if total.get("GPU") else 0.0
        wanted = {"CPU": self.cpus, "GPU": gpus, **self.custom}
        return {name: amount for name, amount in wanted.items() if amount}


class RayCluster:
    """The Ray that the replicas of this process share. address: host:port of a cluster's head, "auto" for the one this
    machine belongs to, None or "local" to start one here. cpus: that one then has, at least."""

    def __init__(self, address: str | None = None, *, cpus: float = 1.0, place_timeout_s: float | None = None) -> None:
        self.address = None if address == "local" else address
        self.place_timeout_s = place_timeout_s or PLACE_TIMEOUT_S
        self._cpus = cpus
        self._connecting = asyncio.Lock()
        self._keeper: _Keeper | None = None  # where Ray was started or joined here

    @property
    def local(self) -> bool:
        """Whether it is this machine alone, which does not grow."""
        return self.address is None

    async def connect(self) -> Any:
        """The module ray, connected. Raises MissingExtra without it, ConfigError where the cluster runs another
        version, EngineUnavailable where it cannot be reached or started."""
        async with self._connecting:
            if sys.modules.get("ray") is None or not _ray().is_initialized():
                keeper = _Keeper(self._init, lambda: _ray().shutdown())
                await asyncio.wrap_future(keeper.begun)
                self._keeper = keeper
            return _ray()

    async def close(self) -> None:
        """Shuts Ray down where it was started or joined here. Idempotent."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.leave.set()
            try:
                await asyncio.wrap_future(keeper.ended)
            except Exception:  # its processes end with this one in any case
                logger.exception("Ray could not be shut down")

    def _init(self) -> None:
        options: dict[str, Any] = {"address": self.address, "log_to_driver": False, "configure_logging": False}
        if self.local:
            options |= {
                "address": "local",
                "include_dashboard": False,
                "num_cpus": max(os.cpu_count() or 1, math.ceil(self._cpus)),
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        where = "Ray could not be started here" if self.local else f"Ray at {self.address}"
        try:
            with _environment(_NO_PRINTING | (_of_a_local_ray() if self.local else {})), _quiet("ray"):
                ray = _ray()
                if not self.local:
                    _show_token()
                ray.init(**options)
        except MissingExtra:
            raise
        except Exception as error:  # whatever it is, there is no Ray then
            if "ersion mismatch" in str(error):
                raise ConfigError(f"{where}: {_one_line(error)}") from error
            raise EngineUnavailable(f"{where}: {_one_line(error)}{'' if self.local else _TOKEN_HINT}") from error
        logger.info("Ray %s: %s", ray.__version__, "started here" if self.local else f"connected to {self.address}")


class _Keeper:
    """A thread that begins something, waits, and ends it. Ray's processes end with the thread that started them, and
    from the main thread Ray would take the handling of SIGTERM."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self.begun: Future[None] = Future()
        self.ended: Future[None] = Future()
        self.leave = threading.Event()
        self._begin = begin
        self._end = end
        threading.Thread(target=self._run, name="ray-keeper", daemon=True).start()

    def _run(self) -> None:
        for work, outcome in ((self._begin, self.begun), (self._end, self.ended)):
            try:
                work()
            except BaseException as error:
                outcome.set_exception(error)
                return
            outcome.set_result(None)
            if work == self._begin:
                self.leave.wait()


class RayLink:
    """The way to one replica; see `remote.Link`. make: gives the engine, and can be pickled."""

    def __init__(
        self, cluster: RayCluster, make: Callable[..., Engine], resources: ReplicaResources, name: str
    ) -> None:
        self._cluster = cluster
        self._make = make
        self._resources = resources
        self._name = name
        self._actor: Any = None
        self._ray: Any = None
        self._closed = False
        self._placing: asyncio.Future[None] | None = None

    @property
    def name(self) -> str:
        return self._name

    async def open(self) -> EngineInfo:
        self._ray = await self._cluster.connect()
        self._placing = asyncio.ensure_future(asyncio.to_thread(self._place))
        await asyncio.shield(self._placing)  # where this is cancelled, the thread still makes its actor
        version, host, pid = await self._placed()
        if version != __version__:
            raise ConfigError(f"replica {self._name} runs lmdeploy-slo {version}, this process {__version__}")
        logger.info("replica %s is process %d on %s", self._name, pid, host)
        level = logging.getLogger("lmdeploy_slo").getEffectiveLevel()
        info: EngineInfo = await self._answer(self._actor.start.remote(level))
        return replace(info, details={**info.details, "host": host, "ray": self._ray.__version__})

    def send(self, data: bytes) -> None:
        self._actor.command.remote(data)

    async def next_report(self) -> bytes:
        try:
            report: bytes = await self._actor.next_report.remote()
        except self._ray.exceptions.RayError as error:
            raise LinkLost(f"replica {self._name} is gone: {_what(error)}") from error
        return report

    async def close(self) -> None:
        """The process is killed, and its devices are free when it is gone."""
        if self._placing is not None:
            await asyncio.wait([self._placing])
        if self._actor is not None and not self._closed:
            self._closed = True
            await asyncio.to_thread(self._kill)

    # -- inside: placing ------------------------------------------------------

    def _place(self) -> None:
        """In a thread."""
        ray = self._ray
        wanted = self._resources.wanted(ray.cluster_resources())
        lacking = self._infeasible(wanted)
        if lacking and self._cluster.local:
            raise EngineUnavailable(f"no place for replica {self._name}: {lacking}")
        if lacking:
            logger.warning("replica %s waits for the cluster: %s", self._name, lacking)
        options: dict[str, Any] = {
            "num_cpus": wanted.pop("CPU", 0),
            "num_gpus": wanted.pop("GPU", 0),
            "resources": wanted,
            "name": f"lmdeploy_slo-{self._name}-{uuid4().hex[:8]}",
            "max_restarts": 0,
            "max_task_retries": 0,
            "enable_task_events": False,
        }
        self._actor = ray.remote(EngineHost).options(**options).remote(self._make)

    async def _placed(self) -> tuple[str, str, int]:
        """The answer of the process, once it has one."""
        try:
            hello: tuple[str, str, int] = await asyncio.wait_for(
                self._answer(self._actor.hello.remote()), self._cluster.place_timeout_s
            )
        except asyncio.TimeoutError:
            told = await asyncio.to_thread(self._lacking)
            raise EngineUnavailable(
                f"no place for replica {self._name} within {self._cluster.place_timeout_s:g} s: {told}"
            ) from None
        return hello

    async def _answer(self, reference: Any) -> Any:
        """What a method of the host returned, or raised."""
        exceptions = self._ray.exceptions
        try:
            return await reference
        except exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, (ConfigError, EngineUnavailable)):
                raise (
                    type(cause)(*cause.args) if type(cause) is not MissingExtra else ConfigError(str(cause))
                ) from error
            raise EngineUnavailable(f"replica {self._name} did not start: {_one_line(cause)}") from error
        except exceptions.RayError as error:
            raise EngineUnavailable(f"replica {self._name} did not start: {_what(error)}") from error

    def _infeasible(self, wanted: Mapping[str, float]) -> str:
        """What no node of the cluster has, were it idle; empty where one has it all."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if any(all(node.get(name, 0.0) >= amount for name, amount in wanted.items()) for node in nodes):
            return ""
        most = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in wanted}
        return "no node has " + ", ".join(
            f"{name} {amount:g} (at most {most[name]:g})" for name, amount in wanted.items()
        )

    def _lacking(self) -> str:
        total, free = self._ray.cluster_resources(), self._ray.available_resources()
        wanted = self._resources.wanted(total)
        infeasible = self._infeasible(wanted)
        told = ", ".join(
            f"{name} {amount:g} (free {free.get(name, 0.0):g} of {total.get(name, 0.0):g})"
            for name, amount in wanted.items()
        )
        return infeasible or f"it takes {told}, on one node"

    def _kill(self) -> None:
        ray = self._ray
        if not ray.is_initialized():
            return
        try:
            ray.kill(self._actor, no_restart=True)
        except Exception as error:  # it is dead already, or Ray is
            logger.info("replica %s: %s", self._name, _one_line(error))


def ray_engine(
    cluster: RayCluster,
    make: Callable[..., Engine],
    face: Face,
    clock: Clock,
    *,
    resources: ReplicaResources,
    name: str,
    silence_s: float = 120.0,
) -> RemoteEngine:
    """An engine on Ray, not started.

    make: called in the replica's process as make(clock=...), gives the engine; pickled, so a `functools.partial` of
    something importable. name: in logs and in `ray list actors`. silence_s: as in `remote.RemoteEngine`.
    """
    return RemoteEngine(RayLink(cluster, make, resources, name), face, clock, silence_s)


def _ray() -> Any:
    try:
        with _quiet("ray"):
            import ray
    except ImportError as error:
        raise MissingExtra("more than one replica, or one on a Ray cluster,", "ray") from error
    return ray


def _show_token() -> None:
    """To a cluster that asks for one, as `ray start` does where a token lies ready; ray.init by itself does not."""
    try:
        from ray._private.authentication import authentication_token_setup as tokens

        tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    except (ImportError, AttributeError, TypeError):  # older Rays have no tokens, other ones may do it otherwise
        return


_TOKEN_HINT = " (a cluster with tokens wants its token in RAY_AUTH_TOKEN or ~/.ray/auth_token, and RAY_AUTH_MODE=token)"


def _of_a_local_ray() -> dict[str, str]:
    """For its processes, which import from where this one does. Ray has no arguments for these."""
    wanted = dict(_OF_A_LOCAL_RAY)
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        wanted["RAY_AUTH_TOKEN"] = _own_token()
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return path | {name: value for name, value in wanted.items() if name not in os.environ}


@cache
def _own_token() -> str:
    """A Ray that knows tokens asks for this one, and needs no file in a home directory. It reads it once a process."""
    return secrets.token_hex(32)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """What is started meanwhile has these."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without what a library tells of itself, and what it adds to everybody's log records."""
    its_logger, make_record = logging.getLogger(name), logging.getLogRecordFactory()
    before = its_logger.level
    its_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        its_logger.setLevel(before)
        logging.setLogRecordFactory(make_record)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _what(error: BaseException) -> str:
    """Ray's long texts, to what matters: a module that is missing there, or the first two lines."""
    lines = [line.strip() for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()]
    missing = [line for line in lines if line.startswith("ModuleNotFoundError: ")]
    if missing:
        return f"{missing[-1]} (every node needs lmdeploy-slo {__version__})"
    return " ".join(lines[:2]) or type(error).__name__


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
