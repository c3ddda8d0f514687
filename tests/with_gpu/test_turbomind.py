"""TurboMind itself, where a CUDA device and LMDeploy with its native module are at hand: `make test-gpu`.

In a process of its own, because the CPU stand-in takes TurboMind's place in the others. The checkpoint is random and
made here, in a shape TurboMind has kernels for, so that nothing is downloaded.
"""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import pytest

from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import Engine, EngineRequest, Stopping
from lmdeploy_slo.engine.lmdeploy import Device, LmdeployEngine, LmdeployOptions
from lmdeploy_slo.testing.engine_contract import EngineContract
from lmdeploy_slo.testing.event_log import EventLog


def _no_turbomind() -> str | None:
    """Why these tests cannot run here."""
    if importlib.util.find_spec("lmdeploy") is None or importlib.util.find_spec("torch") is None:
        return "LMDeploy is not installed here"
    import torch

    return None if torch.cuda.is_available() else "there is no CUDA device here"


pytestmark = pytest.mark.skipif(_no_turbomind() is not None, reason=str(_no_turbomind()))

SLOTS = 4


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 128, as TurboMind's attention kernels want them."""
    from lmdeploy_slo.engine.tiny_model import TinyModelOptions, write_tiny_model

    directory = tmp_path_factory.mktemp("model") / "qwen2"
    write_tiny_model(directory, TinyModelOptions(hidden_size=512, layers=4))
    return directory


def engine_of(model: Path) -> LmdeployEngine:
    limits = EngineLimits(max_batch_size=SLOTS, kv_tokens=64 * 1024)
    return LmdeployEngine(LmdeployOptions(str(model), Device.CUDA, limits), MonotonicClock())


class TestTurboMind(EngineContract):
    @pytest.fixture(autouse=True)
    def _model(self, model: Path) -> None:
        self.model = model

    async def make_engine(self) -> Engine:
        return engine_of(self.model)


async def test_priorities_reorder_what_waits_and_aborts_free_at_once(model: Path) -> None:
    engine, log = engine_of(model), EventLog()
    await engine.start(log.sink)
    runners = [f"r{n}" for n in range(SLOTS)]
    for name in runners:
        engine.submit(EngineRequest(name, [5, 6, 7], Stopping(max_new_tokens=3000, ignore_eos=True)), 0)
    for name in runners:
        await log.tokens(name, 1)
    ranks = [6, 5, 4, 3, 2, 0]
    waiting = [f"w{rank}" for rank in ranks]
    for rank, name in zip(ranks, waiting):
        engine.submit(EngineRequest(name, [5, 6, 7], Stopping(max_new_tokens=2, ignore_eos=True)), rank)
    for _ in range(20):
        await asyncio.sleep(0)
    engine.abort(runners[0])  # one slot: the waiting ones go through it one after the other
    await log.ended(*waiting)
    ends = [event.request_id for _, events in log.calls for event in events if event.end is FinishReason.LENGTH]
    assert ends == ["w0", "w2", "w3", "w4", "w5", "w6"]
    for name in runners[1:]:
        engine.abort(name)
    await engine.close()
    assert log.violations == []
