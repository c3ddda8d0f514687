"""One engine in virtual time, with the scheduler and the policy in front of it.

    arrive -> (ask for a plan -> snapshot -> policy -> apply -> submit) -> steps -> records

Planning. As in the runtime, whatever can change a plan asks for one: an arrival, an end, for a policy that wants
ticks each step, and the time a plan named itself. What the end of a step asks for is answered at once. What is asked
for while a step runs is merged into one plan, made `plan_latency_s` before the step ends: what it sends joins the
next step, as it does in the runtime, where each is answered at once. An ask later than that, or while no step runs,
is answered at once as well. A plan is applied `plan_latency_s` after its snapshot, whatever it really took; what is
asked for in between waits for it. A policy that does not want ticks is not asked while no slot is free: it could send
nothing.

Steps. A stretch of pure decode in which nothing can happen is one event, and cut where something comes in between. Its
instants are those of the closed form counted from the first step of the stretch, also where each step is taken by
itself: jumping changes no result, not by the last bit.

Calibration. What the runtime tells it of real tokens it is told here of simulated ones, step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.metrics import RequestRecord
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.core.slo import Timing
from lmdeploy_slo.engine.batch import PersistentBatch, Sequence
from lmdeploy_slo.offline.simulation.drift import Drift, Recovery
from lmdeploy_slo.offline.simulation.forecasts import Forecasts
from lmdeploy_slo.offline.simulation.prefix_cache import PrefixCache
from lmdeploy_slo.offline.simulation.requests import SimulatedRequest
from lmdeploy_slo.prediction.calibration import Calibration
from lmdeploy_slo.scheduling.policy import Policy
from lmdeploy_slo.scheduling.scheduler import Scheduler

NEVER_S = float("inf")

IDLE_REPLAN_S = 0.05
"""A plan that sends nothing into an idle engine, and names no time to ask again, is asked again after this long."""

_ROUNDING_S = 1e-9
"""Instants this close are the same one, rounded differently."""


@dataclass(slots=True, eq=False)
class Flight:
    """A request that has not ended."""

    request: SimulatedRequest
    handle: int
    timing: Timing
    predicted_output_tokens: float
    sequence: Sequence | None = None  # None while it waits


class Instance:
    """See the module. `records` takes one entry per request when it ends.

    on_plan: called with each plan, once it has been applied, and the instant.
    calibrate: refines the scheduler's model by what the steps took. drift: a change of the engine in mid-run; then the
    error of forecasts is watched also where nothing refines them.
    jump: False takes every step by itself, with equal results.
    """

    def __init__(
        self,
        policy: Policy,
        scheduler: Scheduler,
        batch: PersistentBatch,
        records: list[RequestRecord],
        *,
        plan_latency_s: float,
        prefix_cache: PrefixCache | None = None,
        calibrate: bool = False,
        drift: Drift | None = None,
        forecasts: Forecasts | None = None,
        jump: bool = True,
        on_plan: Callable[[Plan, float], None] | None = None,
    ) -> None:
        self.policy = policy
        self.scheduler = scheduler
        self.batch = batch
        self.prefix_cache = prefix_cache
        self.plans = 0
        self.evaluations = 0
        self.ended = self.with_slo = self.met = 0  # requests
        self.next_event_s = NEVER_S
        self._records = records
        self._on_plan = on_plan
        self._plan_latency_s = plan_latency_s
        self._jump = jump
        self._wants_ticks = policy.wants_ticks
        self._flights: dict[int, Flight] = {}  # by handle
        self._waiting = 0
        self.calibration: Calibration | None = None
        if calibrate or (drift is not None and not drift.told):
            self.calibration = Calibration(
                scheduler.model,
                batch.limits,
                progress=self._tokens_of,
                on_model=self._believe,
                learning=calibrate,
                quiet=True,
            )
        self.recovery: Recovery | None = None  # from the drift on
        self._forecasts = forecasts
        self._drift = drift
        self._drift_at_s = NEVER_S if drift is None else drift.at_s
        # planning
        self._plan_at_s = NEVER_S  # when the next snapshot is taken
        self._plan: Plan | None = None  # made, not applied
        self._plan_ready_s = NEVER_S
        self._at_once = False  # whether that plan must not wait for the end of the step
        self._asked_meanwhile = False  # while a plan was being made
        self._replan_at_s = NEVER_S
        # steps
        self._step_ends_s = NEVER_S
        self._stretch = 0  # steps that end then, all of them quiet; 0: one that the batch was told to begin
        self._anchor_s = 0.0  # the closed form counts from here ...
        self._anchor_batch = -1  # ... with so many sequences (-1: there is none) ...
        self._anchor_context = 0  # ... and so many tokens in the cache,
        self._anchor_steps = 0  # so many steps ago
        # what the scheduler was told
        self._told_steps = 0
        self._recomputing: set[int] = set()  # evicted: have emitted tokens, and emit none for now
        self._evictions = 0

    # -- what the simulator calls ---------------------------------------------

    @property
    def waiting(self) -> int:
        return self._waiting

    def advance(self, now_s: float) -> None:
        """Everything that is due by `now_s`, which is no later than the next event. `settle` comes after."""
        if self._stretch and min(self._step_ends_s, self._plan_ready_s, self._drift_at_s) <= now_s:
            self._cut_stretch(now_s)
        if self._step_ends_s <= now_s:
            self._end_step(now_s)
        if self._drift_at_s <= now_s:
            self._change_engine()
        if self._plan_ready_s <= now_s:
            self._apply_plan(now_s)
        if self._replan_at_s <= now_s:
            self._replan_at_s = NEVER_S
            self._ask(now_s)

    def arrive(self, request: SimulatedRequest, now_s: float) -> None:
        """Takes a request at its arrival; `advance` was called for the same instant."""
        scheduler, spec = self.scheduler, request.spec
        if self._stretch and (self.calibration or self._forecasts):  # what it has shown by now is known by now
            self._cut_stretch(now_s)
        timing = Timing(spec.arrival_at_s)
        forecast = scheduler.forecast(spec)
        kv_tokens = self.batch.limits.kv_tokens
        if kv_tokens is not None and spec.prompt_tokens > kv_tokens:
            self._record(request, timing, now_s, EndStatus.FAILED, None)  # as a server does: it could never run
            return
        if self._forecasts is not None:
            self._tell_progress()
            self._forecasts.arrived(spec, scheduler, now_s)
        handle = scheduler.add(spec)
        self.take_in(Flight(request, handle, timing, forecast.tokens), now_s)

    def take_out(self, handle: int) -> Flight:
        """Gives up a waiting request that has left the scheduler."""
        self._waiting -= 1
        return self._flights.pop(handle)

    def take_in(self, flight: Flight, now_s: float) -> None:
        """Takes a request that waits in the scheduler; `advance` was called for the same instant."""
        self._flights[flight.handle] = flight
        self._waiting += 1
        self._ask(now_s)

    def settle(self, now_s: float) -> None:
        """Begins what can begin at `now_s`: a plan, a step. Sets `next_event_s`."""
        if self._step_ends_s == NEVER_S:
            if self._plan_at_s <= now_s and not self._plan_latency_s:
                self._make_plan(now_s)
                self._apply_plan(now_s)
            self._begin_step(now_s, jump=self._jump)
        if self._plan_at_s <= now_s:
            self._prepare_plan(now_s)
        self.next_event_s = min(
            self._step_ends_s, self._plan_at_s, self._plan_ready_s, self._replan_at_s, self._drift_at_s
        )

    # -- planning -------------------------------------------------------------

    def _ask(self, now_s: float, *, at_once: bool = False) -> None:
        if not self._waiting or (not self._wants_ticks and not self.scheduler.free_slots):
            return
        self._at_once |= at_once
        if self._plan is not None:
            self._asked_meanwhile = True
        elif self._plan_at_s == NEVER_S or at_once:
            self._plan_at_s = now_s

    def _prepare_plan(self, now_s: float) -> None:
        """Makes the plan that was asked for, or puts it off to where it sees more and still joins the same step."""
        if self._stretch:
            self._cut_stretch(now_s)
            if self._step_ends_s == NEVER_S:
                self._begin_step(now_s, jump=False)
        latest_s = self._step_ends_s - self._plan_latency_s
        if now_s < latest_s - _ROUNDING_S and latest_s < NEVER_S and not self._at_once:
            self._plan_at_s = latest_s
            return
        self._make_plan(now_s)
        if abs(self._plan_ready_s - self._step_ends_s) < _ROUNDING_S:
            self._plan_ready_s = self._step_ends_s

    def _make_plan(self, now_s: float) -> None:
        self._plan_at_s = self._replan_at_s = NEVER_S
        self._at_once = False
        self._tell_progress()
        self._plan = self.policy.plan(self.scheduler.snapshot(now_s))
        self._plan_ready_s = now_s + self._plan_latency_s
        self.plans += 1
        self.evaluations += self._plan.quality.evaluations

    def _apply_plan(self, now_s: float) -> None:
        plan, self._plan, self._plan_ready_s = self._plan, None, NEVER_S
        assert plan is not None
        for dispatch in self.scheduler.apply(plan, now_s):
            flight = self._flights[dispatch.handle]
            flight.timing.dispatched_at_s = now_s
            flight.sequence = self._sequence(flight.request, dispatch.handle)
            self.batch.submit(flight.sequence)
            if self.calibration is not None:
                cached_tokens = self.scheduler.cached_tokens(dispatch.handle)
                self.calibration.sent(dispatch.handle, flight.sequence.prompt_tokens, cached_tokens, now_s)
            self._waiting -= 1
        if plan.replan_after_s is not None:
            self._replan_at_s = now_s + max(0.0, plan.replan_after_s)
        elif not len(self.batch):
            self._replan_at_s = now_s + IDLE_REPLAN_S
        if not self._waiting:
            self._replan_at_s = NEVER_S
        if self._on_plan is not None:
            self._on_plan(plan, now_s)
        if self._asked_meanwhile:
            self._asked_meanwhile = False
            self._ask(now_s)  # at once where one of those who asked wanted it so

    def _sequence(self, request: SimulatedRequest, handle: int) -> Sequence:
        """For the engine, in which those that wait for memory go in the order they were sent."""
        cached_tokens = request.cached_tokens
        if self.prefix_cache is not None:
            cached_tokens = self.prefix_cache.match(request.prefix_blocks, request.spec.prompt_tokens)
        return Sequence(handle, request.spec.prompt_tokens, request.output_tokens, cached_tokens)

    def _tell_progress(self) -> None:
        """Brings the scheduler's counts of generated tokens up to date."""
        steps = self.batch.decode_steps - self._told_steps
        if steps:
            self._told_steps += steps
            self.scheduler.on_steps(steps)
            for handle in self._recomputing:
                self.scheduler.on_tokens(handle, -steps, 0.0)

    # -- steps ----------------------------------------------------------------

    def _begin_step(self, now_s: float, *, jump: bool) -> None:
        batch = self.batch
        if jump and not (self._wants_ticks and self._waiting):
            quiet = batch.quiet_steps()
            if quiet > 1:
                self._set_anchor(now_s)
                self._stretch = quiet
                self._step_ends_s = self._instant(quiet)
                return
        duration_s = batch.begin_step()
        if batch.evictions != self._evictions:
            self._note_evictions()
        if duration_s is None:
            self._anchor_batch = -1
        elif batch.prefills_now:
            self._anchor_batch = -1
            self._step_ends_s = now_s + duration_s
        else:
            self._set_anchor(now_s)
            self._step_ends_s = self._instant(1)

    def _set_anchor(self, now_s: float) -> None:
        """Counts on from the anchor there is, where the steps since then were all of them pure decode of the same."""
        batch = self.batch
        sequences, context = batch.decoding, batch.decode_context
        if sequences == self._anchor_batch and context == self._anchor_context + self._anchor_steps * sequences:
            return
        self._anchor_s, self._anchor_batch, self._anchor_context, self._anchor_steps = now_s, sequences, context, 0

    def _instant(self, steps: int) -> float:
        """When the `steps`-th pure decode step from now ends."""
        return self._anchor_s + self.batch.model.decode_stretch_s(
            self._anchor_steps + steps, self._anchor_batch, self._anchor_context
        )

    def _cut_stretch(self, now_s: float) -> None:
        """Takes the steps of the stretch that have ended by `now_s`, and begins the one in which `now_s` lies.

        None is running afterwards where one ends at `now_s`.
        """
        stretch, self._stretch = self._stretch, 0
        done = stretch if self._step_ends_s <= now_s else self._steps_by(now_s, stretch)
        if self.calibration is None:
            self.batch.skip_steps(done)
            self._anchor_steps += done
        else:
            for _ in range(done):
                self.batch.skip_steps(1)
                self._anchor_steps += 1
                self.calibration.step(self._instant(0), self.batch.decoding)
        self._step_ends_s = NEVER_S
        if self._instant(0) < now_s:
            self.batch.begin_step()
            self._step_ends_s = self._instant(1)

    def _steps_by(self, now_s: float, most: int) -> int:
        """How many of the coming `most` steps end by `now_s`: bisection, so that it agrees with `_instant`."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if self._instant(middle) <= now_s:
                low = middle
            else:
                high = middle - 1
        return low

    def _end_step(self, now_s: float) -> None:
        self._step_ends_s = NEVER_S
        batch, scheduler = self.batch, self.scheduler
        pure = not batch.prefills_now
        decoded = batch.decoding
        changed = batch.end_step(every_token=False)
        if pure:
            self._anchor_steps += 1
        recomputed = 0
        if changed:
            self._tell_progress()
            for sequence, last in changed:
                handle: int = sequence.key  # type: ignore[assignment]
                flight = self._flights[handle]
                if flight.timing.first_token_at_s is None:
                    flight.timing.first_token_at_s = now_s
                    if self.calibration is not None:
                        self.calibration.first_token(handle, 1, sequence.cached_tokens)
                    if self.prefix_cache is not None:
                        scheduler.on_cached(handle, sequence.cached_tokens, now_s)
                        self.prefix_cache.insert(flight.request.prefix_blocks)
                if last:
                    self._finish(flight, now_s)
                else:
                    scheduler.on_tokens(handle, 1, now_s)
                recomputed += handle in self._recomputing
                self._recomputing.discard(handle)
        if self.calibration is not None:
            self.calibration.step(now_s, decoded + recomputed)
        if self._wants_ticks:
            self._ask(now_s, at_once=True)

    def _note_evictions(self) -> None:
        self._evictions = self.batch.evictions
        self._tell_progress()
        self._recomputing = {
            handle
            for handle, flight in self._flights.items()
            if flight.sequence is not None and flight.sequence.emitted and flight.sequence.joined_at < 0
        }

    # -- a changing engine ----------------------------------------------------

    def _tokens_of(self, handle: int) -> int:
        sequence = self._flights[handle].sequence
        assert sequence is not None
        return self.batch.emitted_of(sequence)

    def _believe(self, model: StepModel) -> None:
        self.scheduler.model = model

    def _change_engine(self) -> None:
        """From the next step on; the one that runs was begun as it was."""
        drift, self._drift, self._drift_at_s = self._drift, None, NEVER_S
        assert drift is not None
        self.batch.model = drift.of(self.batch.model)
        self._anchor_batch = -1
        self.recovery = Recovery()
        if drift.told:
            self.scheduler.model = drift.of(self.scheduler.model)

    # -- ends -----------------------------------------------------------------

    def _finish(self, flight: Flight, now_s: float) -> None:
        sequence = flight.sequence
        assert sequence is not None
        flight.timing.output_tokens = sequence.output_tokens
        del self._flights[flight.handle]
        self.scheduler.finish(flight.handle, sequence.output_tokens, now_s)
        if self.calibration is not None:
            self.calibration.left(flight.handle, sequence.output_tokens, finished=True)
            if self.recovery is not None:
                self.recovery.finished(self.calibration.statistics())
        self._record(flight.request, flight.timing, now_s, EndStatus.FINISHED, flight.predicted_output_tokens)
        if self._forecasts is not None:
            self._forecasts.finished(flight.request.spec, flight.timing, now_s)
        self._ask(now_s, at_once=True)

    def _record(
        self, request: SimulatedRequest, timing: Timing, now_s: float, status: EndStatus, predicted: float | None
    ) -> None:
        timing.ended_at_s = now_s
        spec = request.spec
        record = RequestRecord(spec.request_id, spec.task_type, spec.prompt_tokens, spec.slo, timing, status, predicted)
        self._records.append(record)
        met = record.slo_met
        self.ended += 1
        self.with_slo += met is not None
        self.met += met is True
