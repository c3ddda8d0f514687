"""Does the profiler find the coefficients of an engine that it does not know?

    python tests/bench/bench_profiler.py [--profile NAME ...] [--live] [--budget-s 150] [--max-batch-size 32]
        [--max-prefill-tokens 2048] [--max-session-tokens 4096]

Without --live the emulated engine runs in virtual time; the profiler talks to it directly. With --live it runs in real
time behind a `serve` process, and `profile run --target` measures it over gRPC; that takes up to the budget for each
profile and wants the machine for itself. Prints, by coefficient, how far what it adds to a pass with the most of
everything is off, in per cent of that pass, and the median error on the points that were held out of the fit.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import astuple
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.offline.profiler.artifact import Notes, make_profile
from lmdeploy_slo.offline.profiler.engine_target import engine_target
from lmdeploy_slo.offline.profiler.grid import GridLimits
from lmdeploy_slo.offline.profiler.profiler import Effort, Profiler, limits_of
from lmdeploy_slo.offline.profiler.state import ProfilerState, identity_of
from lmdeploy_slo.prediction.profiles import Profile, load_profile, profile_names
from lmdeploy_slo.testing.virtual_time import run_virtual

READY = re.compile(r"serving on (\S+:\d+) ")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--profile", nargs="+", default=profile_names())
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--budget-s", type=float, default=150)
    parser.add_argument("--max-batch-size", type=int, default=32)
    parser.add_argument("--max-prefill-tokens", type=int, default=2048)
    parser.add_argument("--max-session-tokens", type=int, default=4096)
    options = parser.parse_args()

    limits = EngineLimits(options.max_batch_size, options.max_prefill_tokens)
    table = Table(title="Off at the far corner, % of the pass" + (", over gRPC in real time" if options.live else ""))
    for heading in ("profile", "c0", "p1", "p2", "d1", "d2", "held out, median", "repeats", "s"):
        table.add_column(heading, justify="left" if heading == "profile" else "right")
    for name in options.profile:
        if options.live:
            found, grid, elapsed_s = measured_live(name, limits, options.max_session_tokens, options.budget_s)
        else:
            found, grid, elapsed_s = measured_virtually(name, limits, options.max_session_tokens)
        off = far_corner_errors(found.step_model, load_profile(name).step_model, grid)
        assert found.errors is not None and found.samples is not None
        held_out = found.errors.held_out["all"].median
        table.add_row(
            name,
            *(f"{100 * value:.2f}" for value in off),
            f"{100 * held_out:.2f} %",
            str(found.samples.count),
            f"{elapsed_s:.0f}",
        )
    Console(width=110).print(table)


def far_corner_errors(found: StepModel, truth: StepModel, limits: GridLimits) -> np.ndarray:
    tokens, batch = limits.max_prefill_tokens, limits.max_batch_size
    amounts = np.array([1, tokens, tokens**2, batch, batch * limits.longest_context(batch)])
    true_terms = np.array(astuple(truth)) * amounts
    return np.abs(np.array(astuple(found)) * amounts - true_terms) / true_terms.sum()


def measured_virtually(name: str, limits: EngineLimits, session: int) -> tuple[Profile, GridLimits, float]:
    async def measure(clock: VirtualClock) -> tuple[Profile, GridLimits, float]:
        engine = EmulatedEngine(load_profile(name).step_model, limits, clock, max_session_tokens=session)
        async with engine_target(engine, clock) as target:
            state = ProfilerState(identity_of(target.info), limits_of(target.info))
            profiler = Profiler(target, state, clock, Effort(budget_s=1e6))
            await profiler.run()
            made = make_profile(state, profiler.points, target.info, Notes(name, "2025-01-01", "virtual time"))
            return made.profile, state.limits, state.elapsed_s

    return run_virtual(measure)


def measured_live(name: str, limits: EngineLimits, session: int, budget_s: float) -> tuple[Profile, GridLimits, float]:
    program = [sys.executable, "-m", "lmdeploy_slo"]
    sizes = [
        *("--max-batch-size", str(limits.max_batch_size), "--max-prefill-tokens", str(limits.max_prefill_tokens)),
        *("--max-session-tokens", str(session)),
    ]
    serve = [*program, "serve", "--profile", name, "--policy", "fcfs", "--port", "0", *sizes]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            ready = READY.search(server.stdout.readline())
            assert ready, "the server did not start"
            out = Path(folder) / f"{name}.json"
            run = [*program, "profile", "run", "--target", ready[1], "--budget-s", str(budget_s), "--no-page"]
            subprocess.run([*run, "-o", str(out)], check=True, stdout=subprocess.DEVNULL)
            state = json.loads((Path(folder) / f"{name}.samples.json").read_text())
            return load_profile(str(out)), GridLimits(**state["limits"]), state["elapsed_s"]
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
