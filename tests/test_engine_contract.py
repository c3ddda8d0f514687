"""The emulated engine under the contract every engine is held to."""

from __future__ import annotations

import asyncio

import pytest

from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.engine.faults import Faults
from lmdeploy_slo.testing.builders import NO_TIME
from lmdeploy_slo.testing.engine_contract import EngineContract
from lmdeploy_slo.testing.virtual_time import run_virtual


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


class Broken(EngineContract):
    """The suite must not pass an engine that misbehaves."""

    long_output_tokens = 50

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    async def make_engine(self) -> EmulatedEngine:
        return EmulatedEngine(NO_TIME, EngineLimits(max_batch_size=2), MonotonicClock(), faults=self._faults)


async def test_the_suite_finds_a_request_that_ends_twice() -> None:
    with pytest.raises(AssertionError):
        await Broken(Faults(duplicate_ends=1)).test_one_request_ends_once_with_all_its_tokens(2)


async def test_the_suite_finds_a_lost_abort() -> None:
    with pytest.raises(AssertionError):
        await Broken(Faults(lost_aborts=1)).test_abort_right_after_submit()


async def test_the_suite_finds_a_request_that_fails() -> None:
    with pytest.raises(AssertionError):
        await Broken(Faults(fail_after_tokens={"r1": 1})).test_many_at_once_each_get_their_own_tokens()


def test_the_suite_does_not_wait_for_ever_for_a_stalled_engine() -> None:
    class Stalled(Broken):
        async def make_engine(self) -> EmulatedEngine:
            engine = await super().make_engine()
            engine.stall()
            return engine

    with pytest.raises(asyncio.TimeoutError):
        run_virtual(lambda clock: Stalled(Faults()).test_one_request_ends_once_with_all_its_tokens(1))
