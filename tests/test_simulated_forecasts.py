"""Forecasts of a simulated run: they change nothing, and hold what they say."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import fmean

import pytest

from lmdeploy_slo.config import ENV_TRACES_DIR
from lmdeploy_slo.core.metrics import RequestRecord
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.offline.experiment import Load, offered_requests
from lmdeploy_slo.offline.generated import generate_workload
from lmdeploy_slo.offline.simulation.forecasts import Forecasts
from lmdeploy_slo.offline.simulation.requests import simulated_requests
from lmdeploy_slo.offline.simulator import Simulator
from lmdeploy_slo.offline.slo_grammar import parse_slo_options
from lmdeploy_slo.offline.traces import TraceRow, read_traces
from lmdeploy_slo.scheduling.policy import SearchBudget, make_policy
from lmdeploy_slo.testing.builders import A100

SLOS = parse_slo_options(["code=e2e:2000", "chat=ttft:1000,tpot:50"])
AZURE = Path(os.environ.get(ENV_TRACES_DIR, "/nonexistent")) / "azure2023_mixed.csv.gz"


def run(
    rows: list[TraceRow], load: Load, policy: str, forecasts: Forecasts | None, evaluations: int = 100
) -> list[RequestRecord]:
    made = make_policy(policy, budget=SearchBudget(time_s=None, evaluations=evaluations))
    simulator = Simulator(made, model=A100, limits=EngineLimits(128), forecasts=forecasts)
    return simulator.run(simulated_requests(offered_requests(rows, load, 0)))


def coverage(records: list[RequestRecord], forecasts: Forecasts, quantity: str) -> float:
    hits = []
    for record in records:
        value, within = getattr(record.timing, quantity), forecasts.told[record.request_id].intervals
        assert within is not None
        interval = getattr(within, quantity)
        if value is not None and interval is not None:
            hits.append(interval.low <= value <= interval.high)
    return fmean(hits)


@pytest.mark.parametrize("policy", ["fcfs", "annealing"])
def test_forecasting_changes_nothing(policy: str) -> None:
    rows, load = generate_workload(150, 1), Load(SLOS)
    forecasts = Forecasts(keeps_order=policy == "fcfs")
    assert run(rows, load, policy, forecasts) == run(rows, load, policy, None)
    assert set(forecasts.told) == {str(row.index) for row in rows}


def test_intervals_hold_on_a_generated_workload() -> None:
    rows, forecasts = generate_workload(3000, 2), Forecasts(keeps_order=True)
    records = run(rows, Load(SLOS, speedup=0.6), "fcfs", forecasts)
    for quantity in ("ttft_s", "tpot_s", "e2e_s"):
        assert 0.75 <= coverage(records, forecasts, quantity) <= 0.87
    chances = [(forecasts.told[record.request_id].chance, record.slo_met) for record in records]
    told, met = fmean(chance or 0.0 for chance, _ in chances), fmean(bool(met) for _, met in chances)
    assert told == pytest.approx(met, abs=0.03)


@pytest.mark.slow
@pytest.mark.skipif(not AZURE.exists(), reason=f"{ENV_TRACES_DIR} names no folder with {AZURE.name}")
def test_intervals_hold_on_recorded_code_and_chat() -> None:
    forecasts = Forecasts(keeps_order=False)
    records = run(read_traces([AZURE]), Load(SLOS, 0.8, 6000), "annealing", forecasts, 800)
    for quantity in ("queue_s", "ttft_s", "tpot_s", "e2e_s"):
        assert 0.75 <= coverage(records, forecasts, quantity) <= 0.85
    for low, high in ((0.3, 0.6), (0.6, 0.9), (0.9, 1.01)):
        here = [
            (chance, bool(record.slo_met))
            for record in records
            if low <= (chance := forecasts.told[record.request_id].chance or 0.0) < high
        ]
        assert fmean(chance for chance, _ in here) == pytest.approx(fmean(met for _, met in here), abs=0.05)
