"""A server over real gRPC that answers what a test wrote down, and one face for both clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from lmdeploy_slo import client as sdk
from lmdeploy_slo.client.errors import ERROR_DOMAIN
from lmdeploy_slo.v1 import inference_pb2 as pb
from lmdeploy_slo.v1 import inference_pb2_grpc

COMPLETION = pb.Completion(
    request_id="r1",
    finish_reason=pb.FINISH_REASON_LENGTH,
    usage=pb.Usage(prompt_tokens=5, output_tokens=2),
    timing=pb.Timing(queue_ms=1, ttft_ms=0, tpot_ms=3, e2e_ms=4),
    predicted=pb.Prediction(output_tokens=2.5, e2e_ms=9),
    slo_met=False,
    effective_priority=0,
    instance="emulated-0",
    slo=pb.Slo(e2e_ms=3),
)
WAIT_S = 20.0  # how long a test waits for an event before it fails; never slept


class ScriptedServer(inference_pb2_grpc.InferenceServiceServicer):
    """Answers each call with the next entry of `script`, a function of (request, context); keeps what it was asked."""

    def __init__(self) -> None:
        self.script: list[Callable[[Any, grpc.ServicerContext], Any]] = []
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self._server = grpc.server(ThreadPoolExecutor(8))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.target = f"localhost:{self._server.add_insecure_port('localhost:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(grace=None).wait()

    def _answer(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        return self.script.pop(0)(request, context)

    Generate = Predict = Abort = GetModelInfo = GetServerInfo = GetLoad = _answer

    def GenerateStream(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield from self._answer(request, context)


def fails(code: grpc.StatusCode, message: str = "no", *details: Any) -> Callable[..., Any]:
    """A script entry that refuses; without details there is no ErrorInfo, as when a proxy answers."""

    def refuse(_request: Any, context: grpc.ServicerContext) -> Any:
        if not details:
            context.abort(code, message)
        status = status_pb2.Status(code=code.value[0], message=message)
        for detail in details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        context.abort_with_status(rpc_status.to_status(status))

    return refuse


def info(reason: str, domain: str = ERROR_DOMAIN, **metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=domain, metadata=metadata)


def retry_info(seconds: int, nanos: int = 0) -> error_details_pb2.RetryInfo:
    return error_details_pb2.RetryInfo(retry_delay=Duration(seconds=seconds, nanos=nanos))


def streams(*messages: pb.GenerateStreamResponse) -> Callable[..., Any]:
    return lambda _request, _context: iter(messages)


def answers(message: Any) -> Callable[..., Any]:
    return lambda _request, _context: message


def whole_stream() -> Callable[..., Any]:
    return streams(
        pb.GenerateStreamResponse(text="Hel", token_ids=[1]),
        pb.GenerateStreamResponse(text="lo", token_ids=[2, 3]),
        pb.GenerateStreamResponse(completion=COMPLETION),
    )


class Blocking:
    """One face for both clients: this one calls `Client`."""

    def __init__(self, target: str, **options: Any) -> None:
        self.slept_s: list[float] = []
        self.client = sdk.Client(target, sleep=self.slept_s.append, **options)

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        return getattr(self.client, method)(*args, **options)

    def read(self, prompt: Any = "x", **options: Any) -> tuple[list[sdk.StreamChunk], sdk.Completion]:
        with self.client.stream(prompt, **options) as stream:
            return list(stream), stream.completion

    def close(self) -> None:
        self.client.close()


class Asyncio:
    """The same over `AsyncClient`, on a loop of its own."""

    def __init__(self, target: str, **options: Any) -> None:
        self.slept_s: list[float] = []
        self._loop = asyncio.new_event_loop()
        self.client = sdk.AsyncClient(target, sleep=self._sleep, **options)

    async def _sleep(self, duration_s: float) -> None:
        self.slept_s.append(duration_s)

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        return self._loop.run_until_complete(getattr(self.client, method)(*args, **options))

    def read(self, prompt: Any = "x", **options: Any) -> tuple[list[sdk.StreamChunk], sdk.Completion]:
        async def read() -> tuple[list[sdk.StreamChunk], sdk.Completion]:
            async with self.client.stream(prompt, **options) as stream:
                return [chunk async for chunk in stream], stream.completion

        return self._loop.run_until_complete(read())

    def close(self) -> None:
        self._loop.run_until_complete(self.client.close())
        self._loop.close()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.stop()


@pytest.fixture(params=[Blocking, Asyncio])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    made = []

    def connect(target: str, **options: Any) -> Any:
        made.append(request.param(target, **{"random": lambda: 0.0, **options}))
        return made[-1]

    yield connect
    for face in made:
        face.close()
