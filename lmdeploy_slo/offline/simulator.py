"""The gateway's scheduler and the engine's step model on a virtual clock.

The scheduling code is the one `serve` runs, and the batch is the one the emulated engine runs; only the clock, the
planner's worker and the tokens themselves are replaced. Deterministic: no wall clock is read, and a plan costs a fixed
virtual time. `simulation.instance` says how planning and steps are laid out in time.

Several instances are engines of their own, each with a scheduler, a policy, the in-flight cap and the limits; they may
be of different kinds. They make up a `scheduling.fleet.Fleet`, which says where a request goes when it arrives, and
moves those that wait.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.metrics import RequestRecord
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.batch import PersistentBatch
from lmdeploy_slo.offline.simulation.drift import Drift
from lmdeploy_slo.offline.simulation.forecasts import Forecasts
from lmdeploy_slo.offline.simulation.instance import NEVER_S, Instance
from lmdeploy_slo.offline.simulation.prefix_cache import PrefixCache
from lmdeploy_slo.offline.simulation.requests import SimulatedRequest
from lmdeploy_slo.prediction.length import LengthPredictor, TaskLengthPredictor
from lmdeploy_slo.prediction.prefix import PrefixPredictor
from lmdeploy_slo.scheduling.fleet import Fleet
from lmdeploy_slo.scheduling.placement import DEFAULT_PLACEMENT, Placement, make_placement
from lmdeploy_slo.scheduling.policy import Policy
from lmdeploy_slo.scheduling.scheduler import Scheduler

__all__ = ["PLAN_EVALUATIONS", "PLAN_LATENCY_S", "EngineKind", "SimulatedRequest", "Simulator"]

PLAN_LATENCY_S = 0.002
"""From a snapshot to its plan being applied: the planning budget of `serve`."""

PLAN_EVALUATIONS = 800
"""Plans scored in that time, about: docs/simulator.md says how it was measured."""


@dataclass(frozen=True, slots=True)
class EngineKind:
    """model: an engine's true coefficients; planner_model: what the scheduler believes. kv_tokens: its KV cache, where
    it is not that of the limits. name: for people."""

    model: StepModel
    planner_model: StepModel
    kv_tokens: int | None = None
    name: str = ""


class Simulator:
    """One run; use it once.

    policy: a Policy for one instance, or a function from the number of an instance (from 0) to its policy.
    model: the engine's true coefficients; planner_model: what the scheduler believes (default: the truth).
    limits: of each instance. mixed: kinds of engines that the instances take in turn, instead of `model` and
    `planner_model`. placement: one, or the name of one.
    lengths: the length predictor, shared by all instances (default: the project's own).
    plan_latency_s: virtual seconds from a snapshot to its plan being applied, >= 0.
    prefix_cache_tokens: size of each instance's prefix cache; None for none.
    calibrate: what the scheduler believes is refined by what the steps took and the prefix cache held, as in `serve`.
    drift: how the engines change in mid-run. forecasts: where what requests are told on arrival goes (default: they are
    told nothing, which is quicker).
    jump: False takes every step by itself; slower, with equal results.
    """

    def __init__(
        self,
        policy: Policy | Callable[[int], Policy],
        *,
        model: StepModel,
        limits: EngineLimits,
        planner_model: StepModel | None = None,
        lengths: LengthPredictor | None = None,
        plan_latency_s: float = PLAN_LATENCY_S,
        instances: int = 1,
        prefix_cache_tokens: int | None = None,
        calibrate: bool = False,
        drift: Drift | None = None,
        forecasts: Forecasts | None = None,
        jump: bool = True,
        mixed: Sequence[EngineKind] = (),
        placement: Placement | str = DEFAULT_PLACEMENT,
    ) -> None:
        if instances < 1:
            raise ValueError(f"instances must be at least 1, got {instances}")
        if plan_latency_s < 0:
            raise ValueError(f"plan_latency_s must be 0 or more, got {plan_latency_s}")
        if not callable(policy) and instances > 1:
            raise ValueError("a policy plans for one instance: give a function that makes one for each")
        lengths = lengths or TaskLengthPredictor()
        self._records: list[RequestRecord] = []
        self.fleet = Fleet(make_placement(placement) if isinstance(placement, str) else placement)
        self.moves = 0  # of waiting requests, from one instance to another
        self.instances: list[Instance] = []
        self._kinds = kinds = list(mixed) or [EngineKind(model, planner_model or model)]
        for number in range(instances):
            kind = kinds[number % len(kinds)]
            of_kind = limits if kind.kv_tokens is None else replace(limits, kv_tokens=kind.kv_tokens)
            instance = Instance(
                policy(number) if callable(policy) else policy,
                Scheduler(
                    limits=of_kind,
                    model=kind.planner_model,
                    lengths=lengths,
                    prefixes=PrefixPredictor() if calibrate else None,
                    numbers=self.fleet.numbers,
                ),
                PersistentBatch(kind.model, of_kind),
                self._records,
                plan_latency_s=plan_latency_s,
                prefix_cache=None if prefix_cache_tokens is None else PrefixCache(prefix_cache_tokens),
                calibrate=calibrate,
                drift=drift,
                forecasts=forecasts,
                jump=jump,
                on_plan=partial(self._planned, number),
            )
            self.fleet.add(instance.scheduler, instance.policy)
            self.instances.append(instance)
        self._plan_applied = False  # since the last look at who might move
        self._due: list[tuple[float, int]] = []  # (instant, instance): heap, some entries outdated
        self._arrived_at: list[int] = []  # instances at which somebody arrived now
        self.now_s = -NEVER_S

    def by_instance(self) -> list[dict[str, Any]]:
        """What each instance did, as in a result file."""
        return [
            {
                "profile": self._kinds[number % len(self._kinds)].name,
                "requests": instance.ended,
                "with_slo": instance.with_slo,
                "met": instance.met,
                "slo_attainment": instance.met / instance.with_slo if instance.with_slo else None,
            }
            for number, instance in enumerate(self.instances)
        ]

    @property
    def plans(self) -> int:
        """Plans made so far."""
        return sum(instance.plans for instance in self.instances)

    @property
    def evaluations(self) -> int:
        """Plans scored in making them, as the policies say."""
        return sum(instance.evaluations for instance in self.instances)

    @property
    def evictions(self) -> int:
        """How often a sequence was evicted for want of KV memory."""
        return sum(instance.batch.evictions for instance in self.instances)

    @property
    def prefix_hit_ratio(self) -> float | None:
        """Prompt tokens found in the prefix caches / all prompt tokens sent; None without a cache or a prompt."""
        caches = [instance.prefix_cache for instance in self.instances if instance.prefix_cache is not None]
        looked_up = sum(cache.looked_up_tokens for cache in caches)
        return sum(cache.hit_tokens for cache in caches) / looked_up if looked_up else None

    @property
    def prefix_error_tokens(self) -> float | None:
        """Mean error of the prefix hits that were expected of late; None where none were looked up or expected."""
        known = [instance.scheduler.prefixes for instance in self.instances if instance.prefix_cache is not None]
        errors = [prefixes.mean_error_tokens for prefixes in known if prefixes is not None and prefixes.observed]
        return sum(errors) / len(errors) if errors else None

    def run(
        self, requests: Iterable[SimulatedRequest], on_progress: Callable[[int], None] | None = None
    ) -> list[RequestRecord]:
        """Runs all requests to their end and returns their records in order of ending.

        A list is taken in any order; anything else is read as it is needed, and must be in order of arrival, else
        ValueError. on_progress: called with the number of requests that have arrived, at each.
        """
        if isinstance(requests, Sequence):
            requests = sorted(requests, key=lambda r: r.spec.arrival_at_s)
        for arrived, request in enumerate(requests, 1):
            self._run_until(request.spec.arrival_at_s)
            self._arrive(request)
            if on_progress is not None:
                on_progress(arrived)
        self._run_until(NEVER_S)
        for instance in self.instances:
            if instance.waiting:
                raise RuntimeError(f"policy {instance.policy.name} leaves {instance.waiting} requests waiting for ever")
        return self._records

    def _run_until(self, until_s: float) -> None:
        """Everything before `until_s`; what arrives at one instant is all there before anything begins at it."""
        if until_s > self.now_s:
            if self._arrived_at:
                self._rebalance(self.now_s, self._arrived_at)
            for number in self._arrived_at:
                self._settle(number, self.now_s)
            self._arrived_at.clear()
        elif until_s < self.now_s:
            raise ValueError(f"a request arrives at {until_s}, before {self.now_s}: they must be in order of arrival")
        due = self._due
        while due and due[0][0] < until_s:
            at_s, number = heapq.heappop(due)
            if at_s == self.instances[number].next_event_s:
                self.instances[number].advance(at_s)
                touched = [number]
                if self._plan_applied:
                    self._plan_applied = False
                    self._rebalance(at_s, touched)
                for each in touched:
                    self._settle(each, at_s)
        self.now_s = until_s

    def _arrive(self, request: SimulatedRequest) -> None:
        number = self.fleet.place(request.spec, self.now_s)
        instance = self.instances[number]
        if number not in self._arrived_at:
            instance.advance(self.now_s)
            self._arrived_at.append(number)
        instance.arrive(request, self.now_s)

    def _planned(self, number: int, plan: Plan, now_s: float) -> None:
        self._plan_applied = True
        self.fleet.note_plan(number, plan, now_s)

    def _rebalance(self, now_s: float, advanced: list[int]) -> None:
        """Moves who waits. advanced: instances that have come as far as `now_s`; others join them."""
        if len(self.instances) < 2:
            return
        for move in self.fleet.rebalance(now_s):
            for number in (move.source, move.target):
                if number not in advanced:
                    self.instances[number].advance(now_s)
                    advanced.append(number)
            self.instances[move.target].take_in(self.instances[move.source].take_out(move.handle), now_s)
            self.moves += 1

    def _settle(self, number: int, now_s: float) -> None:
        instance = self.instances[number]
        instance.settle(now_s)
        if instance.next_event_s < NEVER_S:
            heapq.heappush(self._due, (instance.next_event_s, number))
