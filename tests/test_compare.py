"""The grid of `compare`, paired differences, and the bisection of `capacity`."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from lmdeploy_slo.cli.compare import comparison_table, find_contender
from lmdeploy_slo.cli.main import main
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.offline import capacity as capacity_module
from lmdeploy_slo.offline.capacity import Question, Vary, find_capacity
from lmdeploy_slo.offline.compare import ATTAINMENT, MEAN_E2E_S, Column, Comparison, Contender, Grid, interval, run_grid
from lmdeploy_slo.offline.experiment import Fleet, Load, run_once
from lmdeploy_slo.offline.generated import generate_workload
from lmdeploy_slo.offline.parallel import Job, workers
from lmdeploy_slo.offline.slo_grammar import parse_slo_options
from lmdeploy_slo.testing.builders import A100

ROWS = generate_workload(120, seed=2)
LOAD = Load(parse_slo_options(["code=e2e:1500", "chat=ttft:600,tpot:40"]), 3.0, length_noise=0.3)
FLEET = Fleet(A100, A100, plan_evaluations=60)
GRID = Grid(
    [Contender("fcfs", 8), Contender("fcfs", 64), Contender("swf-feasible", 64)],
    [Column("day", 1.0), Column("day", 3.0)],
    range(4, 7),
)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The status the process would end with."""
    monkeypatch.setattr(sys, "argv", ["lmdeploy_slo", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def shown(comparison: Comparison, baseline: Contender, *, best_cap: bool = False) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(comparison_table(comparison, baseline, best_cap=best_cap))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


# -- compare --------------------------------------------------------------------------------------------------------


def test_every_combination_is_run_as_simulate_would_run_it() -> None:
    done: list[None] = []
    with workers({"day": ROWS}, 1) as pool:
        comparison = run_grid(GRID, LOAD, FLEET, pool, lambda: done.append(None))
    assert len(comparison.runs) == len(done) == 2 * 3 * 3
    last = comparison.runs[-1]
    alone = run_once(
        ROWS,
        LOAD,
        Fleet(A100, A100, plan_evaluations=60, limits=GRID.jobs(LOAD, FLEET)[-1].fleet.limits),
        "swf-feasible",
        6,
    )
    assert last == {"trace": "day", "max_batch_size": 64, **alone.run}
    assert [run["seed"] for run in comparison.runs[:3]] == [4, 5, 6]


@pytest.mark.slow
def test_parallel_processes_give_the_same_runs() -> None:
    comparisons = []
    for processes in (1, 2):
        with workers({"day": ROWS}, processes) as pool:
            comparisons.append(run_grid(GRID, LOAD, FLEET, pool))
    assert comparisons[0].runs == comparisons[1].runs


def made_up(attainments: Sequence[Sequence[float]], grid: Grid) -> Comparison:
    """One list of values per column and contender."""
    runs = [
        {"slo_attainment": value, "e2e_ms": {"mean": 1000 * (1 - value)}} for values in attainments for value in values
    ]
    return Comparison(grid, runs)


def test_differences_are_paired_by_seed() -> None:
    grid = Grid([Contender("a", 1), Contender("b", 1)], [Column("t", 1.0)], range(3))
    comparison = made_up([[0.10, 0.50, 0.90], [0.15, 0.56, 0.94]], grid)
    a, b = grid.contenders
    difference = comparison.difference(grid.columns[0], b, a, ATTAINMENT)
    expected = stats.ttest_rel([0.15, 0.56, 0.94], [0.10, 0.50, 0.90]).confidence_interval(0.95)
    assert difference is not None
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.05, expected.low, expected.high))
    assert comparison.best(grid.columns[0], ATTAINMENT) == comparison.best(grid.columns[0], MEAN_E2E_S) == b


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12))
def test_the_interval_is_that_of_students_t(values: list[float]) -> None:
    found = interval(values)
    spread = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.high is not None
    assert found.high - found.mean == pytest.approx(spread, abs=1e-12)


def test_one_value_has_no_interval() -> None:
    assert interval([0.5]) == interval([0.5])
    assert (interval([0.5]).low, interval([0.5]).high) == (None, None)


def test_the_table_marks_the_best_of_each_column() -> None:
    grid = Grid([Contender("a", 1), Contender("a", 2), Contender("b", 1)], [Column("t", 1.0), Column("t", 2.0)], [0, 1])
    comparison = made_up([[0.2, 0.4], [0.6, 0.6], [0.5, 0.7], [0.9, 0.9], [0.1, 0.1], [0.2, 0.2]], grid)
    text = shown(comparison, grid.contenders[0])
    assert text.count("0.600*") == 2  # two contenders tie in the first column
    assert text.count("0.900*") == 1  # the other column, one metric alone
    assert "+30.0" in text
    best = shown(comparison, grid.contenders[0], best_cap=True)
    assert "at 2" in best
    assert [best.count(f"│ {policy} ") for policy in "ab"] == [1, 1]


def test_what_is_missing_is_a_dash_and_nobody_is_best() -> None:
    grid = Grid([Contender("a", 1), Contender("b", 1)], [Column("t", 1.0)], [0])
    runs = [{"slo_attainment": None, "e2e_ms": {"mean": None}}] * 2
    comparison = Comparison(grid, runs)
    assert comparison.mean(grid.columns[0], grid.contenders[0], ATTAINMENT) is None
    assert comparison.best(grid.columns[0], ATTAINMENT) is None
    assert not any("*" in line for line in shown(comparison, grid.contenders[0]).splitlines() if "│" in line)


def test_the_baseline_is_named_by_policy_and_cap() -> None:
    assert find_contender(None, GRID.contenders) == Contender("fcfs", 8)
    assert find_contender("fcfs@64", GRID.contenders) == Contender("fcfs", 64)
    assert find_contender("swf-feasible", GRID.contenders) == Contender("swf-feasible", 64)
    with pytest.raises(ConfigError, match="--baseline: 'edf' is none of fcfs@8, fcfs@64"):
        find_contender("edf", GRID.contenders)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    lines = ["arrival_s,input_tokens,output_tokens,task_class"]
    lines += [f"{row.arrival_s},{row.input_tokens},{row.output_tokens},{row.task}" for row in ROWS]
    path = tmp_path / "day.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_the_command_compare(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, trace: str
) -> None:
    out = tmp_path / "out.json"
    arguments = (
        "--policy",
        "fcfs,swf-feasible",
        "--speedup",
        "1,4",
        "--max-batch-size",
        "16,64",
        "--seeds",
        "2",
        "--limit",
        "60",
    )
    slos = ("--slo", "default=ttft:500", "--length-noise", "0.3", "--jobs", "1", "--json", str(out))
    assert call(monkeypatch, "compare", trace, *arguments, *slos, "--baseline", "fcfs@64") == 0
    runs = json.loads(out.read_text())["runs"]
    assert len(runs) == 2 * 2 * 2 * 2
    assert {(run["trace"], run["max_batch_size"], run["offered"]) for run in runs} == {(trace, 16, 60), (trace, 64, 60)}
    assert "difference to fcfs at 64" in " ".join(capsys.readouterr().out.split())


def test_placements_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, trace: str
) -> None:
    out = tmp_path / "out.json"
    placements = ("--placement", "slo,round-robin", "--profile", "a100-qwen2.5-7b,h200-qwen2.5-7b")
    arguments = ("--policy", "fcfs", "--speedup", "9", "--seeds", "1", "--limit", "60", "--slo", "default=ttft:500")
    more = ("--jobs", "1", "--json", str(out), "--baseline", "fcfs/round-robin")
    assert call(monkeypatch, "compare", trace, *arguments, *placements, *more) == 0
    runs = json.loads(out.read_text())["runs"]
    assert [(run["placement"], len(run["by_instance"])) for run in runs] == [("slo", 2), ("round-robin", 2)]
    assert [one["requests"] for one in runs[1]["by_instance"]] == [30, 30]
    assert "difference to fcfs/round-robin at 256" in " ".join(capsys.readouterr().out.split())


# -- capacity -------------------------------------------------------------------------------------------------------


class MadeUpJob:
    """Attainment as a function of the load, in place of a simulated run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, attainment: Any) -> None:
        self.tried: list[tuple[float, int]] = []

        def run(job: Job, traces: Any) -> dict[str, Any]:
            self.tried.append((job.load.speedup, job.fleet.instances))
            return {"slo_attainment": attainment(job.load.speedup, job.fleet.instances), "seed": job.seed}

        monkeypatch.setattr(capacity_module.Job, "run", run)


JOB = Job("day", LOAD, FLEET, "fcfs", 0)


@pytest.mark.parametrize("edge", [0.0123, 0.4, 1.0, 1.7, 2.0, 300.0])
def test_the_highest_speedup_is_found(monkeypatch: pytest.MonkeyPatch, edge: float) -> None:
    MadeUpJob(monkeypatch, lambda speedup, instances: 1.0 if speedup <= edge else 0.3)
    found = find_capacity(Question(JOB, Vary.SPEEDUP, 0.95, tolerance=0.01), {"day": ROWS})
    assert found.value is not None
    assert edge / 1.01 <= found.value <= edge
    assert found.attainment == 1.0
    assert found.rate_rps == pytest.approx(len(ROWS) / (ROWS[-1].arrival_s / found.value))


@pytest.mark.parametrize("edge", [1, 2, 3, 7, 64, 100])
def test_the_fewest_instances_are_found(monkeypatch: pytest.MonkeyPatch, edge: int) -> None:
    job = MadeUpJob(monkeypatch, lambda speedup, instances: 1.0 if instances >= edge else 0.3)
    found = find_capacity(Question(JOB, Vary.INSTANCES, 0.95), {"day": ROWS})
    assert found.value == edge
    assert {speedup for speedup, _ in job.tried} == {LOAD.speedup}
    assert len(job.tried) == len(set(job.tried)) <= 2 + 2 * edge.bit_length()


def test_a_target_that_nothing_holds_or_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    MadeUpJob(monkeypatch, lambda speedup, instances: 0.5)
    for vary in Vary:
        assert find_capacity(Question(JOB, vary, 0.95), {"day": ROWS}).value is None
    assert find_capacity(Question(JOB, Vary.SPEEDUP, 0.4), {"day": ROWS}).value == capacity_module.SPEEDUP_RANGE[1]
    assert find_capacity(Question(JOB, Vary.INSTANCES, 0.4), {"day": ROWS}).value == 1


def test_attainment_is_the_mean_over_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    MadeUpJob(monkeypatch, lambda speedup, instances: 0.5)
    found = find_capacity(Question(JOB, Vary.INSTANCES, 0.5, seeds=3), {"day": ROWS})
    assert (found.attainment, [run["seed"] for run in found.runs]) == (0.5, [0, 1, 2])


def test_without_objectives_there_is_no_capacity() -> None:
    job = Job("day", Load(), FLEET, "fcfs", 0)
    with pytest.raises(ConfigError, match="name one with --slo"):
        find_capacity(Question(job, Vary.SPEEDUP, 0.9), {"day": ROWS})


def test_the_command_capacity(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, trace: str
) -> None:
    out = tmp_path / "out.json"
    arguments = ("--policy", "fcfs,swf-feasible", "--target", "0.9", "--tolerance", "0.2", "--slo", "default=ttft:500")
    assert call(monkeypatch, "capacity", trace, *arguments, "--jobs", "1", "--json", str(out)) == 0
    document = json.loads(out.read_text())
    for entry in document["capacity"]:
        tried = {run["speedup"]: run["slo_attainment"] for run in document["runs"] if run["policy"] == entry["policy"]}
        assert tried[entry["speedup"]] == entry["slo_attainment"] >= 0.9
        above = min(speedup for speedup in tried if speedup > entry["speedup"])
        assert tried[above] < 0.9
        assert above <= 1.2 * entry["speedup"]
    assert (
        call(monkeypatch, "capacity", trace, *arguments, "--jobs", "1", "--vary", "instances", "--speedup", "20") == 0
    )
    text = capsys.readouterr().out
    assert "highest speedup" in text
    assert "fewest instances" in text
