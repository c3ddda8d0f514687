"""The emulated engine under the contract every engine is held to."""

from __future__ import annotations

from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.testing.builders import NO_TIME
from lmdeploy_slo.testing.engine_contract import EngineContract


class TestWithoutStepTime(EngineContract):
    async def make_engine(self) -> EmulatedEngine:
        return EmulatedEngine(NO_TIME, EngineLimits(max_batch_size=4), MonotonicClock())


class TestWithStepTime(EngineContract):
    async def make_engine(self) -> EmulatedEngine:
        model = StepModel(c0=2e-4, p1=1e-6, p2=0.0, d1=1e-6, d2=0.0)
        return EmulatedEngine(model, EngineLimits(max_batch_size=4, max_prefill_tokens=16), MonotonicClock())


class TestShortOfMemory(EngineContract):
    """Four prompts fit at first, four long outputs do not: sequences are evicted and recomputed all the time."""

    long_output_tokens = 400

    async def make_engine(self) -> EmulatedEngine:
        return EmulatedEngine(NO_TIME, EngineLimits(max_batch_size=4, kv_tokens=450), MonotonicClock())
