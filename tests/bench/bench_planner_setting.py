"""What `bench_planner.py` measures: the cells, their loads, the goals. Fixed before anything is tuned; nothing is tuned
for a cell."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.offline.experiment import Fleet, Load
from lmdeploy_slo.offline.generated import generate_workload
from lmdeploy_slo.offline.slo_grammar import parse_slo_options
from lmdeploy_slo.offline.traces import TraceRow, read_traces
from lmdeploy_slo.prediction.profiles import load_profile

Rows = Sequence[TraceRow]

REQUESTS = 6000
OTHER_REQUESTS = 3000
OTHER_SEEDS = 3
RULES = (
    "fcfs", "sjf", "swf", "edf", "llf",
    "fcfs-feasible", "sjf-feasible", "swf-feasible", "edf-feasible", "llf-feasible",
    "slack-guard",
)  # fmt: skip
CAPS = (32, 64, 128, 256)
ANNEALING_CAP = 256
BASELINE = ("fcfs", 128)
TIED = 0.005
MOST_P99 = 2.0
"""Of the p99 E2E of fcfs at 128, in each cell that has a goal."""

SLOS = ("code=e2e:2000", "chat=ttft:1000,tpot:50")
LENGTH_NOISE = 0.3


@dataclass(frozen=True, slots=True)
class Cell:
    """One load on one engine. trace: a name of `traces`; the rest as the options of `simulate` of these names."""

    name: str
    trace: str = "mixed"
    speedup: float = 1.0
    profile: str = "a100-qwen2.5-7b"
    slos: tuple[str, ...] = SLOS
    slo_scale: float = 1.0
    requests: int = REQUESTS
    length_noise: float = LENGTH_NOISE
    length_bias: float = 1.0
    planner_scale: float = 1.0

    @property
    def load(self) -> Load:
        slos = parse_slo_options(self.slos, self.slo_scale)
        return Load(slos, self.speedup, self.requests, self.length_noise, self.length_bias)

    def fleet(self, max_batch_size: int) -> Fleet:
        model = PROFILES[self.profile]() if self.profile in PROFILES else load_profile(self.profile).step_model
        return Fleet(model, model.scaled(self.planner_scale), EngineLimits(max_batch_size))


def _seventy_billion() -> StepModel:
    """Made up, from a100-qwen2.5-7b: ten times the weights over four cards of which four fifths are of use, and KV
    caches of 320 KB a token (80 layers, 8 heads) instead of 56, over four."""
    base = load_profile("a100-qwen2.5-7b").step_model
    work = base.scaled(10 / (4 * 0.8))
    return replace(work, d2=base.d2 * 320 / 56 / 4)


def _ten_times_slower() -> StepModel:
    """Made up: a model ten times the size on the same card."""
    return load_profile("a100-qwen2.5-7b").step_model.scaled(10.0)


PROFILES: Mapping[str, Callable[[], StepModel]] = {
    "made-up-70b-tp4": _seventy_billion,
    "made-up-10x": _ten_times_slower,
}


# -- the main table -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Goal:
    """attainment: None is that of fcfs at 128. mean_e2e: at most so many times that of fcfs at 128."""

    attainment: float | None
    mean_e2e: float


GOALS = {
    "x0.3": Goal(None, 1.05),
    "x0.5": Goal(None, 1.05),
    "x0.8": Goal(0.92, 1.0),
    "x1.0": Goal(0.89, 1.0),
    "x1.5": Goal(0.85, 0.8),
    "x2.0": Goal(0.80, 0.75),
}
SPEEDUPS = {name: float(name[1:]) for name in GOALS}
MAIN = [Cell(name, speedup=speedup) for name, speedup in SPEEDUPS.items()]

KNOB_GOAL = Goal(0.72, 1 - 0.316)
"""At x2.0, by one setting of the knob."""


# -- other loads ----------------------------------------------------------------------------------------------------


def _other(name: str, **differences: object) -> Cell:
    return replace(Cell(name, requests=OTHER_REQUESTS), **differences)


_ALL_THREE = ("code=ttft:500,tpot:50,e2e:2000", "chat=ttft:1000,tpot:50,e2e:20000")

OTHERS = [
    _other("h200, x2", profile="h200-qwen2.5-7b", speedup=2.0),
    _other("h200, x4", profile="h200-qwen2.5-7b", speedup=4.0),
    _other("h200, x6", profile="h200-qwen2.5-7b", speedup=6.0),
    _other("a100 Llama-2-7B, x1", profile="a100-llama2-7b-turbomind"),
    _other("70B-like on four cards, x0.15", profile="made-up-70b-tp4", speedup=0.15),
    _other("70B-like on four cards, x0.3", profile="made-up-70b-tp4", speedup=0.3),
    _other("ten times slower, SLO x5, x0.1", profile="made-up-10x", slo_scale=5.0, speedup=0.1),
    _other("all chat, x1.5", trace="chat", speedup=1.5),
    _other("all chat, x3", trace="chat", speedup=3.0),
    _other("all code, x1", trace="code"),
    _other("all code, x3", trace="code", speedup=3.0),
    _other("classification, x1", trace="classification", slos=("label=e2e:500",)),
    _other("classification, x2", trace="classification", speedup=2.0, slos=("label=e2e:1000",)),
    _other("chat and classification, x1.5", trace="chat-label", speedup=1.5, slos=("label=e2e:500", SLOS[1])),
    _other("a third without SLO, x1", trace="third"),
    _other("a third without SLO, x2", trace="third", speedup=2.0),
    _other("SLO x0.5, x0.5", slo_scale=0.5, speedup=0.5),
    _other("SLO x0.5, x1", slo_scale=0.5),
    _other("SLO x2, x1", slo_scale=2.0),
    _other("SLO x2, x2", slo_scale=2.0, speedup=2.0),
    _other("TTFT alone, x1.5", slos=("default=ttft:1000",), speedup=1.5),
    _other("TPOT alone, x1.5", slos=("default=tpot:50",), speedup=1.5),
    _other("E2E alone, x1.5", slos=("code=e2e:2000", "chat=e2e:15000"), speedup=1.5),
    _other("all three, x0.8", slos=_ALL_THREE, speedup=0.8),
    _other("all three, x1.5", slos=_ALL_THREE, speedup=1.5),
    _other("generated workload, x1", trace="generated"),
    _other("Mooncake, x0.2", trace="mooncake", slos=("default=ttft:5000,tpot:100",), speedup=0.2),
]


# -- robustness, frontier, ablation ---------------------------------------------------------------------------------

EXACT = Cell("exact knowledge", length_noise=0.0)
MOST_LOST = 0.9
"""Share of the attainment with exact knowledge that each of these keeps."""

ROBUST = [
    Cell("length noise 0.3"),
    Cell("length noise 0.6", length_noise=0.6),
    Cell("length bias 0.5", length_bias=0.5),
    Cell("length bias 2", length_bias=2.0),
    Cell("planner scale 0.8", planner_scale=0.8),
    Cell("planner scale 1.25", planner_scale=1.25),
]

PATIENCE = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
FRONTIER = [cell for cell in MAIN if cell.speedup >= 1.0]
ABLATION = [cell for cell in MAIN if cell.speedup in (1.0, 2.0)]

VARIANTS: Sequence[tuple[str, Mapping[str, object], int | None]] = (
    ("rules alone decide, on the rollout", {"search": "portfolio"}, None),
    ("greedy insertion and rules", {"search": "greedy"}, None),
    ("no price", {"price_weight": 0.0}, None),
    ("no pacing: no stall expected of who is to come", {"background_max": 0.0}, None),
    ("leftovers at any cost", {"leftover_loss": 1e9}, None),
    ("100 evaluations", {}, 100),
    ("3,200 evaluations", {}, 3200),
)
"""(what it is called, options of annealing that differ, evaluations of a plan where they differ)."""


# -- traces ---------------------------------------------------------------------------------------------------------


def traces(folder: Path | None) -> tuple[dict[str, Rows], str]:
    """(name -> rows, what the mixed one is). Without the recorded file a generated workload of its shape is used;
    "mooncake" is there only where its file is."""
    generated = generate_workload(2 * REQUESTS, seed=1)
    recorded = None if folder is None else folder / "azure2023_mixed.csv.gz"
    if recorded is not None and recorded.exists():
        mixed, source = read_traces([recorded]), "Azure LLM inference traces 2023, code and conversation merged"
    else:
        mixed, source = generate_workload(28_185), "generated workload in the shape of Azure's traces of 2023"
        print(f"no recorded trace ({recorded or 'no folder named'}): {source}", file=sys.stderr)
    made: dict[str, Rows] = {
        "mixed": mixed,
        "generated": generated,
        "chat": [row for row in mixed if row.task == "chat"],
        "code": [row for row in mixed if row.task == "code"],
        "classification": [_labelled(row) for row in mixed],
        "chat-label": [_labelled(row) if row.task == "code" else row for row in mixed],
        "third": [replace(row, task="batch") if row.index % 3 == 0 else row for row in mixed],
    }
    if folder is not None and (folder / "mooncake_synthetic_trace.jsonl.gz").exists():
        made["mooncake"] = read_traces([folder / "mooncake_synthetic_trace.jsonl.gz"])
    return made, source


def _labelled(row: TraceRow) -> TraceRow:
    """The same prompt, answered with 1 to 4 tokens."""
    return replace(row, output_tokens=1 + row.index % 4, task="label")
