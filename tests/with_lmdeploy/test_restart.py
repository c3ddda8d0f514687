"""LMDeploy that stalls is closed and built anew in the same process; who saw no token gets its answer all the same."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lmdeploy_slo.app import serving
from lmdeploy_slo.client import NO_RETRY, AsyncClient
from lmdeploy_slo.config import load
from lmdeploy_slo.engine.supervised import EngineState, SupervisedEngine
from lmdeploy_slo.errors import EngineUnavailable

if TYPE_CHECKING:
    from lmdeploy_slo.engine.cpu_standin.batch import Pace

WAIT_S = 60.0


def flags(model: Path, **more: Any) -> dict[str, Any]:
    return {
        "engine.model": str(model),
        "engine.device": "cpu",
        "engine.max_batch_size": 2,
        "scheduler.policy": "fcfs",
        "server.port": 0,
        **more,
    }


async def test_an_engine_that_says_it_is_gone_is_built_anew(tiny_model: Path) -> None:
    async with (
        serving(load(environ={}, flags=flags(tiny_model))) as server,
        AsyncClient(server.address, retry=NO_RETRY) as client,
    ):
        engine = server.runtime.engine
        assert isinstance(engine, SupervisedEngine)
        first: Any = engine.inner
        before = await client.generate("Hello", max_new_tokens=5, temperature=0.0)

        first._fail_all("the driver is gone")
        back = asyncio.Event()
        changed = engine.on_change
        assert changed is not None

        def on_change(state: EngineState, reason: str) -> None:
            changed(state, reason)
            if state is EngineState.UP:
                back.set()

        engine.on_change = on_change
        await asyncio.wait_for(back.wait(), WAIT_S)

        assert engine.inner is not first
        assert server.runtime.serving
        after = await client.generate("Hello", max_new_tokens=5, temperature=0.0)
        assert after.token_ids == before.token_ids
        assert not engine.left_behind


async def test_a_stalled_engine_is_replaced_under_its_requests(tiny_model: Path, pace: Pace) -> None:
    async with (
        serving(load(environ={}, flags=flags(tiny_model, **{"engine.stall_timeout_s": 1.0}))) as server,
        AsyncClient(server.address, retry=NO_RETRY) as client,
    ):
        began = asyncio.Event()

        async def stream() -> None:
            async for _ in client.stream("Hello", max_new_tokens=3000, ignore_eos=True):
                began.set()

        pace.min_step_s = 0.01
        streaming = asyncio.ensure_future(stream())
        await asyncio.wait_for(began.wait(), WAIT_S)
        pace.hold()
        untouched = asyncio.ensure_future(client.generate("Hi", max_new_tokens=3))
        with pytest.raises(EngineUnavailable):
            await asyncio.wait_for(streaming, WAIT_S)
        pace.release()
        pace.min_step_s = 0.0
        answer = await asyncio.wait_for(untouched, WAIT_S)
        assert answer.completion.usage.output_tokens >= 1
        assert server.runtime.load().engine_restarts == 1
        assert server.runtime.load().retried == 1
