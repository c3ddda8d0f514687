"""The gateway's scheduler and the engine's step model on a virtual clock.

The scheduling code is the one `serve` runs; only the clock, the engine's tokens and the planner's worker are
replaced. Deterministic: no wall clock is read, and a plan costs a fixed virtual time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.metrics import RequestRecord
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import EndStatus, RequestSpec
from lmdeploy_slo.core.slo import Timing
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.batch import PersistentBatch
from lmdeploy_slo.engine.batch import Sequence as EngineSequence
from lmdeploy_slo.prediction.length import LengthPredictor, TaskLengthPredictor
from lmdeploy_slo.scheduling.policy import Policy
from lmdeploy_slo.scheduling.scheduler import Scheduler

NEVER_S = float("inf")


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """A request with its true output length, which goes to the engine alone. `spec.arrival_at_s` is when it arrives."""

    spec: RequestSpec
    output_tokens: int
    cached_tokens: int = 0


@dataclass(slots=True)
class _Flight:
    request: SimulatedRequest
    handle: int
    timing: Timing
    predicted_output_tokens: float
    sequence: EngineSequence | None = None


class Simulator:
    """One instance of the engine under one policy.

    model: the engine's true coefficients; planner_model: what the scheduler believes (default: the truth).
    plan_latency_s: virtual seconds from a snapshot to its plan being applied.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        model: StepModel,
        limits: EngineLimits,
        planner_model: StepModel | None = None,
        lengths: LengthPredictor | None = None,
        plan_latency_s: float = 0.002,
    ) -> None:
        self.policy = policy
        self.batch = PersistentBatch(model, limits)
        self.scheduler = Scheduler(
            limits=limits, model=planner_model or model, lengths=lengths or TaskLengthPredictor()
        )
        self.plan_latency_s = plan_latency_s
        self.now_s = 0.0
        self.plans = 0
        self._flights: dict[int, _Flight] = {}  # by handle
        self._waiting = 0
        self._records: list[RequestRecord] = []
        self._step_ends_s = NEVER_S
        self._plan: Plan | None = None
        self._plan_ready_s = NEVER_S
        self._replan_at_s = NEVER_S
        self._dirty = False

    def run(self, requests: Sequence[SimulatedRequest]) -> list[RequestRecord]:
        """Runs all requests to their end and returns their records in order of ending."""
        arrivals = sorted(requests, key=lambda r: r.spec.arrival_at_s)
        next_arrival = 0
        while True:
            arrival_s = arrivals[next_arrival].spec.arrival_at_s if next_arrival < len(arrivals) else NEVER_S
            at_s = min(arrival_s, self._step_ends_s, self._plan_ready_s, self._replan_at_s)
            if at_s == NEVER_S:
                if not self._waiting:
                    return self._records
                raise RuntimeError(f"policy {self.policy.name} leaves {self._waiting} requests waiting for ever")
            self.now_s = at_s
            if self._step_ends_s <= at_s:
                self._end_step()
            if self._plan_ready_s <= at_s:
                self._apply_plan()
            if self._replan_at_s <= at_s:
                self._replan_at_s = NEVER_S
                self._dirty = True
            while next_arrival < len(arrivals) and arrivals[next_arrival].spec.arrival_at_s <= at_s:
                self._arrive(arrivals[next_arrival])
                next_arrival += 1
            if self._dirty and self._plan_ready_s == NEVER_S:
                self._start_plan()
            if self._step_ends_s == NEVER_S:
                self._begin_step()

    def _arrive(self, request: SimulatedRequest) -> None:
        handle = self.scheduler.add(request.spec)
        predicted = self.scheduler.forecast(request.spec).tokens
        self._flights[handle] = _Flight(request, handle, Timing(request.spec.arrival_at_s), predicted)
        self._waiting += 1
        self._dirty = True

    def _start_plan(self) -> None:
        self._dirty = False
        if not self._waiting:
            return
        for flight in self._flights.values():
            if flight.sequence is not None:
                known = flight.timing.output_tokens
                emitted = self.batch.emitted_of(flight.sequence)
                if emitted > known:
                    self.scheduler.on_tokens(flight.handle, emitted - known, flight.timing.first_token_at_s or 0.0)
                    flight.timing.output_tokens = emitted
        self._replan_at_s = NEVER_S
        self._plan = self.policy.plan(self.scheduler.snapshot(self.now_s))
        self.plans += 1
        self._plan_ready_s = self.now_s + self.plan_latency_s

    def _apply_plan(self) -> None:
        plan, self._plan, self._plan_ready_s = self._plan, None, NEVER_S
        assert plan is not None
        for dispatch in self.scheduler.apply(plan, self.now_s):
            flight = self._flights[dispatch.handle]
            flight.timing.dispatched_at_s = self.now_s
            request = flight.request
            flight.sequence = EngineSequence(
                dispatch.handle, request.spec.prompt_tokens, request.output_tokens, request.cached_tokens
            )
            self.batch.submit(flight.sequence)
            self._waiting -= 1
        if plan.replan_after_s is not None and self._waiting:
            self._replan_at_s = self.now_s + plan.replan_after_s

    def _begin_step(self) -> None:
        duration_s = self.batch.begin_step()
        if duration_s is not None:
            self._step_ends_s = self.now_s + duration_s

    def _end_step(self) -> None:
        self._step_ends_s = NEVER_S
        for sequence, last in self.batch.end_step():
            if last or sequence.emitted == 1:
                flight = self._flights[sequence.key]  # type: ignore[index]
                if flight.timing.first_token_at_s is None:
                    flight.timing.first_token_at_s = self.now_s
                if last:
                    self._finish(flight)
        if self._waiting and self.policy.wants_ticks:
            self._dirty = True

    def _finish(self, flight: _Flight) -> None:
        flight.timing.ended_at_s = self.now_s
        flight.timing.output_tokens = flight.request.output_tokens
        del self._flights[flight.handle]
        self.scheduler.finish(flight.handle, flight.request.output_tokens)
        spec = flight.request.spec
        self._records.append(
            RequestRecord(
                spec.request_id,
                spec.task_type,
                spec.prompt_tokens,
                spec.slo,
                flight.timing,
                EndStatus.FINISHED,
                flight.predicted_output_tokens,
            )
        )
        self._dirty = True
