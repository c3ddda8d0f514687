"""Objectives, instants and the figures of a run: each definition against the plainest way to say it."""

from __future__ import annotations

import math
from dataclasses import astuple
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.clock import MonotonicClock, VirtualClock
from lmdeploy_slo.core.metrics import RequestRecord, attainment, distribution_ms, summarize
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.core.slo import NO_SLO, Slo, Timing
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.testing.builders import make_slo, make_snapshot

durations = st.floats(1e-3, 1e3)
slos = st.builds(Slo, *(st.none() | durations for _ in range(3)))


@st.composite
def timings(draw: st.DrawFn) -> Timing:
    """A request that ran to its end."""
    arrival, queue, first, rest = (draw(durations) for _ in range(4))
    tokens = draw(st.integers(1, 50))
    first_at = arrival + queue + first
    return Timing(arrival, arrival + queue, first_at, first_at + (rest if tokens > 1 else 0.0), tokens)


@st.composite
def records(draw: st.DrawFn) -> RequestRecord:
    return RequestRecord(
        "r", draw(st.sampled_from(["chat", "code"])), 1, draw(slos), draw(timings()), draw(st.sampled_from(EndStatus))
    )


# -- objectives ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["ttft_s", "tpot_s", "e2e_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_an_objective_is_a_positive_finite_time(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Slo(**{name: value})


@given(slos, st.floats(0.01, 100))
def test_scaling_keeps_what_is_unset(slo: Slo, factor: float) -> None:
    for before, after in zip(astuple(slo), astuple(slo.scaled(factor))):
        assert after == (None if before is None else before * factor)
    assert slo.scaled(factor).has_objective == slo.has_objective == any(v is not None for v in astuple(slo))


@given(slos, timings())
def test_met_is_every_objective_that_is_carried(slo: Slo, timing: Timing) -> None:
    assert timing.first_token_at_s is not None
    assert timing.ended_at_s is not None
    verdicts = []
    if slo.ttft_s is not None:
        verdicts.append(timing.first_token_at_s - timing.arrival_at_s <= slo.ttft_s)
    if slo.e2e_s is not None:
        verdicts.append(timing.ended_at_s - timing.arrival_at_s <= slo.e2e_s)
    if slo.tpot_s is not None and timing.output_tokens > 1:
        verdicts.append((timing.ended_at_s - timing.first_token_at_s) / (timing.output_tokens - 1) <= slo.tpot_s)
    assert slo.met_by(timing) == (all(verdicts) if slo.has_objective else None)


def test_an_objective_is_met_at_its_very_value_and_not_beyond() -> None:
    timing = Timing(arrival_at_s=1.0, dispatched_at_s=1.5, first_token_at_s=2.0, ended_at_s=4.0, output_tokens=5)
    assert (timing.queue_s, timing.ttft_s, timing.tpot_s, timing.e2e_s) == (0.5, 1.0, 0.5, 3.0)
    assert Slo(ttft_s=1.0, tpot_s=0.5, e2e_s=3.0).met_by(timing) is True
    for slo in (Slo(ttft_s=0.999), Slo(tpot_s=0.499), Slo(e2e_s=2.999), Slo(1.0, 0.499, 3.0)):
        assert slo.met_by(timing) is False


def test_one_token_meets_any_tpot() -> None:
    timing = Timing(0.0, 0.0, 5.0, 5.0, output_tokens=1)
    assert timing.tpot_s is None
    assert make_slo(tpot_ms=0.001).met_by(timing) is True
    assert make_slo(ttft_ms=4999.0, tpot_ms=1.0).met_by(timing) is False


@pytest.mark.parametrize("timing", [Timing(0.0), Timing(0.0, 1.0, 2.0), Timing(0.0, 1.0, None, 3.0)])
def test_what_never_came_is_unset_and_missed(timing: Timing) -> None:
    assert make_slo(e2e_ms=1e6).met_by(timing) is False
    assert NO_SLO.met_by(timing) is None
    assert timing.tpot_s is None
    assert (timing.e2e_s is None) == (timing.ended_at_s is None)
    assert (timing.ttft_s is None) == (timing.first_token_at_s is None)


# -- figures of a run ---------------------------------------------------------


def record(
    status: EndStatus, slo: Slo = NO_SLO, e2e_s: float = 1.0, arrival_at_s: float = 0.0, task: str = "chat"
) -> RequestRecord:
    """Dispatched a quarter, first token half way, five tokens."""
    instants = (arrival_at_s + e2e_s * share for share in (0.25, 0.5, 1.0))
    return RequestRecord("r", task, 10, slo, Timing(arrival_at_s, *instants, 5), status)


@pytest.mark.parametrize(
    ("status", "slo", "met"),
    [
        (EndStatus.FINISHED, make_slo(e2e_ms=1000), True),
        (EndStatus.FINISHED, make_slo(e2e_ms=999), False),
        (EndStatus.FINISHED, NO_SLO, None),
        (EndStatus.REJECTED, make_slo(e2e_ms=1000), False),
        (EndStatus.TIMED_OUT, make_slo(e2e_ms=1000), False),
        (EndStatus.FAILED, make_slo(e2e_ms=1000), False),
        (EndStatus.FAILED, NO_SLO, None),
        (EndStatus.CANCELLED, make_slo(e2e_ms=1000), None),
    ],
)
def test_verdict(status: EndStatus, slo: Slo, met: bool | None) -> None:
    assert record(status, slo).slo_met is met


@given(st.lists(records()))
def test_attainment_counts_what_carried_an_objective_and_was_not_cancelled(some: list[RequestRecord]) -> None:
    counted = [r for r in some if r.slo.has_objective and r.status is not EndStatus.CANCELLED]
    met = [r for r in counted if r.status is EndStatus.FINISHED and r.slo.met_by(r.timing)]
    assert attainment(some) == (len(counted), len(met), len(met) / len(counted) if counted else None)


@given(st.lists(st.floats(0, 1e3), min_size=1), st.randoms(use_true_random=False))
def test_distribution_does_not_depend_on_the_order(values_s: list[float], random: Any) -> None:
    before = distribution_ms(values_s)
    random.shuffle(values_s)
    assert distribution_ms(values_s) == before
    assert before["mean"] == pytest.approx(1e3 * math.fsum(values_s) / len(values_s), abs=1e-6)
    p50, p90, p99 = (before[name] or 0.0 for name in ("p50", "p90", "p99"))
    assert 1e3 * min(values_s) <= p50 <= p90 <= p99 <= 1e3 * max(values_s)


def test_percentiles_are_interpolated_linearly_and_in_milliseconds() -> None:
    expected = {"mean": 50_000.0, "p50": 50_000.0, "p90": 90_000.0, "p99": 99_000.0}
    assert distribution_ms([float(n) for n in range(101)]) == pytest.approx(expected)
    assert distribution_ms([]) == {"mean": None, "p50": None, "p90": None, "p99": None}


def test_a_run_by_hand() -> None:
    tight, loose = make_slo(e2e_ms=1000), make_slo(e2e_ms=5000)
    run = summarize(
        [
            record(EndStatus.FINISHED, loose, e2e_s=2.0, arrival_at_s=10.0, task="chat"),
            record(EndStatus.FINISHED, tight, e2e_s=4.0, arrival_at_s=11.0, task="code"),
            record(EndStatus.FINISHED, NO_SLO, e2e_s=6.0, arrival_at_s=12.0, task="bulk"),
            record(EndStatus.REJECTED, tight, e2e_s=100.0, arrival_at_s=13.0, task="code"),
            record(EndStatus.CANCELLED, loose, e2e_s=9.0, arrival_at_s=14.0, task="chat"),
        ],
        policy="fcfs",
        speedup=2.0,
        seed=3,
    )
    assert run == {
        "policy": "fcfs",
        "speedup": 2.0,
        "seed": 3,
        "offered": 5,
        "with_slo": 3,
        "met": 1,
        "slo_attainment": pytest.approx(1 / 3),
        "finished": 3,
        "rejected": 1,
        "timed_out": 0,
        "failed": 0,
        "cancelled": 1,
        "goodput_rps": pytest.approx(1 / 4),
        "by_task": {
            "bulk": {"offered": 1, "met": 0, "slo_attainment": None},
            "chat": {"offered": 2, "met": 1, "slo_attainment": 1.0},
            "code": {"offered": 2, "met": 0, "slo_attainment": 0.0},
        },
        "ttft_ms": pytest.approx({"mean": 2000.0, "p50": 2000.0, "p90": 2800.0, "p99": 2980.0}),
        "tpot_ms": pytest.approx({"mean": 500.0, "p50": 500.0, "p90": 700.0, "p99": 745.0}),
        "e2e_ms": pytest.approx({"mean": 4000.0, "p50": 4000.0, "p90": 5600.0, "p99": 5960.0}),
        "queue_ms": pytest.approx({"mean": 1000.0, "p50": 1000.0, "p90": 1400.0, "p99": 1490.0}),
        "duration_s": pytest.approx(103.0),
    }


def test_missing_figures_are_null() -> None:
    run = summarize([], policy="fcfs", speedup=1.0, seed=0)
    assert run["slo_attainment"] is run["goodput_rps"] is run["duration_s"] is None
    assert run["e2e_ms"] == {"mean": None, "p50": None, "p90": None, "p99": None}
    assert (run["offered"], run["by_task"]) == (0, {})
    free = [record(EndStatus.FINISHED, arrival_at_s=at_s) for at_s in (0.0, 1.0)]
    assert summarize(free, policy="fcfs", speedup=1.0, seed=0)["goodput_rps"] is None, "nobody could meet anything"
    alone = summarize([record(EndStatus.FINISHED, make_slo(e2e_ms=5000))], policy="fcfs", speedup=1.0, seed=0)
    assert alone["goodput_rps"] is None, "one arrival spans no time"
    assert alone["slo_attainment"] == 1.0


@given(st.lists(records(), min_size=1))
def test_every_request_is_counted_once(some: list[RequestRecord]) -> None:
    run = summarize(some, policy="p", speedup=1.0, seed=0)
    assert sum(run[status.value] for status in EndStatus) == run["offered"] == len(some)
    assert sum(task["offered"] for task in run["by_task"].values()) == len(some)
    assert sum(task["met"] for task in run["by_task"].values()) == run["met"] <= run["with_slo"]


# -- small things -------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_batch_size", "max_prefill_tokens", "kv_tokens"])
def test_limits_are_at_least_one(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        EngineLimits(**{name: 0})


def test_free_slots_never_go_below_none() -> None:
    limits = EngineLimits(max_batch_size=2)
    assert [make_snapshot(running=[{}] * count, limits=limits).free_slots for count in range(4)] == [2, 1, 0, 0]


def test_clocks_never_go_back() -> None:
    clock = VirtualClock(5.0)
    clock.advance(1.5)
    clock.advance_to(2.0)
    assert clock.now_s() == 6.5
    clock.advance_to(7.0)
    assert clock.now_s() == 7.0
    with pytest.raises(ValueError, match="goes back"):
        clock.advance(-0.1)
    real = MonotonicClock()
    assert real.now_s() <= real.now_s()
