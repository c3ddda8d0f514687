"""What a request is told on arrival, and what is learnt of how it turned out."""

from __future__ import annotations

import json
import math
import random
from statistics import fmean
from typing import Any

import pytest

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.core.slo import Timing
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.prediction.length_forecast import LengthForecast
from lmdeploy_slo.scheduling.admission import Forecast, Interval, Intervals, unmet_objectives
from lmdeploy_slo.scheduling.forecaster import Forecaster
from lmdeploy_slo.scheduling.outlook import Outlook
from lmdeploy_slo.testing.builders import A100, make_slo, make_snapshot, make_spec

STEP_S = 0.01
CONSTANT = StepModel(STEP_S, 0.0, 0.0, 0.0, 0.0)
"""Every step takes 10 ms."""

LENGTH = LengthForecast(100.0, 0.0)
CHAT = {"task_type": "chat", "slo": make_slo(ttft_ms=1000, tpot_ms=50)}


def idle(model: StepModel = CONSTANT) -> Outlook:
    return Outlook(make_snapshot(model=model))


def timing_of(ttft_s: float, tpot_s: float, tokens: int = 100, queue_s: float = 0.0) -> Timing:
    return Timing(0.0, queue_s, ttft_s, ttft_s + (tokens - 1) * tpot_s, tokens)


def run(forecaster: Forecaster, outlook: Outlook, spec: RequestSpec, timing: Timing) -> Forecast:
    told = forecaster.forecast(spec, outlook, LENGTH)
    assert timing.ended_at_s is not None
    forecaster.ended(told, timing, spec.slo.met_by(timing), at_s=timing.ended_at_s, finished=True)
    return told


def test_before_anything_was_seen_the_model_of_the_queue_speaks() -> None:
    told = Forecaster().forecast(make_spec(**CHAT), idle(), LENGTH)
    assert (told.output_tokens, told.queue_position, told.queue_s) == (100, 0, 0.0)
    assert (told.ttft_s, told.tpot_s, told.e2e_s) == pytest.approx((STEP_S, STEP_S, 1.0))
    assert told.intervals is not None
    assert told.intervals.e2e_s.low < 1.0 < told.intervals.e2e_s.high
    assert dict(told.chances) == {"ttft": pytest.approx(1, abs=0.01), "tpot": pytest.approx(1, abs=0.01)}
    assert told.chance == pytest.approx(1, abs=0.01)


def test_without_an_objective_there_is_no_chance_to_tell() -> None:
    told = Forecaster().forecast(make_spec(), idle(), LENGTH)
    assert (told.chance, told.chances) == (None, ())
    assert unmet_objectives(make_slo(), told) == []


def test_a_single_token_has_no_tpot() -> None:
    told = Forecaster().forecast(make_spec(**CHAT), idle(), LengthForecast(1.0, 0.0))
    assert told.tpot_s is None
    assert told.intervals is not None
    assert told.intervals.tpot_s is None
    assert [name for name, _ in told.chances] == ["ttft"]


def test_forecasts_follow_what_was_observed_by_kind() -> None:
    forecaster, draws = Forecaster(), random.Random(1)
    for _ in range(300):
        run(forecaster, idle(), make_spec(**CHAT), timing_of(0.3 * draws.lognormvariate(0, 0.1), 0.02))
    told = forecaster.forecast(make_spec(**CHAT), idle(), LENGTH)
    assert told.ttft_s == pytest.approx(0.3, rel=0.1)
    assert told.tpot_s == pytest.approx(0.02, rel=0.05)
    assert told.e2e_s == pytest.approx(0.3 + 99 * 0.02, rel=0.1)
    assert told.intervals is not None
    assert 0.2 < told.intervals.ttft_s.low < 0.3 < told.intervals.ttft_s.high < 0.45
    other = forecaster.forecast(make_spec(task_type="code"), idle(), LENGTH)
    assert abs(math.log(other.ttft_s / STEP_S)) < abs(math.log(told.ttft_s / STEP_S)), "another task is known less of"


def test_chances_come_true_where_policies_give_up_some() -> None:
    """One in four waits for half a minute; nothing tells which."""
    forecaster, draws = Forecaster(), random.Random(2)
    spec = make_spec(task_type="code", slo=make_slo(e2e_ms=2000))
    told = []
    for _ in range(2000):
        ttft_s = (30.0 if draws.random() < 0.25 else 0.1) * draws.lognormvariate(0, 0.1)
        told.append(run(forecaster, idle(), spec, timing_of(ttft_s, 0.01)))
    assert fmean(t.chance for t in told[500:] if t.chance is not None) == pytest.approx(0.75, abs=0.04)
    last = told[-1].intervals
    assert last is not None
    assert 0.05 < last.ttft_s.low < 0.15
    assert last.ttft_s.high > 20


def test_the_model_that_describes_the_policy_is_found_out() -> None:
    """A full engine with a long queue: in turn it takes seconds to start, overtaking a fraction of one."""
    snapshot = make_snapshot(
        waiting=[{"output_tokens": 200.0}] * 50,
        running=[{"output_tokens": 200.0, "generated_tokens": g, "first_token_at_s": 0.0} for g in (180.0, 100.0)],
        limits=EngineLimits(max_batch_size=2),
        model=CONSTANT,
    )
    spec = make_spec(**CHAT)
    in_turn, overtaking = (
        look(spec, 100.0).ttft_s for look in (Outlook(snapshot).in_turn, Outlook(snapshot).overtaking)
    )
    assert in_turn > 20 * overtaking
    for keeps_order in (True, False):
        for truth in (in_turn, overtaking):
            forecaster = Forecaster(keeps_order=keeps_order)
            for _ in range(200):
                run(forecaster, Outlook(snapshot), spec, timing_of(truth, STEP_S, queue_s=truth - STEP_S))
            told = forecaster.forecast(spec, Outlook(snapshot), LENGTH)
            assert told.ttft_s == pytest.approx(truth, rel=0.15)
            assert told.queue_position == (50 if truth == in_turn else 0)  # nobody there carries an objective


def test_requests_that_gave_up_waiting_count_as_waits_at_least_so_long() -> None:
    patient, censored = Forecaster(), Forecaster()
    draws = random.Random(3)
    for _ in range(600):
        ttft_s = draws.lognormvariate(0, 0.7)
        run(patient, idle(), make_spec(), timing_of(ttft_s, STEP_S, queue_s=ttft_s - STEP_S))
        told = censored.forecast(make_spec(), idle(), LENGTH)
        if ttft_s > 1.5:
            censored.ended(told, Timing(0.0), None, at_s=1.5, finished=False)
        else:
            timing = timing_of(ttft_s, STEP_S, queue_s=max(0.0, ttft_s - STEP_S))
            censored.ended(told, timing, None, at_s=timing.ended_at_s or 0.0, finished=True)
    expected = patient.forecast(make_spec(), idle(), LENGTH).ttft_s
    assert censored.forecast(make_spec(), idle(), LENGTH).ttft_s == pytest.approx(expected, rel=0.15)


def test_forecasts_are_in_order_whatever_was_observed() -> None:
    forecaster, draws = Forecaster(), random.Random(4)
    for _ in range(200):
        ttft_s = draws.lognormvariate(-2, 2)
        timing = timing_of(ttft_s, draws.lognormvariate(-4, 2), queue_s=ttft_s * draws.random())
        told = run(forecaster, idle(A100), make_spec(prompt_tokens=draws.randrange(1, 5000), **CHAT), timing)
        assert told.intervals is not None
        assert 0 <= told.queue_s <= told.ttft_s <= told.e2e_s
        for value, (low, high) in (
            (told.queue_s, told.intervals.queue_s),
            (told.ttft_s, told.intervals.ttft_s),
            (told.e2e_s, told.intervals.e2e_s),
            (told.tpot_s, told.intervals.tpot_s or (0, 0)),
        ):
            assert value is not None
            assert 0 <= low <= value <= high
        assert told.chance is not None
        assert 0 <= told.chance <= 1


def test_nothing_is_learnt_from_a_forecast_of_somebody_else() -> None:
    forecaster = Forecaster()
    before = forecaster.state()
    forecaster.ended(Forecast(1.0, 0, 0.0, 0.0, None, 0.0), timing_of(1.0, 1.0), True, at_s=9.0, finished=True)
    assert forecaster.state() == before


def test_what_was_learnt_survives_a_restart() -> None:
    forecaster, draws = Forecaster(), random.Random(5)
    for _ in range(200):
        run(forecaster, idle(), make_spec(**CHAT), timing_of(draws.lognormvariate(-1, 1), 0.03))
    again = Forecaster()
    again.restore(json.loads(json.dumps(forecaster.state())))
    one, other = (each.forecast(make_spec(**CHAT), idle(), LENGTH) for each in (forecaster, again))
    assert (one.ttft_s, one.tpot_s, one.e2e_s, one.chance) == pytest.approx(
        (other.ttft_s, other.tpot_s, other.e2e_s, other.chance), rel=1e-3
    )
    assert one.intervals is not None
    assert other.intervals is not None
    assert one.intervals.ttft_s == pytest.approx(other.intervals.ttft_s, rel=1e-2)
    broken: list[Any] = [{}, forecaster.state() | {"models": [1]}, forecaster.state() | {"durations": {"queue": 3}}]
    for state in broken:
        with pytest.raises(ValueError):
            again.restore(state)


# -- overtaking -------------------------------------------------------------------------------------------------------


def test_whoever_overtakes_waits_for_what_is_pending_and_for_a_slot() -> None:
    model = StepModel(STEP_S, 1e-4, 0.0, 0.0, 0.0)
    running = [
        {"output_tokens": 50.0, "generated_tokens": 20.0, "first_token_at_s": -0.38},
        {"prompt_tokens": 500.0, "output_tokens": 90.0},
    ]
    waiting = [{"prompt_tokens": 3000.0}] * 5
    free = Outlook(make_snapshot(waiting, running, model=model))
    assert free.pace_s == pytest.approx(0.02)  # 0.38 s for 19 tokens since the first
    told = free.overtaking(make_spec(prompt_tokens=100), 10.0)
    assert told.queue_s == 0.0
    assert told.ttft_s == pytest.approx(0.05 + 0.01 + STEP_S)
    assert told.tpot_s == pytest.approx(0.02)
    assert told.e2e_s == pytest.approx(0.07 + 9 * 0.02)
    full = Outlook(make_snapshot(waiting, running, limits=EngineLimits(max_batch_size=2), model=model))
    assert full.overtaking(make_spec(prompt_tokens=100), 10.0).queue_s == pytest.approx(30 * 0.02)


def test_it_stands_among_those_that_can_still_meet() -> None:
    model = StepModel(STEP_S, 1e-4, 0.0, 0.0, 0.0)
    waiting = [
        {"arrival_at_s": -0.5, "ttft_s": 1.0},
        {"arrival_at_s": -1.5, "ttft_s": 1.0},  # too late
        {"output_tokens": 500.0, "e2e_s": 2.0},  # too long
        {"tpot_s": 0.009},  # too fast
        {},  # promises nothing
    ]
    outlook = Outlook(make_snapshot(waiting, model=model))
    assert outlook.overtaking(make_spec(), 10.0).queue_position == 1
    assert outlook.in_turn(make_spec(), 10.0).queue_position == 5
    assert outlook.hopeful_s == pytest.approx(0.01)
    assert outlook.waiting_s == pytest.approx(0.05)
    outlook.add(make_spec(prompt_tokens=300, slo=make_slo(ttft_ms=9)), 10.0)
    assert outlook.overtaking(make_spec(), 10.0).queue_position == 2
    assert (outlook.hopeful_s, outlook.waiting_s) == pytest.approx((0.04, 0.08))


# -- reasons ----------------------------------------------------------------------------------------------------------


def told_of(chance: float, **chances: float) -> Forecast:
    within = Intervals(Interval(1, 9), Interval(0, 1), Interval(0.1, 0.9), Interval(0.01, 0.06), Interval(1.0, 4.0))
    return Forecast(5.0, 0, 0.0, 0.4, 0.04, 2.0, within, chance, tuple(chances.items()))


def test_a_request_meets_its_slo_when_that_is_as_likely_as_not() -> None:
    slo = make_slo(ttft_ms=300, e2e_ms=3000)
    assert unmet_objectives(slo, told_of(0.5, ttft=0.5, e2e=0.99)) == []
    assert unmet_objectives(slo, told_of(0.4, ttft=0.4, e2e=0.99)) == [
        "ttft is expected to be 400.0 ms (100.0 to 900.0), above the objective of 300 ms"
    ]


def test_a_reason_is_given_even_where_no_median_breaks_an_objective() -> None:
    slo = make_slo(ttft_ms=500, tpot_ms=45, e2e_ms=9000)
    assert unmet_objectives(slo, told_of(0.4, ttft=0.6, tpot=0.6, e2e=0.99)) == [
        "ttft is 60 % likely to be within its objective of 500 ms, and is expected to be 400.0 ms (100.0 to 900.0)",
        "tpot is 60 % likely to be within its objective of 45 ms, and is expected to be 40.0 ms (10.0 to 60.0)",
    ]
    assert unmet_objectives(slo, told_of(0.2, ttft=0.96, tpot=0.96, e2e=0.99)) == [
        "requests like it meet their objectives in 20 % of cases"
    ]
