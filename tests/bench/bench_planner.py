"""The planner's tables: annealing beside every fixed rule at its best cap, in the simulator, and the time of a plan.

    python tests/bench/bench_planner.py [--quick] [--sections main,others,...] [--cells NAME ...] [--seeds 5]

Sections: main (the loads of the mixed trace), others (profiles, mixes, SLOs), robust (wrong forecasts), frontier (the
knob), ablation (what each part gives), time (of a plan; measured by itself, on an idle machine). All are made unless
some are named. Recorded traces are looked for in --traces or LMDEPLOY_SLO_TRACES; without them a generated workload
is used. What was run is kept in --out and not run again while the code it rests on stays as it is, so an interrupted
benchmark goes on. `planner.json` has the sections made last; `bench_planner_tables.py` turns it into Markdown.

--rules makes the runs of rules alone, so that they are there when annealing changes. --recheck N: where code that
they rest on was edited, N kept runs of each rule are made again; if they come out the same, all kept ones are taken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bench_planner_setting as setting
import bench_planner_tables as tables
import bench_planner_time as plan_time
from bench_planner_runs import (
    ANNEALING,
    FCFS,
    Book,
    Contender,
    Run,
    annealing_with,
    at_each_cap,
    code_of,
    first_wave,
    second_wave,
)
from bench_planner_setting import Cell, Rows

from lmdeploy_slo.config import ENV_TRACES_DIR
from lmdeploy_slo.offline.compare import interval
from lmdeploy_slo.offline.parallel import workers
from lmdeploy_slo.offline.results import write_json
from lmdeploy_slo.offline.run_store import RunStore, source_files
from lmdeploy_slo.scheduling.annealing import AnnealingOptions
from lmdeploy_slo.scheduling.policy import make_policy

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Study:
    """What the sections share. every_seed: of the 6,000 requests; fewer are taken for other loads."""

    book: Book
    traces: dict[str, Rows]
    every_seed: Sequence[int]
    cells: Sequence[str]
    rules_alone: bool

    def chosen(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those that were asked for and whose trace is there."""
        return [c for c in cells if c.trace in self.traces and (not self.cells or c.name in self.cells)]

    def seeds(self, cell: Cell) -> Sequence[int]:
        return self.every_seed if cell.requests == setting.REQUESTS else self.every_seed[: setting.OTHER_SEEDS]

    def make(self, cells: Sequence[Cell], contenders: Sequence[Contender]) -> None:
        self.book.make(Run(cell, one, seed) for cell in cells for one in contenders for seed in self.seeds(cell))

    def make_rules(self, cells: Sequence[Cell], *, every_rule: bool) -> None:
        """With `every_rule` each is known at its best cap at all seeds, else only those near the best of the cell."""
        self.book.make(run for cell in cells for run in first_wave(cell, self.seeds(cell)))
        self.book.make(
            run for cell in cells for run in second_wave(self.book, cell, self.seeds(cell), every_rule=every_rule)
        )

    def summary(self, cell: Cell, contender: Contender) -> dict[str, Any]:
        """Means over the seeds; the ratios are to fcfs at 128 in the same cell."""
        runs = [self.book[Run(cell, contender, seed)] for seed in self.seeds(cell)]
        base = [self.book[Run(cell, FCFS, seed)] for seed in self.seeds(cell)]
        mean_s, p99_s = _mean(runs, "mean_e2e_s"), _mean(runs, "p99_e2e_s")
        return {
            "policy": contender.policy,
            "max_batch_size": contender.max_batch_size,
            "attainment": _mean(runs, "attainment"),
            "attainments": [run["attainment"] for run in runs],
            "mean_e2e_s": mean_s,
            "p99_e2e_s": p99_s,
            "mean_e2e_ratio": mean_s / _mean(base, "mean_e2e_s"),
            "p99_e2e_ratio": p99_s / _mean(base, "p99_e2e_s"),
            "unfinished": sum(cell.requests - run["finished"] for run in runs),
            "by_task": {
                task: sum(run["by_task"][task] for run in runs) / len(runs)
                for task, value in runs[0]["by_task"].items()
                if value is not None
            },
        }


# -- sections -------------------------------------------------------------------------------------------------------


def main_section(study: Study) -> dict[str, Any]:
    cells = study.chosen(setting.MAIN)
    study.make_rules(cells, every_rule=True)
    if not study.rules_alone:
        study.make(cells, [ANNEALING])
    return {"cells": [_compared(study, cell) for cell in cells]}


def others_section(study: Study) -> dict[str, Any]:
    cells = study.chosen(setting.OTHERS)
    study.make_rules(cells, every_rule=False)
    if not study.rules_alone:
        study.make(cells, [ANNEALING])
    return {"cells": [_compared(study, cell) for cell in cells]}


def robust_section(study: Study) -> dict[str, Any]:
    cells = study.chosen([setting.EXACT, *setting.ROBUST])
    study.make(cells, [FCFS, ANNEALING])
    rows = [{"name": cell.name, **study.summary(cell, ANNEALING)} for cell in cells]
    exact = next((row["attainment"] for row in rows if row["name"] == setting.EXACT.name), None)
    for row in rows:
        row["kept"] = None if exact is None else row["attainment"] / exact
    return {"goal": setting.MOST_LOST, "cells": rows}


def frontier_section(study: Study) -> dict[str, Any]:
    cells = study.chosen(setting.FRONTIER)
    options = [(patience, annealing_with({"patience": patience})) for patience in setting.PATIENCE]
    known = [(patience, contender) for patience, contender in options if contender is not None]
    study.make(cells, [FCFS, *(contender for _, contender in known)])
    return {
        "knob": "patience",
        "default": AnnealingOptions().patience,
        "cells": [
            {
                "name": cell.name,
                "fcfs": study.summary(cell, FCFS),
                "points": [{"patience": patience, **study.summary(cell, one)} for patience, one in known],
            }
            for cell in cells
        ],
    }


def ablation_section(study: Study) -> dict[str, Any]:
    cells = study.chosen(setting.ABLATION)
    variants = [(name, annealing_with(*differences)) for name, *differences in setting.VARIANTS]
    known = [(name, contender) for name, contender in variants if contender is not None]
    study.make_rules(cells, every_rule=True)
    study.make(cells, [ANNEALING, *(contender for _, contender in known)])
    rows = []
    for cell in cells:
        best = study.book.at_best_caps(cell, study.seeds(cell))
        guard = best.pop("slack-guard")
        order = max(best.values(), key=lambda rule: study.book.attainment(cell, rule, study.seeds(cell)))
        parts = [("fcfs at 128", FCFS), ("order only: the best rule at its best cap", order)]
        parts += [("guard only", guard), *known, ("all of it", ANNEALING)]
        rows.append({"name": cell.name, "parts": [{"what": name, **study.summary(cell, one)} for name, one in parts]})
    return {"cells": rows, "not_offered": [name for name, contender in variants if contender is None]}


def time_section() -> dict[str, Any]:
    make_policy("annealing").warm_up()
    return {"sizes": [plan_time.measure(waiting, goal_ms) for waiting, goal_ms in plan_time.SIZES.items()]}


SIMULATED: dict[str, Callable[[Study], dict[str, Any]]] = {
    "main": main_section,
    "others": others_section,
    "robust": robust_section,
    "frontier": frontier_section,
    "ablation": ablation_section,
}
SECTIONS = [*SIMULATED, "time"]


def _compared(study: Study, cell: Cell) -> dict[str, Any]:
    """Annealing beside the rules, and beside the goal where there is one."""
    seeds, rows = study.seeds(cell), study.traces[cell.trace][: cell.requests]
    best = study.book.at_best_caps(cell, seeds)
    winner = max(best.values(), key=lambda rule: study.book.attainment(cell, rule, seeds))
    compared: dict[str, Any] = {
        "name": cell.name,
        "requests": len(rows),
        "rate_rps": len(rows) * cell.speedup / (rows[-1].arrival_s - rows[0].arrival_s),
        "seeds": list(seeds),
        "fcfs": study.summary(cell, FCFS),
        "rules": [study.summary(cell, rule) for rule in best.values()],
        "best_rule": winner.policy,
    }
    if study.rules_alone:
        return compared
    ours = compared["annealing"] = study.summary(cell, ANNEALING)
    theirs = study.summary(cell, winner)
    lead = interval([a - b for a, b in zip(ours["attainments"], theirs["attainments"], strict=True)])
    compared["lead"] = {"mean": lead.mean, "low": lead.low, "high": lead.high}
    compared["verdict"] = "best" if lead.mean > 0 else "tied" if lead.mean >= -setting.TIED else "behind"
    goal = setting.GOALS.get(cell.name)
    if goal is not None:
        wanted = compared["fcfs"]["attainment"] if goal.attainment is None else goal.attainment
        compared["goal"] = {
            "attainment": wanted,
            "mean_e2e_ratio": goal.mean_e2e,
            "p99_e2e_ratio": setting.MOST_P99,
            "missed": [
                name
                for name, holds in (
                    ("attainment", round(ours["attainment"], 3) >= round(wanted, 3)),
                    ("mean E2E", round(ours["mean_e2e_ratio"], 2) <= goal.mean_e2e),
                    ("p99 E2E", round(ours["p99_e2e_ratio"], 2) <= setting.MOST_P99),
                )
                if not holds
            ],
        }
    return compared


def _mean(runs: Sequence[dict[str, Any]], figure: str) -> float:
    return sum(run[figure] for run in runs) / len(runs)


# -- running --------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--cells", nargs="*", default=[], metavar="NAME", help="only these cells, such as x1.0")
    parser.add_argument("--seeds", type=int, default=5, help="so many, from 0")
    parser.add_argument("--quick", action="store_true", help="the main table with one seed")
    parser.add_argument("--rules", action="store_true", help="the sections main and others, without annealing")
    parser.add_argument("--recheck", type=int, default=0, metavar="N", help="runs of each rule, see above")
    parser.add_argument("--processes", type=int, default=None, metavar="N", help="default: as many as there are cores")
    parser.add_argument("--traces", type=Path, default=os.environ.get(ENV_TRACES_DIR), metavar="DIR")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench-planner", metavar="DIR")
    parser.add_argument("--json", type=Path, help="where the figures go, instead of planner.json in --out")
    options = parser.parse_args()
    options.names = ["main"] if options.quick else options.sections.split(",")
    if options.rules:
        options.names = [name for name in options.names if name in ("main", "others")]
    if unknown := set(options.names) - set(SECTIONS):
        parser.error(f"--sections: {', '.join(sorted(unknown))}: not of {', '.join(SECTIONS)}")
    if options.quick:
        options.seeds = 1
    if options.seeds < 1:
        parser.error("--seeds: must be at least 1")
    return options


def main() -> None:
    options = arguments()
    path = options.json or options.out / ("planner-quick.json" if options.quick else "planner.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "time" in options.names:
        document["time"] = {**about(), **time_section()}
        write_json(path, document)
    os.nice(10)  # after the times were taken; it cannot be taken back
    traces, source = setting.traces(options.traces and Path(options.traces))
    with workers(traces, options.processes) as pool:
        book = Book(RunStore(options.out / "runs"), traces, pool)
        study = Study(book, traces, range(options.seeds), options.cells, options.rules)
        if options.recheck:
            recheck(study, options.recheck)
        for name, section in SIMULATED.items():
            if name in options.names:
                figures = section(study)
                kept = {"runs_of_other_code": book.of_other_code} if book.of_other_code else {}
                document[name] = {**about(), "trace": source, "seeds": options.seeds, **kept, **figures}
                write_json(path, document)
    print("\n".join(tables.markdown(document, options.names)))
    print(f"{path}, from runs of {book.cpu_s / 60:.0f} minutes of CPU", file=sys.stderr)


def recheck(study: Study, count: int) -> None:
    """Per rule: what is kept of other code holds for this, or is made again."""
    for rule in setting.RULES:
        cells = study.chosen([*setting.MAIN, *setting.OTHERS])
        study.book.recheck(
            (Run(cell, c, seed) for cell in cells for c in at_each_cap(rule) for seed in study.seeds(cell)), count
        )


def about() -> dict[str, Any]:
    """Which code, and what it runs on. edited: files that the figures rest on and that are not as in the commit."""
    simulated = source_files((*code_of("annealing"), *code_of("slack-guard")))
    files = [str(path) for path in (*simulated, *Path(__file__).parent.glob("bench_planner*.py"))]
    return {
        "commit": _git("rev-parse", "HEAD") or None,
        "edited": sorted(line[3:] for line in _git("status", "--porcelain", "--", *files).splitlines()),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("lmdeploy-slo", "numpy", "numba")},
        },
    }


def _git(*words: str) -> str:
    """What git says; nothing where there is no git, or this is no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.rstrip()


if __name__ == "__main__":
    main()
