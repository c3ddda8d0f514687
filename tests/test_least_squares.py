"""Coefficients come back from what a known model would have measured, disturbed or not."""

from __future__ import annotations

import csv
import math
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy_slo.config import traces_dir
from lmdeploy_slo.core.latency_model import BilinearModel, StepModel
from lmdeploy_slo.prediction.fit_errors import error_figures, errors_by_kind, predicted_by_bilinear, predicted_by_step
from lmdeploy_slo.prediction.least_squares import disturbed, fit_bilinear, fit_models, fit_step
from lmdeploy_slo.prediction.observations import (
    Kind,
    Observation,
    decode_observation,
    prefill_observation,
    range_of,
    seconds_of,
)
from lmdeploy_slo.prediction.profiles import load_profile, profile_names

MOST = 8192
TABLE = "lmdeploy_turbomind_v0.2.0_a100_fp16_static.csv"


def grid(repeats: int = 1) -> list[Observation]:
    """Prefill, decode and mixed points whose durations are still to be filled in."""
    points = [
        prefill_observation(count, tokens, 1.0, max_prefill_tokens=MOST, point=f"prefill {count} {tokens}")
        for count, tokens in ((1, 16), (1, 256), (1, 2048), (1, 8192), (1, 12000), (4, 512), (4, 2048), (16, 512))
    ]
    points += [
        decode_observation(batch, batch * context, 1.0, steps=steps, point=f"decode {batch} {context}")
        for batch in (1, 8, 64, 256)
        for context in (32, 1024, 8000)
        for steps in (32,)
    ]
    points.append(Observation(1, 1.0, 1, 2048, 2048**2, 64, 64 * 1024, "mixed"))
    return [point for point in points for _ in range(repeats)]


def timed(points: list[Observation], seconds: np.ndarray) -> list[Observation]:
    return [replace(point, seconds=float(s)) for point, s in zip(points, seconds, strict=True)]


def far_corner_terms(model: StepModel) -> np.ndarray:
    """What each coefficient adds to a step with everything in it."""
    return np.array(astuple(model)) * np.array([1, MOST, MOST**2, 256, 256 * 8000])


log_coefficients = st.tuples(
    st.floats(-6.2, -3.9), st.floats(-11.5, -9.2), st.floats(-22, -19.5), st.floats(-12.5, -10), st.floats(-18.5, -15)
)


@given(log_coefficients)
@settings(max_examples=40)
def test_an_exact_record_gives_the_exact_model(logs: tuple[float, ...]) -> None:
    model = StepModel(*(math.exp(value) for value in logs))
    points = grid()
    fitted = fit_models(timed(points, predicted_by_step(model, points)))
    assert np.abs(far_corner_terms(fitted.step) - far_corner_terms(model)).max() < 1e-4 * far_corner_terms(model).sum()
    assert fitted.set_aside == ()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_noise_and_disturbed_repeats_move_it_little(seed: int) -> None:
    """Noise of 2 %, and one value in eight is up to five times too long."""
    model = load_profile("a100-qwen2.5-7b").step_model
    points = grid(repeats=5)
    random = np.random.default_rng(seed)
    seconds = predicted_by_step(model, points) * random.lognormal(0, 0.02, len(points))
    hit = random.random(len(points)) < 0.125
    fitted = fit_models(timed(points, np.where(hit, seconds * random.uniform(1.5, 5, len(points)), seconds)))
    assert np.abs(far_corner_terms(fitted.step) - far_corner_terms(model)).max() < 0.03 * far_corner_terms(model).sum()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_without_repeats_single_values_pull_little(seed: int) -> None:
    model = load_profile("h200-llama3.1-8b").step_model
    points = [replace(point, point="") for point in grid(repeats=3)]
    random = np.random.default_rng(seed)
    seconds = predicted_by_step(model, points) * random.lognormal(0, 0.01, len(points))
    hit = random.random(len(points)) < 0.05
    fitted = fit_models(timed(points, np.where(hit, 4 * seconds, seconds)))
    assert np.abs(far_corner_terms(fitted.step) - far_corner_terms(model)).max() < 0.05 * far_corner_terms(model).sum()


def test_a_point_whose_repeats_agree_is_kept_however_far_off_it_is() -> None:
    model = load_profile("a100-qwen2.5-7b").step_model
    points = grid(repeats=4)
    seconds = predicted_by_step(model, points)
    own = np.array([point.point == "decode 256 8000" for point in points])
    fitted = fit_models(timed(points, np.where(own, 1.5 * seconds, seconds)))
    assert fitted.set_aside == ()
    assert fitted.step.d2 > model.d2


def test_the_repeat_that_was_disturbed_is_set_aside() -> None:
    model = load_profile("a100-qwen2.5-7b").step_model
    points = grid(repeats=4)
    seconds = predicted_by_step(model, points)
    seconds[5] *= 3
    fitted = fit_models(timed(points, seconds))
    assert [o.point for o in fitted.set_aside] == [points[5].point]
    assert len(fitted.kept) == len(points) - 1
    two = timed(points[:2], np.array([1.0, 3.0]))
    assert not disturbed(two, model).any(), "two repeats do not say which of them is off"


@given(st.lists(st.floats(1e-4, 10), min_size=21, max_size=21))
@settings(max_examples=50)
def test_whatever_was_measured_no_time_is_negative(seconds: list[float]) -> None:
    observations = timed(grid(), np.array(seconds))
    fitted = fit_models(observations)
    assert min(astuple(fitted.step)) >= 0
    assert predicted_by_step(fitted.step, observations).min() >= 0
    assert fitted.bilinear is not None
    assert min(fitted.bilinear.prefill + fitted.bilinear.decode) >= 0


def test_the_papers_model_comes_back() -> None:
    model = BilinearModel((2e-5, 3e-4, 4e-6, 5e-3), (3e-8, 1e-5, 4e-8, 9e-3))
    points = [o for o in grid() if o.kind is not Kind.MIXED]
    fitted = fit_bilinear(timed(points, predicted_by_bilinear(model, points)))
    assert fitted is not None
    assert (*fitted.prefill, *fitted.decode) == pytest.approx((*model.prefill, *model.decode), rel=1e-5)


def test_the_papers_model_says_nothing_of_mixed_steps() -> None:
    model = BilinearModel((1, 1, 1, 1), (1, 1, 1, 1))
    observations = grid()
    assert [math.isnan(s) for s in predicted_by_bilinear(model, observations)] == [
        o.kind is Kind.MIXED for o in observations
    ]
    assert fit_bilinear([o for o in observations if o.kind is not Kind.DECODE]) is None


def test_the_papers_decode_of_an_observation_is_its_closed_form() -> None:
    model = BilinearModel((0, 0, 0, 0), (3e-8, 1e-5, 4e-8, 9e-3))
    observation = decode_observation(7, 7 * 500, 1.0, steps=40)
    assert predicted_by_bilinear(model, [observation])[0] == pytest.approx(model.decode_s(7, 500.0, 40.0))


def test_what_is_not_in_the_record_is_zero() -> None:
    fitted = fit_models([decode_observation(1, 100, 0.01), decode_observation(1, 200, 0.01)])
    assert fitted.step.p1 == fitted.step.p2 == 0
    assert fitted.range.prompt_tokens is None
    assert fitted.bilinear is None
    with pytest.raises(ValueError, match="nothing to fit"):
        fit_models([])


def test_errors_by_hand() -> None:
    figures = error_figures(np.array([1.0, 2.0, 4.0]), np.array([1.1, 2.0, 3.0]))
    assert figures is not None
    assert (figures.count, figures.mape, figures.median, figures.worst) == pytest.approx((3, 0.35 / 3, 0.1, 0.25))
    assert figures.r2 == pytest.approx(1 - (0.01 + 1.0) / (16 / 9 + 1 / 9 + 25 / 9))
    assert error_figures(np.array([]), np.array([])) is None
    same = error_figures(np.array([2.0, 2.0]), np.array([2.0, 2.0]))
    assert same is not None and same.r2 is None


def test_errors_are_told_by_kind() -> None:
    observations = grid()
    figures = errors_by_kind(observations, 1.1 * seconds_of(observations))
    assert {kind: figure.count for kind, figure in figures.items()} == {
        "prefill": 8,
        "decode": 12,
        "mixed": 1,
        "all": 21,
    }
    assert all(figure.mape == pytest.approx(0.1) for figure in figures.values())


def test_the_range_is_of_single_passes() -> None:
    found = range_of(grid())
    assert found.prompt_tokens == (16, 12000)
    assert found.prefill_tokens == (16, 8192)
    assert found.batch_size == (1, 256)
    assert found.context_tokens == (32 + 15.5, 8000 + 15.5)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0, "seconds": 1.0, "prompts": 1},
        {"steps": 1, "seconds": 0.0, "prompts": 1},
        {"steps": 1, "seconds": math.nan, "prompts": 1},
        {"steps": 1, "seconds": 1.0, "prompts": 1, "prefill_tokens": -1.0},
        {"steps": 1, "seconds": 1.0},
    ],
)
def test_observations_out_of_range(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Observation(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_model_can_be_found_again(name: str) -> None:
    model = load_profile(name).step_model
    points = grid()
    found = fit_step(timed(points, predicted_by_step(model, points)))
    assert astuple(found) == pytest.approx(astuple(model), rel=1e-3, abs=1e-12)


def test_lmdeploys_table_of_an_a100() -> None:
    folder = traces_dir()
    places = [] if folder is None else [folder / TABLE, folder.parent / "profiles" / TABLE]
    table = next(filter(Path.exists, places), None)
    if table is None:
        pytest.skip(f"{TABLE} is not among the recorded traces")
    with table.open(newline="") as file:
        rows = [
            (int(row["batch"]), int(row["prompt_tokens"]), int(row["output_tokens"]), float(row["tok_p50_s"]))
            for row in csv.DictReader(file)
        ]
    measured = [
        decode_observation(batch, batch * (prompt + output / 2), seconds)
        for batch, prompt, output, seconds in rows
        if not (batch == 64 and prompt == 2048)  # more than the KV cache holds
    ]
    assert len(measured) == 18
    fitted = fit_models(measured)
    assert errors_by_kind(measured, predicted_by_step(fitted.step, measured))["decode"].mape < 0.04
