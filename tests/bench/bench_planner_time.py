"""How long annealing takes to plan, what a bound on its time costs, and whether more budget ever makes a plan worse.

Snapshots are made up: a stream of requests with the lengths of the generated workload against an engine that is far too
small for it, looked at every 25 ms. Always the same number waits and runs; a free slot is always left, since a full
engine is not planned for. The policy sees one after the other, as it does in `serve`; other budgets are tried on copies
of it, so that all start from the same state.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.snapshot import ROW_DTYPE, EngineLimits, Rows, Snapshot
from lmdeploy_slo.offline.generated import generate_workload
from lmdeploy_slo.prediction.profiles import load_profile
from lmdeploy_slo.scheduling.annealing import AnnealingPolicy
from lmdeploy_slo.scheduling.policy import Policy, SearchBudget, make_policy

RUNNING = 256
SIZES = {1_000: 2.0, 10_000: 10.0}
"""Waiting requests, and the goal for a plan, ms."""

TICK_S = 0.025
ARRIVALS_RPS = 32.0
WARM_UP = 20
TICKS = 200
TRIED_EACH = 5
LONG_S = 0.2
EVALUATIONS = (1, 25, 50, 100, 200, 400, 800, 1600, 3200, 6400)
MOST_LOST = 0.01
"""Of the score of `LONG_S`."""

ROUNDING = 1e-9

LENGTH_SIGMA = 0.3
PACE_S = 0.035


def snapshots(waiting: int, count: int, seed: int = 0) -> Iterator[Snapshot]:
    """`count` snapshots, `TICK_S` apart, each with `waiting` waiting and `RUNNING` running requests."""
    random = np.random.default_rng([waiting, seed])
    rows, truth = _requests(waiting + RUNNING + int(count * (ARRIVALS_RPS * TICK_S + RUNNING)), random)
    model = load_profile("a100-qwen2.5-7b").step_model
    now_s = 1000.0
    rows["arrival_at_s"][: waiting + RUNNING] = now_s - np.arange(waiting + RUNNING, 0, -1) / ARRIVALS_RPS
    queue, running = list(range(RUNNING, waiting + RUNNING)), list(range(RUNNING))
    for row in running:  # they came when it was quiet
        generated = int(random.integers(0, truth[row]))
        first_s = now_s - generated * PACE_S * random.uniform(0.8, 1.1)
        rows["first_token_at_s"][row] = first_s if generated else np.nan
        rows["dispatched_at_s"][row] = first_s - 0.3
        rows["arrival_at_s"][row] = first_s - random.uniform(0.3, 0.9)
        rows["generated_tokens"][row] = generated
    coming = waiting + RUNNING
    limits = EngineLimits(max_batch_size=2 * RUNNING)
    for _ in range(count):
        yield Snapshot(now_s, _frozen(rows[queue]), _frozen(rows[running]), limits, model)
        now_s += TICK_S
        started = rows["generated_tokens"][running] == 0
        rows["first_token_at_s"][np.array(running)[started]] = now_s
        rows["generated_tokens"][running] += 1
        running = [row for row in running if rows["generated_tokens"][row] < truth[row]]
        leaving = min(RUNNING - len(running) + int(random.poisson(ARRIVALS_RPS * TICK_S)), len(queue))
        chosen = set(random.choice(len(queue), leaving, replace=False).tolist())
        joining = [row for place, row in enumerate(queue) if place in chosen][: RUNNING - len(running)]
        rows["dispatched_at_s"][joining] = now_s
        running += joining
        queue = [row for place, row in enumerate(queue) if place not in chosen]
        new = waiting - len(queue)
        rows["arrival_at_s"][coming : coming + new] = now_s - random.uniform(0, TICK_S, new)
        queue += range(coming, coming + new)
        coming += new


def _requests(count: int, random: np.random.Generator) -> tuple[Rows, np.ndarray[Any, Any]]:
    """(rows without instants, true output lengths)."""
    rows = np.zeros(count, dtype=ROW_DTYPE)
    drawn = generate_workload(count, seed=7)
    truth = np.array([row.output_tokens for row in drawn])
    code = np.array([row.task == "code" for row in drawn])
    rows["handle"] = np.arange(1, count + 1)
    rows["tier"] = 1
    rows["prompt_tokens"] = [row.input_tokens for row in drawn]
    rows["output_tokens"] = np.maximum(1.0, np.rint(truth * np.exp(LENGTH_SIGMA * random.standard_normal(count))))
    rows["length_sigma"] = LENGTH_SIGMA
    rows["ttft_s"], rows["tpot_s"], rows["e2e_s"] = (
        np.where(code, np.inf, 1.0), np.where(code, np.inf, 0.05), np.where(code, 2.0, np.inf),
    )  # fmt: skip
    rows["dispatched_at_s"] = rows["first_token_at_s"] = np.nan
    return rows, truth


def _frozen(rows: Rows) -> Rows:
    rows.flags.writeable = False
    return rows


def measure(waiting: int, goal_ms: float, ticks: int = TICKS) -> dict[str, Any]:
    """Everything about snapshots of this size."""
    budget = SearchBudget()
    policy, llf = AnnealingPolicy(budget=budget), make_policy("llf")
    wall_s: list[float] = []
    cpu_s: list[float] = []
    llf_s: list[float] = []
    evaluations: list[int] = []
    default: list[float] = []  # scores
    long: list[float] = []
    by_evaluations: dict[int, list[float]] = {count: [] for count in EVALUATIONS}
    for tick, snapshot in enumerate(snapshots(waiting, WARM_UP + ticks)):
        tried = tick >= WARM_UP and tick % TRIED_EACH == 0
        if tried:
            for count, scores in by_evaluations.items():
                scores.append(_score(policy, budget, SearchBudget(None, count), snapshot))
            long.append(_score(policy, budget, SearchBudget(LONG_S), snapshot))
        plan, one_wall_s, one_cpu_s = _timed(policy, snapshot)
        _, one_llf_s, _ = _timed(llf, snapshot)
        if tried:
            default.append(plan.quality.score)
        if tick >= WARM_UP:
            wall_s.append(one_wall_s)
            cpu_s.append(one_cpu_s)
            llf_s.append(one_llf_s)
            evaluations.append(plan.quality.evaluations)
    shares = [score / most for score, most in zip(default, long, strict=True)]
    return {
        "waiting": waiting,
        "running": RUNNING,
        "plans": ticks,
        "goal_ms": goal_ms,
        "budget_ms": None if budget.time_s is None else 1e3 * budget.time_s,
        "wall_ms": _quantiles_ms(wall_s),
        "cpu_ms": _quantiles_ms(cpu_s),
        "llf_ms": _quantiles_ms(llf_s),
        "times_llf": statistics.median(ours / sort for ours, sort in zip(wall_s, llf_s, strict=True)),
        "evaluations": statistics.median(evaluations),
        "beside_long": {
            "plans": len(shares),
            "mean": statistics.mean(shares),
            "least": min(shares),
            "within_goal": sum(share >= 1 - MOST_LOST for share in shares) / len(shares),
            "requests_lost": statistics.mean(most - score for score, most in zip(default, long, strict=True)),
        },
        "by_evaluations": _by_evaluations(by_evaluations),
    }


def _score(state: AnnealingPolicy, own: SearchBudget, tried: SearchBudget, snapshot: Snapshot) -> float:
    """Of the plan that a copy of the policy makes when it has the budget `tried` in place of its own."""
    return copy.deepcopy(state, {id(own): tried}).plan(snapshot).quality.score


def _by_evaluations(scores: dict[int, list[float]]) -> list[dict[str, Any]]:
    """For each budget the mean score, how many plans are worse than with the budget before, and by how much."""
    rows = []
    for count, less in zip(EVALUATIONS, (EVALUATIONS[0], *EVALUATIONS), strict=False):
        falls = [before - after for before, after in zip(scores[less], scores[count], strict=True)]
        worse = [fall for fall in falls if fall > ROUNDING]
        rows.append(
            {
                "evaluations": count,
                "score": statistics.mean(scores[count]),
                "worse": len(worse),
                "worst": max(worse, default=0.0),
            }
        )
    return rows


def _timed(policy: Policy, snapshot: Snapshot) -> tuple[Plan, float, float]:
    """(plan, wall time, time of this thread), s."""
    cpu_s, wall_s = time.thread_time(), time.perf_counter()
    plan = policy.plan(snapshot)
    wall_s = time.perf_counter() - wall_s
    return plan, wall_s, time.thread_time() - cpu_s


def _quantiles_ms(values_s: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(values_s, [50, 99])
    return {"p50": 1e3 * float(p50), "p99": 1e3 * float(p99)}
