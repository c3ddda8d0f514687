"""Who gets the slots where more may enter than are free: the kernel against its plain twin, and what the order does."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_annealing import PlainRandom
from plain_slots import plain_score, plain_search

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.request import PriorityClass
from lmdeploy_slo.core.snapshot import ROW_DTYPE, EngineLimits, Snapshot
from lmdeploy_slo.scheduling import annealing, slot_order
from lmdeploy_slo.scheduling.annealing import AnnealingOptions, AnnealingPolicy
from lmdeploy_slo.scheduling.policy import SearchBudget
from lmdeploy_slo.scheduling.slot_order_kernel import score_order, search_order

MODEL = StepModel(c0=15.85e-3, p1=0.11e-3, p2=0.0, d1=0.275e-3, d2=0.42e-6)
"""A slow engine: 16 ms a pass."""

NOW_S = 100.0
seeds = st.integers(0, 2**32 - 1)


def draw_jobs(seed: int, n: int, slots: int) -> tuple[Any, ...]:
    """run, limit, worth, waited, free: some lost, some late with a longer output, some worth ten times as much. Whole
    numbers, so that sums are exact in every order."""
    rng = np.random.default_rng(seed)
    limit = np.sort(rng.integers(-40, 300, (n, 4)))[:, ::-1].astype(np.float64)
    free = np.sort(np.where(rng.random(slots) < 0.4, 0, rng.integers(1, 100, slots))).astype(np.float64)
    run = np.ceil(rng.lognormal(3.3, 0.8, n))
    return run, limit, rng.choice([1.0, 1.0, 10.0], n), float(rng.integers(0, 200)), free


def draw_starts(seed: int, n: int) -> Any:
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation(n) for _ in range(3)])


def search(jobs: tuple[Any, ...], starts: Any, moves: int, seed: int = 1) -> tuple[list[int], float]:
    best = np.empty(starts.shape[1], dtype=np.int64)
    score = search_order(starts, *jobs, moves, np.array([seed], dtype=np.uint64), best)
    return best.tolist(), score


@given(seed=seeds, n=st.integers(2, 9), slots=st.integers(1, 6), moves=st.integers(0, 120))
@settings(max_examples=40, deadline=None)
def test_the_search_equals_the_plain_twin_under_the_same_draws(seed: int, n: int, slots: int, moves: int) -> None:
    jobs, starts = draw_jobs(seed, n, slots), draw_starts(seed, n)
    order, score = search(jobs, starts, moves, seed | 1)
    wanted, wanted_score = plain_search(starts, *jobs, moves, PlainRandom(seed | 1))
    assert order == wanted
    assert score == pytest.approx(wanted_score, rel=1e-12)


@given(seed=seeds, n=st.integers(2, 48), slots=st.integers(1, 48))
@settings(max_examples=40, deadline=None)
def test_an_order_holds_everybody_once_and_scores_no_less_than_its_starts(seed: int, n: int, slots: int) -> None:
    jobs, starts = draw_jobs(seed, n, slots), draw_starts(seed, n)
    order, score = search(jobs, starts, 200)
    assert sorted(order) == list(range(n))
    assert score == pytest.approx(plain_score(order, *jobs), rel=1e-12)
    assert score >= max(score_order(start, *jobs) for start in starts)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_small_ones_are_solved(slots: int) -> None:
    for seed in range(10):
        jobs = draw_jobs(seed, 6, slots)
        best = max(plain_score(order, *jobs) for order in permutations(range(6)))
        _, score = search(jobs, draw_starts(seed, 6), 6 * slot_order.MOVES_EACH)
        assert score >= 0.99 * best


def waiting(*requests: dict[str, float]) -> Any:
    rows = np.zeros(len(requests), dtype=ROW_DTYPE)
    for row, request in zip(rows, requests, strict=True):
        told = {"ttft_s": np.inf, "tpot_s": np.inf, "e2e_s": np.inf, "tier": PriorityClass.DEFAULT, **request}
        for field, value in told.items():
            row[field] = value
    rows["handle"] = np.arange(1, len(rows) + 1)
    rows["dispatched_at_s"] = rows["first_token_at_s"] = np.nan
    rows.flags.writeable = False
    return rows


def chat(waited_s: float, output: int, **more: float) -> dict[str, float]:
    arrival = NOW_S - waited_s
    return dict(arrival_at_s=arrival, prompt_tokens=100, output_tokens=output, ttft_s=10.0, tpot_s=0.05, **more)


def code(waited_s: float, output: int, **more: float) -> dict[str, float]:
    return dict(arrival_at_s=NOW_S - waited_s, prompt_tokens=100, output_tokens=output, e2e_s=30.0, **more)


def snapshot(rows: Any, cap: int) -> Snapshot:
    return Snapshot(NOW_S, rows, rows[:0], EngineLimits(max_batch_size=cap), MODEL)


def plan_of(rows: Any, cap: int) -> Any:
    options = AnnealingOptions(price_weight=0.0)
    return AnnealingPolicy(budget=SearchBudget(time_s=None, evaluations=400), options=options).plan(snapshot(rows, cap))


def test_a_long_request_whose_time_is_running_out_goes_before_shorter_ones_that_can_wait() -> None:
    assert plan_of(waiting(chat(1.0, 80), chat(9.0, 300), code(0.5, 90)), cap=1).order[0] == 2
    # with more time, or a shorter one beside it, both fit
    assert plan_of(waiting(chat(1.0, 80), chat(5.0, 300), code(0.5, 90)), cap=1).order[0] == 1
    assert plan_of(waiting(chat(1.0, 20), chat(9.0, 300), code(0.5, 90)), cap=1).order.tolist() == [1, 2, 3]


def test_a_higher_class_is_worth_more() -> None:
    rows = waiting(chat(9.0, 400), chat(9.0, 400, tier=PriorityClass.INTERACTIVE), chat(9.0, 400))
    assert plan_of(rows, cap=1).order[0] == 2


def test_arrival_decides_where_nothing_is_gained() -> None:
    rows = waiting(chat(2.0, 101), chat(3.0, 102), chat(1.0, 100))
    assert plan_of(rows, cap=1).order.tolist() == [2, 1, 3]


def test_nothing_is_ordered_while_slots_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def watched(shot: Snapshot, *rest: Any) -> Any:
        asked.append(shot.free_slots)
        return slot_order.order_for_slots(shot, *rest)

    monkeypatch.setattr(annealing, "order_for_slots", watched)
    rows = waiting(*(chat(1.0, 100 + i) for i in range(4)))
    assert plan_of(rows, cap=4).send_now == 4
    assert asked == []
    assert plan_of(rows, cap=3).send_now == 3
    assert asked == [3]


def test_everything_is_compiled_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(annealing, "order_for_slots", lambda shot, pool, chosen, *rest: asked.append(len(chosen)))
    AnnealingPolicy().warm_up()
    assert asked
    assert min(asked) >= 2


def test_who_has_waited_too_long_gets_the_share_of_slots_that_the_floor_grants() -> None:
    planner = AnnealingPolicy(budget=SearchBudget(time_s=None, evaluations=400))

    def first_at(now_s: float) -> int:
        rows = waiting(chat(0.0, 1000), chat(0.0, 100), chat(0.0, 120)).copy()
        rows["arrival_at_s"][1:] = now_s - 0.5
        shot = snapshot(rows, cap=1)
        return int(planner.plan(Snapshot(now_s, rows, shot.running, shot.limits, MODEL)).order[0])

    assert first_at(NOW_S + 1000.0) == 2  # nothing is granted yet
    assert first_at(NOW_S + 2000.0) == 2  # 10 s of the 16 it needs
    assert first_at(NOW_S + 3000.0) == 1
    assert first_at(NOW_S + 3000.1) == 2  # used up


def test_jobs_are_described_by_hand() -> None:
    """One slot runs 30 of 50 tokens; two of 21 and 41 tokens wait, with exact lengths."""
    rows = waiting(code(4.0, 21), chat(1.0, 41))
    running = waiting(code(2.0, 50, generated_tokens=30, first_token_at_s=NOW_S - 1.0))
    flat = StepModel(c0=0.02, p1=1e-3, p2=0.0, d1=0.0, d2=0.0)
    shot = Snapshot(NOW_S, rows, running, EngineLimits(max_batch_size=2), flat)
    planner = AnnealingPolicy()
    *_, n, stage = planner._set_stage(shot)
    assert n == 2
    chosen = np.argsort(planner._candidates.row[:n])
    assert stage[0].background == 0.0
    run, limit, worth, free = slot_order.describe(shot, planner._candidates, chosen, stage[0])
    assert run.tolist() == pytest.approx([0.1 + 21 * 0.02, 0.1 + 41 * 0.02])
    assert free.tolist() == pytest.approx([0.0, 20 * 0.02])
    assert worth.tolist() == [1.0, 1.0]
    assert limit[:, 0].tolist() == pytest.approx([26.0 - 0.1 - 21 * 0.02, 9.0 - 0.1 - 0.02])
    assert (limit[:, 1:] == limit[:, :1] / (1.0 + slot_order.LATE_STARTS[1:])).all()
