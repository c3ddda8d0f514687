"""The planner's benchmark, on loads of a moment: what it runs, what it keeps, its tables and its plot."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))
import bench_planner
import bench_planner_plot as plot
import bench_planner_runs as runs
import bench_planner_setting as setting
import bench_planner_tables as tables
import bench_planner_time as plan_time

from lmdeploy_slo.offline.experiment import run_once
from lmdeploy_slo.offline.generated import generate_workload
from lmdeploy_slo.offline.parallel import Workers
from lmdeploy_slo.offline.run_store import RunStore

ROWS = {"mixed": generate_workload(150, seed=3)}
CELL = replace(setting.MAIN[-1], speedup=4.0, requests=120)
SEEDS = (0, 1)


class Counting(Workers):
    """Workers in this process that know how many runs they made."""

    def __init__(self) -> None:
        super().__init__(ROWS, None)
        self.made: list[runs.Run] = []

    def map(self, work: Any, items: Any) -> Iterator[Any]:
        self.made += items
        return super().map(work, items)


def study(folder: Path, pool: Workers | None = None, **differences: Any) -> bench_planner.Study:
    book = runs.Book(RunStore(folder), ROWS, pool or Counting())
    values = {"book": book, "traces": ROWS, "every_seed": SEEDS, "cells": (), "rules_alone": False}
    return bench_planner.Study(**{**values, **differences})


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setting, "MAIN", [CELL])
    monkeypatch.setattr(setting, "REQUESTS", CELL.requests)
    for module in (setting, runs):
        monkeypatch.setattr(module, "RULES", ("fcfs", "swf-feasible", "slack-guard"))
        monkeypatch.setattr(module, "CAPS", (16, 128))


def test_a_cell_is_what_its_options_say() -> None:
    cell = replace(CELL, slo_scale=2.0, planner_scale=0.8, length_bias=2.0, length_noise=0.6)
    fleet = cell.fleet(32)
    assert fleet.limits.max_batch_size == 32
    assert fleet.planner_model == fleet.model.scaled(0.8)
    assert (cell.load.slos["chat"].ttft_s, cell.load.slos["code"].e2e_s) == (2.0, 4.0)
    assert (cell.load.length_noise, cell.load.length_bias, cell.load.limit) == (0.6, 2.0, CELL.requests)


def test_every_cell_can_be_run() -> None:
    """Its trace, profile and SLOs are known, and somebody in it carries an SLO."""
    made, source = setting.traces(None)
    assert "generated" in source
    for cell in [*setting.OTHERS, *setting.ROBUST, *setting.FRONTIER, *setting.ABLATION, setting.EXACT]:
        assert cell.fleet(32).model.c0 > 0
        if cell.trace in made:
            tasks = {row.task for row in made[cell.trace]}
            assert tasks & set(cell.load.slos) or "default" in cell.load.slos, cell.name
        else:
            assert cell.trace == "mooncake"
    assert {row.output_tokens for row in made["classification"]} == {1, 2, 3, 4}
    assert {row.task for row in made["third"]} == {"code", "chat", "batch"}
    names = [cell.name for cell in setting.OTHERS]
    assert len(set(names)) == len(names)


def test_a_run_is_that_of_the_simulator() -> None:
    cell, contender = CELL, runs.Contender("swf-feasible", 16)
    made = runs.make_run(runs.Run(cell, contender, 1), ROWS)
    run = run_once(ROWS["mixed"], cell.load, cell.fleet(16), "swf-feasible", 1).run
    assert made["attainment"] == run["slo_attainment"]
    assert made["p99_e2e_s"] == run["e2e_ms"]["p99"] / 1e3
    assert made["finished"] == CELL.requests


def test_annealing_takes_options_and_evaluations() -> None:
    with_patience = runs.annealing_with({"patience": 8.0}, 50)
    assert with_patience is not None and not isinstance(with_patience.factory, str)
    made = runs.make_run(runs.Run(CELL, with_patience, 0), ROWS)
    default = runs.make_run(runs.Run(CELL, runs.ANNEALING, 0), ROWS)
    assert made["mean_e2e_s"] != default["mean_e2e_s"]
    assert runs.annealing_with({"no such option": 1}) is None


def test_the_main_table_and_what_is_kept(tmp_path: Path) -> None:
    first = Counting()
    section = bench_planner.main_section(study(tmp_path, first))
    [cell] = section["cells"]
    made = {rule["policy"]: rule for rule in cell["rules"]}
    assert set(made) == {"fcfs", "swf-feasible", "slack-guard"}
    assert cell["best_rule"] == max(made, key=lambda name: made[name]["attainment"])
    assert cell["fcfs"]["mean_e2e_ratio"] == 1.0
    lead = cell["annealing"]["attainment"] - made[cell["best_rule"]]["attainment"]
    assert cell["lead"]["mean"] == pytest.approx(lead)
    assert cell["verdict"] == ("best" if lead > 0 else "tied" if lead >= -0.005 else "behind")
    assert len(first.made) == len(set(first.made))

    again = Counting()
    assert bench_planner.main_section(study(tmp_path, again)) == section
    assert again.made == []

    text = "\n".join(tables.markdown({"main": {**bench_planner.about(), "trace": "made", "seeds": 2, **section}}))
    assert f"{cell['annealing']['attainment']:.3f}" in text
    assert "| slack-guard |" in text


def test_rules_alone_leave_annealing_out(tmp_path: Path) -> None:
    pool = Counting()
    [cell] = bench_planner.main_section(study(tmp_path, pool, rules_alone=True))["cells"]
    assert "annealing" not in cell
    assert all(run.contender.is_rule for run in pool.made)
    lines = list(tables.markdown({"main": {**bench_planner.about(), "trace": "made", "seeds": 2, "cells": [cell]}}))
    assert any(line.startswith("| **annealing** | - |") for line in lines)


def test_who_is_far_behind_runs_once(tmp_path: Path) -> None:
    made = study(tmp_path)
    made.make_rules([CELL], every_rule=False)
    first = {
        c: made.book.attainment(CELL, c, SEEDS[:1]) for rule in ("fcfs", "swf-feasible") for c in runs.at_each_cap(rule)
    }
    behind = [c for c, value in first.items() if value < max(first.values()) - runs.SPREAD and c != runs.FCFS]
    assert behind
    for contender in behind:
        with pytest.raises(KeyError):
            made.book[runs.Run(CELL, contender, SEEDS[1])]
    assert "slack-guard" in made.book.at_best_caps(CELL, SEEDS)  # always shown


def test_runs_of_other_code_are_taken_where_some_come_out_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [runs.Run(CELL, runs.Contender("fcfs", cap), 0) for cap in (16, 128)]
    study(tmp_path).book.make(wanted)
    monkeypatch.setattr(runs, "code_fingerprint", lambda modules: "edited")

    edited = Counting()
    book = study(tmp_path, edited).book
    book.recheck(wanted, 1)
    assert len(edited.made) == 1
    assert book.of_other_code == len(wanted)
    book.make(wanted)
    study(tmp_path, edited).book.make(wanted)  # and another day
    assert len(edited.made) == 1

    monkeypatch.setattr(runs, "code_fingerprint", lambda modules: "edited again")
    other = Counting()
    book = study(tmp_path, other).book
    monkeypatch.setattr(runs, "make_run", lambda run, traces: {**runs_make(run, traces), "attainment": -1.0})
    book.recheck(wanted, 1)
    book.make(wanted)
    assert len(other.made) == 3
    assert book.of_other_code == 0
    assert book[wanted[0]]["attainment"] == -1.0


runs_make = runs.make_run


def test_robustness_frontier_and_ablation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(CELL, requests=60)
    monkeypatch.setattr(setting, "REQUESTS", 60)
    monkeypatch.setattr(setting, "EXACT", replace(small, name="exact knowledge", length_noise=0.0))
    monkeypatch.setattr(setting, "ROBUST", [replace(small, name="length bias 2", length_bias=2.0)])
    monkeypatch.setattr(setting, "FRONTIER", [small])
    monkeypatch.setattr(setting, "ABLATION", [small])
    monkeypatch.setattr(setting, "PATIENCE", (0.5, 4.0))
    made = study(tmp_path, every_seed=(0,))
    document = {
        name: {**bench_planner.about(), "trace": "made", "seeds": 1, **bench_planner.SIMULATED[name](made)}
        for name in ("robust", "frontier", "ablation")
    }
    exact, biased = document["robust"]["cells"]
    assert exact["kept"] == 1.0
    assert biased["kept"] == pytest.approx(biased["attainment"] / exact["attainment"])
    assert [point["patience"] for point in document["frontier"]["cells"][0]["points"]] == [0.5, 4.0]
    parts = {part["what"]: part for part in document["ablation"]["cells"][0]["parts"]}
    assert parts["guard only"]["policy"] == "slack-guard"
    assert parts["all of it"]["policy"] == "annealing"
    text = "\n".join(tables.markdown(document))
    assert "| length bias 2 |" in text and "| guard only |" in text and "`patience`" in text
    json.dumps(document, allow_nan=False)


# -- times of plans -------------------------------------------------------------------------------------------------


def test_made_up_snapshots_are_such_as_an_engine_shows() -> None:
    seen: set[int] = set()
    before = -np.inf
    for snapshot in plan_time.snapshots(300, 12):
        assert (len(snapshot.waiting), len(snapshot.running)) == (300, plan_time.RUNNING)
        assert snapshot.free_slots > 0 and snapshot.now_s > before
        before = snapshot.now_s
        assert np.all(snapshot.waiting["arrival_at_s"] <= snapshot.now_s)
        assert np.all(np.isnan(snapshot.waiting["dispatched_at_s"]))
        running = snapshot.running
        started = running["generated_tokens"] > 0
        assert np.all(running["dispatched_at_s"] >= running["arrival_at_s"])
        assert np.all(running["first_token_at_s"][started] > running["dispatched_at_s"][started])
        assert np.all(np.isnan(running["first_token_at_s"][~started]))
        handles = set(snapshot.waiting["handle"].tolist())
        assert not handles & set(running["handle"].tolist())
        assert not seen or max(handles) >= max(seen)
        seen = handles


@pytest.mark.slow
def test_times_and_budgets_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_time, "LONG_S", 0.01)
    monkeypatch.setattr(plan_time, "EVALUATIONS", (1, 50, 400))
    measured = plan_time.measure(200, 2.0, ticks=10)
    assert measured["wall_ms"]["p99"] >= measured["wall_ms"]["p50"] > 0
    assert [row["evaluations"] for row in measured["by_evaluations"]] == [1, 50, 400]
    assert measured["by_evaluations"][0]["worse"] == 0
    text = "\n".join(tables.markdown({"time": {**bench_planner.about(), "sizes": [measured]}}))
    assert "| 200 waiting, 2 plans |" in text


# -- the plot -------------------------------------------------------------------------------------------------------


def test_the_plot_shows_the_figures() -> None:
    def cell(rate_rps: float, *attainments: float) -> dict[str, Any]:
        ours, guard, rule, fcfs = attainments
        rules = [("slack-guard", guard), ("swf", 0.1), ("swf-feasible", rule)]
        return {
            "name": f"x{rate_rps / 10:.1f}",
            "rate_rps": rate_rps,
            "annealing": {"attainment": ours},
            "fcfs": {"attainment": fcfs},
            "rules": [{"policy": name, "attainment": value} for name, value in rules],
        }

    text = plot.draw([cell(20.0, 0.75, 0.62, 0.61, 0.06), cell(5.0, 0.99, 0.98, 0.97, 0.96)])
    root = ET.fromstring(text)
    words = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "75% annealing" in words
    assert any(word.startswith("61% best fixed rule") for word in words)
    heights = [
        float(node.attrib["y"])
        for node in root.iter("{http://www.w3.org/2000/svg}text")
        if (node.text or "")[:2].isdigit() and "%" in (node.text or "") and " " in (node.text or "")
    ]
    gaps = np.diff(sorted(heights))
    assert len(heights) == 3 and np.all(gaps >= plot.LINE_PX - 0.1)
    assert "prefers-color-scheme:dark" in text
