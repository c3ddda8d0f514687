"""Durations and probabilities that are corrected by what they turned out to be."""

from __future__ import annotations

import json
import math
import random
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.prediction.backoff import Context
from lmdeploy_slo.prediction.calibrated import PRIOR_SIGMA, CalibratedDuration
from lmdeploy_slo.prediction.reliability import KNOTS, PRIOR_WEIGHT, Reliability

GROUP: Context = ("chat",)
PATH: tuple[Context, ...] = ((), GROUP)


def make() -> CalibratedDuration:
    return CalibratedDuration(0.005, 2)


def learn(duration: CalibratedDuration, value_s: float, base_s: float = 1.0, **options: Any) -> None:
    low, _, high, _ = duration.forecast(PATH, GROUP, base_s)
    duration.observe(PATH, GROUP, base_s, value_s, (low, high), **options)


def test_before_anything_was_seen_the_base_is_the_median() -> None:
    low, median, high, chance = make().forecast(PATH, GROUP, 2.0, 2.0)
    assert (median, chance) == (2.0, pytest.approx(0.5))
    assert high / 2.0 == pytest.approx(math.exp(1.2816 * PRIOR_SIGMA), rel=0.03)
    assert 2.0 / low == pytest.approx(math.exp(1.2816 * PRIOR_SIGMA), rel=0.03)
    assert make().forecast(PATH, GROUP, 0.0)[1] == 0.0
    assert make().forecast(PATH, GROUP, 0.0)[3] is None


def test_a_bias_and_a_spread_are_learnt() -> None:
    duration, draws = make(), random.Random(1)
    for _ in range(1500):
        base_s = draws.uniform(0.5, 5.0)
        learn(duration, base_s * 3 * draws.lognormvariate(0, 0.2), base_s)
    low, median, high, _ = duration.forecast(PATH, GROUP, 2.0)
    assert median == pytest.approx(6.0, rel=0.05)
    assert (low, high) == (pytest.approx(6 * math.exp(-0.256), rel=0.1), pytest.approx(6 * math.exp(0.256), rel=0.1))
    for limit_s in (5.0, 6.0, 7.0):
        expected = 0.5 * math.erfc(-math.log(limit_s / 6.0) / 0.2 / math.sqrt(2))
        assert duration.forecast(PATH, GROUP, 2.0, limit_s)[3] == pytest.approx(expected, abs=0.06)


def test_either_end_is_missed_by_one_in_ten_while_everything_changes() -> None:
    """Bursts, in which durations are up to twenty times as long for a while; nothing foretells them."""
    duration, draws, misses = make(), random.Random(2), []
    for number in range(6000):
        low, _, high, _ = duration.forecast(PATH, GROUP, 1.0)
        burst = 1 + 19 * max(0.0, math.sin(number / 150))
        value_s = burst * draws.lognormvariate(0, 0.3)
        misses.append((value_s < low) - (value_s > high))
        duration.observe(PATH, GROUP, 1.0, value_s, (low, high))
    assert fmean(miss > 0 for miss in misses) == pytest.approx(0.1, abs=0.03)
    assert fmean(miss < 0 for miss in misses) == pytest.approx(0.1, abs=0.03)


def test_what_was_cut_off_is_not_taken_for_quick() -> None:
    duration, draws = make(), random.Random(3)
    for _ in range(1500):
        value_s = draws.lognormvariate(0, 0.5)
        learn(duration, min(value_s, 0.8), at_least=value_s > 0.8)
    assert duration.forecast(PATH, GROUP, 1.0)[1] == pytest.approx(1.0, rel=0.1)


def test_without_an_interval_told_none_is_moved() -> None:
    duration = make()
    before = duration.state()["levels"]
    duration.observe(PATH, GROUP, 1.0, 50.0, None)
    duration.observe(PATH, GROUP, 1.0, 0.1, (0.5, 2.0), at_least=True)
    assert duration.state()["levels"] == before
    duration.observe(PATH, GROUP, 1.0, 3.0, (0.5, 2.0), at_least=True)
    assert duration.state()["levels"] != before


@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 1e5)), max_size=30), st.floats(0, 1e5), st.floats(1e-6, 1e6))
def test_forecasts_are_in_order_and_chances_are_probabilities(
    seen: list[tuple[float, float]], base_s: float, limit_s: float
) -> None:
    duration = make()
    for value_s, about_s in seen:
        learn(duration, value_s, about_s)
    low, median, high, chance = duration.forecast(PATH, GROUP, base_s, limit_s)
    assert 0 <= low <= median <= high < math.inf
    assert chance is not None
    assert 0 <= chance <= 1


def test_what_was_learnt_of_durations_survives_a_restart() -> None:
    duration, again, draws = make(), make(), random.Random(4)
    for _ in range(200):
        learn(duration, draws.lognormvariate(1, 0.5))
    again.restore(json.loads(json.dumps(duration.state())))
    assert again.forecast(PATH, GROUP, 1.0, 2.0) == pytest.approx(duration.forecast(PATH, GROUP, 1.0, 2.0), rel=1e-3)
    for broken in ({}, duration.state() | {"levels": [[["chat"], 0.0, 99.0]]}, duration.state() | {"ratios": 3}):
        with pytest.raises(ValueError):
            again.restore(broken)


# -- probabilities ----------------------------------------------------------------------------------------------------


def test_probabilities_come_true() -> None:
    reliability, draws = Reliability(), random.Random(5)
    for _ in range(4000):
        told = draws.random()
        reliability.observe(GROUP, told, draws.random() < told**2)  # too hopeful
    for told in (0.05, 0.3, 0.5, 0.8, 0.95):
        assert reliability.calibrated(GROUP, told) == pytest.approx(told**2, abs=0.06)
    assert reliability.calibrated(("unknown",), 0.3) == 0.3


def test_few_observations_move_a_probability_little() -> None:
    reliability = Reliability()
    for _ in range(int(PRIOR_WEIGHT)):
        reliability.observe(GROUP, 0.5, False)
    assert reliability.calibrated(GROUP, 0.5) == pytest.approx(0.25, abs=0.01)
    assert reliability.calibrated(GROUP, 0.9) == pytest.approx(0.9, abs=0.01)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=40), st.floats(0, 1))
def test_probabilities_stay_probabilities(seen: list[tuple[float, bool]], told: float) -> None:
    reliability = Reliability()
    for probability, happened in seen:
        reliability.observe(GROUP, probability, happened)
    assert 0 <= reliability.calibrated(GROUP, told) <= 1
    again = Reliability()
    again.restore(json.loads(json.dumps(reliability.state())))
    assert again.calibrated(GROUP, told) == pytest.approx(reliability.calibrated(GROUP, told), abs=1e-4)


def test_groups_are_corrected_apart_and_the_oldest_forgotten() -> None:
    reliability = Reliability()
    for number in range(600):
        reliability.observe(("kept",), 0.5, False)
        reliability.observe((f"group {number}",), 0.5, True)
    assert len(reliability.state()) == 512
    assert reliability.calibrated(("kept",), 0.5) < 0.1
    assert reliability.calibrated(("group 599",), 0.5) > 0.5
    assert reliability.calibrated(("group 0",), 0.5) == 0.5


@pytest.mark.parametrize(
    "state", [3, [3], [[["a"], []]], [[["a"], [[1.0, 2.0]] * len(KNOTS)]], [[["a"], [["x", "y"]] * len(KNOTS)]]]
)
def test_anything_else_than_a_reliability_is_refused(state: Any) -> None:
    reliability = Reliability()
    reliability.observe(GROUP, 0.5, True)
    before = reliability.state()
    with pytest.raises(ValueError):
        reliability.restore(state)
    assert reliability.state() == before
