"""What lmdeploy_slo costs over LMDeploy, on the CPU stand-in with steps of 10 ms; pairs of runs, medians.

    python tests/bench/bench_lmdeploy.py [--rounds 5] [--step-ms 10]      in the environment of `make test-lmdeploy`

1. lmdeploy_slo.pipeline() against lmdeploy.pipeline(), both `stream_infer` in one process: time to first token of one
   request on an idle engine, and tokens per second of 16 streams.
2. gRPC streaming of `lmdeploy_slo serve` against HTTP streaming of LMDeploy's own api_server, each server in a process
   of its own: the same two figures, as a client sees them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

STREAMS = 16
TOKENS = 64
FIRST_TOKENS = 20
PROMPT = "Tell me a story about a river"

Figures = dict[str, float]


# -- 1. in process ----------------------------------------------------------------------------------------------------


def in_process(model: str, rounds: int, step_s: float) -> dict[str, list[Figures]]:
    from lmdeploy_slo.engine.cpu_standin.native import PACE
    from lmdeploy_slo.engine.lmdeploy_options import Device, import_lmdeploy

    lmdeploy = import_lmdeploy(device=Device.CPU, patched=True)
    import lmdeploy_slo

    config = lmdeploy.TurbomindEngineConfig(max_batch_size=STREAMS)
    pipes = {
        "lmdeploy.pipeline": lmdeploy.pipeline(model, config),
        "lmdeploy_slo.pipeline": lmdeploy_slo.pipeline(model, config, device="cpu"),
    }
    PACE.min_step_s = step_s
    settings = lmdeploy.GenerationConfig(max_new_tokens=TOKENS, ignore_eos=True)
    one = lmdeploy.GenerationConfig(max_new_tokens=1, ignore_eos=True)
    found: dict[str, list[Figures]] = {name: [] for name in pipes}
    for round_number in range(rounds + 1):  # the first warms up
        for name, pipe in pipes.items():
            firsts = []
            for _ in range(FIRST_TOKENS):
                begun_s = time.perf_counter()
                next(iter(pipe.stream_infer(PROMPT, gen_config=one)))
                firsts.append(time.perf_counter() - begun_s)
                time.sleep(2 * step_s)  # the engine is idle again
            begun_s = time.perf_counter()
            tokens = sum(len(r.token_ids) for r in pipe.stream_infer([PROMPT] * STREAMS, gen_config=settings))
            seconds = time.perf_counter() - begun_s
            if round_number:
                found[name].append({"ttft_ms": 1e3 * statistics.median(firsts), "tokens_per_s": tokens / seconds})
    for pipe in pipes.values():
        pipe.close()
    return found


# -- 2. servers -------------------------------------------------------------------------------------------------------


def serve_lmdeploy(model: str, step_s: float) -> None:
    """LMDeploy's api_server as released, on a port the environment names."""
    from lmdeploy_slo.engine.cpu_standin.native import PACE
    from lmdeploy_slo.engine.lmdeploy_options import Device, import_lmdeploy

    lmdeploy = import_lmdeploy(device=Device.CPU, patched=False)
    from lmdeploy.serve.openai.api_server import serve

    PACE.min_step_s = step_s
    os.environ["UVICORN_LOG_LEVEL"] = "warning"
    serve(
        model,
        backend_config=lmdeploy.TurbomindEngineConfig(max_batch_size=STREAMS),
        server_name="127.0.0.1",
        server_port=int(os.environ["BENCH_PORT"]),
    )


def serve_ours(model: str, step_s: float) -> None:
    from lmdeploy_slo import lifecycle
    from lmdeploy_slo.config import load
    from lmdeploy_slo.engine.cpu_standin.native import PACE

    PACE.min_step_s = step_s
    flags = {
        "engine.model": model,
        "engine.device": "cpu",
        "engine.max_batch_size": STREAMS,
        "server.port": int(os.environ["BENCH_PORT"]),
        "stream.flush_interval_ms": 0.0,
    }
    lifecycle.run(load(flags=flags, environ={}), print)


@contextlib.contextmanager
def server(kind: str, model: str, step_s: float) -> Iterator[int]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--serve", kind, "--model", model, "--step-ms", str(1e3 * step_s)]
    process = subprocess.Popen(
        command, env={**os.environ, "BENCH_PORT": str(port)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                break
            time.sleep(0.2)
        else:
            raise RuntimeError(f"{kind} did not start")
        yield port
    finally:
        process.terminate()
        process.wait(30)


Stream = Callable[[int], AsyncIterator[int]]
"""tokens wanted -> tokens of each message, as they come."""


async def measure(stream: Stream, step_s: float) -> Figures:
    firsts = []
    for _ in range(FIRST_TOKENS):
        begun_s = time.perf_counter()
        async for _tokens in stream(1):
            firsts.append(time.perf_counter() - begun_s)
            break
        await asyncio.sleep(2 * step_s)

    async def count() -> int:
        return sum([tokens async for tokens in stream(TOKENS)])

    begun_s = time.perf_counter()
    tokens = sum(await asyncio.gather(*(count() for _ in range(STREAMS))))
    seconds = time.perf_counter() - begun_s
    return {"ttft_ms": 1e3 * statistics.median(firsts), "tokens_per_s": tokens / seconds}


async def over_grpc(port: int, use: Callable[[Stream], Awaitable[None]]) -> None:
    from lmdeploy_slo.client import AsyncClient

    async with AsyncClient(f"127.0.0.1:{port}") as client:

        async def stream(tokens: int) -> AsyncIterator[int]:
            async with client.stream(PROMPT, max_new_tokens=tokens, ignore_eos=True) as chunks:
                async for chunk in chunks:
                    if chunk.token_ids:
                        yield len(chunk.token_ids)

        await use(stream)


async def over_http(port: int, model: str, use: Callable[[Stream], Awaitable[None]]) -> None:
    """A plain HTTP client that reads server-sent events, which is the least a client can do."""
    import httpx

    url = f"http://127.0.0.1:{port}/v1/completions"
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=STREAMS)) as client:

        async def stream(tokens: int) -> AsyncIterator[int]:
            body: dict[str, Any] = {
                "model": model,
                "prompt": PROMPT,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            told = 0
            async with client.stream("POST", url, json=body) as response:
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    message = json.loads(line[6:])
                    if message["choices"] and not message["choices"][0].get("finish_reason"):
                        told += 1
                        yield 1
                    elif message.get("usage"):
                        yield message["usage"]["completion_tokens"] - told  # messages of several tokens

        await use(stream)


async def against_api_server(model: str, rounds: int, step_s: float) -> dict[str, list[Figures]]:
    found: dict[str, list[Figures]] = {"api_server, HTTP": [], "lmdeploy_slo serve, gRPC": []}
    with server("lmdeploy", model, step_s) as theirs, server("ours", model, step_s) as ours:
        for round_number in range(rounds + 1):

            async def keep(name: str, stream: Stream, *, counts: bool = round_number > 0) -> None:
                figures = await measure(stream, step_s)
                if counts:
                    found[name].append(figures)

            await over_http(theirs, model, lambda stream: keep("api_server, HTTP", stream))
            await over_grpc(ours, lambda stream: keep("lmdeploy_slo serve, gRPC", stream))
    return found


# -- report -----------------------------------------------------------------------------------------------------------


def report(title: str, found: dict[str, list[Figures]]) -> None:
    print(title)
    medians = {name: {k: statistics.median(f[k] for f in runs) for k in runs[0]} for name, runs in found.items()}
    for name, figures in medians.items():
        print(f"  {name:26} {figures['ttft_ms']:8.2f} ms to first token {figures['tokens_per_s']:10.1f} tokens/s")
    theirs, ours = medians.values()
    print(f"  difference: {ours['ttft_ms'] - theirs['ttft_ms']:+.2f} ms; ratio: ", end="")
    print(f"{ours['tokens_per_s'] / theirs['tokens_per_s']:.3f} of the tokens per second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--model", help="a checkpoint directory; default: a tiny one")
    parser.add_argument("--serve", choices=["lmdeploy", "ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    step_s = options.step_ms / 1e3
    if options.serve:
        (serve_ours if options.serve == "ours" else serve_lmdeploy)(options.model, step_s)
        return
    with tempfile.TemporaryDirectory() as directory:
        model = options.model
        if model is None:
            from lmdeploy_slo.engine.tiny_model import write_tiny_model

            model = str(Path(directory) / "tiny")
            write_tiny_model(Path(model))
        report("1. pipeline(), in process", in_process(model, options.rounds, step_s))
        report("2. over the network", asyncio.run(against_api_server(model, options.rounds, step_s)))


if __name__ == "__main__":
    main()
