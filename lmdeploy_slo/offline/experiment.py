"""One simulated run from its description: the same description gives the same records, in whichever process it is run.

`simulate`, `compare` and `capacity` describe runs; this module makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.metrics import RequestRecord, summarize
from lmdeploy_slo.core.plan import DEFAULT_PATIENCE
from lmdeploy_slo.core.slo import Slo
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.offline.simulation.drift import Drift
from lmdeploy_slo.offline.simulation.requests import simulated_requests
from lmdeploy_slo.offline.simulator import PLAN_EVALUATIONS, PLAN_LATENCY_S, EngineKind, Simulator
from lmdeploy_slo.offline.traces import TraceRow
from lmdeploy_slo.offline.workload import OfferedRequest, build_workload
from lmdeploy_slo.prediction.calibration import CalibrationStatistics
from lmdeploy_slo.prediction.length_predictors import make_length_predictor
from lmdeploy_slo.scheduling.placement import DEFAULT_PLACEMENT
from lmdeploy_slo.scheduling.policy import Policy, PolicyFactory, SearchBudget, make_policy


@dataclass(frozen=True, slots=True)
class Load:
    """What is offered, but for the trace and the seed; see `workload.build_workload`."""

    slos: Mapping[str, Slo] = field(default_factory=dict)
    speedup: float = 1.0
    limit: int | None = None
    length_noise: float | None = None
    length_bias: float = 1.0


@dataclass(frozen=True, slots=True)
class Fleet:
    """What serves it: `instances` engines.

    model: the engines' true coefficients; planner_model: what the planner believes; mixed: kinds of engines that the
    instances take in turn, instead of these. placement: which of them serves a request, by name. plan_evaluations: the
    planning budget, >= 1; patience: as for `make_policy`; plan_latency_s: the time charged for a plan, >= 0. calibrate,
    drift: see `Simulator`. length_predictor: by name.
    """

    model: StepModel
    planner_model: StepModel
    limits: EngineLimits = field(default_factory=EngineLimits)
    instances: int = 1
    prefix_cache_tokens: int | None = None
    plan_evaluations: int = PLAN_EVALUATIONS
    patience: float = DEFAULT_PATIENCE
    plan_latency_s: float = PLAN_LATENCY_S
    calibrate: bool = False
    drift: Drift | None = None
    length_predictor: str = "learned"
    mixed: tuple[EngineKind, ...] = ()
    placement: str = DEFAULT_PLACEMENT


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run. run: as in a result file, of several instances with what each did; the rest is for people.

    calibrations: of each instance, where forecasts were watched. recoveries: beside them, the requests that finished
    after the drift until forecasts were right to 5 % and stayed so; None where they never were, or nothing drifted.
    prefix_error_tokens: mean |expected - cached tokens| of the last hundred requests or so; None where nothing was
    expected.
    """

    run: dict[str, Any]
    records: list[RequestRecord]
    plans: int
    evaluations: int
    evictions: int
    prefix_hit_ratio: float | None  # cached / all prompt tokens; None without a prefix cache
    calibrations: tuple[CalibrationStatistics, ...] = ()
    recoveries: tuple[int | None, ...] = ()
    prefix_error_tokens: float | None = None
    moves: int = 0  # of waiting requests from one instance to another


def offered_requests(rows: Sequence[TraceRow], load: Load, seed: int) -> list[OfferedRequest]:
    """The requests of a run, in order of arrival; raises ConfigError for what `build_workload` refuses."""
    return build_workload(
        rows,
        slos=load.slos,
        speedup=load.speedup,
        limit=load.limit,
        length_noise=load.length_noise,
        length_bias=load.length_bias,
        seed=seed,
    )


def run_once(
    rows: Sequence[TraceRow],
    load: Load,
    fleet: Fleet,
    policy: str | PolicyFactory,
    seed: int,
    on_progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Simulates one run. The seed is that of the length hints and, with the instance's number added, of each policy.

    policy: the name of one, or what makes one that has options of its own.
    Raises ConfigError for an unknown policy and for what `build_workload` refuses.
    """

    def policy_of(instance: int) -> Policy:
        budget = SearchBudget(time_s=None, evaluations=fleet.plan_evaluations)
        if isinstance(policy, str):
            return make_policy(policy, seed=seed + instance, budget=budget, patience=fleet.patience)
        return policy(seed + instance, budget)

    simulator = Simulator(
        policy_of,
        model=fleet.model,
        limits=fleet.limits,
        planner_model=fleet.planner_model,
        plan_latency_s=fleet.plan_latency_s,
        instances=fleet.instances,
        prefix_cache_tokens=fleet.prefix_cache_tokens,
        calibrate=fleet.calibrate,
        drift=fleet.drift,
        lengths=make_length_predictor(fleet.length_predictor),
        mixed=fleet.mixed,
        placement=fleet.placement,
    )
    records = simulator.run(simulated_requests(offered_requests(rows, load, seed)), on_progress)
    run = summarize(records, policy=simulator.instances[0].policy.name, speedup=load.speedup, seed=seed)
    if fleet.instances > 1:
        run |= {"placement": fleet.placement, "by_instance": simulator.by_instance()}
    return Outcome(
        run,
        records,
        simulator.plans,
        simulator.evaluations,
        simulator.evictions,
        simulator.prefix_hit_ratio,
        tuple(i.calibration.statistics() for i in simulator.instances if i.calibration is not None),
        tuple(
            None if i.recovery is None else i.recovery.requests
            for i in simulator.instances
            if i.calibration is not None
        ),
        simulator.prefix_error_tokens,
        simulator.moves,
    )
