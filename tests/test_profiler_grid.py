"""Whatever the engine's limits, the grid stays within them and reaches their corners."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.offline.profiler.bench import visit_s
from lmdeploy_slo.offline.profiler.grid import SHOTS, GridLimits, Point, design
from lmdeploy_slo.offline.profiler.profiler import LONGEST_SESSION, limits_of
from lmdeploy_slo.offline.profiler.target import TargetInfo
from lmdeploy_slo.prediction.observations import Kind

limits = st.builds(
    GridLimits,
    max_batch_size=st.integers(1, 512),
    max_prefill_tokens=st.integers(1, 16384),
    max_session_tokens=st.integers(16, 65536),
    kv_tokens=st.none() | st.integers(256, 10**7),
)


@given(limits)
def test_every_point_fits_the_engine(limits: GridLimits) -> None:
    for point in design(limits):
        assert point.prompts + point.decoding >= 1
        assert point.prompts + point.decoding <= limits.max_batch_size
        if point.prompts:
            assert 1 <= point.prompt_tokens < limits.max_session_tokens
        if point.prompts > 1 or (point.decoding and point.prompts):
            assert point.prompts * point.prompt_tokens <= limits.max_prefill_tokens
        output = limits.hold_tokens(point.decoding, point.context_tokens) if point.decoding > 1 else limits.probe_tokens
        held = point.decoding * (point.context_tokens + output) if point.decoding else 0
        if point.decoding:
            assert point.context_tokens >= 1
            assert point.context_tokens + output <= limits.max_session_tokens
        if limits.kv_tokens is not None:
            assert held + point.prompts * point.prompt_tokens <= limits.kv_tokens


@given(limits)
def test_names_are_unique_and_the_order_is_that_of_kinds(limits: GridLimits) -> None:
    points = design(limits)
    assert len({point.name for point in points}) == len(points)
    kinds = [point.kind for point in points]
    assert kinds == sorted(kinds, key=[Kind.PREFILL, Kind.DECODE, Kind.MIXED].index)


def test_the_corners_are_on_the_grid() -> None:
    limits = GridLimits(256, 8192, 16_384)
    points = {(p.prompts, p.prompt_tokens, p.decoding, p.context_tokens) for p in design(limits) if not p.held_out}
    longest = limits.longest_context(256)
    assert (1, 8192, 0, 0) in points, "a pass full of one prompt"
    assert (16, 512, 0, 0) in points, "a pass full of many"
    assert {(0, 0, 1, 32), (0, 0, 256, 32), (0, 0, 256, longest)} <= points
    assert longest + limits.hold_tokens(256, longest) == 16_384


def test_little_memory_bends_the_grid() -> None:
    limits = GridLimits(256, 8192, 16_384, kv_tokens=100_000)
    contexts = {
        batch: max(p.context_tokens for p in design(limits) if p.kind is Kind.DECODE and p.decoding == batch)
        for batch in (1, 16, 256)
    }
    assert contexts[1] > contexts[16] > contexts[256] > 32


def test_some_points_are_held_out_between_the_others() -> None:
    points = design(GridLimits(64, 4096, 8192))
    held_out = [point for point in points if point.held_out]
    assert {point.kind for point in held_out} == set(Kind)
    assert len(held_out) < len(points) / 4


@pytest.mark.parametrize("bad", [(0, 1, 8), (1, 0, 8), (1, 1, 7)])
def test_an_engine_too_small_is_refused(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="leaves nothing to measure"):
        GridLimits(*bad)


def test_what_the_user_wants_lowers_the_limits() -> None:
    def info(session: int | None) -> TargetInfo:
        return TargetInfo("e", "m", True, EngineLimits(64, 2048, 9999), session, None)

    assert limits_of(info(None)) == GridLimits(64, 2048, LONGEST_SESSION, 9999)
    assert limits_of(info(32_768)) == GridLimits(64, 2048, 32_768, 9999)
    assert limits_of(info(None), max_session_tokens=20_000).max_session_tokens == 20_000
    assert limits_of(info(4096), max_batch_size=8, max_session_tokens=20_000) == GridLimits(8, 2048, 4096, 9999)


def test_what_a_visit_takes_by_hand() -> None:
    model, limits = StepModel(0.01, 1e-4, 0.0, 1e-3, 0.0), GridLimits(8, 1000, 2000)
    assert visit_s(Point(1, 1500), SHOTS, model, limits) == pytest.approx(3 * (2 * 0.01 + 0.15))
    # Two shots of a probe: its prompt, and 34 passes of four sequences; before that the three others.
    decode_s = (0.01 + 0.05) + 34 * (0.01 + 4e-3)
    assert visit_s(Point(decoding=4, context_tokens=500), 2, model, limits) == pytest.approx(0.03 + 0.14 + 2 * decode_s)
