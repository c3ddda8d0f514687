"""The robust recursive fit: follows an engine that changes, and is not led astray by anything else."""

from __future__ import annotations

import json
import random
from dataclasses import astuple, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.prediction.calibration_estimator import LARGEST_STEP, StepEstimator, Work
from lmdeploy_slo.testing.builders import A100, NO_TIME

COEFFICIENTS = ("c0", "p1", "p2", "d1", "d2")
CHANGES = [
    (1.3, 1.3, 1.3, 1.3, 1.3),
    (0.7, 0.7, 0.7, 0.7, 0.7),
    (1.3, 0.7, 1.3, 0.7, 1.3),
    (0.7, 1.3, 0.7, 1.3, 0.7),
    (1.0, 1.3, 1.3, 1.0, 1.0),
]


def changed(factors: tuple[float, ...]) -> StepModel:
    return StepModel(*(factor * value for factor, value in zip(factors, astuple(A100), strict=True)))


def seconds(model: StepModel, work: Work) -> float:
    """By the formula, and by none of the code that is tested."""
    columns = (work.steps, work.prefill_tokens, work.prefill_square, work.sequence_steps, work.context_tokens)
    return sum(value * column for value, column in zip(astuple(model), columns, strict=True))


class Load:
    """Work as a loaded engine has it; prompts in half of the windows unless told otherwise."""

    def __init__(self, seed: int = 0, *, noise: float = 0.02, pauses: float = 0.0) -> None:
        self.random = random.Random(seed)
        self.noise, self.pauses = noise, pauses

    def work(self, model: StepModel, *, prompts: bool = True) -> Work:
        draw = self.random
        steps, batch = 8.0, draw.randint(5, 120)
        context = batch * draw.uniform(500, 1500)
        tokens = square = 0.0
        if prompts and draw.random() < 0.5:
            steps, tokens = float(draw.randint(1, 8)), float(draw.randint(50, 4000))
            square = tokens * tokens * draw.uniform(0.3, 1.0)
        work = Work(1.0, steps, tokens, square, steps * batch, steps * context)
        duration_s = seconds(model, work) * draw.lognormvariate(0.0, self.noise)
        if draw.random() < self.pauses:
            duration_s += draw.uniform(0.1, 2.0)
        return replace(work, duration_s=duration_s)


def largest_error(estimator: StepEstimator, model: StepModel, seed: int = 1) -> float:
    load = Load(seed, noise=0.0)
    works = [load.work(model) for _ in range(40)]
    return max(abs(estimator.expected_s(work) / work.duration_s - 1) for work in works)


@pytest.mark.parametrize("factors", CHANGES)
def test_an_engine_that_changes_is_followed(factors: tuple[float, ...]) -> None:
    """150 windows after the change every forecast is right to 5 %."""
    estimator, load, truth = StepEstimator(A100), Load(), changed(factors)
    for _ in range(400):
        estimator.update(load.work(A100))
    assert largest_error(estimator, A100) < 0.03
    for _ in range(150):
        estimator.update(load.work(truth))
    assert largest_error(estimator, truth) < 0.05


@pytest.mark.parametrize("factors", CHANGES[:3])
def test_pauses_in_a_tenth_of_the_windows_do_little(factors: tuple[float, ...]) -> None:
    estimator, load, truth = StepEstimator(A100), Load(pauses=0.1), changed(factors)
    for _ in range(400):
        estimator.update(load.work(truth))
    assert largest_error(estimator, truth) < 0.06


def test_one_pause_moves_nothing_by_much() -> None:
    estimator, load = StepEstimator(A100), Load(noise=0.005)
    for _ in range(300):
        estimator.update(load.work(A100))
    before = estimator.model
    estimator.update(replace(load.work(A100), duration_s=60.0))
    for name in COEFFICIENTS:
        assert getattr(estimator.model, name) == pytest.approx(getattr(before, name), rel=0.02)


def test_what_is_not_seen_does_not_wander() -> None:
    """A day of pure decoding: prompts cost what they did."""
    estimator, load, truth = StepEstimator(A100), Load(), changed((1.2, 1.4, 1.4, 1.2, 1.2))
    for _ in range(1000):
        estimator.update(load.work(truth))
    before = estimator.model
    for _ in range(20_000):
        estimator.update(load.work(truth, prompts=False))
    assert estimator.model.p1 == pytest.approx(before.p1, rel=0.05)
    assert largest_error(estimator, truth) < 0.05


def test_what_was_never_seen_changes_with_the_rest() -> None:
    """Half as fast throughout, seen in decoding alone: prompts are taken to be half as fast as well."""
    estimator, load, truth = StepEstimator(A100), Load(), A100.scaled(2.0)
    for _ in range(1000):
        estimator.update(load.work(truth, prompts=False))
    assert estimator.model.p1 == pytest.approx(truth.p1, rel=0.2)
    assert estimator.slowness == pytest.approx(2.0, rel=0.05)


def test_a_profile_of_another_gpu_is_left_behind() -> None:
    estimator, load = StepEstimator(A100), Load()
    truth = StepModel(c0=4.34e-3, p1=0.01703e-3, p2=4.99e-10, d1=0.00733e-3, d2=1.30e-8)
    for _ in range(300):
        estimator.update(load.work(truth))
    assert largest_error(estimator, truth) < 0.05


@pytest.mark.parametrize("truth", [A100, replace(A100, p2=0.0)])
def test_a_coefficient_believed_to_be_0_may_be_so_or_not(truth: StepModel) -> None:
    estimator, load = StepEstimator(replace(A100, p2=0.0)), Load(noise=0.005)
    for _ in range(600):
        estimator.update(load.work(truth))
    assert largest_error(estimator, truth) < 0.03
    assert estimator.model.p2 == pytest.approx(truth.p2, abs=0.45 * A100.p2)


def test_nothing_is_believed_of_an_engine_without_a_profile() -> None:
    estimator, load = StepEstimator(NO_TIME), Load()
    for _ in range(600):
        estimator.update(load.work(A100))
    assert largest_error(estimator, A100) < 0.05


positive = st.floats(1e-4, 1e4)
works = st.builds(
    Work,
    duration_s=st.floats(1e-4, 1e3),
    steps=st.floats(1, 100),
    prefill_tokens=st.just(0.0) | positive,
    prefill_square=st.just(0.0) | st.floats(1, 1e9),
    sequence_steps=st.just(0.0) | positive,
    context_tokens=st.just(0.0) | st.floats(1, 1e7),
)


@settings(max_examples=60)
@given(st.lists(works, max_size=40))
def test_whatever_is_observed_coefficients_stay_positive_and_steps_bounded(history: list[Work]) -> None:
    estimator = StepEstimator(A100)
    for work in history:
        before, slowness = astuple(estimator.model), estimator.slowness
        estimator.update(work)
        for value, was, unit in zip(astuple(estimator.model), before, astuple(A100), strict=True):
            largest = LARGEST_STEP * max(was, 0.2 * max(slowness, estimator.slowness) * unit)
            assert 0 <= value <= was + largest * (1 + 1e-9)
            assert value >= was - largest * (1 + 1e-9)


def test_numbers_beyond_reason_do_not_stay() -> None:
    estimator, load = StepEstimator(A100), Load()
    for duration_s in (1e300, 1e-300):
        estimator.update(Work(duration_s, 1e150, 1e150, 1e150, 1e150, 1e150))
    for _ in range(300):
        estimator.update(load.work(A100))
    assert largest_error(estimator, A100) < 0.05


def test_a_state_goes_on_where_it_was() -> None:
    first, load = StepEstimator(A100), Load(seed=3)
    for _ in range(200):
        first.update(load.work(A100.scaled(1.4)))
    second = StepEstimator(A100)
    assert second.restore(json.loads(json.dumps(first.state())))
    assert second.model == first.model
    for _ in range(50):
        work = load.work(A100.scaled(1.4))
        first.update(work)
        second.update(work)
    assert astuple(second.model) == pytest.approx(astuple(first.model), rel=1e-3)


def test_a_state_of_another_profile_is_left() -> None:
    other = StepEstimator(A100.scaled(2.0))
    assert not StepEstimator(A100).restore(other.state())


@pytest.mark.parametrize(
    "change",
    [
        {"value": [1, 1, 1, 1]},
        {"value": [1, 1, 1, 1, -1]},
        {"value": [1, 1, 1, 1, "x"]},
        {"value": [1, 1, 1, 1, float("nan")]},
        {"information": [[1]]},
        {"information": [[-1.0 * (i == j) for i in range(5)] for j in range(5)]},
        {"information": [[float(i > j) + (i == j) for i in range(5)] for j in range(5)]},
        {"slowness": 0.0},
        {"updates": -1},
        {"prior": None},
    ],
)
def test_what_is_no_state_is_refused_and_changes_nothing(change: dict[str, object]) -> None:
    estimator = StepEstimator(A100)
    with pytest.raises((ValueError, TypeError, KeyError)):
        estimator.restore({**estimator.state(), **change})
    assert estimator.model == A100
