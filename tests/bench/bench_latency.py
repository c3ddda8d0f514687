"""What the gateway and the scheduler add to the time to first token of the bare engine, at light load.

    python tests/bench/bench_latency.py [--pairs 5] [--requests 300] [--rate 10] [--policy annealing]

The emulated engine in four settings, with the same requests at the same Poisson instants:

    engine   in the process of its caller: submit, wait for the first token
    service  in the process of its caller: the gateway's own call, from its bytes to its first message, and with it
             limits, validation, forecast, admission, plan, dispatch and stream
    bare     behind a grpc.aio server that does nothing but parse, tokenise, submit and write
    gateway  the whole server behind gRPC

Servers and client are processes of their own, on uvloop. A pair is one run of each setting, every other time in
reverse, so that other load on the machine falls on all alike. Of every request the time from the call to its first
token is taken where the call is made; what is told are differences of percentiles, and their medians over the pairs.
`nothing` is a second run of the bare server less the first: so far noise alone goes.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvloop

sys.path.insert(0, str(Path(__file__).parent))

from bench_streaming import METHOD, hung_up, spawn

from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import EngineEvent, EngineRequest, Stopping
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.gateway.options import GatewayOptions
from lmdeploy_slo.gateway.server import Gateway
from lmdeploy_slo.gateway.service import SERVICE_NAME, InferenceService
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.runtime.runtime import Runtime, RuntimeOptions
from lmdeploy_slo.scheduling.policy import make_policy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.v1 import inference_pb2 as pb

LIMITS = EngineLimits(max_batch_size=64)
MODEL = StepModel(c0=5e-3, p1=2e-5, p2=0.0, d1=2e-5, d2=0.0)
TIMER_TICK_S = 1e-3
TOKENS = 4
Measured = tuple[list[float], float]
TEXT = "How much does a gateway add to the time until a user sees something? " * 4


def request_of(text: str) -> bytes:
    return pb.GenerateRequest(
        text=text,
        slo=pb.Slo(ttft_ms=200, tpot_ms=50),
        stopping=pb.StoppingParams(max_new_tokens=TOKENS),
        emulation=pb.Emulation(output_tokens=TOKENS),
    ).SerializeToString()


TEXTS = tuple(TEXT + " so" * more for more in range(round(TIMER_TICK_S / MODEL.p1)))
"""Each takes one more token's prefill than the one before, all together a tick."""

REQUESTS = tuple(map(request_of, TEXTS))


class BareEngine:
    """The engine and who waits for its first tokens."""

    def __init__(self) -> None:
        self.engine = EmulatedEngine(MODEL, LIMITS, MonotonicClock())
        self._waiting: dict[str, asyncio.Future[EngineEvent]] = {}
        self._number = 0

    async def start(self) -> None:
        await self.engine.start(self._sink)

    async def first_token(self, prompt_token_ids: list[int]) -> EngineEvent:
        self._number += 1
        name = str(self._number)
        first = self._waiting[name] = asyncio.get_running_loop().create_future()
        stopping = Stopping(max_new_tokens=TOKENS)
        request = EngineRequest(name, prompt_token_ids, stopping=stopping, emulated_output_tokens=TOKENS)
        self.engine.submit(request, 0)
        return await first

    def _sink(self, events: Any, at_s: float) -> None:
        for event in events:
            waiting = self._waiting.pop(event.request_id, None)
            if waiting is not None and event.token_ids:
                waiting.set_result(event)


def serve_bare(pipe: Connection) -> None:
    async def main() -> None:
        bare = BareEngine()
        await bare.start()

        async def stream(data: bytes, context: Any) -> None:
            request = pb.GenerateRequest.FromString(data)
            event = await bare.first_token(bare.engine.tokenizer.encode(request.text))
            message = pb.GenerateStreamResponse(token_ids=event.token_ids, text=event.text)
            await context.write(message.SerializeToString())

        server = grpc.aio.server()
        handlers = {"GenerateStream": grpc.unary_stream_rpc_method_handler(stream)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        pipe.send(port)
        await hung_up(pipe)
        await server.stop(0)

    uvloop.run(main())


def new_runtime(policy: str) -> Runtime:
    """As `serve` has it."""
    clock = MonotonicClock()
    scheduler = Scheduler(limits=LIMITS, model=MODEL, lengths=TaskLengthPredictor())
    engine = EmulatedEngine(MODEL, LIMITS, clock)
    return Runtime(engine, scheduler, make_policy(policy, seed=0), clock, RuntimeOptions())


class InProcess:
    """A call of the service without gRPC; ended at its first message for who waits."""

    def __init__(self) -> None:
        self.first_s = 0.0

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def time_remaining(self) -> None:
        return None

    def set_trailing_metadata(self, trailing: Any) -> None:
        pass

    async def write(self, message: bytes) -> None:
        self.first_s = self.first_s or time.perf_counter()


async def phases(policy: str, requests: int) -> str:
    """Where the time from a call to the engine goes, request after request on an idle service."""
    runtime = new_runtime(policy)
    await runtime.start()
    service: Any = InferenceService(runtime, GatewayOptions())
    marks: list[float] = []

    def marked(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            began_s = time.perf_counter()
            answer = method(*args, **options)
            marks.extend((began_s, time.perf_counter()))
            return answer

        return call

    runtime.submit = marked(runtime.submit)  # type: ignore[method-assign]
    runtime.engine.submit = marked(runtime.engine.submit)  # type: ignore[method-assign]
    found = []
    for _ in range(requests):
        marks.clear()
        called_s = time.perf_counter()
        await service.generate_stream(REQUESTS[0], InProcess())
        accepted_s, queued_s, sent_s, _ = marks
        found.append((accepted_s - called_s, queued_s - accepted_s, sent_s - queued_s))
        await asyncio.sleep(0.02)
    plan_s = runtime.load().planner.mean_plan_s or 0.0
    await runtime.close()
    checked, queued, planned = np.percentile(found, 50, axis=0) * 1e3
    return (
        f"p50 of its parts, ms: checked {checked:.2f}, forecast and queued {queued:.2f}, "
        f"planned and sent {planned:.2f} (of these the plan itself {plan_s * 1e3:.2f}, mean)"
    )


def serve_gateway(pipe: Connection) -> None:
    async def main() -> None:
        runtime = new_runtime(pipe.recv())
        await runtime.start()
        gateway = Gateway(runtime)
        pipe.send(await gateway.start("127.0.0.1", 0))
        await hung_up(pipe)
        await gateway.close()
        await runtime.close()

    uvloop.run(main())


def run_client(pipe: Connection) -> None:
    """(port, or "engine", or a policy for the service; seed; requests; rate) -> times to first token, and the CPU time
    of this process; seconds."""

    async def offer(first_token: Callable[[int], Any], seed: int, requests: int, rate: float) -> Measured:
        draw, took_s = random.Random(seed), list[float]()

        async def one(which: int) -> None:
            began_s = time.perf_counter()
            ended_s = await first_token(which)
            took_s.append(ended_s - began_s)

        calls, cpu_s = [], time.process_time()
        for _ in range(requests):
            calls.append(asyncio.create_task(one(draw.randrange(len(REQUESTS)))))
            await asyncio.sleep(draw.expovariate(rate))
        await asyncio.gather(*calls)
        return took_s, time.process_time() - cpu_s

    async def run(port: int | str, seed: int, requests: int, rate: float) -> Measured:
        if isinstance(port, str) and port != "engine":
            runtime = new_runtime(port)
            await runtime.start()
            service: Any = InferenceService(runtime, GatewayOptions())

            async def called(which: int) -> float:
                call = InProcess()
                await service.generate_stream(REQUESTS[which], call)
                return call.first_s

            measured = await offer(called, seed, requests, rate)
            await runtime.close()
            return measured
        if port == "engine":
            bare = BareEngine()
            await bare.start()
            ids = [bare.engine.tokenizer.encode(text) for text in TEXTS]

            async def alone(which: int) -> float:
                await bare.first_token(ids[which])
                return time.perf_counter()

            measured = await offer(alone, seed, requests, rate)
            await bare.engine.close()
            return measured
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await channel.channel_ready()
            method = channel.unary_stream(METHOD)

            async def over_grpc(which: int) -> float:
                call, first_s = method(REQUESTS[which]), 0.0
                async for _ in call:
                    first_s = first_s or time.perf_counter()
                return first_s

            return await offer(over_grpc, seed, requests, rate)

    while (job := pipe.recv()) is not None:
        pipe.send(uvloop.run(run(*job)))


def spawn_from(root: Path, target: Any) -> Connection:
    """A child process with the package of another checkout."""
    sys.path.insert(0, str(root.resolve()))
    try:
        return spawn(target)
    finally:
        del sys.path[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument(
        "--rate", type=float, default=10.0, help="requests a second; each keeps the engine busy for 20 ms"
    )
    parser.add_argument("--policy", default="annealing")
    parser.add_argument("--baseline", type=Path, help="a checkout of another version, to run beside this one")
    args = parser.parse_args()
    client, bare, gateway = spawn(run_client), spawn(serve_bare), spawn(serve_gateway)
    gateway.send(args.policy)
    port = bare.recv()
    settings: dict[str, tuple[Connection, int | str]] = {
        "engine": (client, "engine"),
        "service": (client, args.policy),
        "bare": (client, port),
        "gateway": (client, gateway.recv()),
        "again": (client, port),
    }
    if args.baseline:
        other_client, other_gateway = spawn_from(args.baseline, run_client), spawn_from(args.baseline, serve_gateway)
        other_gateway.send(args.policy)
        settings |= {"service before": (other_client, args.policy), "gateway before": (client, other_gateway.recv())}

    cpu_ms: dict[str, list[float]] = {name: [] for name in settings if name.startswith(("engine", "service"))}

    def figures(setting: str, seed: int, requests: int) -> tuple[float, ...]:
        """Of the times to first token, milliseconds: p50, p99, mean."""
        measured_by, port = settings[setting]
        measured_by.send((port, seed, requests, args.rate))
        took_s, cpu_s = measured_by.recv()
        if setting in cpu_ms and seed:
            cpu_ms[setting].append(cpu_s * 1e3 / requests)
        return tuple(float(x) * 1e3 for x in (*np.percentile(took_s, (50, 99)), np.mean(took_s)))

    for setting in settings:
        figures(setting, 0, 50)  # warm up
    print("TTFT, ms  " + "".join(f"{setting:>16}" for setting in settings) + "   (p50 p99)")
    differences = {"nothing": ("again", "bare")}
    for when in ("", " before") if args.baseline else ("",):
        differences |= {
            f"service{when} over engine": (f"service{when}", "engine"),
            f"gateway{when} over bare gRPC": (f"gateway{when}", "bare"),
            f"gateway{when} over engine": (f"gateway{when}", "engine"),
        }
    added: dict[str, list[tuple[float, ...]]] = {name: [] for name in differences}
    for pair in range(1, args.pairs + 1):
        order = list(settings) if pair % 2 else list(settings)[::-1]
        found = {setting: figures(setting, pair, args.requests) for setting in order}
        for name, (more, less) in differences.items():
            added[name].append(tuple(a - b for a, b in zip(found[more], found[less], strict=True)))
        print(f"pair {pair:<5}" + "".join(f"{found[s][0]:9.2f}{found[s][1]:7.2f}" for s in settings), flush=True)
    print("\nadded, ms: medians over the pairs (each pair)")
    for name, pairs in added.items():
        for what, values in zip(("p50", "p99", "mean"), zip(*pairs, strict=True), strict=True):
            told = ", ".join(f"{value:.2f}" for value in values)
            print(f"  {name:31}{what:5} {statistics.median(values):6.2f}   ({told})")
    told = ", ".join(f"{name} {statistics.median(values):.2f}" for name, values in cpu_ms.items())
    print(f"CPU, ms a request of {TOKENS} tokens, with who calls: {told}")
    for measured_by in {id(c): c for c, _ in settings.values()}.values():
        measured_by.send(None)
    print(uvloop.run(phases(args.policy, args.requests)))


if __name__ == "__main__":
    main()
