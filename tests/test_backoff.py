"""Distributions in a context: against the estimate written out, and what is promised of memory, cuts and restarts."""

from __future__ import annotations

import json
import math
import random
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_backoff import PlainBackoff

from lmdeploy_slo.prediction import backoff
from lmdeploy_slo.prediction.backoff import (
    MEMORY,
    PARENT_WEIGHT,
    PRIOR_DEPTH_WEIGHT,
    BackoffDistribution,
    Context,
    log_ratio_support,
    smooth_prior,
)
from lmdeploy_slo.prediction.experts import RATE, ExpertWeights, pinball_loss

SUPPORT = np.arange(0.0, 11.0)
PRIOR = smooth_prior([(x - 4.3) / 2.7 for x in SUPPORT.tolist()])
LEVELS = np.array([0.1, 0.5, 0.9])


def make(**options: Any) -> BackoffDistribution:
    return BackoffDistribution(SUPPORT, PRIOR, 2, **options)


def path(task: str = "a", bucket: int = 0) -> tuple[Context, ...]:
    return ((task,), (task, bucket))


observations = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2), st.integers(1, 10)), max_size=60)


@given(observations)
@settings(max_examples=60)
def test_estimates_are_those_written_out(seen: list[tuple[str, int, int]]) -> None:
    fast, plain = make(), PlainBackoff(SUPPORT.tolist(), PRIOR.tolist(), 2)
    for task, bucket, value in seen:
        fast.observe(path(task, bucket), (task,), value)
        plain.observe(path(task, bucket), (task,), value)
    for task in "abc":
        for bucket in range(4):
            expected = plain.cumulative(path(task, bucket), (task,))
            assert fast.cumulative(path(task, bucket), (task,)) == pytest.approx(expected, abs=1e-9)


def test_before_anything_was_seen_the_prior_holds() -> None:
    assert make().cumulative(path(), ("a",)) == pytest.approx(PRIOR)
    assert make().quantiles(path(), ("a",), PRIOR[3:6]) == pytest.approx(SUPPORT[3:6])


@given(observations)
@settings(max_examples=30)
def test_estimates_are_distributions(seen: list[tuple[str, int, int]]) -> None:
    learnt = make()
    for number, (task, bucket, value) in enumerate(seen):
        learnt.observe(path(task, bucket), (task,), value, at_least=number % 3 == 0)
        cumulative = learnt.cumulative(path(task, bucket), (task,))
        assert cumulative[0] == pytest.approx(0, abs=1e-12)
        assert cumulative[-1] == pytest.approx(1)
        assert (np.diff(cumulative) > 0).all()


def test_a_context_that_says_more_is_listened_to_and_one_that_is_noise_is_not() -> None:
    draws = random.Random(1)
    telling, noise = make(), make()
    for _ in range(2000):
        bucket = draws.randrange(2)
        telling.observe(path("a", bucket), ("a",), 2 + 6 * bucket + draws.randrange(2))
        noise.observe(path("a", draws.randrange(500)), ("a",), draws.randint(1, 10))
    low, high = (telling.quantiles(path("a", bucket), ("a",), LEVELS) for bucket in (0, 1))
    assert low[2] < 4 < 7 < high[0]
    medians = [float(noise.quantiles(path("a", bucket), ("a",), LEVELS)[1]) for bucket in range(500)]
    assert fmean(medians) == pytest.approx(5, abs=0.5)
    assert pstdev(medians) < 0.5


def test_old_observations_fade() -> None:
    learnt, count = BackoffDistribution(SUPPORT, PRIOR, 1), int(MEMORY)
    for _ in range(10 * count):
        learnt.observe((("a",),), ("a",), 2)
    for _ in range(count):
        learnt.observe((("a",),), ("a",), 9)
    rows, share, _ = learnt._look_up((("a",),))
    old = learnt._mass[rows[1], 2] * share[1]
    assert old == pytest.approx(math.exp(-1), rel=0.03)  # less the weight of the prior


def test_a_long_history_stays_a_distribution() -> None:
    learnt = BackoffDistribution(SUPPORT, PRIOR, 1)
    for number in range(40_000):  # the weights of new observations are rescaled on the way
        learnt.observe((("a",),), ("a",), 1 if number % 4 else 10)
    cumulative = learnt.cumulative((("a",),), ("a",))
    assert cumulative == pytest.approx(np.array([0.0] + [0.75] * 9 + [1.0]), abs=0.03)
    assert max(learnt._step) < 1e13


def test_what_was_cut_lies_somewhere_beyond_the_cut() -> None:
    learnt = BackoffDistribution(SUPPORT, PRIOR, 1)
    for number in range(900):
        if number % 3:
            learnt.observe((("a",),), ("a",), 4, at_least=True)  # the others of a law whose median is 5
        else:
            learnt.observe((("a",),), ("a",), 2 if number % 2 else 8)
    low, median, high = learnt.quantiles((("a",),), ("a",), LEVELS)
    assert low < 3
    assert median > 4
    assert high > 7
    only_cut = BackoffDistribution(SUPPORT, PRIOR, 1)
    for _ in range(2000):
        only_cut.observe((("a",),), ("a",), 4, at_least=True)
    above = (PRIOR - PRIOR[4]) / (1 - PRIOR[4])
    expected = np.interp(0.5, above[4:], SUPPORT[4:])  # all that is known beyond 4 is the prior
    assert only_cut.quantiles((("a",),), ("a",), LEVELS)[1] == pytest.approx(expected, abs=0.2)


def test_a_value_beyond_the_support_counts_as_the_largest() -> None:
    learnt = make()
    learnt.observe(path(), ("a",), 1e9)
    learnt.observe(path(), ("a",), 1e9, at_least=True)
    assert learnt.cumulative(path(), ("a",))[-1] == pytest.approx(1)
    assert learnt.cumulative(path(), ("a",))[-2] < PRIOR[-2]


def test_memory_is_bounded_and_the_contexts_used_least_recently_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "MAX_GROUPS", 5)
    learnt = make(max_contexts=8)
    for number in range(100):
        learnt.observe(path("kept", 0), ("kept",), 9)
        learnt.observe(path(f"task {number}", number), (f"task {number}",), 1)
        assert len(learnt._rows) <= 8
        assert len(learnt._groups) <= 5
    assert len(learnt._mass) <= 64
    assert learnt.quantiles(path("kept", 0), ("kept",), LEVELS)[1] > 8
    assert learnt.quantiles(path("task 3", 3), ("task 3",), LEVELS)[1] == pytest.approx(
        make().quantiles(path(), ("a",), LEVELS)[1]
    )


@given(observations)
@settings(max_examples=30)
def test_what_was_learnt_survives_being_written_down(seen: list[tuple[str, int, int]]) -> None:
    learnt, again = make(), make()
    for task, bucket, value in seen:
        learnt.observe(path(task, bucket), (task,), value)
    again.restore(json.loads(json.dumps(learnt.state())))
    for one in (learnt, again):
        one.observe(path("b", 1), ("b",), 7)
    for task in "abc":
        expected = learnt.cumulative(path(task, 1), (task,))
        assert again.cumulative(path(task, 1), (task,)) == pytest.approx(expected, abs=1e-4)
    assert list(again._rows) == list(learnt._rows), "those used least recently are still known"


@pytest.mark.parametrize(
    "change",
    [
        {"bins": 3},
        {"depth": 9},
        {"contexts": [[["a"], [99], [1.0]]]},
        {"contexts": [[["a"], [1], [-1.0]]]},
        {"contexts": [[["a"], [1], [math.nan]]]},
        {"contexts": [[["a"], ["x"], [1.0]]]},
        {"contexts": [[["a"], [1, 2], [1.0]]]},
        {"contexts": [[{"a": 1}, [], []]]},
        {"contexts": [["a"]]},
        {"contexts": 7},
        {"groups": [[["a"], [0.0, 0, 1.0]]]},
        {"groups": [[["a"], [0.0, 0, math.inf, 0.0, 0.0]]]},
        {"groups": [[["a"], ["x", 0, 0.0, 0.0, 0.0]]]},
        {"groups": None},
    ],
)
def test_anything_else_is_refused_and_changes_nothing(change: dict[str, Any]) -> None:
    learnt = make()
    learnt.observe(path(), ("a",), 3)
    before = learnt.cumulative(path(), ("a",))
    with pytest.raises(ValueError):
        learnt.restore(learnt.state() | change)
    with pytest.raises(ValueError):
        learnt.restore({})
    assert (learnt.cumulative(path(), ("a",)) == before).all()


def test_what_is_no_distribution_is_refused() -> None:
    with pytest.raises(ValueError, match="prior"):
        BackoffDistribution(SUPPORT, PRIOR[:-1], 1)
    with pytest.raises(ValueError, match="prior"):
        BackoffDistribution(SUPPORT, PRIOR * 0.5, 1)
    with pytest.raises(ValueError, match="depth"):
        BackoffDistribution(SUPPORT, PRIOR, 0)
    with pytest.raises(ValueError, match="depth"):
        BackoffDistribution(SUPPORT, PRIOR, 4, max_contexts=4)


def test_the_parent_counts_as_so_many_observations() -> None:
    learnt = BackoffDistribution(SUPPORT, PRIOR, 1)
    for _ in range(int(PARENT_WEIGHT)):
        learnt.observe((("a",),), ("a",), 1)
    share = PRIOR_DEPTH_WEIGHT / (PRIOR_DEPTH_WEIGHT + 1)  # of the prior alone, where nobody has been judged
    expected = share * PRIOR[1] + (1 - share) * (1 + PRIOR[1]) / 2
    assert learnt.cumulative((("a",),), ("unknown group",))[1] == pytest.approx(expected, abs=0.01)


# -- ratios and experts -----------------------------------------------------------------------------------------------


def test_bins_of_ratios_are_finest_around_one_and_symmetric() -> None:
    ends, prior = log_ratio_support(0.02, 8.0, 140, 0.3)
    assert (ends[0], ends[70], ends[-1]) == pytest.approx((-8, 0, 8))
    assert ends == pytest.approx(-ends[::-1])
    widths = np.diff(ends)
    assert widths.argmin() in (69, 70)
    assert widths.min() < 0.002
    assert float(np.interp(0.3, ends, prior)) == pytest.approx(0.8413, abs=0.01)
    assert (np.diff(prior) > 0).all()


def test_weights_start_at_their_prior_and_move_to_whoever_loses_less() -> None:
    weights = ExpertWeights([0.2, 0.8])
    assert weights.weights == pytest.approx([0.2, 0.8])
    weights.charge([1.0, 3.0])
    assert weights.weights[0] / weights.weights[1] == pytest.approx(0.25 * math.exp(RATE * (3 - 1) / 2), rel=0.01)
    for _ in range(50):
        weights.charge([1.0, 3.0])
    assert weights.weights[0] > 0.99
    for _ in range(200):
        weights.charge([3.0, 1.0])
    assert weights.weights[1] > 0.99
    weights.charge([1.0, 1e9])
    assert weights.weights[1] > 0.9, "one loss beyond measure does not undo the rest"


def test_the_unit_of_losses_does_not_matter() -> None:
    one, other = ExpertWeights([1.0, 1.0]), ExpertWeights([1.0, 1.0])
    for number in range(20):
        losses = [1.0 + number % 3, 2.0]
        one.charge(losses)
        other.charge(losses, 1000.0)
    assert one.weights == pytest.approx(other.weights)


@pytest.mark.parametrize("every", [1, 2, 4, 10])
def test_one_of_so_many_calls_is_due_in_no_simple_rhythm(every: int) -> None:
    weights = ExpertWeights([1.0])
    due = [number for number in range(1000) if weights.due(every)]
    assert due[0] == 0
    assert len(due) == pytest.approx(1000 / every, rel=0.02)
    for rhythm in range(2, 9):
        shares = [sum(number % rhythm == phase for number in due) / len(due) for phase in range(rhythm)]
        assert max(shares) < 1.7 / rhythm


@given(st.floats(0.01, 0.99), st.lists(st.floats(-100, 100), min_size=1, max_size=30))
def test_the_pinball_loss_is_least_at_the_quantile(level: float, values: list[float]) -> None:
    def total(forecast: float) -> float:
        return sum(pinball_loss(value - forecast, level) for value in values)

    quantile = sorted(values)[math.ceil(level * len(values) - 1e-9) - 1]
    assert total(quantile) <= min(total(value) for value in values) + 1e-9
