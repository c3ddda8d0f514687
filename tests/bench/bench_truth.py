"""How well a step model fitted to the first requests of a recorded run foretells the rest of it.

    python tests/bench/bench_truth.py REQUESTS [--first 150] [--max-batch-size 128] [--max-prefill-tokens 2048]
                                      [--kv-tokens K]

REQUESTS are request timelines as `lmdeploy_slo profile fit` reads them, with their arrivals. The model is fitted to the
first requests with only what was known when the next one arrived; then all of them are simulated from the start under
arrival order, and the means of TTFT, TPOT and E2E of those it was not fitted to are set beside the recorded ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.offline.simulator import SimulatedRequest, Simulator
from lmdeploy_slo.offline.timelines import read_timelines
from lmdeploy_slo.prediction.fitting import fit_step_model
from lmdeploy_slo.scheduling.policy import make_policy


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("requests", type=Path)
    parser.add_argument("--first", type=int, default=150)
    parser.add_argument("--max-batch-size", type=int, default=128)
    parser.add_argument("--max-prefill-tokens", type=int, default=2048)
    parser.add_argument("--kv-tokens", type=int)
    options = parser.parse_args()

    recorded = read_timelines(options.requests)
    everything = recorded.timelines
    known = recorded.until_arrival_of(options.first)
    fitted = fit_step_model(known, options.max_prefill_tokens)
    arrival = np.asarray(recorded.arrival_at_s)
    offset = np.nanmin(everything.queued_at_s - arrival)  # between the clock of arrivals and that of the engine
    arrival = np.where(np.isfinite(arrival), arrival + offset, everything.queued_at_s)
    start = arrival.min()

    limits = EngineLimits(options.max_batch_size, options.max_prefill_tokens, options.kv_tokens)
    outputs = everything.output_tokens.astype(int)
    offered = [
        SimulatedRequest(
            RequestSpec(str(n), float(arrival[n] - start), int(everything.prompt_tokens[n]), int(outputs.max())),
            int(outputs[n]),
        )
        for n in range(len(everything))
    ]
    records = Simulator(make_policy("fcfs"), model=fitted.model, limits=limits).run(offered)
    simulated = {int(record.request_id): record.timing for record in records}

    table = Table(title=f"{options.requests.name}, fitted to the first {options.first}", title_justify="left")
    for column in ("requests", "mean", "recorded", "simulated", "error"):
        table.add_column(column, justify="right")
    for label, chosen in (
        (f"1 to {options.first}", range(options.first)),
        (f"{options.first + 1} to {len(everything)}", range(options.first, len(everything))),
    ):
        rows = list(chosen)
        several = [n for n in rows if outputs[n] > 1]
        first, last = everything.first_token_at_s, everything.last_token_at_s
        pairs = {
            "TTFT, s": (np.mean((first - arrival)[rows]), np.mean([simulated[n].ttft_s for n in rows])),
            "TPOT, ms": (
                1e3 * np.mean(((last - first) / (outputs - 1))[several]),
                1e3 * np.mean([simulated[n].tpot_s for n in several]),
            ),
            "E2E, s": (np.mean((last - arrival)[rows]), np.mean([simulated[n].e2e_s for n in rows])),
        }
        for name, (truth, ours) in pairs.items():
            table.add_row(label, name, f"{truth:.3f}", f"{ours:.3f}", f"{100 * (ours / truth - 1):+.1f} %")
    console = Console()
    milliseconds = ", ".join(
        f"{name} {1e3 * getattr(fitted.model, name):.4g}" for name in ("c0", "p1", "p2", "d1", "d2")
    )
    console.print(f"fitted, ms: {milliseconds}; {fitted.finished} of {fitted.requests} requests had finished")
    console.print(table)


if __name__ == "__main__":
    main()
