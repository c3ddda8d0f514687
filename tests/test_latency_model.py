"""The two latency models: closed forms against sums written out."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.core.latency_model import BilinearModel, StepModel

coefficients = st.floats(0, 1e-2)
step_models = st.builds(StepModel, *(coefficients for _ in range(5)))
four = st.tuples(*(coefficients for _ in range(4)))
bilinear_models = st.builds(BilinearModel, four, four)
prompts = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 5000)), max_size=5)
contexts = st.lists(st.integers(1, 5000), max_size=8)


@given(step_models, prompts, contexts)
def test_a_step_is_the_sum_of_its_terms(model: StepModel, chunks: list[tuple[int, int]], decoding: list[int]) -> None:
    expected = model.c0 + model.d1 * len(decoding) + math.fsum(model.d2 * context for context in decoding)
    for tokens, context in chunks:
        expected += model.p1 * tokens + model.p2 * tokens * (tokens + 2 * context)
    step_s = model.step_s(
        sum(tokens for tokens, _ in chunks),
        sum(tokens * (tokens + 2 * context) for tokens, context in chunks),
        len(decoding),
        sum(decoding),
    )
    assert step_s == pytest.approx(expected, rel=1e-9)


@given(step_models, contexts, st.integers(0, 200))
def test_a_decode_stretch_is_the_sum_of_its_steps(model: StepModel, decoding: list[int], steps: int) -> None:
    expected = math.fsum(
        model.step_s(0, 0, len(decoding), sum(context + done for context in decoding)) for done in range(steps)
    )
    assert model.decode_stretch_s(steps, len(decoding), sum(decoding)) == pytest.approx(expected, rel=1e-9)


@given(step_models, st.lists(st.integers(1, 3000), min_size=1, max_size=6))
def test_the_stall_of_a_prompt_does_not_depend_on_its_chunks(model: StepModel, chunks: list[int]) -> None:
    stall_s, context = 0.0, 0
    for tokens in chunks:
        stall_s += model.step_s(tokens, tokens * (tokens + 2 * context), 0, 0) - model.c0
        context += tokens
    assert model.prefill_stall_s(sum(chunks)) == pytest.approx(stall_s, rel=1e-6, abs=1e-9)
    first, *others = chunks
    behind_s = model.prefill_stall_s(first) + model.prefill_stall_s(sum(others), first)
    assert behind_s == pytest.approx(stall_s, rel=1e-6, abs=1e-9)


@given(step_models, st.floats(0.01, 100))
def test_scaling_a_model_scales_every_step(model: StepModel, factor: float) -> None:
    assert model.scaled(factor).step_s(7, 11, 13, 17) == pytest.approx(factor * model.step_s(7, 11, 13, 17), rel=1e-9)


@given(bilinear_models, st.integers(1, 32), st.integers(1, 3000), st.integers(0, 300))
def test_the_papers_decode_is_the_sum_over_its_tokens(
    model: BilinearModel, batch_size: int, prompt_tokens: int, output_tokens: int
) -> None:
    a, b, c, d = model.decode
    expected = math.fsum(
        a * batch_size * (prompt_tokens + k) + b * batch_size + c * (prompt_tokens + k) + d
        for k in range(1, output_tokens + 1)
    )
    assert model.decode_s(batch_size, prompt_tokens, output_tokens) == pytest.approx(expected, rel=1e-9)


def test_the_papers_prefill_by_hand() -> None:
    model = BilinearModel(prefill=(0.1, 5.7, 0.01, 43.67), decode=(0.0002, 0.275, 0.00088, 15.85))
    assert model.prefill_s(4, 100) == pytest.approx(0.1 * 400 + 5.7 * 4 + 0.01 * 100 + 43.67)
    assert model.decode_s(4, 100, 1) == pytest.approx(0.0002 * 4 * 101 + 0.275 * 4 + 0.00088 * 101 + 15.85)


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
@pytest.mark.parametrize("position", range(5))
def test_step_coefficients_are_finite_and_not_negative(position: int, value: float) -> None:
    values = list(astuple(StepModel(1.0, 1.0, 1.0, 1.0, 1.0)))
    values[position] = value
    with pytest.raises(ValueError, match=["c0", "p1", "p2", "d1", "d2"][position]):
        StepModel(*values)


@pytest.mark.parametrize("bad", [(1.0, 1.0, 1.0), (1.0, 1.0, 1.0, -1.0), (math.nan, 1.0, 1.0, 1.0)])
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_bilinear_coefficients_are_four_finite_and_not_negative(name: str, bad: tuple[float, ...]) -> None:
    fine = (1.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=name):
        BilinearModel(**{"prefill": fine, "decode": fine, name: bad})  # type: ignore[arg-type]
