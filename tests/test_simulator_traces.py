"""The simulator on recorded traces, where they are at hand: LMDEPLOY_SLO_TRACES names their folder.

Expected figures: swf-feasible and fcfs on the first 6,000 requests of the Azure traces of 2023 (code and conversation,
merged), as measured with an independent implementation of the step model.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lmdeploy_slo.config import ENV_TRACES_DIR
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.offline.experiment import Fleet, Load, run_once
from lmdeploy_slo.offline.slo_grammar import parse_slo_options
from lmdeploy_slo.offline.traces import TraceRow, read_traces
from lmdeploy_slo.testing.builders import A100

FOLDER = Path(os.environ.get(ENV_TRACES_DIR, "/nonexistent"))
AZURE = FOLDER / "azure2023_mixed.csv.gz"
SLOS = parse_slo_options(["code=e2e:2000", "chat=ttft:1000,tpot:50"])
WITHIN = 0.015

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not AZURE.exists(), reason=f"{ENV_TRACES_DIR} names no folder with {AZURE.name}"),
]


@pytest.fixture(scope="module")
def rows() -> list[TraceRow]:
    return read_traces([AZURE])


def attainment(rows: list[TraceRow], policy: str, speedup: float, cap: int) -> float:
    load = Load(SLOS, speedup, 6000, length_noise=0.3)
    run = run_once(rows, load, Fleet(A100, A100, EngineLimits(cap)), policy, 0).run
    value: float = run["slo_attainment"]
    return value


@pytest.mark.parametrize(("speedup", "expected"), [(0.8, 0.52), (1.0, 0.38), (1.5, 0.19), (2.0, 0.06)])
def test_arrival_order_at_128_in_flight(rows: list[TraceRow], speedup: float, expected: float) -> None:
    assert attainment(rows, "fcfs", speedup, 128) == pytest.approx(expected, abs=WITHIN)


@pytest.mark.parametrize(("speedup", "expected"), [(0.8, 0.85), (1.0, 0.80), (1.5, 0.72), (2.0, 0.64)])
def test_shortest_feasible_first_at_its_best(rows: list[TraceRow], speedup: float, expected: float) -> None:
    best = max(attainment(rows, "swf-feasible", speedup, cap) for cap in (32, 64))
    assert best == pytest.approx(expected, abs=WITHIN)
