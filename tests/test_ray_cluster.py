"""How Ray is started, joined and left, and that nobody else imports it; without a Ray."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest

from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine import ray_replica
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.engine.ray_replica import RayCluster, ReplicaResources, ray_engine
from lmdeploy_slo.engine.remote import EngineFace
from lmdeploy_slo.errors import ConfigError, EngineUnavailable, MissingExtra
from lmdeploy_slo.testing.builders import NO_TIME
from lmdeploy_slo.testing.event_log import EventLog

NICENESS = "RAY_worker_niceness"


def test_gpus_are_taken_where_there_are_any() -> None:
    resources = ReplicaResources.of({"CPU": 4, "h200": 1}, gpus=None, gpus_if_any=2)
    assert resources.wanted({"CPU": 64, "GPU": 8}) == {"CPU": 4, "GPU": 2, "h200": 1}
    assert resources.wanted({"CPU": 64}) == {"CPU": 4, "h200": 1}
    assert ReplicaResources.of({"GPU": 4}, gpus=None).wanted({}) == {"CPU": 1, "GPU": 4}
    assert ReplicaResources.of({"CPU": 0}, gpus=0).wanted({"GPU": 8}) == {}


async def test_without_ray_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    make, clock = partial(EmulatedEngine, NO_TIME, EngineLimits()), MonotonicClock()
    face = EngineFace(make(clock=clock))
    engine = ray_engine(RayCluster(), make, face, clock, resources=ReplicaResources(), name="0")
    with pytest.raises(MissingExtra, match=r"lmdeploy-slo\[ray\]"):
        await engine.start(EventLog().sink)
    await engine.close()


class FakeRay:
    """How Ray is started and left."""

    __version__ = "0"

    def __init__(self, error: Exception | None = None, initialized: bool = False) -> None:
        self.error = error
        self.initialized = initialized
        self.options: list[dict[str, Any]] = []
        self.shutdowns = 0

    def is_initialized(self) -> bool:
        return self.initialized

    def init(self, **options: Any) -> None:
        self.options.append(options | {"niceness": os.environ.get(NICENESS)})
        if self.error is not None:
            raise self.error
        self.initialized = True

    def shutdown(self) -> None:
        self.shutdowns += 1


async def test_a_ray_of_our_own_is_quiet_and_ends_with_us(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    cluster = RayCluster(cpus=4.5)
    await asyncio.gather(cluster.connect(), cluster.connect())
    assert len(ray.options) == 1
    options = ray.options[0]
    assert (options["address"], options["include_dashboard"], options["log_to_driver"]) == ("local", False, False)
    assert options["num_cpus"] >= 5
    assert options["niceness"] == "0"
    assert NICENESS not in os.environ
    await cluster.close()
    await cluster.close()
    assert ray.shutdowns == 1


async def test_a_ray_of_others_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay(initialized=True)
    monkeypatch.setitem(sys.modules, "ray", ray)
    cluster = RayCluster("auto")
    await cluster.connect()
    await cluster.close()
    assert (ray.options, ray.shutdowns) == ([], 0)


async def test_a_ray_that_does_not_shut_down_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Stubborn(FakeRay):
        def shutdown(self) -> None:
            raise RuntimeError("not now")

    monkeypatch.setitem(sys.modules, "ray", Stubborn())
    cluster = RayCluster()
    await cluster.connect()
    await cluster.close()
    assert "could not be shut down" in caplog.text


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("Version mismatch: The cluster was started with:\n Ray: 2.1"), ConfigError),
        (ConnectionError("Could not find any running Ray instance"), EngineUnavailable),
    ],
)
async def test_a_cluster_that_cannot_be_joined(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    ray = FakeRay(error)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(ray_replica, "_show_token", lambda: None)
    with pytest.raises(kind, match=r"Ray at head:6379: .*(mismatch: The cluster|any running)"):
        await RayCluster("head:6379").connect()
    assert ray.options[0]["address"] == "head:6379"
    assert "num_cpus" not in ray.options[0]
    assert ray.options[0]["niceness"] is None


def test_one_engine_in_process_knows_no_ray() -> None:
    program = """
import asyncio, sys
from lmdeploy_slo import app, config, lifecycle
async def main():
    async with app.serving(config.load(environ={}, flags={"server.port": 0})):
        assert not [name for name in sys.modules if name == "ray" or name.startswith("ray.")]
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
