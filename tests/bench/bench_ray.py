"""What an engine on Ray costs beside one in the gateway's process.

    python tests/bench/bench_ray.py engine [--streams 64] [--tokens 300] [--step-ms 10] [--replicas 1,4] [--rounds 3]
    python tests/bench/bench_ray.py serve  [--streams 64] [--tokens 300] [--step-ms 20] [--replicas 1,4] [--rounds 3]

engine: emulated engines alone, their events counted and thrown away. For each number of replicas, on Ray and in this
process: CPU time of this process and of the replicas' per token, how long after the step its events are here (median
and 99th percentile; on one machine both ends have one clock), and how many steps came in one report.

serve: `lmdeploy_slo serve` in a process of its own, and a client that reads all streams over one channel, unparsed.
In process: one engine with all streams, as fast as several. Tokens per second that arrived, of how many the engines
made; CPU time of the gateway's process per token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import uvloop
from bench_streaming import run_client, spawn

from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import Engine, EngineEvent
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.engine.ray_replica import RayCluster, ReplicaResources, ray_engine
from lmdeploy_slo.engine.remote import EngineFace, RemoteEngine
from lmdeploy_slo.testing.builders import make_request
from lmdeploy_slo.v1 import inference_pb2 as pb

CLOCK = MonotonicClock()
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
READY = re.compile(r"lmdeploy_slo: serving on \S+:(\d+) ")


def cpu_s(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


# -- engines alone ------------------------------------------------------------


class Reader:
    """The sink of one engine."""

    def __init__(self, wanted: int) -> None:
        self.tokens = self.ended = 0
        self.late_s: list[float] = []
        self.done = asyncio.Event()
        self.engine: Engine | None = None
        self._wanted = wanted

    def sink(self, events: Sequence[EngineEvent], at_s: float) -> None:
        if isinstance(self.engine, RemoteEngine):
            offset = self.engine._offset
            at_s -= min(offset._before, offset._now)  # as the engine itself said
        self.late_s.append(CLOCK.now_s() - at_s)
        for event in events:
            self.tokens += len(event.token_ids)
            self.ended += event.end is not None
        if self.ended == self._wanted:
            self.done.set()


async def measure_engines(engines: Sequence[Engine], args: argparse.Namespace) -> dict[str, float]:
    readers = [Reader(args.streams) for _ in engines]
    for engine, reader in zip(engines, readers):
        reader.engine = engine
        await engine.start(reader.sink)
    pids = [(await e._link._actor.hello.remote())[2] for e in engines if isinstance(e, RemoteEngine)]  # type: ignore[attr-defined]
    began_s, theirs_s = time.process_time(), sum(map(cpu_s, pids))
    for number in range(args.streams):
        for engine in engines:
            engine.submit(make_request(f"r{number}", output_tokens=args.tokens), number)
    await asyncio.gather(*(reader.done.wait() for reader in readers))
    ours_s, theirs_s = time.process_time() - began_s, sum(map(cpu_s, pids)) - theirs_s
    for engine in engines:
        await engine.close()
    tokens = sum(reader.tokens for reader in readers)
    late_s = sorted(each for reader in readers for each in reader.late_s)
    return {
        "here us": ours_s * 1e6 / tokens,
        "there us": theirs_s * 1e6 / tokens,
        "late ms": statistics.median(late_s) * 1e3,
        "p99 ms": late_s[int(0.99 * (len(late_s) - 1))] * 1e3,
        "steps": float(len(late_s)),
    }


async def bench_engines(args: argparse.Namespace) -> None:
    model = StepModel(args.step_ms / 1e3, 0.0, 0.0, 0.0, 0.0)
    make = partial(EmulatedEngine, model, EngineLimits())
    cluster = RayCluster(cpus=max(args.replicas))
    await cluster.connect()

    def engines_of(where: str, count: int) -> list[Engine]:
        if where == "in process":
            return [make(clock=CLOCK) for _ in range(count)]
        resources = ReplicaResources(cpus=1)
        face = EngineFace(make(clock=CLOCK))
        return [ray_engine(cluster, make, face, CLOCK, resources=resources, name=str(n)) for n in range(count)]

    print(f"{args.streams} streams of {args.tokens} tokens a replica, steps of {args.step_ms:g} ms")
    print(f"{'where':12s} replicas  CPU us per token: here  there   late ms: p50    p99")
    for count in args.replicas:
        results: dict[str, list[dict[str, float]]] = {"in process": [], "Ray": []}
        for number in range(args.rounds):
            order = list(results)
            for where in order if number % 2 else order[::-1]:
                results[where].append(await measure_engines(engines_of(where, count), args))
        for where, rounds in results.items():
            median = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
            figures = (
                f"{median['here us']:22.2f} {median['there us']:6.2f} {median['late ms']:14.3f} {median['p99 ms']:6.2f}"
            )
            print(f"{where:12s} {count:8d}  {figures}", flush=True)
    await cluster.close()


# -- through the gateway ------------------------------------------------------


@contextmanager
def serving(folder: Path, step_ms: float, *flags: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """(port, process) of a server."""
    profile = folder / "profile.json"
    step = {"c0": step_ms, "p1": 0.0, "p2": 0.0, "d1": 0.0, "d2": 0.0}
    profile.write_text(json.dumps({"format": 1, "name": "fast", "step_ms": step}))
    command = [sys.executable, "-m", "lmdeploy_slo", "serve", "--port", "0", "--profile", str(profile)]
    command += ["--policy", "fcfs", "--max-batch-size", "4096", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            ready = READY.match(line := process.stdout.readline())
            assert ready, f"no ready line but {line!r}"
            yield int(ready[1]), process
        finally:
            process.terminate()
            process.wait(60)


def bench_serve(args: argparse.Namespace) -> None:
    client = spawn(run_client)
    request = pb.GenerateRequest(
        text="benchmark",
        stopping=pb.StoppingParams(max_new_tokens=args.tokens),
        emulation=pb.Emulation(output_tokens=args.tokens),
    ).SerializeToString()
    head = [str(Path(sys.executable).with_name("ray"))]
    print(f"{args.streams} streams of {args.tokens} tokens a replica, steps of {args.step_ms:g} ms")
    print(f"{'where':12s} replicas  tokens/s  of made  messages  CPU us per token of the gateway")
    with tempfile.TemporaryDirectory() as folder:
        for count in args.replicas:
            # One replica on Ray needs a Ray that is there already.
            start = [*head, "start", "--head", "--port=6399", "--include-dashboard=false", "--num-cpus=16"]
            quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}
            subprocess.run(start, env={**os.environ, "RAY_worker_niceness": "0"}, **quiet)
            try:
                for where in ("in process", "Ray"):
                    on_ray = ["--replicas", str(count), "--ray-address", "127.0.0.1:6399"] if where == "Ray" else []
                    with serving(Path(folder), args.step_ms, *on_ray) as (port, server):
                        report(where, count, client, port, request, server.pid, args)
            finally:
                subprocess.run([*head, "stop"], **quiet)
    client.send(None)


def report(where: str, count: int, client: Any, port: int, request: bytes, pid: int, args: argparse.Namespace) -> None:
    streams = args.streams * count
    rates, costs, messages = [], [], 0
    for number in range(args.rounds + 1):
        began_s = cpu_s(pid)
        client.send((port, request, streams, False))
        elapsed_s, messages, _ = client.recv()
        if number:  # the first warms up
            rates.append(streams * args.tokens / elapsed_s)
            costs.append((cpu_s(pid) - began_s) * 1e6 / (streams * args.tokens))
    made = streams / (args.step_ms / 1e3) if args.step_ms else float("nan")
    rate, cost = statistics.median(rates), statistics.median(costs)
    print(f"{where:12s} {count:8d} {rate:9.0f} {rate / made:8.3f} {messages:9d} {cost:32.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["engine", "serve"])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--step-ms", type=float)
    parser.add_argument("--replicas", type=lambda text: [int(each) for each in text.split(",")], default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.step_ms is None:
        args.step_ms = 10.0 if args.what == "engine" else 20.0
    if args.what == "engine":
        uvloop.run(bench_engines(args))
    else:
        bench_serve(args)


if __name__ == "__main__":
    main()
