"""The forecast for a request that arrives now, against what its page says and against small cases done by hand."""

from __future__ import annotations

from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.request import PriorityClass, RequestSpec
from lmdeploy_slo.core.slo import Slo
from lmdeploy_slo.core.snapshot import EngineLimits, Snapshot
from lmdeploy_slo.scheduling.admission import Forecast, unmet_objectives
from lmdeploy_slo.scheduling.outlook import Outlook
from lmdeploy_slo.testing.builders import A100, make_slo, make_snapshot, make_spec

STEP_S = 0.01
CONSTANT = StepModel(STEP_S, 0.0, 0.0, 0.0, 0.0)
"""Every step takes 10 ms."""


def forecast(snapshot: Snapshot, spec: RequestSpec, output_tokens: float) -> Forecast:
    return Outlook(snapshot).in_turn(spec, output_tokens)


def test_an_idle_engine_starts_at_once() -> None:
    expected = forecast(make_snapshot(model=CONSTANT), make_spec(), 11)
    assert (expected.queue_position, expected.queue_s) == (0, 0.0)
    assert expected.ttft_s == pytest.approx(STEP_S)
    assert expected.tpot_s == pytest.approx(STEP_S)
    assert expected.e2e_s == pytest.approx(11 * STEP_S)


def test_the_prompt_is_prefilled_before_the_first_token() -> None:
    model = StepModel(STEP_S, 1e-4, 1e-8, 0.0, 0.0)
    expected = forecast(make_snapshot(model=model), make_spec(prompt_tokens=1000), 1)
    assert expected.ttft_s == pytest.approx(STEP_S + 0.1 + 0.01)
    assert expected.e2e_s == expected.ttft_s
    assert expected.tpot_s is None


def test_what_is_cached_is_not_prefilled_and_yet_read() -> None:
    """1,000 tokens of which 600 are cached: 400 are computed behind them, and all are read in each step."""
    model = StepModel(STEP_S, 1e-4, 1e-8, 0.0, 1e-6)
    outlook = Outlook(make_snapshot(model=model))
    spec = make_spec(prompt_tokens=1000)
    cached = outlook.in_turn(spec, 3, 600)
    step_s = STEP_S + 1e-6 * (1000 + 1.5)
    assert cached.ttft_s == pytest.approx(step_s + 400e-4 + 1e-8 * (1000**2 - 600**2))
    assert cached.tpot_s == pytest.approx(step_s)
    outlook.add(spec, 3, 600)
    behind = outlook.in_turn(make_spec(prompt_tokens=1), 3)
    other = Outlook(
        make_snapshot([{"prompt_tokens": 400.0, "cached_tokens": 600.0, "output_tokens": 3.0}], model=model)
    )
    assert behind == other.in_turn(make_spec(prompt_tokens=1), 3)


def test_a_running_request_without_a_token_prefills_first() -> None:
    model = StepModel(STEP_S, 1e-4, 0.0, 0.0, 0.0)
    snapshot = make_snapshot(
        running=[{"prompt_tokens": 500.0}, {"prompt_tokens": 900.0, "generated_tokens": 1.0}], model=model
    )
    assert forecast(snapshot, make_spec(prompt_tokens=100), 1).ttft_s == pytest.approx(STEP_S + 0.01 + 0.05)


def test_a_full_engine_is_waited_for_until_the_first_departure() -> None:
    running = [{"output_tokens": 100.0, "generated_tokens": 40.0}, {"output_tokens": 100.0, "generated_tokens": 80.0}]
    snapshot = make_snapshot(running=running, limits=EngineLimits(max_batch_size=2), model=CONSTANT)
    assert forecast(snapshot, make_spec(), 10).queue_s == pytest.approx(20 * STEP_S)


def test_those_ahead_take_the_first_departures() -> None:
    running = [{"output_tokens": 100.0, "generated_tokens": g} for g in (90.0, 70.0)]
    snapshot = make_snapshot(
        waiting=[{"output_tokens": 500.0}], running=running, limits=EngineLimits(max_batch_size=2), model=CONSTANT
    )
    expected = forecast(snapshot, make_spec(), 10)
    assert expected.queue_position == 1
    assert expected.queue_s == pytest.approx(30 * STEP_S)


def test_behind_a_long_queue_the_work_ahead_is_shared_by_all_slots() -> None:
    snapshot = make_snapshot(
        waiting=[{"output_tokens": 50.0}] * 10,
        running=[{"output_tokens": 100.0, "generated_tokens": 1.0}] * 2,
        limits=EngineLimits(max_batch_size=2),
        model=CONSTANT,
    )
    assert forecast(snapshot, make_spec(), 10).queue_s == pytest.approx((2 * 99 + 10 * 50) / 2 * STEP_S)


def test_a_lower_tier_is_not_waited_for() -> None:
    snapshot = make_snapshot(
        waiting=[{"tier": float(PriorityClass.BULK)}, {"tier": float(PriorityClass.SYSTEM)}], model=CONSTANT
    )
    assert forecast(snapshot, make_spec(priority_class=PriorityClass.BULK), 10).queue_position == 2
    assert forecast(snapshot, make_spec(priority_class=PriorityClass.DEFAULT), 10).queue_position == 1


def test_unmet_objectives_are_named_with_both_figures() -> None:
    expected = forecast(make_snapshot(model=CONSTANT), make_spec(), 100)
    assert unmet_objectives(make_slo(ttft_ms=10, tpot_ms=10, e2e_ms=1000), expected) == []
    assert unmet_objectives(Slo(), expected) == []
    assert unmet_objectives(make_slo(ttft_ms=5, tpot_ms=5, e2e_ms=999), expected) == [
        "ttft is expected to be 10.0 ms, above the objective of 5 ms",
        "tpot is expected to be 10.0 ms, above the objective of 5 ms",
        "e2e is expected to be 1000.0 ms, above the objective of 999 ms",
    ]


def test_a_one_token_output_meets_any_tpot() -> None:
    expected = forecast(make_snapshot(model=CONSTANT), make_spec(), 1)
    assert unmet_objectives(make_slo(tpot_ms=0.001), expected) == []


row = st.fixed_dictionaries(
    {
        "prompt_tokens": st.integers(1, 8000).map(float),
        "output_tokens": st.floats(1, 2000),
        "generated_tokens": st.floats(0, 3000),
        "tier": st.integers(0, 3).map(float),
    }
)


@given(
    waiting=st.lists(row, max_size=12),
    running=st.lists(row, max_size=12),
    cap=st.integers(1, 16),
    output_tokens=st.floats(2, 4000),
    extra=row,
)
def test_forecasts_are_finite_ordered_and_grow_with_the_queue(
    waiting: list[dict[str, float]],
    running: list[dict[str, float]],
    cap: int,
    output_tokens: float,
    extra: dict[str, float],
) -> None:
    spec = make_spec(priority_class=PriorityClass.BULK)
    limits = EngineLimits(max_batch_size=cap)
    expected = forecast(make_snapshot(waiting, running[:cap], limits=limits, model=A100), spec, output_tokens)

    assert 0 <= expected.queue_s <= expected.ttft_s <= expected.e2e_s < float("inf")
    assert expected.queue_position == len(waiting)
    if len(waiting) + len(running[:cap]) < cap:
        assert expected.queue_s == 0

    constant = make_snapshot(waiting, running[:cap], limits=limits, model=CONSTANT)
    longer = forecast(
        make_snapshot([*waiting, extra], running[:cap], limits=limits, model=CONSTANT), spec, output_tokens
    )
    assert longer.queue_s >= forecast(constant, spec, output_tokens).queue_s

    added = Outlook(constant)
    late = make_spec(prompt_tokens=int(extra["prompt_tokens"]), priority_class=PriorityClass(int(extra["tier"])))
    added.add(late, extra["output_tokens"])
    assert astuple(added.in_turn(spec, output_tokens))[:6] == pytest.approx(astuple(longer)[:6]), (
        "a request added is one seen"
    )
