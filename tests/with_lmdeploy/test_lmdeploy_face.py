"""What a gateway knows of an LMDeploy engine elsewhere is what that engine knows itself; that engine in a Ray actor."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest

from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import ChatMessage, Engine, EngineRequest, Sampling, Stopping
from lmdeploy_slo.engine.lmdeploy import Device, LmdeployEngine, LmdeployOptions
from lmdeploy_slo.engine.lmdeploy_face import LmdeployFace
from lmdeploy_slo.engine.ray_replica import RayCluster, ReplicaResources, ray_engine
from lmdeploy_slo.errors import EngineUnavailable, InvalidRequest
from lmdeploy_slo.testing.engine_contract import EngineContract
from lmdeploy_slo.testing.event_log import EventLog

CHAT = [ChatMessage("system", "Be brief."), ChatMessage("user", "Who are you?")]


def options_of(model: Path) -> LmdeployOptions:
    return LmdeployOptions(str(model), device=Device.CPU, limits=EngineLimits(max_batch_size=4))


@pytest.fixture
async def engine(tiny_model: Path) -> AsyncIterator[LmdeployEngine]:
    engine = LmdeployEngine(options_of(tiny_model), MonotonicClock())
    await engine.start(EventLog().sink)
    yield engine
    await engine.close()


async def test_the_face_says_what_the_engine_says(engine: LmdeployEngine, tiny_model: Path) -> None:
    face = LmdeployFace(options_of(tiny_model))
    with pytest.raises(EngineUnavailable, match="not loaded"):
        assert face.tokenizer
    face.load()
    for text in ("plain words", "Zürich, 東京", ""):
        assert face.tokenizer.encode(text) == engine.tokenizer.encode(text)
    assert face.tokenizer.encode_chat(CHAT) == engine.tokenizer.encode_chat(CHAT)
    assert (face.info.model, face.info.look_ahead) == (engine.info.model, engine.info.look_ahead)
    for request in (
        EngineRequest("a", [], Stopping(4)),
        EngineRequest("a", [5] * 100_000, Stopping(4)),
        EngineRequest("a", [10**9], Stopping(4), Sampling(temperature=3.0)),
    ):
        with pytest.raises(InvalidRequest) as refused:
            engine.submit(request, 0)
        told = [(each.field, each.description) for each in refused.value.violations]
        assert told == list(face.unsupported_fields(request, engine.info))


SIDE_BY_SIDE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from lmdeploy_slo.engine.lmdeploy_face import LmdeployFace
from lmdeploy_slo.engine.lmdeploy_options import LmdeployOptions
faces = [LmdeployFace(LmdeployOptions(sys.argv[1])) for _ in range(4)]
with ThreadPoolExecutor(len(faces)) as threads:
    list(threads.map(LmdeployFace.load, faces))
assert len({id(face.tokenizer) for face in faces}) == 1
"""


def test_replicas_that_start_side_by_side_read_their_model_once(tiny_model: Path) -> None:
    """In a process that has not imported LMDeploy yet."""
    subprocess.run([sys.executable, "-c", SIDE_BY_SIDE, str(tiny_model)], check=True, timeout=100)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    face = LmdeployFace(LmdeployOptions(str(tmp_path / "nowhere"), device=Device.CPU))
    with pytest.raises(EngineUnavailable, match="nowhere"):
        face.load()


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed here")
    cluster = RayCluster(cpus=8)
    asyncio.run(cluster.connect())
    yield
    asyncio.run(cluster.close())


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
class TestOnRay(EngineContract):
    patience_s = 110.0

    @pytest.fixture(autouse=True)
    def _model(self, tiny_model: Path) -> None:
        self.model = tiny_model

    async def make_engine(self) -> Engine:
        options, clock = options_of(self.model), MonotonicClock()
        make = partial(LmdeployEngine, options)
        resources = ReplicaResources(cpus=1)
        return ray_engine(RayCluster(), make, LmdeployFace(options), clock, resources=resources, name="0")
