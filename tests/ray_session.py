"""One Ray for all tests of a session, shut down at its end; tests that need it are skipped where it cannot run."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator

import pytest

from lmdeploy_slo.engine.ray_replica import RayCluster
from lmdeploy_slo.errors import EngineUnavailable


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed here: pip install 'lmdeploy-slo[ray]'")
    cluster = RayCluster(cpus=16)
    try:
        asyncio.run(cluster.connect())
    except EngineUnavailable as error:
        pytest.skip(f"Ray does not run here: {error}")
    yield
    asyncio.run(cluster.close())
