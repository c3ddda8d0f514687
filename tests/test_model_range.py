"""A model says once, and only then, that it is asked about what it was not fitted on; and what it says is no less."""

from __future__ import annotations

import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine

from lmdeploy_slo.app import build_runtime
from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.config import Config, EngineConfig
from lmdeploy_slo.core.latency_model import BilinearModel, StepModel
from lmdeploy_slo.core.model_range import ModelRange, RangedBilinearModel, RangedStepModel, RangeWatch
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.testing.builders import make_spec

MODEL = StepModel(4e-3, 2e-5, 1e-9, 1e-5, 2e-8)
PAPER = BilinearModel((1e-5, 2e-4, 3e-5, 4e-3), (1e-8, 2e-4, 3e-8, 5e-3))
FITTED = ModelRange(prompt_tokens=(16, 4096), prefill_tokens=(16, 8192), batch_size=(1, 64), context_tokens=(32, 6000))

amounts = st.floats(0, 1e6)
coefficients = st.floats(0, 1.0)


def ranged() -> RangedStepModel:
    return RangedStepModel(MODEL, RangeWatch("mine", FITTED), max_prefill_tokens=8192)


def test_inside_the_range_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = ranged()
    model.step_s(8192, 8192**2, 64, 64 * 6000)
    model.step_s(0, 0, 1, 32)
    model.step_s(16, 16**2, 0, 0)
    model.prefill_s(1, 4096)
    model.decode_s(64, 100, 20)
    assert caplog.records == []


def test_each_quantity_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = ranged()
    for batch in (65, 128, 256):
        model.step_s(0, 0, batch, batch * 100)
    assert [r.getMessage() for r in caplog.records] == [
        "profile mine: batch_size 65 is outside 1 to 64, which it was fitted on: times are extrapolated"
    ]
    assert caplog.records[0].levelno == logging.WARNING
    model.decode_s(65, 7000, 100)
    model.prefill_s(1, 5000)
    assert [r.getMessage().split()[2] for r in caplog.records[1:]] == ["context_tokens", "prompt_tokens"]


def test_the_papers_model_is_watched_as_well(caplog: pytest.LogCaptureFixture) -> None:
    model = RangedBilinearModel(PAPER, RangeWatch("mine", FITTED))
    assert model.prefill_s(2, 4096) == PAPER.prefill_s(2, 4096.0)
    assert caplog.records == []
    assert model.prefill_s(3, 4096) == PAPER.prefill_s(3, 4096.0)
    assert model.decode_s(100, 500, 10) == PAPER.decode_s(100, 500.0, 10.0)
    assert [r.getMessage().split()[2] for r in caplog.records] == ["prefill_tokens", "batch_size"]


def test_what_was_not_measured_has_no_range(caplog: pytest.LogCaptureFixture) -> None:
    RangeWatch("mine", ModelRange()).note(batch_size=1e6, prompt_tokens=1e9)
    assert caplog.records == []


@given(st.builds(StepModel, *(coefficients for _ in range(5))), *(amounts for _ in range(4)))
def test_a_watched_step_is_the_bare_one_and_never_negative(
    model: StepModel, tokens: float, square: float, batch: float, context: float
) -> None:
    watched = RangedStepModel(model, RangeWatch("mine", FITTED), 8192)
    assert watched.step_s(tokens, square, batch, context) == model.step_s(tokens, square, batch, context) >= 0


@given(st.integers(1, 300), st.integers(1, 9000), st.integers(1, 9000))
def test_a_static_batch_is_prefilled_in_as_few_steps_as_hold_it(batch: int, prompt: int, limit: int) -> None:
    model = RangedStepModel(MODEL, RangeWatch("mine", FITTED), limit)
    left, steps = batch * prompt, 0
    while left > 0:
        left, steps = left - limit, steps + 1
    expected = steps * MODEL.c0 + batch * (MODEL.p1 * prompt + MODEL.p2 * prompt**2)
    assert model.prefill_s(batch, prompt) == pytest.approx(expected)


@pytest.mark.parametrize("span", [(2.0, 1.0), (-1.0, 1.0), (0.0, math.inf), (math.nan, 1.0)])
def test_a_span_is_finite_and_in_order(span: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="batch_size must be two finite numbers"):
        ModelRange(batch_size=span)


def test_a_step_holds_a_token() -> None:
    with pytest.raises(ValueError, match="max_prefill_tokens"):
        RangedStepModel(MODEL, RangeWatch("mine", FITTED), 0)


@pytest.mark.parametrize("synthetic", [False, True])
async def test_a_server_tells_what_its_profile_was_not_fitted_on(
    synthetic: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The emulated engine is its profile: there is nothing to be wrong about."""
    engine = ScriptedEngine(MonotonicClock(), limits=EngineLimits(256, 2048), synthetic=synthetic)
    config = Config(engine=EngineConfig(profile="a100-llama2-7b-turbomind"))
    runtime = build_runtime(config, engine, MonotonicClock())  # type: ignore[arg-type]
    try:
        for number, tokens in enumerate((2048, 3000, 5000)):
            runtime.scheduler.add(make_spec(str(number), prompt_tokens=tokens))
        told = [record.getMessage() for record in caplog.records if "was fitted on" in record.getMessage()]
    finally:
        await runtime.close()
    expected = ["batch_size 256 is outside 1 to 64", "prompt_tokens 3000 is outside 1 to 2048"]
    assert [message.split(": ")[1].split(",")[0] for message in told] == ([] if synthetic else expected)
