"""The fixed rules against plain Python twins, and the table of policy names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.core.snapshot import EngineLimits, Snapshot
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.scheduling.policy import SearchBudget, make_policy, policy_names
from lmdeploy_slo.scheduling.rules import RULES, RulePolicy, rule_order
from lmdeploy_slo.testing.builders import A100, make_snapshot

Row = Mapping[str, float]

objectives = st.just(math.inf) | st.floats(0.01, 60)
waiting_rows = st.fixed_dictionaries(
    {
        "tier": st.integers(0, 3),
        "arrival_at_s": st.floats(0, 30),
        "prompt_tokens": st.floats(1, 8000),
        "output_tokens": st.floats(1, 2000),
        "ttft_s": objectives,
        "tpot_s": objectives,
        "e2e_s": objectives,
        "cached_tokens": st.just(0.0) | st.floats(1, 8000),
    }
)
running_rows = st.fixed_dictionaries(
    {
        "prompt_tokens": st.floats(1, 8000),
        "output_tokens": st.floats(1, 2000),
        "generated_tokens": st.integers(0, 500),
        "cached_tokens": st.just(0.0) | st.floats(1, 8000),
    }
)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    return make_snapshot(
        draw(st.lists(waiting_rows, max_size=12)),
        draw(st.lists(running_rows, max_size=6)),
        now_s=draw(st.floats(0, 60)),
        limits=EngineLimits(max_batch_size=draw(st.integers(1, 10))),
    )


# -- the twins: one request at a time, formulas as they are written down -----------


def prefill_s(row: Row) -> float:
    cached, whole = row["cached_tokens"], row["prompt_tokens"] + row["cached_tokens"]
    return A100.p1 * (whole - cached) + A100.p2 * (whole**2 - cached**2)


def decode_step_s(snapshot: Snapshot) -> float:
    decoding = [r for r in snapshot.running if r["generated_tokens"] > 0]
    contexts = [r["prompt_tokens"] + r["cached_tokens"] + r["generated_tokens"] for r in decoding]
    return A100.c0 + A100.d1 * max(1, len(contexts)) + A100.d2 * sum(contexts)


def wall_time_s(row: Row, snapshot: Snapshot) -> float:
    return prefill_s(row) + row["output_tokens"] * decode_step_s(snapshot)


def engine_time_s(row: Row) -> float:
    context = row["prompt_tokens"] + row["cached_tokens"] + row["output_tokens"] / 2
    return prefill_s(row) + row["output_tokens"] * (A100.d1 + A100.d2 * context + A100.c0 / 64)


def latest_start_s(row: Row, snapshot: Snapshot) -> float:
    for_first_token = row["arrival_at_s"] + row["ttft_s"] - prefill_s(row) - A100.c0
    for_last_token = row["arrival_at_s"] + row["e2e_s"] - wall_time_s(row, snapshot)
    return min(for_first_token, for_last_token)


TWINS: dict[str, Callable[[Row, Snapshot], float]] = {
    "fcfs": lambda row, snapshot: row["arrival_at_s"],
    "sjf": wall_time_s,
    "swf": lambda row, snapshot: engine_time_s(row),
    "edf": lambda row, snapshot: row["arrival_at_s"] + min(row["e2e_s"], row["ttft_s"]),
    "llf": latest_start_s,
}


@given(snapshots())
@pytest.mark.parametrize("rule", TWINS)
def test_keys_equal_their_twins(rule: str, snapshot: Snapshot) -> None:
    expected = [TWINS[rule](row, snapshot) for row in snapshot.waiting]
    assert RULES[rule](snapshot).tolist() == pytest.approx(expected, rel=1e-9)


@given(snapshots())
@pytest.mark.parametrize("feasible_first", [False, True])
@pytest.mark.parametrize("rule", TWINS)
def test_order_equals_its_twin(rule: str, feasible_first: bool, snapshot: Snapshot) -> None:
    def place(position: int) -> tuple[Any, ...]:
        row = snapshot.waiting[position]
        # The key itself is the kernel's, so that the last digit does not decide between near equals.
        key = float(RULES[rule](snapshot)[position])
        hopeless = feasible_first and float(RULES["llf"](snapshot)[position]) < snapshot.now_s
        if hopeless:
            key = float(RULES["swf"](snapshot)[position])
        return (-row["tier"], hopeless, key, row["arrival_at_s"], row["handle"])

    expected = sorted(range(len(snapshot.waiting)), key=place)
    assert rule_order(snapshot, rule, feasible_first=feasible_first).tolist() == expected


def plan_handles(name: str, *waiting: Row, **options: Any) -> list[int]:
    return make_policy(name).plan(make_snapshot(waiting, **options)).order.tolist()


# -- by hand ------------------------------------------------------------------


def test_each_rule_by_hand() -> None:
    rows: list[Row] = [
        {"arrival_at_s": 0.0, "prompt_tokens": 4000, "output_tokens": 50, "e2e_s": 60.0},
        {"arrival_at_s": 1.0, "prompt_tokens": 10, "output_tokens": 60, "e2e_s": 30.0, "ttft_s": 5.0},
        {"arrival_at_s": 2.0, "prompt_tokens": 10, "output_tokens": 400, "e2e_s": 8.0},
        {"arrival_at_s": 3.0, "prompt_tokens": 10, "output_tokens": 5},
    ]
    assert plan_handles("fcfs", *rows) == [1, 2, 3, 4]
    assert plan_handles("sjf", *rows) == [4, 2, 1, 3]  # 400 steps take longer than prefilling 4000 tokens
    assert plan_handles("swf", *rows) == [4, 2, 3, 1]  # but cost less of an engine that 64 share
    assert plan_handles("edf", *rows) == [2, 3, 1, 4]
    assert plan_handles("llf", *rows) == [3, 2, 1, 4]


def test_who_can_no_longer_meet_goes_last_in_order_of_engine_time() -> None:
    rows: list[Row] = [
        {"arrival_at_s": 0.0, "e2e_s": 1.0, "output_tokens": 900},
        {"arrival_at_s": 1.0, "e2e_s": 1.0, "output_tokens": 300},
        {"arrival_at_s": 2.0, "e2e_s": 90.0},
        {"arrival_at_s": 3.0},
        {"arrival_at_s": 4.0, "ttft_s": 5.9, "output_tokens": 500},
    ]
    assert plan_handles("fcfs-feasible", *rows, now_s=9.0) == [3, 4, 5, 2, 1]
    assert plan_handles("fcfs-feasible", *rows, now_s=9.9) == [3, 4, 2, 5, 1]
    assert plan_handles("fcfs", *rows, now_s=9.9) == [1, 2, 3, 4, 5]


def test_the_latest_start_itself_is_not_too_late() -> None:
    rows: list[Row] = [{"e2e_s": 4.0, "output_tokens": 50}, {"arrival_at_s": 1.0, "e2e_s": 100.0}]
    latest_s = float(RULES["llf"](make_snapshot(rows))[0])
    assert plan_handles("fcfs-feasible", *rows, now_s=latest_s) == [1, 2]
    assert plan_handles("fcfs-feasible", *rows, now_s=math.nextafter(latest_s, 9.0)) == [2, 1]


def test_higher_tiers_go_first_even_when_hopeless() -> None:
    rows: list[Row] = [{"tier": 1, "arrival_at_s": 0.0}, {"tier": 3, "arrival_at_s": 5.0, "e2e_s": 0.1}, {"tier": 0}]
    for name in RULES:
        assert plan_handles(name, *rows, now_s=50.0) == [2, 1, 3]
        assert plan_handles(f"{name}-feasible", *rows, now_s=50.0) == [2, 1, 3]


def test_equals_go_by_arrival_and_then_by_handle() -> None:
    rows: list[Row] = [{"handle": 9}, {"handle": 4}, {"handle": 5, "arrival_at_s": -1.0}]
    for name in ("sjf", "swf"):
        assert plan_handles(name, *rows) == [5, 4, 9]


# -- plans --------------------------------------------------------------------


@given(snapshots())
def test_a_rule_orders_everybody_once_and_fills_the_free_slots(snapshot: Snapshot) -> None:
    for name in RULES:
        for policy in (RulePolicy(name), RulePolicy(name, feasible_first=True)):
            plan = policy.plan(snapshot)
            assert sorted(plan.order.tolist()) == sorted(snapshot.waiting["handle"].tolist())
            assert plan.send_now == min(len(snapshot.waiting), snapshot.free_slots)
            assert plan.replan_after_s is None
            assert np.array_equal(policy.plan(snapshot).order, plan.order)
            assert not policy.wants_ticks


def test_names() -> None:
    names = policy_names()
    assert names[0] == "annealing"
    assert set(names) >= {"annealing", "slack-guard", *RULES, *(f"{rule}-feasible" for rule in RULES)}
    assert set(RULES) == {"fcfs", "sjf", "swf", "edf", "llf"}
    for name in names:
        assert make_policy(name, seed=1).name == name


@pytest.mark.parametrize("name", ["", "FCFS", "feasible", "lifo"])
def test_an_unknown_name_lists_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match="annealing, slack-guard, fcfs, fcfs-feasible"):
        make_policy(name)
    with pytest.raises(KeyError):
        RulePolicy(name)


@pytest.mark.parametrize("bounds", [(None, None), (0.0, None), (-1.0, 5), (None, 0)])
def test_a_search_needs_a_sensible_bound(bounds: tuple[float | None, int | None]) -> None:
    with pytest.raises(ValueError, match=r"time_s|evaluations"):
        SearchBudget(*bounds)
