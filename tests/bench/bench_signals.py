"""How long a server takes to end, and whether pings in a silent prefill do harm.

    python tests/bench/bench_signals.py [--seconds 45]

Real `lmdeploy_slo serve` processes on the emulated engine, 64 open streams each. Prints the time from SIGTERM to the
exit with streams that end by themselves in 2 s, from a second signal to the exit with streams that would not, from the
submit to a stalled engine to UNAVAILABLE and to the exit (stall timeout 2 s, no restarts), and what becomes of a call
whose client pings every 10 s for --seconds without a token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc

from lmdeploy_slo.v1 import inference_pb2 as pb
from lmdeploy_slo.v1 import inference_pb2_grpc

STREAMS = 64


class Server:
    def __init__(self, folder: Path, step_ms: float, *flags: str) -> None:
        profile = folder / f"{step_ms}.json"
        step = {"c0": step_ms, "p1": 0.0, "p2": 0.0, "d1": 0.0, "d2": 0.0}
        profile.write_text(json.dumps({"format": 1, "name": "bench", "step_ms": step}))
        command = [sys.executable, "-m", "lmdeploy_slo", "serve", "--port", "0", "--profile", str(profile), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def ready(self) -> str:
        assert self.process.stdout is not None
        found = re.match(r"lmdeploy_slo: serving on (\S+) ", self.process.stdout.readline())
        assert found, "the server did not start"
        return found[1]

    def signal(self, number: int) -> float:
        self.process.send_signal(number)
        return time.perf_counter()


async def stream(target: str, tokens: int, began: asyncio.Event, *options: tuple[str, int]) -> str:
    """How it ended; `began` is set by its first message."""
    message = pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(300, 400)))
    message.stopping.max_new_tokens = message.emulation.output_tokens = tokens
    async with grpc.aio.insecure_channel(target, options=list(options)) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            async for _ in stub.GenerateStream(message):
                began.set()
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        return "finished"


async def ending(folder: Path, tokens: int, signals: int) -> None:
    server = Server(folder, 10.0, "--drain-grace-s", "3600")
    target, began = server.ready(), [asyncio.Event() for _ in range(STREAMS)]
    calls = [asyncio.ensure_future(stream(target, tokens, event)) for event in began]
    await asyncio.gather(*(event.wait() for event in began))
    asked = server.signal(signal.SIGTERM)
    for _ in range(signals - 1):
        await asyncio.sleep(1.0)
        asked = server.signal(signal.SIGTERM)
    status = await asyncio.to_thread(server.process.wait)
    took_s = time.perf_counter() - asked
    ends = set(await asyncio.gather(*calls))
    print(f"signal {signals} to exit: {took_s:.2f} s, status {status}; streams: {ends}")


async def stalling(folder: Path) -> None:
    server = Server(folder, 3_600_000.0, "--stall-timeout-s", "2", "--restarts", "0")
    target = server.ready()
    sent = time.perf_counter()
    end = await stream(target, 10, asyncio.Event())
    told_s = time.perf_counter() - sent
    status = await asyncio.to_thread(server.process.wait)
    print(f"stall to {end}: {told_s:.2f} s; to exit: {time.perf_counter() - sent:.2f} s, status {status}")


async def pinging(folder: Path, seconds: float) -> None:
    server = Server(folder, seconds * 1e3)
    pings = (("grpc.keepalive_time_ms", 10_000), ("grpc.keepalive_timeout_ms", 5_000))
    unbounded = (("grpc.http2.max_pings_without_data", 0), ("grpc.keepalive_permit_without_calls", 1))
    sent = time.perf_counter()
    end = await stream(server.ready(), 1, asyncio.Event(), *pings, *unbounded)
    print(f"a silent prefill of {seconds:g} s, pings every 10 s: {end} after {time.perf_counter() - sent:.1f} s")
    server.process.kill()


async def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--seconds", type=float, default=45.0)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        await ending(folder, 200, 1)
        await ending(folder, 1_000_000, 2)
        await stalling(folder)
        await pinging(folder, options.seconds)


if __name__ == "__main__":
    asyncio.run(main())
