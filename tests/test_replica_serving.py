"""A whole server with replicas on a real Ray: streams survive the death of a process, and engines come and go."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from ray_session import local_ray

from lmdeploy_slo.app import Server, serving
from lmdeploy_slo.client import NO_RETRY, AsyncClient, Load
from lmdeploy_slo.config import load
from lmdeploy_slo.engine.supervised import SupervisedEngine
from lmdeploy_slo.errors import Cancelled, InvalidRequest

__all__ = ["local_ray"]

pytestmark = pytest.mark.usefixtures("local_ray")

WAIT_S = 60.0
TOKENS = 300


@asynccontextmanager
async def served(folder: Path, replicas: int, **flags: Any) -> AsyncIterator[tuple[Server, AsyncClient]]:
    """Engines with steps of 2 ms, eight slots each."""
    profile = folder / "profile.json"
    step = {"c0": 2.0, "p1": 0.0, "p2": 0.0, "d1": 0.0, "d2": 0.0}
    profile.write_text(json.dumps({"format": 1, "name": "fast", "step_ms": step}))
    settings: dict[str, Any] = {
        "engine.replicas": replicas,
        "engine.ray_address": "local",
        "engine.profile": str(profile),
        "engine.max_batch_size": 8,
        "engine.replica_resources": {"CPU": 0.1},
        "autoscale.grace_s": 0.0,
        "server.port": 0,
    }
    async with (
        serving(load(environ={}, flags=settings | flags)) as server,
        AsyncClient(server.address, retry=NO_RETRY) as client,
    ):
        yield server, client


async def pid_of(server: Server, number: int) -> int:
    engine: Any = server.runtime.replicas[number].engine
    assert isinstance(engine, SupervisedEngine)
    _, _, pid = await engine.inner._link._actor.hello.remote()  # type: ignore[attr-defined]
    return int(pid)


async def until(client: AsyncClient, condition: Callable[[Load], bool]) -> Load:
    """The load once it is so; asked again and again."""
    async with asyncio.timeout(WAIT_S) if hasattr(asyncio, "timeout") else _no_limit():
        while not condition(seen := await client.load()):
            pass
        return seen


@asynccontextmanager
async def _no_limit() -> AsyncIterator[None]:
    yield


async def test_a_killed_replica_loses_no_request(tmp_path: Path) -> None:
    """Every stream goes on elsewhere without a gap and without a repeat: it is what one engine would have given."""
    async with served(tmp_path, 3) as (server, client):
        names = [f"prompt {i}" for i in range(30)]  # more than run at once
        alone = [await client.generate(name, max_new_tokens=TOKENS, ignore_eos=True) for name in names[:3]]
        all_began, began = asyncio.Event(), 0

        async def stream(name: str) -> tuple[list[int], str, str]:
            nonlocal began
            ids: list[int] = []
            text, instance = "", ""
            async for chunk in client.stream(name, max_new_tokens=TOKENS, ignore_eos=True):
                if not ids and chunk.token_ids:
                    began += 1
                    if began == 12:
                        all_began.set()
                ids += chunk.token_ids
                text += chunk.text
                if chunk.completion is not None:
                    instance = chunk.completion.instance
            return ids, text, instance

        streams = [asyncio.ensure_future(stream(name)) for name in names]
        await asyncio.wait_for(all_began.wait(), WAIT_S)
        victim = max(server.runtime.replicas.values(), key=lambda replica: len(replica.in_engine))
        assert victim.in_engine
        os.kill(await pid_of(server, victim.number), signal.SIGKILL)
        told = await asyncio.wait_for(asyncio.gather(*streams), WAIT_S)

        assert all(len(ids) == TOKENS for ids, _, _ in told)
        for (ids, text, _), whole in zip(told[:3], alone, strict=True):
            assert ids == list(whole.token_ids)
            assert text == whole.text
        seen = await client.load()
        assert seen.resumed + seen.retried > 0
        assert (seen.finished, seen.failed) == (len(names) + 3, 0)
        back = await until(client, lambda now: all(one.up for one in now.replicas))
        assert sum(one.engine_restarts for one in back.replicas) == 1


async def test_scaling_while_streams_run(tmp_path: Path) -> None:
    async with served(tmp_path, 1) as (_, client):
        busy = asyncio.ensure_future(
            client.generate("long", max_new_tokens=100_000, ignore_eos=True, request_id="long")
        )
        await until(client, lambda now: now.in_flight == 1)
        scaled = await client.scale(2)
        assert (scaled.wanted, scaled.up) == (2, 1)
        await until(client, lambda now: sum(one.up for one in now.replicas) == 2)
        streams = [
            asyncio.ensure_future(client.generate(f"prompt {i}", max_new_tokens=1000, ignore_eos=True))
            for i in range(7)
        ]
        seen = await until(client, lambda now: now.in_flight == 8 and all(one.output_tokens for one in now.replicas))
        assert all(one.in_flight for one in seen.replicas), "new requests go where there is room"
        await client.scale(1)
        await until(client, lambda now: len(now.replicas) == 1)
        told = await asyncio.wait_for(asyncio.gather(*streams), WAIT_S)
        assert all(len(one.token_ids) == 1000 for one in told)
        assert (await client.load()).resumed > 0
        await client.abort("long")
        with pytest.raises(Cancelled):
            await busy
        for wrong in (0, 1025):
            with pytest.raises(InvalidRequest, match="replicas"):
                await client.scale(wrong)


async def test_one_engine_in_its_own_process_cannot_be_scaled(tmp_path: Path) -> None:
    async with served(tmp_path, 1, **{"engine.ray_address": None, "engine.replica_resources": {}}) as (_, client):
        with pytest.raises(InvalidRequest, match="own process"):
            await client.scale(2)
