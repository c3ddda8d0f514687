"""The online annealing: kernels against their plain twins, and what the policy promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_annealing import (
    PlainRandom,
    engine_time_s,
    hopeful_rows,
    plain_anneal,
    plain_greedy,
    plain_rollout,
    running_base,
    running_stakes,
)

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import ROW_DTYPE, EngineLimits, Snapshot
from lmdeploy_slo.scheduling import annealing_arrays as arrays
from lmdeploy_slo.scheduling import annealing_kernel as kernel
from lmdeploy_slo.scheduling.annealing import (
    LATER,
    PORTFOLIO_RULES,
    PORTFOLIO_SIZES,
    TIER_WORTH,
    AnnealingOptions,
    AnnealingPolicy,
)
from lmdeploy_slo.scheduling.annealing_arrays import NEVER, QUANTILES, WAVES
from lmdeploy_slo.scheduling.policy import SearchBudget
from lmdeploy_slo.scheduling.rules import rule_order

MODEL = StepModel(c0=0.01025, p1=4.752e-5, p2=1.13e-9, d1=2.377e-5, d2=3.67e-8)
PACE = arrays.Pace(MODEL.c0, MODEL.p1, MODEL.p2, MODEL.d1, MODEL.d2, 0.4)
SPREAD = np.linspace(-1.0, 1.0, QUANTILES) * 0.8
NOW_S = 100.0


def draw_rows(rng: np.random.Generator, count: int, *, running: bool, first_handle: int = 1) -> np.ndarray:
    """Requests of every kind around NOW_S: code, chat, one-token outputs, none with an objective, late ones."""
    rows = np.zeros(count, dtype=ROW_DTYPE)
    rows["handle"] = np.arange(first_handle, first_handle + count)
    rows["tier"] = rng.choice([0, 1, 1, 1, 2, 3], count)
    rows["arrival_at_s"] = NOW_S - rng.exponential(0.8, count)
    rows["prompt_tokens"] = np.rint(rng.lognormal(6.8, 0.8, count)) + 1
    rows["output_tokens"] = np.rint(rng.lognormal(3.5, 1.2, count)) + 1
    rows["length_sigma"] = rng.choice([0.0, 0.3, 1.0], count)
    kind = rng.integers(0, 4, count)
    rows["ttft_s"] = np.where(kind == 0, 1.0, np.inf)
    rows["tpot_s"] = np.where(np.isin(kind, (0, 3)), 0.05, np.inf)
    rows["e2e_s"] = np.where(np.isin(kind, (1, 3)), 2.0, np.inf)
    rows["dispatched_at_s"] = np.nan
    rows["first_token_at_s"] = np.nan
    if running:
        generated = np.where(rng.random(count) < 0.8, rng.integers(1, 60, count), 0)
        rows["generated_tokens"] = generated
        rows["output_tokens"] = np.maximum(rows["output_tokens"], generated + 1)
        rows["dispatched_at_s"] = rows["arrival_at_s"]
        first = NOW_S - generated * rng.uniform(0.012, 0.06, count)
        rows["first_token_at_s"] = np.where(generated > 0, np.maximum(first, rows["arrival_at_s"]), np.nan)
    rows.flags.writeable = False
    return rows


def draw_snapshot(seed: int, waiting: int = 14, running: int = 20, **limits: int) -> Snapshot:
    rng = np.random.default_rng(seed)
    run = draw_rows(rng, running, running=True)
    wait = draw_rows(rng, waiting, running=False, first_handle=running + 1)
    return Snapshot(NOW_S, wait, run, EngineLimits(**limits), MODEL)


class Stage:
    """A snapshot as the kernels see it, and a scoring function of the plain twin beside the compiled one."""

    def __init__(self, snapshot: Snapshot, price_s: float = 0.8) -> None:
        waiting = snapshot.waiting
        self.base, self.scratch = arrays.make_base(), arrays.make_scratch()
        self.stakes, self.candidates = arrays.make_stakes(1024), arrays.make_candidates(48)
        self.worth = TIER_WORTH[snapshot.running["tier"]]
        self.at_stake, self.spans = kernel.look_at_running(
            snapshot.running, self.worth, NOW_S, PACE, SPREAD, self.base, self.stakes
        )
        self.hopeful, self.engine_s = np.empty(len(waiting), dtype=np.bool_), np.empty(len(waiting))
        kernel.look_at_waiting(waiting, NOW_S, PACE, SPREAD, 64.0, self.base, self.engine_s, self.hopeful)
        chosen = np.flatnonzero(self.hopeful)
        self.n = len(chosen)
        kernel.take_candidates(
            waiting, chosen, TIER_WORTH[waiting[chosen]["tier"]], NOW_S, PACE, SPREAD, price_s, self.engine_s,
            self.candidates,
        )  # fmt: skip
        self.arguments = (PACE, self.base, self.spans, self.stakes, self.at_stake, self.candidates, self.scratch)

    def compiled(self, admit: list[int]) -> float:
        return kernel.rollout(np.array(admit, dtype=np.int64), self.n, *self.arguments)

    def __call__(self, admit: list[int]) -> float:
        stakes = list(
            zip(
                self.stakes.end[: self.at_stake],
                self.stakes.deadline[: self.at_stake],
                self.stakes.weight[: self.at_stake],
                strict=True,
            )
        )
        return plain_rollout(admit, self.n, PACE, self.base, self.spans, stakes, self.candidates)


seeds = st.integers(0, 2**32 - 1)


@given(seed=st.integers(1, 2**64 - 1))
def test_random_draws_equal_the_plain_generator(seed: int) -> None:
    state, plain = np.array([seed], dtype=np.uint64), PlainRandom(seed)
    draws = [kernel.next_random(state) for _ in range(20)]
    assert draws == [plain() for _ in range(20)]
    assert all(0 <= draw < 1 for draw in draws)


@given(seed=seeds)
@settings(max_examples=40, deadline=None)
def test_the_look_at_running_requests_equals_the_plain_twin(seed: int) -> None:
    snapshot = draw_snapshot(seed)
    stage = Stage(snapshot)
    for mine, plain in zip(stage.base, running_base(snapshot.running, PACE), strict=True):
        np.testing.assert_allclose(mine, plain, rtol=1e-9, atol=1e-6)
    plain_stakes = running_stakes(snapshot.running, stage.worth, NOW_S, PACE, SPREAD)
    assert stage.at_stake == len(plain_stakes)
    mine = zip(stage.stakes.end, stage.stakes.deadline, stage.stakes.weight, strict=True)
    for got, wanted in zip(mine, plain_stakes, strict=False):
        assert got == pytest.approx(wanted, rel=1e-12, abs=1e-12)


@given(seed=seeds)
@settings(max_examples=40, deadline=None)
def test_the_look_at_waiting_requests_equals_the_plain_twin(seed: int) -> None:
    snapshot = draw_snapshot(seed)
    stage = Stage(snapshot)
    assert stage.hopeful.tolist() == hopeful_rows(snapshot.waiting, NOW_S, PACE, SPREAD, stage.base)
    assert stage.candidates.row[: stage.n].tolist() == np.flatnonzero(stage.hopeful).tolist()
    assert stage.engine_s.tolist() == pytest.approx([engine_time_s(row, PACE, 64.0) for row in snapshot.waiting])


@given(seed=seeds)
@settings(max_examples=40, deadline=None)
def test_the_rollout_equals_the_plain_twin(seed: int) -> None:
    stage = Stage(draw_snapshot(seed))
    rng = np.random.default_rng(seed)
    for _ in range(4):
        admit = rng.choice([*WAVES.tolist(), NEVER, NEVER], stage.n).tolist()
        assert stage.compiled(admit) == pytest.approx(stage(admit), abs=1e-9)


@given(seed=seeds)
@settings(max_examples=12, deadline=None)
def test_the_search_equals_the_plain_twin_under_the_same_draws(seed: int) -> None:
    stage = Stage(draw_snapshot(seed, waiting=8, running=8))
    n = stage.n
    order = np.random.default_rng(seed).permutation(n)
    admit = np.full(n, NEVER, dtype=np.int64)
    nothing = kernel.rollout(admit, n, *stage.arguments)
    score, spent = kernel.insert_greedily(admit, order, n, nothing, 60, *stage.arguments)
    plain, plain_score, plain_spent = plain_greedy(order.tolist(), n, 60, stage)
    assert (admit.tolist(), spent) == (plain, plain_spent)
    assert score == pytest.approx(plain_score, abs=1e-9)
    if n == 0:
        return
    state, best = np.array([seed | 1], dtype=np.uint64), admit.copy()
    score, best_score = kernel.anneal(admit, best, n, score, score, 0.3, 0.01, 80, state, *stage.arguments)
    plain_best, plain_last, plain_best_score = plain_anneal(plain, 0.3, 0.01, 80, PlainRandom(seed | 1), stage)
    assert best.tolist() == plain_best
    assert (score, best_score) == pytest.approx((plain_last, plain_best_score), abs=1e-9)


def test_who_can_wait_for_ever_is_admitted_only_where_it_is_all_but_sure_to_meet() -> None:
    snapshot = draw_snapshot(4, waiting=2, running=0)
    rows = snapshot.waiting.copy()
    rows["tier"], rows["tpot_s"], rows["e2e_s"] = 1, 0.05, np.inf
    rows["ttft_s"] = [np.inf, 60.0]
    planner = policy()
    planner._set_stage(Snapshot(NOW_S, rows, snapshot.running, EngineLimits(), MODEL))
    chosen = planner._candidates.row[:2]
    assert planner._candidates.price[:2][np.argsort(chosen)].tolist() == [LATER, 0.0]


def test_a_deadline_is_met_with_a_part_of_the_stall_to_come() -> None:
    assert [kernel.chance(3.0, 1.0, deadline) for deadline in (0.5, 1.0, 1.5, 3.0, 9.0)] == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert [kernel.chance(1.0, 1.0, deadline) for deadline in (0.9, 1.0)] == [0.0, 1.0]


def test_an_output_of_one_token_meets_without_a_tpot_objective() -> None:
    rows = draw_snapshot(1, waiting=1, running=0).waiting.copy()
    rows["tier"], rows["arrival_at_s"], rows["prompt_tokens"], rows["output_tokens"] = 1, NOW_S, 100, 1
    rows["ttft_s"], rows["tpot_s"], rows["e2e_s"] = np.inf, np.inf, 2.0
    stage = Stage(Snapshot(NOW_S, rows, draw_snapshot(1, running=0).running, EngineLimits(), MODEL), price_s=0.0)
    assert stage.compiled([0]) == pytest.approx(1.0)


def policy(evaluations: int = 300, **options: float) -> AnnealingPolicy:
    return AnnealingPolicy(
        budget=SearchBudget(time_s=None, evaluations=evaluations), options=AnnealingOptions(**options)
    )


@given(seed=seeds, waiting=st.integers(0, 70), running=st.integers(0, 30), cap=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_a_plan_names_everybody_once_and_keeps_the_cap(seed: int, waiting: int, running: int, cap: int) -> None:
    snapshot = draw_snapshot(seed, waiting, running, max_batch_size=cap)
    plan = policy().plan(snapshot)
    assert sorted(plan.order.tolist()) == sorted(snapshot.waiting["handle"].tolist())
    assert 0 <= plan.send_now <= snapshot.free_slots


@given(seed=seeds)
@settings(max_examples=30, deadline=None)
def test_no_plan_scores_below_a_rule_of_the_portfolio(seed: int) -> None:
    snapshot = draw_snapshot(seed)
    planner = policy(evaluations=1)  # even where there is no time to search
    plan = planner.plan(snapshot)
    _, _, n, stage = planner._set_stage(snapshot)
    place = np.full(len(snapshot.waiting), -1)
    place[planner._candidates.row[:n]] = np.arange(n)
    for rule in PORTFOLIO_RULES:
        order = place[rule_order(snapshot, rule)]
        order = order[order >= 0]
        for size in PORTFOLIO_SIZES:
            admit = np.full(n, NEVER, dtype=np.int64)
            admit[order[:size]] = 0
            if n and size < 2 * n:
                assert plan.quality.score >= kernel.rollout(admit, n, *stage) - 1e-9


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_more_evaluations_never_score_worse_than_the_start(seed: int) -> None:
    plan = policy(evaluations=500).plan(draw_snapshot(seed, waiting=30))
    assert plan.quality.score >= plan.quality.start_score
    assert plan.quality.evaluations <= 500 + len(WAVES) + len(PORTFOLIO_RULES) * len(PORTFOLIO_SIZES) + 2


@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_a_larger_budget_never_plans_worse(seed: int) -> None:
    snapshot = draw_snapshot(seed, waiting=40)
    scores = [policy(evaluations=budget).plan(snapshot).quality.score for budget in (1, 40, 150, 300, 700, 1500, 3100)]
    assert scores == sorted(scores)


@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_equal_snapshots_and_seeds_give_equal_plans(seed: int) -> None:
    first, second = policy().plan(draw_snapshot(seed)), policy().plan(draw_snapshot(seed))
    assert first.order.tolist() == second.order.tolist()
    assert first.send_now == second.send_now


def test_an_idle_engine_always_gets_work() -> None:
    snapshot = draw_snapshot(3, waiting=5, running=0)
    hopeless = snapshot.waiting.copy()
    hopeless["arrival_at_s"] = NOW_S - 1e4
    hopeless.flags.writeable = False
    never = policy(leftover_loss=-1.0, patience=1e6)
    plan = never.plan(Snapshot(NOW_S, hopeless, snapshot.running, EngineLimits(), MODEL))
    assert plan.send_now == 1


def test_requests_without_an_objective_are_served_when_nothing_is_at_stake() -> None:
    snapshot = draw_snapshot(4, waiting=6, running=0)
    rows = snapshot.waiting.copy()
    for field in ("ttft_s", "tpot_s", "e2e_s"):
        rows[field] = np.inf
    rows["tier"], rows["prompt_tokens"] = 1, 10
    rows.flags.writeable = False
    plan = policy(leftovers_per_plan=6).plan(Snapshot(NOW_S, rows, snapshot.running, EngineLimits(), MODEL))
    assert plan.send_now == 6


def test_leftovers_go_older_first_and_cheaper_first() -> None:
    rows = draw_snapshot(4, waiting=4, running=0).waiting.copy()
    for field in ("ttft_s", "tpot_s", "e2e_s"):
        rows[field] = np.inf
    rows["tier"] = [1, 1, 1, 2]
    rows["arrival_at_s"] = NOW_S - np.array([1.0, 2.0, 1.0, 1.0])
    rows["prompt_tokens"] = [500, 500, 100, 5000]
    rows["output_tokens"] = 10
    rows.flags.writeable = False
    empty = draw_snapshot(4, running=0).running
    plan = policy(leftovers_per_plan=6).plan(Snapshot(NOW_S, rows, empty, EngineLimits(), MODEL))
    assert plan.order.tolist() == [rows["handle"][i] for i in (3, 2, 1, 0)]


@pytest.mark.parametrize(
    ("waited_s", "granted", "queue_s", "taken", "left"),
    [
        (9.0, 5.0, math.inf, 0, 5.0),
        (11.0, 0.9, math.inf, 0, 0.9),
        (11.0, 1.5, math.inf, 1, 0.5),
        (11.0, 2.5, math.inf, 2, 0.5),
        (11.0, 2.5, 0.1, 1, 1.5),
    ],
)
def test_who_is_overdue_may_cost_others_what_the_floor_granted(
    waited_s: float, granted: float, queue_s: float, taken: int, left: float
) -> None:
    """Two run, whose deadlines the one and then the other leftover's prefill makes them miss; nobody is sent to wait in
    the engine for another's."""
    snapshot = draw_snapshot(4, waiting=2, running=2)
    run, wait = snapshot.running.copy(), snapshot.waiting.copy()
    for rows in (run, wait):
        rows["tier"], rows["length_sigma"], rows["cached_tokens"] = 1, 0.0, 0
        rows["ttft_s"] = rows["tpot_s"] = rows["e2e_s"] = np.inf
    run["generated_tokens"], run["output_tokens"], run["first_token_at_s"] = 10, 20, NOW_S - 0.5
    wait["prompt_tokens"], wait["output_tokens"], wait["arrival_at_s"] = 4000, 1, NOW_S - waited_s
    step_s, stall_s = MODEL.step_s(0, 0, 2, float(np.sum(run["prompt_tokens"])) + 40), MODEL.p1 * 4000
    slack_s = 10 * step_s * (1 + PACE.background) + np.array([0.8, 1.8]) * stall_s
    run["e2e_s"] = NOW_S - run["arrival_at_s"] + slack_s
    stage = Stage(Snapshot(NOW_S, wait, run, EngineLimits(), MODEL))
    assert (stage.n, stage([])) == (0, pytest.approx(2.0))
    pace, *others = stage.arguments
    quiet = pace._replace(background=0.0)
    answer = kernel.admit_leftovers(
        wait, np.arange(2), NOW_S, 1e-9, 10.0, queue_s, 0.02, 0.0, granted, 0.0, 0.0, 0.0, stage.engine_s,
        np.empty(0, dtype=np.int64), 0, quiet, *others,
    )  # fmt: skip
    assert answer == (taken, pytest.approx(left))


def test_predicted_kv_memory_is_kept() -> None:
    snapshot = draw_snapshot(5, waiting=40, running=0)
    need = float(np.min(snapshot.waiting["prompt_tokens"] + snapshot.waiting["output_tokens"]))
    tight = Snapshot(NOW_S, snapshot.waiting, snapshot.running, EngineLimits(kv_tokens=max(1, int(3 * need))), MODEL)
    plan = policy().plan(tight)
    sent = snapshot.waiting[np.isin(snapshot.waiting["handle"], plan.order[: plan.send_now])]
    assert plan.send_now == 1 or float(np.sum(sent["prompt_tokens"] + sent["output_tokens"])) <= 3 * need


def test_an_engine_that_takes_no_time_is_planned_for() -> None:
    snapshot = draw_snapshot(6)
    free = StepModel(0.0, 0.0, 0.0, 0.0, 0.0)
    plan = policy().plan(Snapshot(NOW_S, snapshot.waiting, snapshot.running, snapshot.limits, free))
    assert plan.send_now > 0


def test_a_time_budget_ends_the_search() -> None:
    class SlowClock(VirtualClock):
        """Every look costs half a millisecond."""

        def now_s(self) -> float:
            self.advance(0.0005)
            return super().now_s()

    snapshot = draw_snapshot(7, waiting=60, running=60)
    planner = AnnealingPolicy(budget=SearchBudget(time_s=0.002), clock=SlowClock())
    evaluations = planner.plan(snapshot).quality.evaluations
    assert 0 < evaluations < 10_000
    assert math.isfinite(evaluations)
