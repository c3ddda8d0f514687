"""A gateway over real gRPC on a free port, on an engine that does what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from scripted_engine import WAIT_S, ScriptedEngine, make_runtime

from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.gateway.options import GatewayOptions
from lmdeploy_slo.gateway.security import Security
from lmdeploy_slo.gateway.server import Gateway
from lmdeploy_slo.v1 import inference_pb2 as pb
from lmdeploy_slo.v1 import inference_pb2_grpc


class Served:
    def __init__(
        self,
        engine: Any,
        gateway_options: GatewayOptions | None = None,
        security: Security | None = None,
        **runtime_options: Any,
    ) -> None:
        self.engine = engine
        self.runtime = make_runtime(engine, MonotonicClock(), **runtime_options)
        self.gateway = Gateway(self.runtime, gateway_options, security)

    async def start(self) -> None:
        await self.runtime.start()
        self.port = await self.gateway.start("127.0.0.1", 0)
        self.target = f"127.0.0.1:{self.port}"
        self.channel = grpc.aio.insecure_channel(self.target)
        self.stub: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        await self.channel.close()
        await self.gateway.close()
        await self.runtime.close()

    def stream(
        self, request_id: str = "r", *, timeout: float | None = None, metadata: Any = None, **fields: Any
    ) -> Any:
        return self.stub.GenerateStream(request(request_id, **fields), timeout=timeout, metadata=metadata)

    def generate(self, request_id: str = "r", *, timeout: float | None = None, **fields: Any) -> Any:
        return self.stub.Generate(request(request_id, **fields), timeout=timeout)

    async def load(self) -> pb.GetLoadResponse:
        answer = await self.stub.GetLoad(pb.GetLoadRequest())
        assert isinstance(answer, pb.GetLoadResponse)
        return answer


def request(request_id: str | None = "r", **fields: Any) -> pb.GenerateRequest:
    if not {"text", "token_ids", "messages"} & fields.keys():
        fields["text"] = "hello"
    return pb.GenerateRequest(request_id=request_id, **fields)


@asynccontextmanager
async def served(
    *,
    batch_size: int = 256,
    gateway_options: GatewayOptions | None = None,
    security: Security | None = None,
    engine: Any = None,
    info: dict[str, Any] | None = None,
    **runtime_options: Any,
) -> AsyncIterator[Served]:
    engine = engine or ScriptedEngine(MonotonicClock(), limits=EngineLimits(max_batch_size=batch_size), **(info or {}))
    server = Served(engine, gateway_options, security, **runtime_options)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


async def soon(awaitable: Any) -> Any:
    """Fails, rather than hangs, where what is awaited does not come."""
    return await asyncio.wait_for(awaitable, WAIT_S)


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    """The error a unary call, or the rest of a stream, ends with."""
    try:
        if hasattr(call, "read"):
            while await soon(call.read()) is not grpc.aio.EOF:
                pass
        else:
            await soon(call)
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call did not fail")


def reason(error: grpc.aio.AioRpcError) -> str:
    info = detail(error, error_details_pb2.ErrorInfo)
    assert isinstance(info, error_details_pb2.ErrorInfo)
    return info.reason


def detail(error: grpc.aio.AioRpcError, kind: type[Message]) -> Message | None:
    trailing = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            message = kind()
            packed.Unpack(message)
            return message
    return None


def violated(error: grpc.aio.AioRpcError) -> list[str]:
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason(error) == "INVALID_REQUEST"
    bad = detail(error, error_details_pb2.BadRequest)
    assert isinstance(bad, error_details_pb2.BadRequest)
    return [violation.field for violation in bad.field_violations]
