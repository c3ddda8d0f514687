"""Output length forecasts: the hint, the prior, what is learnt, and requests that outlive their forecast."""

from __future__ import annotations

import math
import random
from statistics import fmean, pvariance

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.prediction.length import (
    HINT_SIGMA,
    MEMORY,
    PRIOR_SIGMA,
    PRIOR_TOKENS,
    PRIOR_WEIGHT,
    TaskLengthPredictor,
)
from lmdeploy_slo.testing.builders import make_rows, make_spec


@given(st.floats(0.1, 1e6), st.integers(1, 5000))
def test_a_hint_is_taken_at_its_word_within_the_cap(hint: float, cap: int) -> None:
    forecast = TaskLengthPredictor().predict(make_spec(expected_output_tokens=hint, max_new_tokens=cap))
    assert forecast.tokens == min(max(1.0, hint), cap)
    assert forecast.sigma == HINT_SIGMA


def test_before_anything_was_seen_the_prior_holds() -> None:
    forecast = TaskLengthPredictor().predict(make_spec())
    assert forecast.tokens == pytest.approx(PRIOR_TOKENS)
    assert forecast.sigma == PRIOR_SIGMA


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=200))
def test_what_is_learnt_is_the_mean_and_spread_of_prior_and_observations(lengths: list[int]) -> None:
    predictor, spec = TaskLengthPredictor(), make_spec(max_new_tokens=10**6)
    for length in lengths:
        predictor.observe(spec, length)
    # The prior stands for PRIOR_WEIGHT observations of mean log(PRIOR_TOKENS) and variance PRIOR_SIGMA^2.
    prior_mean, logs = math.log(PRIOR_TOKENS), [math.log(length) for length in lengths]
    weight = PRIOR_WEIGHT + len(logs)
    mean = (PRIOR_WEIGHT * prior_mean + sum(logs)) / weight
    square = PRIOR_WEIGHT * (PRIOR_SIGMA**2 + (prior_mean - mean) ** 2) + sum((x - mean) ** 2 for x in logs)
    forecast = predictor.predict(spec)
    assert forecast.tokens == pytest.approx(max(1.0, math.exp(mean)), rel=1e-6)
    assert forecast.sigma == pytest.approx(math.sqrt(square / weight), rel=1e-6)


def test_many_observations_outweigh_the_prior() -> None:
    predictor, spec, draws = TaskLengthPredictor(), make_spec(max_new_tokens=10**6), random.Random(1)
    lengths = [max(1, round(draws.lognormvariate(math.log(900), 0.4))) for _ in range(3000)]
    for length in lengths:
        predictor.observe(spec, length)
    logs = [math.log(length) for length in lengths[-1000:]]
    assert predictor.predict(spec).tokens == pytest.approx(math.exp(fmean(logs)), rel=0.1)
    assert predictor.predict(spec).sigma == pytest.approx(math.sqrt(pvariance(logs)), rel=0.2)


def test_old_observations_fade() -> None:
    predictor, spec = TaskLengthPredictor(), make_spec(max_new_tokens=10**6)
    for _ in range(2000):
        predictor.observe(spec, 50)
    before = math.log(predictor.predict(spec).tokens)
    for _ in range(int(MEMORY)):
        predictor.observe(spec, 5000)
    after = math.log(predictor.predict(spec).tokens)
    assert (math.log(5000) - after) / (math.log(5000) - before) == pytest.approx(1 / math.e, rel=0.01)


def test_tasks_and_models_are_learnt_apart() -> None:
    predictor = TaskLengthPredictor()
    for _ in range(200):
        predictor.observe(make_spec(task_type="code", model="m"), 30)
        predictor.observe(make_spec(task_type="chat", model="m"), 600)
    code = predictor.predict(make_spec(task_type="code", model="m")).tokens
    chat = predictor.predict(make_spec(task_type="chat", model="m")).tokens
    assert code < 50 < 400 < chat
    assert predictor.predict(make_spec(task_type="code", model="other")).tokens == pytest.approx(PRIOR_TOKENS)
    assert predictor.predict(make_spec(task_type="chat", model="m", max_new_tokens=100)).tokens == 100


def test_equal_histories_give_equal_forecasts() -> None:
    one, other = TaskLengthPredictor(), TaskLengthPredictor()
    for length in (3, 700, 20):
        one.observe(make_spec("a"), length)
        other.observe(make_spec("b"), length)
    assert one.predict(make_spec()) == other.predict(make_spec())


def test_a_forecast_reached_is_a_forecast_outlived() -> None:
    rows = make_rows(
        {"generated_tokens": 40, "output_tokens": 40.0}, {"generated_tokens": 39, "output_tokens": 40.0}
    ).copy()
    TaskLengthPredictor().revise(rows)
    assert rows["output_tokens"].tolist() == pytest.approx([40 * 1.15 + 1, 40.0])


@given(st.integers(0, 5000), st.floats(1, 5000), st.floats(0, 2))
def test_only_a_forecast_that_was_outlived_is_raised(generated: int, forecast: float, sigma: float) -> None:
    rows = make_rows({"generated_tokens": generated, "output_tokens": forecast, "length_sigma": sigma}).copy()
    TaskLengthPredictor().revise(rows)
    revised = float(rows["output_tokens"][0])
    if generated < forecast:
        assert revised == forecast
    else:
        assert revised == pytest.approx(generated * (1 + sigma / 2) + 1)
        assert revised > generated
