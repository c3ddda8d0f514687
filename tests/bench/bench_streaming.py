"""How many messages a second the gateway streams, beside a bare grpc.aio server sending the same bytes.

    python tests/bench/bench_streaming.py [--pairs 5] [--streams 64] [--tokens 200]

Two servers in processes of their own, both on uvloop: the whole gateway over the emulated engine without step time,
coalescing off (one token a message), and a server whose handler does nothing but write messages recorded from the
gateway before. A client in a third process reads all streams at once over one channel, without parsing. Runs
alternate, so that other load on the machine falls on both. Prints both rates and their ratio, pair by pair.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import grpc
import uvloop

from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.gateway.server import Gateway
from lmdeploy_slo.gateway.service import SERVICE_NAME
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.runtime.runtime import Runtime, RuntimeOptions
from lmdeploy_slo.scheduling.rules import RulePolicy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.v1 import inference_pb2 as pb

METHOD = f"/{SERVICE_NAME}/GenerateStream"


def serve_gateway(pipe: Connection) -> None:
    """Child process: tells its port, serves until the parent hangs up."""

    async def main() -> None:
        clock, limits, model = MonotonicClock(), EngineLimits(), StepModel(0, 0, 0, 0, 0)
        engine = EmulatedEngine(model, limits, clock)
        scheduler = Scheduler(limits=limits, model=model, lengths=TaskLengthPredictor())
        runtime = Runtime(engine, scheduler, RulePolicy("fcfs"), clock, RuntimeOptions(flush_interval_s=0))
        await runtime.start()
        gateway = Gateway(runtime)
        pipe.send(await gateway.start("127.0.0.1", 0))
        await hung_up(pipe)
        await gateway.close()
        await runtime.close()

    uvloop.run(main())


def serve_bare(pipe: Connection) -> None:
    """The same, sending what the parent gives it."""
    messages: list[bytes] = pipe.recv()

    async def stream(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        for message in messages:
            await context.write(message)

    async def main() -> None:
        server = grpc.aio.server()
        handlers = {"GenerateStream": grpc.unary_stream_rpc_method_handler(stream)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        pipe.send(port)
        await hung_up(pipe)
        await server.stop(0)

    uvloop.run(main())


async def hung_up(pipe: Connection) -> None:
    """Answers every message of the parent with the CPU seconds this process has used, until the parent hangs up."""
    ended = asyncio.Event()

    def answer() -> None:
        try:
            pipe.recv()
            pipe.send(time.process_time())
        except EOFError:
            ended.set()

    asyncio.get_running_loop().add_reader(pipe.fileno(), answer)
    await ended.wait()
    asyncio.get_running_loop().remove_reader(pipe.fileno())


def run_client(pipe: Connection) -> None:
    """Child process: (port, request, streams, record) -> elapsed seconds and messages (the messages themselves)."""

    async def one(call: Any) -> list[bytes]:
        return [message async for message in call]

    async def run(port: int, request: bytes, streams: int) -> tuple[float, list[list[bytes]]]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await channel.channel_ready()
            method = channel.unary_stream(METHOD)
            began = time.perf_counter()
            received = await asyncio.gather(*(one(method(request)) for _ in range(streams)))
            return time.perf_counter() - began, received

    uvloop.install()
    loop = uvloop.new_event_loop()
    while True:
        job = pipe.recv()
        if job is None:
            return
        port, request, streams, record = job
        elapsed_s, received = loop.run_until_complete(run(port, request, streams))
        pipe.send((elapsed_s, sum(map(len, received)), received[0] if record else []))


def cpu_s(server: Connection) -> float:
    server.send(None)
    used_s: float = server.recv()
    return used_s


def spawn(target: Any) -> Connection:
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=target, args=(theirs,), daemon=True).start()
    theirs.close()
    return ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2, help="runs of all streams per measurement")
    args = parser.parse_args()
    request = pb.GenerateRequest(
        text="benchmark",
        stopping=pb.StoppingParams(max_new_tokens=args.tokens),
        emulation=pb.Emulation(output_tokens=args.tokens),
    ).SerializeToString()

    client, gateway, bare = spawn(run_client), spawn(serve_gateway), spawn(serve_bare)
    gateway_port = gateway.recv()

    def measure(port: int, *, streams: int = args.streams, record: bool = False) -> tuple[float, list[bytes]]:
        """Messages per second."""
        client.send((port, request, streams, record))
        elapsed_s, messages, recorded = client.recv()
        if messages != streams * args.tokens:
            raise SystemExit(f"{messages} messages came, not {streams * args.tokens}")
        return messages / elapsed_s, recorded

    _, messages = measure(gateway_port, streams=1, record=True)
    bare.send(messages)
    bare_port = bare.recv()
    for port in (gateway_port, bare_port):  # warm up
        measure(port)

    def rate(port: int, server: Connection) -> tuple[float, float]:
        """Messages per second, and the server's CPU microseconds per message."""
        began_s = cpu_s(server)
        rates = [measure(port)[0] for _ in range(args.rounds)]
        used_s = cpu_s(server) - began_s
        return statistics.harmonic_mean(rates), used_s * 1e6 / (args.rounds * args.streams * args.tokens)

    size = sum(map(len, messages)) / len(messages)
    print(f"{args.streams} streams of {args.tokens} messages, {size:.1f} bytes each on average")
    print("pair   bare/s  gateway/s  ratio   CPU us per message: bare  gateway")
    ratios = []
    for pair in range(1, args.pairs + 1):
        servers = [(bare_port, bare), (gateway_port, gateway)]
        results = {port: rate(port, server) for port, server in (servers if pair % 2 else servers[::-1])}
        (bare_rate, bare_us), (gateway_rate, gateway_us) = results[bare_port], results[gateway_port]
        ratios.append(gateway_rate / bare_rate)
        print(
            f"{pair:4d} {bare_rate:8.0f} {gateway_rate:10.0f}  {ratios[-1]:5.3f} {bare_us:25.1f} {gateway_us:8.1f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.3f}")
    client.send(None)


if __name__ == "__main__":
    main()
