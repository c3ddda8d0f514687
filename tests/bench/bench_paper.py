"""The paper's own setting: FCFS and annealing side by side in every cell of `lmdeploy_slo/offline/paper/setting.py`.

    python tests/bench/bench_paper.py [--seeds N] [--engines static,persistent] [--chat-lengths FILE]
                                      [--json FILE] [--markdown FILE]

Chat lengths are drawn from sharegpt_V3_lens.csv.gz in --traces or LMDEPLOY_SLO_TRACES, or from --chat-lengths, a CSV
with input_tokens and output_tokens; without either from quantiles of the former. What was run is kept in --out and not
run again while the code it rests on stays as it is. Everything is in virtual time: the same figures on any machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmdeploy_slo.config import ENV_TRACES_DIR
from lmdeploy_slo.offline.paper import setting
from lmdeploy_slo.offline.paper.cells import ENGINES, SCHEDULERS, Cell, all_cells, capacity_rps, run_cell
from lmdeploy_slo.offline.paper.workload import read_pairs
from lmdeploy_slo.offline.parallel import workers
from lmdeploy_slo.offline.results import write_json
from lmdeploy_slo.offline.run_store import RunStore, Stored, code_fingerprint, digest, plain, source_files

ROOT = Path(__file__).parents[2]
CHAT_FILE = "sharegpt_V3_lens.csv.gz"
REPORTED_FACTOR, REPORTED_MEAN = 5.0, 1 - 0.316
"""What the paper says of its scheduler, against vLLM and LMDeploy: attainment, and mean latency."""

CELLS_MODULE = "lmdeploy_slo.offline.paper.cells"
POLICY_MODULES = {"annealing": "lmdeploy_slo.scheduling.annealing"}


@dataclass(frozen=True)
class Run:
    cell: Cell
    scheduler: str
    seed: int
    capacity_rps: float

    @property
    def code(self) -> tuple[str, ...]:
        policy = POLICY_MODULES.get(self.scheduler, "lmdeploy_slo.scheduling.rules")
        return (CELLS_MODULE,) if self.cell.engine == "static" else (CELLS_MODULE, policy)


def make_run(run: Run, shared: Mapping[str, Any]) -> dict[str, Any]:
    return asdict(run_cell(run.cell, run.scheduler, run.seed, run.capacity_rps, shared["chat"]))


def make_all(runs: list[Run], chat: Any, out: Path, processes: int | None) -> dict[Run, dict[str, Any]]:
    """All of them, those that are kept in `out` from there."""
    store, lengths = RunStore(out), "preset" if chat is None else digest(chat.tolist())
    codes = {code: code_fingerprint(code) for code in {run.code for run in runs}}
    asked = {run: [plain(run), lengths, setting.LENGTH_NOISE, setting.POISSON_REQUESTS] for run in runs}
    answers = {}
    for run in runs:
        kept = store.find(asked[run])
        if kept is not None and kept.code == codes[run.code]:
            answers[run] = kept.answer
    missing = [run for run in runs if run not in answers]
    with workers({"chat": chat}, processes) as pool:
        for done, (position, answer) in enumerate(pool.map(make_run, missing), 1):
            run = missing[position]
            store.keep(Stored(asked[run], codes[run.code], answer))
            answers[run] = answer
            if done % 100 == 0 or done == len(missing):
                print(f"{done} of {len(missing)} runs", file=sys.stderr, flush=True)
    return answers


def summarize(cell: Cell, seeds: Iterable[int], runs: Mapping[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds; p99 likewise, of each run's own."""
    entry: dict[str, Any] = asdict(cell) | {"family": cell.family, "seeds": list(seeds)}
    for scheduler in SCHEDULERS:
        of_seeds = [runs[scheduler, seed] for seed in entry["seeds"]]
        entry[scheduler] = {
            key: float(np.mean([one[key] for one in of_seeds])) for key in ("attainment", "mean_e2e_s", "p99_e2e_s")
        }
        entry[scheduler]["by_task"] = {
            task: float(np.mean([one["by_task"][task] for one in of_seeds])) for task in setting.SLOS
        }
        entry[scheduler]["attainment_by_seed"] = [one["attainment"] for one in of_seeds]
        entry[scheduler]["mean_e2e_s_by_seed"] = [one["mean_e2e_s"] for one in of_seeds]
    base = entry["fcfs"]
    for scheduler in SCHEDULERS[1:]:
        ours = entry[scheduler]
        ours["attainment_factor"] = ours["attainment"] / base["attainment"] if base["attainment"] else None
        ours["mean_e2e_relative"] = ours["mean_e2e_s"] / base["mean_e2e_s"]
        ours["p99_e2e_relative"] = ours["p99_e2e_s"] / base["p99_e2e_s"]
    return entry


def is_worse(entry: dict[str, Any]) -> bool:
    """Whether annealing meets less or takes longer than FCFS, beyond rounding."""
    ours, base = entry["annealing"], entry["fcfs"]
    return ours["attainment"] < base["attainment"] - 1e-9 or ours["mean_e2e_relative"] > 1 + 1e-9


def families(entries: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        found.setdefault(entry["family"], []).append(entry)
    return found


def markdown(entries: list[dict[str, Any]]) -> str:
    """The table of families, and one of all cells for each family."""
    lines = [
        "| family | attainment up to | mean E2E down to | least mean E2E, SLOs aside | cells | worse than FCFS |",
        "|---|---|---|---|---|---|",
    ]
    for family, cells in families(entries).items():
        factor = max(cell["annealing"]["attainment_factor"] for cell in cells)
        mean = min(cell["annealing"]["mean_e2e_relative"] for cell in cells)
        floor = min(cell["shortest"]["mean_e2e_relative"] for cell in cells)
        worse = sum(map(is_worse, cells))
        lines.append(f"| {family} | {factor:.1f} x | {mean:.3f} | {floor:.3f} | {len(cells)} | {worse or 'none'} |")
    lines.append(f"| the paper, against vLLM and LMDeploy | {REPORTED_FACTOR:.0f} x | {REPORTED_MEAN:.3f} | | | |")
    for family, cells in families(entries).items():
        loads = sorted({cell["load"] for cell in cells})
        unit = "{:g} requests" if cells[0]["arrivals"] == "at once" else "x{:g}"
        lines += ["", f"**{family[0].upper()}{family[1:]}**", ""]
        lines.append("| batch size | " + " | ".join(unit.format(load) for load in loads) + " |")
        lines.append("|---" * (len(loads) + 1) + "|")
        for batch_size in sorted({cell["batch_size"] for cell in cells}):
            row = sorted((cell for cell in cells if cell["batch_size"] == batch_size), key=lambda cell: cell["load"])
            lines.append(f"| {batch_size} | " + " | ".join(map(_entry, row)) + " |")
    return "\n".join(lines) + "\n"


def _entry(cell: dict[str, Any]) -> str:
    base, ours = cell["fcfs"], cell["annealing"]
    told = f"{base['attainment']:.3f} → {ours['attainment']:.3f}; {ours['mean_e2e_relative']:.3f}"
    return f"{told}; {ours['p99_e2e_relative']:.2f}{' (worse)' if is_worse(cell) else ''}"


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="at most so many of each cell's")
    parser.add_argument("--engines", default=",".join(ENGINES), help="default: %(default)s")
    parser.add_argument("--traces", type=Path, default=os.environ.get(ENV_TRACES_DIR), metavar="DIR")
    parser.add_argument("--chat-lengths", type=Path, metavar="FILE")
    parser.add_argument("--processes", type=int, metavar="N", help="default: as many as there are cores")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench-paper", metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: paper.json in --out")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="default: stdout")
    options = parser.parse_args()
    path = options.chat_lengths or (options.traces and Path(options.traces) / CHAT_FILE)
    chat = read_pairs(path) if path and (options.chat_lengths or path.exists()) else None
    os.nice(10)
    cells = [cell for cell in all_cells() if cell.engine in options.engines.split(",")]
    capacities = {
        (engine, size): capacity_rps(engine, size, chat) for engine, size in {(c.engine, c.batch_size) for c in cells}
    }
    runs = [
        Run(cell, scheduler, seed, capacities[cell.engine, cell.batch_size])
        for cell in cells
        for scheduler in SCHEDULERS
        for seed in cell.seeds[: options.seeds]
    ]
    answers = make_all(runs, chat, options.out / "runs", options.processes)
    by_cell: dict[Cell, dict[tuple[str, int], dict[str, Any]]] = {}
    for run, answer in answers.items():
        by_cell.setdefault(run.cell, {})[run.scheduler, run.seed] = answer
    entries = [summarize(cell, cell.seeds[: options.seeds], by_cell[cell]) for cell in cells]
    files = [str(file) for file in source_files((CELLS_MODULE, *POLICY_MODULES.values()))]
    document = {
        "commit": _git("rev-parse", "HEAD") or None,
        "edited": sorted(line[3:] for line in _git("status", "--porcelain", "--", *files).splitlines()),
        "chat_lengths": "quantiles of the preset" if chat is None else f"{path.name}, {len(chat)} different pairs",
        "length_noise": setting.LENGTH_NOISE,
        "poisson_requests": setting.POISSON_REQUESTS,
        "capacity_rps": {f"{engine}, {size}": value for (engine, size), value in sorted(capacities.items())},
        "cells": entries,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.json or options.out / "paper.json", document)
    if options.markdown:
        options.markdown.write_text(markdown(entries), encoding="utf-8")
    else:
        print(markdown(entries))


if __name__ == "__main__":
    main()
