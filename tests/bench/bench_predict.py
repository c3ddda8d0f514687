"""Whether what requests are told on arrival comes true: simulated, on a recorded trace.

    python tests/bench/bench_predict.py TRACE [--policy annealing] [--speedup 0.8] [--limit 6000] [--seed 0]

Code completion has 2 s E2E, chat 1 s TTFT and 50 ms TPOT; lengths are the project's own forecasts. For each duration,
by task: the share of requests that ended up below, within and above the 80 % interval they were told, how wide it was
(high / low, median), and the median of |log(observed / told)|, beside that of the model the forecasts start from. Then
what became of those who were told a chance, by chance, with the Brier score beside that of telling everybody the same.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, median

from rich.console import Console
from rich.table import Table

from lmdeploy_slo.core.metrics import RequestRecord
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.offline.experiment import Load, offered_requests
from lmdeploy_slo.offline.simulation.forecasts import Forecasts
from lmdeploy_slo.offline.simulation.requests import simulated_requests
from lmdeploy_slo.offline.simulator import Simulator
from lmdeploy_slo.offline.slo_grammar import parse_slo_options
from lmdeploy_slo.offline.traces import read_traces
from lmdeploy_slo.prediction.profiles import load_profile
from lmdeploy_slo.scheduling.admission import Forecast
from lmdeploy_slo.scheduling.policy import SearchBudget, make_policy

Told = list[tuple[RequestRecord, Forecast]]
FLOOR_S = 0.005


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trace")
    parser.add_argument("--traces", type=Path, default=os.environ.get("LMDEPLOY_SLO_TRACES", "."))
    parser.add_argument("--policy", default="annealing")
    parser.add_argument("--speedup", type=float, default=0.8)
    parser.add_argument("--limit", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-batch-size", type=int, default=256)
    options = parser.parse_args()

    rows = read_traces([options.traces / options.trace])
    load = Load(parse_slo_options(["code=e2e:2000", "chat=ttft:1000,tpot:50"]), options.speedup, options.limit)
    policy = make_policy(options.policy, seed=options.seed, budget=SearchBudget(time_s=None, evaluations=800))
    forecasts = Forecasts(keeps_order=not policy.wants_ticks)
    model = load_profile("a100-qwen2.5-7b").step_model
    simulator = Simulator(policy, model=model, limits=EngineLimits(options.max_batch_size), forecasts=forecasts)
    spent = {"forecast": Stopwatch(forecasts, "arrived"), "learning": Stopwatch(forecasts, "finished")}
    records = simulator.run(simulated_requests(offered_requests(rows, load, options.seed)))
    told = [(record, forecasts.told[record.request_id]) for record in records]

    console = Console()
    met = fmean(bool(record.slo_met) for record in records)
    console.print(
        f"{options.policy}, x{options.speedup:g}, {len(records):,} requests, {100 * met:.1f} % met; "
        + ", ".join(f"{name} {watch.mean_us:.0f} microseconds" for name, watch in spent.items()),
        highlight=False,
    )
    console.print(durations(told))
    console.print(chances(told))


class Stopwatch:
    """Processor time of the calls of a method."""

    def __init__(self, owner: object, method: str) -> None:
        self._ns: list[int] = []
        inner = getattr(owner, method)

        def timed(*args: object) -> None:
            began = time.thread_time_ns()
            inner(*args)
            self._ns.append(time.thread_time_ns() - began)

        setattr(owner, method, timed)

    @property
    def mean_us(self) -> float:
        return fmean(self._ns) / 1e3


def durations(told: Told) -> Table:
    table = Table(title="Durations", title_justify="left")
    for column in ("", "task", "below", "within", "above", "high / low", "error", "error before"):
        table.add_column(column, justify="left" if column in ("", "task") else "right")
    tasks = sorted({record.task for record, _ in told})
    for place, name in enumerate(("queue", "ttft", "tpot", "e2e")):
        for task in [*tasks, "all"]:
            cases = []
            for record, forecast in told:
                observed = getattr(record.timing, f"{name}_s")
                expected, within = getattr(forecast, f"{name}_s"), getattr(forecast.intervals, f"{name}_s")
                if task in (record.task, "all") and observed is not None and within is not None:
                    cases.append((observed, expected, within, forecast.basis.bases_s[place]))
            shares = [
                share(observed < within.low for observed, _, within, _ in cases),
                share(within.low <= observed <= within.high for observed, _, within, _ in cases),
                share(observed > within.high for observed, _, within, _ in cases),
            ]
            width = median((within.high + FLOOR_S) / (within.low + FLOOR_S) for _, _, within, _ in cases)
            error = median(log_error(observed, expected) for observed, expected, _, _ in cases)
            before = median(log_error(observed, base) for observed, _, _, base in cases)
            table.add_row(name, task, *shares, f"{width:.1f}", f"{error:.2f}", f"{before:.2f}")
    return table


def chances(told: Told) -> Table:
    table = Table(title="Chances of meeting the SLO", title_justify="left")
    for column in ("told", "requests", "mean told", "met"):
        table.add_column(column, justify="right")
    cases = [(f.chance, bool(r.slo_met)) for r, f in told if f.chance is not None and r.slo_met is not None]
    for low in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9):
        high = min(x for x in (0.1, 0.3, 0.5, 0.7, 0.9, 1.01) if x > low)
        here = [(chance, met) for chance, met in cases if low <= chance < high]
        if here:
            means = fmean(chance for chance, _ in here), fmean(met for _, met in here)
            table.add_row(f"{low:.1f} to {min(high, 1):.1f}", f"{len(here):,}", *(f"{mean:.2f}" for mean in means))
    overall = fmean(met for _, met in cases)
    brier = fmean((chance - met) ** 2 for chance, met in cases)
    right = fmean((chance >= 0.5) == met for chance, met in cases)
    table.caption = (
        f"Brier score {brier:.3f}, of the mean {overall * (1 - overall):.3f}; {100 * right:.1f} % called right"
    )
    return table


def log_error(observed: float, expected: float) -> float:
    return abs(math.log((observed + FLOOR_S) / (expected + FLOOR_S)))


def share(hits: Iterable[bool]) -> str:
    return f"{100 * fmean(hits):.1f} %"


if __name__ == "__main__":
    main()
