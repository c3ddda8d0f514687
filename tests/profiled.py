"""Engines whose coefficients are hidden from the profiler, measured in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.offline.profiler.engine_target import EngineTarget, engine_target
from lmdeploy_slo.offline.profiler.profiler import Effort, Profiler, Progress, limits_of
from lmdeploy_slo.offline.profiler.state import ProfilerState, identity_of
from lmdeploy_slo.testing.virtual_time import run_virtual

ENDLESS = Effort(budget_s=1e6)
SMALL = EngineLimits(max_batch_size=8, max_prefill_tokens=512, kv_tokens=20_000)


@dataclass(slots=True)
class Run:
    """One run of a profiler: how it ended, and what it leaves."""

    finished: bool
    profiler: Profiler
    state: ProfilerState
    clock: VirtualClock


class Disturbed(StepModel):
    """Passes with noise, of which some take several times as long."""

    def step_s(self, *amounts: float) -> float:  # type: ignore[override]
        draws = _DRAWS[0]
        late = 4.0 if draws.random() < 0.004 else 1.0
        return late * float(draws.lognormal(0, 0.03)) * StepModel.step_s(self, *amounts)


_DRAWS = [np.random.default_rng(0)]


def disturbed(model: StepModel, seed: int = 0) -> StepModel:
    _DRAWS[0] = np.random.default_rng(seed)
    return Disturbed(*astuple(model))


def profiled(
    model: StepModel,
    limits: EngineLimits = SMALL,
    *,
    session: int | None = 1024,
    effort: Effort = ENDLESS,
    state: ProfilerState | None = None,
    wrap: Callable[[EngineTarget], Any] = lambda target: target,
    on_progress: Callable[[Progress, asyncio.Event], None] = lambda progress, stop: None,
) -> Run:
    """A profiler's run in virtual time, on an emulated engine with these coefficients."""

    async def main(clock: VirtualClock) -> Run:
        engine = EmulatedEngine(model, limits, clock, max_session_tokens=session)
        stop = asyncio.Event()
        async with engine_target(engine, clock) as target:
            own = state or ProfilerState(identity_of(target.info), limits_of(target.info))
            profiler = Profiler(wrap(target), own, clock, effort, on_progress=lambda p: on_progress(p, stop))
            finished = await profiler.run(stop)
            assert (await target.in_flight()) == (0, 0)
            return Run(finished, profiler, own, clock)

    return run_virtual(main)


def far_corner_errors(found: StepModel, truth: StepModel, run: Run) -> np.ndarray:
    """By term: how far what it adds to a pass with the most of everything is off, as a share of that pass."""
    limits = run.state.limits
    tokens, batch = limits.max_prefill_tokens, limits.max_batch_size
    amounts = np.array([1, tokens, tokens**2, batch, batch * limits.longest_context(batch)])
    true_terms, found_terms = np.array(astuple(truth)) * amounts, np.array(astuple(found)) * amounts
    return np.abs(found_terms - true_terms) / true_terms.sum()
