"""The yardstick for patience."""

from __future__ import annotations

import numpy as np
import pytest

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import ROW_DTYPE, EngineLimits, Snapshot
from lmdeploy_slo.scheduling.fcfs_backlog import HALF_LIFE_S, SHORTEST_S, FcfsBacklog

TEN_S_EACH = StepModel(c0=0.0, p1=0.01, p2=0.0, d1=0.0, d2=0.0)


def snapshot(now_s: float, *handles: int) -> Snapshot:
    rows = np.zeros(len(handles), dtype=ROW_DTYPE)
    rows["handle"] = handles
    rows["prompt_tokens"] = 1000
    return Snapshot(now_s, rows, rows[:0], EngineLimits(), TEN_S_EACH)


def test_arrivals_lengthen_the_virtual_queue_and_time_works_it_off() -> None:
    backlog = FcfsBacklog()
    backlog.learn(snapshot(0.0, 1, 2), 64)
    assert backlog.longest_s == pytest.approx(20.0)
    backlog.learn(snapshot(5.0, 1, 2, 3), 64)  # 20 - 5 + 10
    assert backlog.longest_s == pytest.approx(25.0)
    backlog.learn(snapshot(6.0, 3), 64)  # nobody new: no longer than before
    assert backlog.longest_s == pytest.approx(25.0, rel=0.01)


def test_a_peak_is_forgotten_by_half_in_its_half_life() -> None:
    backlog = FcfsBacklog()
    backlog.learn(snapshot(0.0, 1, 2), 64)
    backlog.learn(snapshot(HALF_LIFE_S), 64)
    assert backlog.longest_s == pytest.approx(10.0)
    backlog.learn(snapshot(100 * HALF_LIFE_S), 64)
    assert backlog.longest_s == SHORTEST_S
