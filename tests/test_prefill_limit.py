"""The prefill limit is the largest with which a mixed step keeps the tightest TPOT."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.config import load
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.engine.prefill_limit import SMALLEST_LIMIT, prefill_token_limit
from lmdeploy_slo.engines import build_engine
from lmdeploy_slo.testing.builders import A100


def mean_step_s(model: StepModel, limit: int, batch: int, context: int, prompt: int, share: float) -> float:
    """Mean duration of steps of which `share` prefill `limit` tokens, in the worst case of the module."""
    # The end of a long prompt, or several whole ones.
    square = limit * (limit + 2 * (prompt - limit)) if limit <= prompt else limit * prompt
    decode = model.step_s(0, 0, batch, context)
    mixed = model.step_s(limit, square, batch, context)
    return decode + share * (mixed - decode)


@given(
    tpot_ms=st.floats(12, 500),
    batch=st.integers(0, 256),
    context=st.integers(0, 200_000),
    prompt=st.integers(1, 30_000),
    share=st.floats(0.05, 1.0),
)
def test_it_holds_and_one_more_does_not(tpot_ms: float, batch: int, context: int, prompt: int, share: float) -> None:
    limit = prefill_token_limit(
        A100, tpot_ms / 1e3, batch_size=batch, context_tokens=context, prompt_tokens=prompt, mixed_share=share
    )
    assert SMALLEST_LIMIT <= limit <= 8192
    if limit > SMALLEST_LIMIT:
        assert mean_step_s(A100, limit, batch, context, prompt, share) <= tpot_ms / 1e3 * (1 + 1e-9)
    if limit < 8192:
        assert mean_step_s(A100, limit + 1, batch, context, prompt, share) >= tpot_ms / 1e3 * (1 - 1e-9)


def test_figures_of_the_a100() -> None:
    """50 ms, 64 sequences of 512 tokens: 50 - 10.25 - 1.52 - 1.20 ms are left, at 0.0475 + 2 x 1.13e-6 x 2048 ms."""
    assert 710 <= prefill_token_limit(A100, 0.05, batch_size=64, context_tokens=64 * 512) <= 722
    assert prefill_token_limit(A100, 0.005, batch_size=64, context_tokens=64 * 512) == SMALLEST_LIMIT
    assert prefill_token_limit(A100, 10.0, batch_size=64, context_tokens=64 * 512) == 8192


@pytest.mark.parametrize(("tpot_ms", "limit"), [(None, 8192), (50.0, 697), (1.0, SMALLEST_LIMIT)])
def test_the_server_takes_it_from_its_configuration(tpot_ms: float | None, limit: int) -> None:
    flags = {"engine.profile": "a100-qwen2.5-7b", "engine.prefill_for_tpot_ms": tpot_ms}
    engine = build_engine(load(flags=flags, environ={}), VirtualClock())
    assert engine.info.limits.max_prefill_tokens == limit


@pytest.mark.parametrize(
    "wrong", [{"tpot_s": 0.0}, {"mixed_share": 0.0}, {"mixed_share": 1.1}, {"batch_size": -1}, {"ceiling": 10}]
)
def test_out_of_range(wrong: dict[str, float]) -> None:
    arguments: dict[str, float] = {"tpot_s": 0.05, "batch_size": 8, "context_tokens": 100, **wrong}
    tpot_s = arguments.pop("tpot_s")
    with pytest.raises(ValueError):
        prefill_token_limit(A100, tpot_s, **arguments)  # type: ignore[arg-type]
