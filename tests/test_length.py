"""Output length forecasts: what is learnt of tasks, prompts and clients, and what is believed before."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy_slo.core.clients import ClientId
from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.prediction import length as length_module
from lmdeploy_slo.prediction.backoff import MAX_CONTEXTS
from lmdeploy_slo.prediction.length import PRIOR_TOKENS, LengthPredictor, TaskLengthPredictor
from lmdeploy_slo.prediction.length_forecast import LEVELS, MEDIAN, TIMING_SIGMA, LengthForecast, forecast_of
from lmdeploy_slo.prediction.length_gaussian import PRIOR_MEAN, GaussianLengthPredictor
from lmdeploy_slo.prediction.length_predictors import make_length_predictor
from lmdeploy_slo.prediction.length_remaining import HELD_UNTIL, UPPER_Z
from lmdeploy_slo.testing.builders import make_rows, make_spec

LONG = 1 << 17
"""A limit that cuts nothing."""

BOTH: list[Callable[[], Any]] = [TaskLengthPredictor, GaussianLengthPredictor]


def spec_of(**changes: Any) -> RequestSpec:
    return make_spec(**({"max_new_tokens": LONG} | changes))


def lognormal(draws: random.Random, median: float, sigma: float) -> int:
    return max(1, round(draws.lognormvariate(math.log(median), sigma)))


# -- forecasts --------------------------------------------------------------------------------------------------------


def test_the_spread_is_that_of_the_upper_quantiles() -> None:
    normal = NormalDist()
    forecast = forecast_of([200 * math.exp(0.5 * normal.inv_cdf(level)) for level in LEVELS])
    assert forecast.tokens == pytest.approx(200)
    assert forecast.sigma == pytest.approx(math.hypot(0.5, TIMING_SIGMA))
    for level in (0.01, 0.05, 0.33, 0.5, 0.77, 0.9, 0.975):
        expected = 200 * math.exp(0.5 * normal.inv_cdf(min(max(level, 0.025), 0.975)))
        assert forecast.quantile(level) == pytest.approx(expected)
    skewed = [100.0] * (MEDIAN + 1) + [150.0, 250.0, 500.0, 1000.0, 2000.0, 4000.0]
    assert forecast_of(skewed).sigma > 1.2


def test_without_quantiles_a_forecast_is_lognormal() -> None:
    forecast = LengthForecast(100.0, 0.4)
    assert forecast.quantile(0.5) == pytest.approx(100)
    assert forecast.quantile(0.9) == pytest.approx(100 * math.exp(0.4 * 1.2816), rel=1e-4)
    assert LengthForecast(1.0, 2.0).quantile(0.01) == 1.0


@pytest.mark.parametrize("make", BOTH)
@given(
    seen=st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 9000), st.none() | st.integers(1, 9000)), max_size=30),
    prompt_tokens=st.integers(1, 100_000),
    cap=st.integers(1, 5000),
    hint=st.none() | st.floats(0.1, 1e6),
)
@settings(max_examples=40)
def test_quantiles_rise_and_stay_within_the_cap(
    make: Callable[[], LengthPredictor],
    seen: list[tuple[int, int, int | None]],
    prompt_tokens: int,
    cap: int,
    hint: float | None,
) -> None:
    predictor = make()
    for prompt, output, said in seen:
        predictor.observe(make_spec(prompt_tokens=prompt, max_new_tokens=4000, expected_output_tokens=said), output)
    spec = make_spec(prompt_tokens=prompt_tokens, max_new_tokens=cap, expected_output_tokens=hint)
    forecast = predictor.predict(spec)
    assert len(forecast.quantiles) == len(LEVELS)
    assert all(a <= b for a, b in zip(forecast.quantiles, forecast.quantiles[1:], strict=False))
    assert forecast.quantiles[0] >= 1
    assert forecast.quantiles[-1] <= cap
    assert forecast.tokens == forecast.quantiles[MEDIAN]
    assert TIMING_SIGMA <= forecast.sigma < math.inf


# -- without hints ----------------------------------------------------------------------------------------------------


def test_before_anything_was_seen_the_prior_holds() -> None:
    forecast = TaskLengthPredictor().predict(spec_of())
    assert forecast.tokens == pytest.approx(PRIOR_TOKENS, rel=0.02)
    assert forecast.quantile(0.9) / forecast.quantile(0.5) == pytest.approx(math.exp(1.28), rel=0.1)


def test_tasks_and_models_are_learnt_apart() -> None:
    predictor, draws = TaskLengthPredictor(), random.Random(1)
    for _ in range(300):
        predictor.observe(spec_of(task_type="code", model="m"), lognormal(draws, 30, 0.3))
        predictor.observe(spec_of(task_type="chat", model="m"), lognormal(draws, 600, 0.3))
    for task, median in (("code", 30), ("chat", 600)):
        forecast = predictor.predict(spec_of(task_type=task, model="m"))
        assert forecast.tokens == pytest.approx(median, rel=0.1)
        assert forecast.quantile(0.9) == pytest.approx(median * math.exp(0.3 * 1.28), rel=0.15)
    assert predictor.predict(spec_of(task_type="code", model="other")).tokens == pytest.approx(PRIOR_TOKENS, rel=0.02)


def test_a_new_task_starts_from_what_the_model_does_elsewhere() -> None:
    predictor = TaskLengthPredictor()
    for _ in range(200):
        predictor.observe(spec_of(task_type="chat", model="m"), 900)
    assert predictor.predict(spec_of(task_type="new", model="m")).tokens == pytest.approx(900, rel=0.1)


def test_prompts_of_other_lengths_are_learnt_apart_where_that_tells_something() -> None:
    predictor, draws = TaskLengthPredictor(), random.Random(2)
    for _ in range(600):
        predictor.observe(spec_of(prompt_tokens=50), lognormal(draws, 40, 0.3))
        predictor.observe(spec_of(prompt_tokens=5000), lognormal(draws, 800, 0.3))
    assert predictor.predict(spec_of(prompt_tokens=50)).tokens == pytest.approx(40, rel=0.15)
    assert predictor.predict(spec_of(prompt_tokens=5000)).tokens == pytest.approx(800, rel=0.15)
    unseen = predictor.predict(spec_of(prompt_tokens=500))
    assert unseen.quantile(0.1) < 60 < 500 < unseen.quantile(0.9)


def test_a_change_of_habits_is_followed() -> None:
    predictor = TaskLengthPredictor()
    for length in [50] * 2000 + [700] * 600:
        predictor.observe(spec_of(), length)
    assert predictor.predict(spec_of()).tokens > 600


def test_outputs_cut_at_their_limit_are_not_taken_for_short_ones() -> None:
    predictor, draws = TaskLengthPredictor(), random.Random(3)
    for number in range(3000):
        cap = 200 if number % 3 else LONG
        predictor.observe(make_spec(max_new_tokens=cap), min(cap, lognormal(draws, 400, 0.6)))
    assert predictor.predict(spec_of()).tokens == pytest.approx(400, rel=0.15)
    assert predictor.predict(make_spec(max_new_tokens=200)).tokens == 200


# -- with hints -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 100_000), st.integers(1, 5000))
def test_an_unknown_clients_hint_is_taken_at_its_word_within_the_cap(hint: int, cap: int) -> None:
    forecast = TaskLengthPredictor().predict(make_spec(expected_output_tokens=hint, max_new_tokens=cap))
    assert forecast.tokens == min(hint, cap)
    assert forecast.quantile(0.9) == pytest.approx(min(hint * math.exp(0.3 * 1.28), cap), rel=0.05, abs=1)


def learn_hints(
    predictor: TaskLengthPredictor, hint: Callable[[int, random.Random], float], client: str = "", count: int = 600
) -> random.Random:
    draws = random.Random(4)
    for _ in range(count):
        length = lognormal(draws, 300, 1.0)
        predictor.observe(spec_of(fairness_id=client, expected_output_tokens=max(1.0, hint(length, draws))), length)
    return draws


def test_a_clients_bias_and_spread_are_learnt() -> None:
    predictor = TaskLengthPredictor()
    learn_hints(predictor, lambda length, draws: 3 * length * draws.lognormvariate(0, 0.1), "thrice")
    learn_hints(predictor, lambda length, draws: length * draws.lognormvariate(0, 0.5), "vague")
    thrice = predictor.predict(spec_of(fairness_id="thrice", expected_output_tokens=900))
    vague = predictor.predict(spec_of(fairness_id="vague", expected_output_tokens=300))
    assert thrice.tokens == pytest.approx(300, rel=0.1)
    assert thrice.quantile(0.9) / thrice.quantile(0.1) < 1.5
    assert vague.quantile(0.9) / vague.quantile(0.1) > 2
    exact = TaskLengthPredictor()
    learn_hints(exact, lambda length, draws: length)
    assert exact.predict(spec_of(expected_output_tokens=437)).quantiles[2:-2] == pytest.approx([437] * 9, rel=0.02)


def test_hints_that_tell_nothing_are_ignored() -> None:
    predictor = TaskLengthPredictor()
    learn_hints(predictor, lambda length, draws: draws.lognormvariate(math.log(300), 1.0), "liar")
    for hint in (30, 3000):
        told = predictor.predict(spec_of(fairness_id="liar", expected_output_tokens=hint))
        assert told == predictor.predict(spec_of(fairness_id="liar"))
    assert predictor.predict(spec_of(fairness_id="other", task_type="other", expected_output_tokens=30)).tokens < 150


def test_while_a_client_is_on_trial_the_answer_lies_between_hint_and_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length_module, "HINT_PRIOR", 0.5)
    predictor = TaskLengthPredictor()
    for _ in range(300):
        predictor.observe(spec_of(), 100)
    assert predictor.predict(spec_of(expected_output_tokens=400)).tokens == pytest.approx(200, rel=0.05)


# -- running, remembered, bounded -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", BOTH)
def test_a_request_that_runs_on_is_expected_to_run_longer(make: Callable[[], LengthPredictor]) -> None:
    """Against the truncated lognormal drawn."""
    sigma, normal = 0.7, np.random.default_rng(5).standard_normal(400_000)
    drawn = 100 * np.exp(sigma * normal)
    for known in (0, 20, 60, 100, 150, 300):
        rows = make_rows({"generated_tokens": known, "output_tokens": 100.0, "length_sigma": sigma}).copy()
        make().revise(rows)
        tokens, spread = float(rows["output_tokens"][0]), float(rows["length_sigma"][0])
        left = drawn[drawn > known]
        assert tokens == pytest.approx(max(100.0, float(np.quantile(left, HELD_UNTIL)), known + 1), rel=0.02)
        upper = float(np.quantile(left, normal_below(UPPER_Z)))
        held = max(100.0, float(np.quantile(left, HELD_UNTIL)))
        assert spread == pytest.approx(math.log(upper / held) / UPPER_Z, rel=0.03)


def normal_below(z: float) -> float:
    return NormalDist().cdf(z)


@given(st.lists(st.tuples(st.integers(0, 20_000), st.floats(1, 5000), st.floats(0, 3)), min_size=1, max_size=8))
def test_no_forecast_falls_or_ends_before_the_next_token(rows: list[tuple[int, float, float]]) -> None:
    table = make_rows(
        *({"generated_tokens": k, "output_tokens": tokens, "length_sigma": sigma} for k, tokens, sigma in rows)
    ).copy()
    TaskLengthPredictor().revise(table)
    for (known, tokens, sigma), row in zip(rows, table, strict=True):
        assert row["output_tokens"] >= max(tokens * (1 - 1e-9), known + 1)
        assert 0 <= row["length_sigma"] <= max(3 * sigma, 1e-9)
        assert np.isfinite(row["output_tokens"])


@pytest.mark.parametrize("make", BOTH)
def test_equal_histories_give_equal_forecasts(make: Callable[[], LengthPredictor]) -> None:
    one, other = make(), make()
    for length in (3, 700, 20):
        one.observe(make_spec("a"), length)
        other.observe(make_spec("b"), length)
    assert one.predict(make_spec()) == other.predict(make_spec())


@pytest.mark.parametrize("make", BOTH)
def test_what_was_learnt_survives_a_restart(make: Callable[[], Any]) -> None:
    predictor, draws = make(), random.Random(6)
    for _ in range(400):
        length = lognormal(draws, 300, 1.0)
        hint = length * 2 if draws.random() < 0.5 else None
        predictor.observe(spec_of(prompt_tokens=draws.randrange(1, 5000), expected_output_tokens=hint), length)
    again = make()
    again.restore(json.loads(json.dumps(predictor.state())))
    for spec in (spec_of(), spec_of(prompt_tokens=17), spec_of(expected_output_tokens=600), spec_of(task_type="new")):
        expected = predictor.predict(spec)
        assert again.predict(spec).quantiles == pytest.approx(expected.quantiles, abs=1)
        assert again.predict(spec).sigma == pytest.approx(expected.sigma, abs=0.02)
    for broken in ({}, {"tasks": 3}, predictor.state() | {"trust": [[1]], "tasks": [["a", "b", 1.0, 2.0, -3.0]]}):
        before = again.predict(spec_of())
        with pytest.raises(ValueError):
            again.restore(broken)
        assert again.predict(spec_of()) == before


def test_memory_is_bounded_whatever_clients_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length_module, "MAX_CLIENTS", 20)
    predictor = TaskLengthPredictor()
    for number in range(1500):
        predictor.observe(
            spec_of(
                task_type=f"t{number}", fairness_id=f"c{number}", prompt_tokens=number + 1, expected_output_tokens=9
            ),
            number + 1,
        )
    state = predictor.state()
    assert len(state["trust"]) == 20
    assert len(state["lengths"]["contexts"]) == len(state["hints"]["contexts"]) == MAX_CONTEXTS


# -- the paper's ------------------------------------------------------------------------------------------------------


def test_the_papers_lengths_are_normal() -> None:
    predictor, draws = GaussianLengthPredictor(), random.Random(7)
    assert predictor.predict(spec_of()).tokens == pytest.approx(PRIOR_MEAN + 23, abs=20)  # cut off below a token
    lengths = [max(1, round(draws.gauss(500, 60))) for _ in range(3000)]
    for length in lengths:
        predictor.observe(spec_of(task_type="chat"), length)
    forecast = predictor.predict(spec_of(task_type="chat"))
    for level in (0.1, 0.5, 0.9):
        assert forecast.quantile(level) == pytest.approx(NormalDist(500, 60).inv_cdf(level), rel=0.03)
    assert predictor.predict(spec_of(task_type="chat", prompt_tokens=9)) == forecast
    assert predictor.predict(spec_of(task_type="chat", expected_output_tokens=33)).tokens == 33
    assert predictor.predict(make_spec(task_type="chat", max_new_tokens=300)).tokens == 300


def test_the_papers_predictor_forgets_the_tasks_seen_longest_ago() -> None:
    predictor = GaussianLengthPredictor()
    for number in range(1200):
        predictor.observe(spec_of(task_type=f"t{number}"), 900)
        predictor.observe(spec_of(task_type="kept"), 50)
    assert len(predictor.state()["tasks"]) == 1024
    assert predictor.predict(spec_of(task_type="kept")).tokens < 80


def test_predictors_are_found_by_name() -> None:
    assert isinstance(make_length_predictor("learned"), TaskLengthPredictor)
    assert isinstance(make_length_predictor("gaussian"), GaussianLengthPredictor)
    with pytest.raises(ConfigError, match="'best'; choose one of learned, gaussian"):
        make_length_predictor("best")


def test_hints_are_those_of_who_sent_them_whatever_they_say_of_themselves() -> None:
    predictor = TaskLengthPredictor()
    for _ in range(300):
        predictor.observe(spec_of(client=ClientId("known"), fairness_id="a", expected_output_tokens=300), 100)
    told = predictor.predict(spec_of(client=ClientId("known"), fairness_id="b", expected_output_tokens=300))
    assert told.tokens == pytest.approx(100, rel=0.05)
