"""What an overloaded server does: how fast it says no, whether its memory grows, and what becomes of what it accepted.

    python tests/bench/bench_overload.py [--seconds 300] [--policy annealing]

A real `lmdeploy_slo serve` on the emulated engine, which starts 32 requests a second at most (16 places, 50 steps of 10
ms each), gets equal requests at random instants (Poisson, open loop) over real gRPC: first 1.5 times that many, then 10
times. 24 requests may wait. Each promises 2 s from arrival to last token. Prints, for both loads, the latency of
rejections as the client sees it, attainment among accepted requests, and the server's resident memory, sampled every
two seconds; its growth is that of the mean of the last quarter over that of the second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import uvloop

from lmdeploy_slo.v1 import inference_pb2 as pb
from lmdeploy_slo.v1 import inference_pb2_grpc

PLACES, STEPS, STEP_S = 16, 50, 0.010
CAPACITY = PLACES / (STEPS * STEP_S)
QUEUE, SLO_MS = 24, 2000.0
LOADS = (1.5, 10.0)
SAMPLE_S = 2.0


@dataclass
class Seen:
    """accepted: whether each met its SLO. rejected_ms: call to status. memory_mib: of the server."""

    accepted: list[bool] = field(default_factory=list)
    rejected_ms: list[float] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)
    memory_mib: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)


async def offer(target: str, load: float, seconds: float, pid: int, seed: int) -> Seen:
    """Sends for so many seconds and waits for all ends."""
    draw, seen = random.Random(seed), Seen()
    message = pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(300, 400)), slo=pb.Slo(e2e_ms=SLO_MS))
    message.stopping.max_new_tokens = STEPS
    message.emulation.output_tokens = STEPS
    async with grpc.aio.insecure_channel(target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]

        async def one() -> None:
            began = time.perf_counter()
            try:
                answer = await stub.Generate(message)
                seen.accepted.append(answer.completion.slo_met)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    seen.rejected_ms.append((time.perf_counter() - began) * 1e3)
                else:
                    seen.others[error.code().name] = seen.others.get(error.code().name, 0) + 1

        async def sample() -> None:
            while True:
                seen.memory_mib.append(memory_mib(pid))
                await asyncio.sleep(SAMPLE_S)

        sampling = asyncio.ensure_future(sample())
        tasks: set[asyncio.Task[None]] = set()
        began = due = time.perf_counter()
        while due - began < seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            seen.late_ms.append((time.perf_counter() - due) * 1e3)
            task = asyncio.ensure_future(one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due += draw.expovariate(load * CAPACITY)
        await asyncio.gather(*tasks)
        sampling.cancel()
    return seen


def memory_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def describe(load: float, seen: Seen) -> str:
    rejected = np.asarray(seen.rejected_ms or [float("nan")])
    p50, p99, most = np.percentile(rejected, [50, 99, 100])
    n = len(seen.memory_mib) // 4
    before, after = statistics.mean(seen.memory_mib[n : 2 * n]), statistics.mean(seen.memory_mib[-n:])
    return (
        f"x{load:g}: {len(seen.accepted)} accepted, {len(seen.rejected_ms)} rejected, others {seen.others or 'none'}\n"
        f"  rejected after p50 {p50:.1f} ms, p99 {p99:.1f} ms, at most {most:.1f} ms\n"
        f"  {100 * statistics.mean(seen.accepted):.2f} % of the accepted met their SLO\n"
        f"  memory {before:.1f} MiB, later {after:.1f} MiB, at most {max(seen.memory_mib):.1f} MiB\n"
        f"  the client was late by p99 {np.percentile(seen.late_ms, 99):.1f} ms"
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("--seconds", type=float, default=300.0)
    arguments.add_argument("--policy", default="annealing")
    arguments.add_argument("--seed", type=int, default=1)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "bench.json"
        step = {"c0": STEP_S * 1e3, "p1": 0.0, "p2": 0.0, "d1": 0.0, "d2": 0.0}
        profile.write_text(json.dumps({"format": 1, "name": "bench", "step_ms": step}))
        for load in LOADS:
            flags = ["--port", "0", "--profile", str(profile), "--policy", options.policy]
            flags += ["--max-batch-size", str(PLACES), "--max-queued-requests", str(QUEUE)]
            command = [sys.executable, "-m", "lmdeploy_slo", "serve", *flags]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
                assert server.stdout is not None
                ready = re.match(r"lmdeploy_slo: serving on (\S+) ", server.stdout.readline())
                assert ready, "the server did not start"
                print(describe(load, uvloop.run(offer(ready[1], load, options.seconds, server.pid, options.seed))))
                server.terminate()


if __name__ == "__main__":
    main()
