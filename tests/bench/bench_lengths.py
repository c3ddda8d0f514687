"""How well output lengths are foretold on recorded traces, and what a forecast costs.

    python tests/bench/bench_lengths.py [--traces DIR] [--hindsight]

DIR (else LMDEPLOY_SLO_TRACES) holds the traces. One pass over each in its order, every request predicted before it is
seen, beside the quantile of all outputs so far (`offline.length_scores`). Costs are processor time, of the first 20,000
requests of a trace. --hindsight adds what prompt lengths tell of outputs at the very best: each request is predicted
from all others of its trace, those after it included, weighted by a normal kernel in the logarithm of the prompt
length; of several widths the best.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.offline.length_scores import (
    UNBOUNDED_TOKENS,
    LengthRow,
    length_scores,
    read_lengths,
    without_hints,
    without_repeats,
)
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.prediction.length_predictors import make_length_predictor

CALLS = 20_000
WIDTHS = (0.05, 0.1, 0.2, 0.4)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--traces", type=Path, default=os.environ.get("LMDEPLOY_SLO_TRACES"))
    parser.add_argument("--hindsight", action="store_true")
    options = parser.parse_args()
    folder = options.traces
    if folder is None:
        parser.error("name the folder of the traces: --traces DIR, or LMDEPLOY_SLO_TRACES")
    console = Console()
    azure, sharegpt = read_lengths(folder / "azure2023_mixed.csv.gz"), read_lengths(folder / "sharegpt_V3_lens.csv.gz")
    hinted = read_lengths(folder / "sharegpt_val_predicted_len.csv.gz")
    table = Table(title="Pinball loss below that of the global running quantile", title_justify="left")
    for column in ("trace", "predictor", "requests", "at 0.5", "at 0.9", "coverage of 0.9"):
        table.add_column(column, justify="left" if column in ("trace", "predictor") else "right")
    cases = [
        ("azure2023_mixed", azure, "learned"),
        ("azure2023_mixed", azure, "gaussian"),
        ("sharegpt_V3_lens, distinct pairs", without_repeats(sharegpt), "learned"),
        ("sharegpt_V3_lens, distinct pairs", without_repeats(sharegpt), "gaussian"),
        ("sharegpt_V3_lens, all rows", sharegpt, "learned"),
        ("sharegpt_val, hints withheld", without_hints(hinted), "learned"),
        ("sharegpt_val, with hints", hinted, "learned"),
    ]
    for name, rows, predictor_name in cases:
        median, upper = length_scores(rows, make_length_predictor(predictor_name))
        below = (f"{100 * score.below:.1f} %" for score in (median, upper))
        table.add_row(name, predictor_name, f"{len(rows):,}", *below, f"{upper.coverage:.3f}")
    console.print(table)
    if options.hindsight:
        for name, rows in (("sharegpt_V3_lens, distinct pairs", without_repeats(sharegpt)),):
            best = [max(hindsight(rows, level, width) for width in WIDTHS) for level in (0.5, 0.9)]
            console.print(f"{name}, in hindsight: " + ", ".join(f"{100 * below:.1f} %" for below in best))
    for name, rows in (("azure2023_mixed", azure), ("sharegpt_val, with hints", hinted)):
        console.print(f"{name}: {costs(rows)}", highlight=False)


def hindsight(rows: list[LengthRow], level: float, width: float) -> float:
    """By how much the pinball loss is below that of the one best quantile of all."""
    lengths = np.array([row.output_tokens for row in rows], dtype=float)
    prompts = np.array([row.prompt_tokens for row in rows])
    by_length = np.argsort(lengths, kind="stable")
    lengths, prompts = lengths[by_length], prompts[by_length]
    places, values = np.log(prompts + 2.0), np.empty_like(lengths)
    for prompt in np.unique(prompts):
        weights = np.exp(-0.5 * ((places - math.log(prompt + 2.0)) / width) ** 2)
        below = np.cumsum(weights)
        for own in np.flatnonzero(prompts == prompt):
            wanted = level * (below[-1] - weights[own])
            at = int(np.searchsorted(below, wanted))
            if at >= own:
                at = int(np.searchsorted(below, wanted + weights[own]))
            values[own] = lengths[min(at, len(lengths) - 1)]
    constant = lengths[int(level * len(lengths))]
    losses = [np.sum(np.where(e > 0, level, level - 1.0) * e) for e in (lengths - values, lengths - constant)]
    return float(1.0 - losses[0] / losses[1])


def costs(rows: list[LengthRow]) -> str:
    predictor = TaskLengthPredictor()
    spent: list[tuple[int, int]] = []
    for row in rows[:CALLS]:
        spec = RequestSpec(
            "", 0.0, row.prompt_tokens, UNBOUNDED_TOKENS, task_type=row.task, expected_output_tokens=row.hint
        )
        began = time.thread_time_ns()
        predictor.predict(spec)
        between = time.thread_time_ns()
        predictor.observe(spec, row.output_tokens)
        spent.append((between - began, time.thread_time_ns() - between))
    parts = []
    for name, values in zip(("predict", "update"), zip(*spent, strict=True), strict=True):
        ranked = sorted(values)
        at = [ranked[int(share * len(ranked))] / 1e3 for share in (0.1, 0.5)]
        mean = sum(ranked) / len(ranked) / 1e3
        parts.append(f"{name} p10 {at[0]:.1f}, p50 {at[1]:.1f}, mean {mean:.1f} microseconds")
    return "; ".join(parts)


if __name__ == "__main__":
    main()
