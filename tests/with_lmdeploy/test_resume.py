"""A request whose LMDeploy is gone in mid-output goes on in another one: the whole is what one would have given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import EngineRequest, Sampling, Stopping
from lmdeploy_slo.engine.lmdeploy import Device, LmdeployEngine, LmdeployOptions
from lmdeploy_slo.engine.supervised import SupervisedEngine, Supervision
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.runtime.live import RuntimeOptions
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.runtime.stream import RequestStream
from lmdeploy_slo.scheduling.fleet import Fleet
from lmdeploy_slo.scheduling.placement import make_placement
from lmdeploy_slo.scheduling.rules import RulePolicy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import NO_TIME, make_spec

if TYPE_CHECKING:
    from lmdeploy_slo.engine.cpu_standin.batch import Pace

pytestmark = pytest.mark.asyncio(loop_scope="module")

WAIT_S = 60.0
LIMITS = EngineLimits(max_batch_size=2)
TOKENS = 60


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def runtime(tiny_model: Path) -> AsyncIterator[Runtime]:
    clock, fleet, lengths = MonotonicClock(), Fleet(make_placement("least-loaded")), TaskLengthPredictor()

    def build() -> LmdeployEngine:
        return LmdeployEngine(LmdeployOptions(model=str(tiny_model), device=Device.CPU, limits=LIMITS), clock)

    def parts() -> tuple[SupervisedEngine, Scheduler, RulePolicy]:
        scheduler = Scheduler(limits=LIMITS, model=NO_TIME, lengths=lengths, numbers=fleet.numbers)
        return SupervisedEngine(build, clock, Supervision(backoff_s=0.01)), scheduler, RulePolicy("fcfs")

    runtime = Runtime(*parts(), clock, RuntimeOptions(flush_interval_s=0.0), fleet=fleet)
    runtime.add(*parts())
    await runtime.start()
    yield runtime
    await runtime.close()


def submit(runtime: Runtime, name: str, sampling: Sampling) -> RequestStream:
    ids = runtime.engine.tokenizer.encode("The engine is gone, and")
    spec = make_spec(name, arrival_at_s=runtime.clock.now_s(), prompt_tokens=len(ids), max_new_tokens=TOKENS)
    stopping = Stopping(max_new_tokens=TOKENS, ignore_eos=True, skip_special_tokens=False)
    return runtime.submit(spec, EngineRequest(name, ids, stopping, sampling))


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(temperature=0.8, seed=3)])
async def test_the_stream_goes_on_without_a_gap(runtime: Runtime, pace: Pace, sampling: Sampling) -> None:
    whole = await asyncio.wait_for(submit(runtime, "whole", sampling).result(), WAIT_S)
    assert len(whole.token_ids) == TOKENS

    pace.min_step_s = 0.01
    resumed = runtime.load().resumed
    stream = submit(runtime, "cut", sampling)
    seen: list[int] = []
    text = ""
    while len(seen) < 10:
        delta = await asyncio.wait_for(stream.__anext__(), WAIT_S)
        seen, text = [*seen, *delta.token_ids], text + delta.text
    (holder,) = [replica for replica in runtime.replicas.values() if replica.in_engine]
    assert isinstance(holder.engine, SupervisedEngine)
    holder.engine.inner._fail_all("the driver is gone")  # type: ignore[attr-defined]
    pace.min_step_s = 0.0
    rest = await asyncio.wait_for(stream.result(), WAIT_S)

    assert rest.completion is not None
    assert rest.completion.instance != holder.name
    assert rest.completion.timing.output_tokens == TOKENS
    assert len(seen) + len(rest.token_ids) == TOKENS
    assert runtime.load().resumed == resumed + 1
    if sampling.temperature == 0.0:
        assert [*seen, *rest.token_ids] == list(whole.token_ids)
        assert text + rest.text == whole.text
