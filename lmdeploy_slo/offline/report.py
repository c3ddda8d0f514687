"""Runs side by side in a terminal. What is missing is shown as a dash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

_MAX_COLUMNS = 4  # more runs than this go down the page, one line each
_MISSING = "-"
_STATUSES = ("finished", "rejected", "timed_out", "failed", "cancelled")
_LATENCIES = (  # metric, statistic, label, decimal places
    ("ttft_ms", "p50", "TTFT p50, ms", 0),
    ("ttft_ms", "p99", "TTFT p99, ms", 0),
    ("tpot_ms", "p50", "TPOT p50, ms", 1),
    ("tpot_ms", "p99", "TPOT p99, ms", 1),
    ("e2e_ms", "mean", "E2E mean, ms", 0),
    ("e2e_ms", "p99", "E2E p99, ms", 0),
    ("queue_ms", "mean", "queue mean, ms", 0),
)


def runs_table(runs: Sequence[dict[str, Any]], title: str | None = None) -> Table:
    """A table of `runs` as `core.metrics.summarize` makes them: a column each, or a line each where there are many."""
    lines = _lines(runs)
    table = Table(title=title, title_justify="left", header_style="bold")
    if len(runs) <= _MAX_COLUMNS:
        table.add_column("")
        for run in runs:
            table.add_column(run["policy"], justify="right")
        for label, cells in lines:
            table.add_row(label, *cells)
    else:
        table.add_column("policy")
        for label, _ in lines:
            table.add_column(label.strip(), justify="right")
        for position, run in enumerate(runs):
            table.add_row(run["policy"], *(cells[position] for _, cells in lines))
    return table


def _lines(runs: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(label, one cell per run); what is the same for all runs by nature, or nothing but zeros, is left out."""
    lines = [
        (name, [f"{run[name]:g}" for run in runs])
        for name in ("speedup", "seed")
        if len({run[name] for run in runs}) > 1
    ]
    lines.append(("SLO attainment", [_number(run["slo_attainment"], 3) for run in runs]))
    tasks = sorted({task for run in runs for task in run["by_task"]})
    if len(tasks) > 1:
        for task in tasks:
            shares = [run["by_task"].get(task, {}).get("slo_attainment") for run in runs]
            lines.append((f"  {task or '(no task)'}", [_number(share, 3) for share in shares]))
    lines.append(("met / with SLO", [f"{run['met']:,} / {run['with_slo']:,}" for run in runs]))
    lines.append(("goodput, requests/s", [_number(run["goodput_rps"], 2) for run in runs]))
    lines.extend(
        (status.replace("_", " "), [f"{run[status]:,}" for run in runs])
        for status in _STATUSES
        if status == "finished" or any(run[status] for run in runs)
    )
    lines.extend(
        (label, [_number(run[metric][statistic], digits) for run in runs])
        for metric, statistic, label, digits in _LATENCIES
    )
    lines.append(("duration, s", [_number(run["duration_s"], 1) for run in runs]))
    return lines


def _number(value: float | None, digits: int) -> str:
    return _MISSING if value is None else f"{value:,.{digits}f}"
