"""Measures the points of a grid until each is known well enough, or the budget is spent.

The first pass visits every point once, cheap ones first; what a visit will take is foretold by the model fitted to what
was measured by then, and a visit that would not fit into what is left of the budget is left out. Then the points whose
confidence interval is not yet tight are visited again. After each visit the state is saved, so that a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.offline.profiler.bench import Bench, visit_s
from lmdeploy_slo.offline.profiler.grid import SHOTS, GridLimits, Point, design
from lmdeploy_slo.offline.profiler.precision import repeats_missing
from lmdeploy_slo.offline.profiler.state import ProfilerState
from lmdeploy_slo.offline.profiler.target import Target, TargetInfo
from lmdeploy_slo.prediction.least_squares import fit_models
from lmdeploy_slo.prediction.observations import Kind

logger = logging.getLogger(__name__)

LONGEST_SESSION = 8192
"""Tokens of a sequence that are measured where neither the engine nor the user sets a bound."""

_NOTHING_KNOWN = StepModel(0.0, 0.0, 0.0, 0.0, 0.0)
_SPOILED_ENOUGH = 3 * SHOTS
_UNKNOWN_VISIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Effort:
    """budget_s: time for everything, of all runs together. precision: the half-width of the 95 % confidence interval
    of each point that is tight enough, as a share of it."""

    budget_s: float = 900.0
    precision: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.budget_s < math.inf or not 0 < self.precision < 1:
            raise ValueError(f"an effort out of range: {self}")


@dataclass(frozen=True, slots=True)
class Progress:
    """now: the point that is measured. settled: of `points`, those known well enough, or given up.
    remaining_s: about what is left to do, no more than the budget."""

    now: str
    settled: int
    points: int
    elapsed_s: float
    remaining_s: float


OnProgress = Callable[[Progress], None]


def limits_of(
    info: TargetInfo, *, max_batch_size: int | None = None, max_session_tokens: int | None = None
) -> GridLimits:
    """The engine's own limits; those given lower them."""
    session = min(info.max_session_tokens or math.inf, max_session_tokens or math.inf)
    return GridLimits(
        max_batch_size=min(info.limits.max_batch_size, max_batch_size or info.limits.max_batch_size),
        max_prefill_tokens=info.limits.max_prefill_tokens,
        max_session_tokens=LONGEST_SESSION if session == math.inf else int(session),
        kv_tokens=info.limits.kv_tokens,
    )


class Profiler:
    """One measurement; `state` is filled in place."""

    def __init__(
        self,
        target: Target,
        state: ProfilerState,
        clock: Clock,
        effort: Effort | None = None,
        *,
        seed: int = 0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        on_progress: OnProgress = lambda progress: None,
    ) -> None:
        self.points: Sequence[Point] = design(state.limits)
        self._state = state
        self._clock = clock
        self._effort = effort or Effort()
        # Another run must not send the prompts of this one again, which a prefix cache may still hold.
        self._bench = Bench(target, state.limits, clock, seed=seed + len(state.observations), sleep=sleep)
        self._on_progress = on_progress

    async def run(self, stop: asyncio.Event | None = None) -> bool:
        """Whether it came to its end; False where `stop` was set, or the task cancelled, before: what was measured
        until then is in the state. Raises SloError where the target fails."""
        work = asyncio.ensure_future(self._measure_all())
        stopped = asyncio.ensure_future((stop or asyncio.Event()).wait())
        try:
            await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
                return True
            return False
        finally:
            for task in (work, stopped):
                task.cancel()
            await asyncio.gather(work, stopped, return_exceptions=True)

    @property
    def model(self) -> StepModel:
        """What is known so far; all zeros where nothing is."""
        own = self._fitted_points
        known = [o for o in self._state.observations if o.point in own]
        return fit_models(known).step if known else _NOTHING_KNOWN

    # -- inside -----------------------------------------------------------------

    @property
    def _fitted_points(self) -> set[str]:
        return {point.name for point in self.points if not point.held_out}

    @property
    def _left_s(self) -> float:
        return self._effort.budget_s - self._state.elapsed_s

    async def _measure_all(self) -> None:
        if not self._unsettled(self.model) or self._left_s <= 0:
            return
        await self._warm_up()
        while self._left_s > 0:
            model = self.model
            round_of = self._unsettled(model)
            visited = False
            for point in round_of:
                model = self.model
                expected_s = visit_s(point, SHOTS, model, self._state.limits) or _UNKNOWN_VISIT_S
                if expected_s > self._left_s:
                    continue
                self._tell(point, model)
                await self._visit(point, model)
                visited = True
            if not visited:
                break
        for point in self._unsettled(self.model):
            if point.name not in self._state.of_points():
                self._state.given_up[point.name] = "the budget did not suffice"
        self._state.save()

    async def _warm_up(self) -> None:
        """The largest of each kind that is quick enough, once: what an engine does for the first time takes longer."""
        began_s = self._clock.now_s()
        for kind in Kind:
            own = [p for p in self.points if p.kind is kind]
            if own:
                await self._bench.measure(own[len(own) // 2], 1, self.model)
        self._state.elapsed_s += self._clock.now_s() - began_s

    async def _visit(self, point: Point, model: StepModel) -> None:
        state, began_s = self._state, self._clock.now_s()
        try:
            shots = await self._bench.measure(point, SHOTS, model)
        finally:
            state.elapsed_s += self._clock.now_s() - began_s
        state.observations += shots.observations
        if shots.spoiled:
            state.spoiled[point.name] = state.spoiled.get(point.name, 0) + shots.spoiled
            known = sum(o.point == point.name for o in state.observations)
            if state.spoiled[point.name] >= _SPOILED_ENOUGH and state.spoiled[point.name] > known:
                state.given_up[point.name] = f"{shots.why} in {state.spoiled[point.name]} shots"
                logger.warning("%s: given up, %s", point.name, state.given_up[point.name])
        state.save()

    def _unsettled(self, model: StepModel) -> list[Point]:
        """What is to be visited, in order; held-out points once."""
        known = self._state.of_points()
        found = []
        for point in self.points:
            repeats = known.get(point.name, [])
            wanted = math.inf if point.held_out else self._effort.precision
            if point.name not in self._state.given_up and repeats_missing(repeats, model, wanted):
                found.append(point)
        return found

    def _tell(self, point: Point, model: StepModel) -> None:
        known, remaining_s, unsettled = self._state.of_points(), 0.0, self._unsettled(model)
        for other in unsettled:
            missing = repeats_missing(known.get(other.name, []), model, self._effort.precision)
            visits = 1 if other.held_out else math.ceil(missing / SHOTS)
            remaining_s += visits * (visit_s(other, SHOTS, model, self._state.limits) or _UNKNOWN_VISIT_S)
        self._on_progress(
            Progress(
                now=point.name,
                settled=len(self.points) - len(unsettled),
                points=len(self.points),
                elapsed_s=self._state.elapsed_s,
                remaining_s=min(remaining_s, max(0.0, self._left_s)),
            )
        )
