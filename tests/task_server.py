"""A server over real gRPC that does with a request what its task is called."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from lmdeploy_slo.v1 import inference_pb2 as pb
from lmdeploy_slo.v1 import inference_pb2_grpc


class TaskServer(inference_pb2_grpc.InferenceServiceServicer):
    """`hanging` is set once a request hangs, `let_go` once the server was told that nobody waits for it any more."""

    def __init__(self) -> None:
        self.seen: list[pb.GenerateRequest] = []
        self.hanging = asyncio.Event()
        self.let_go = asyncio.Event()

    async def GetServerInfo(self, request: Any, context: Any) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(policy="scripted")

    async def GetModelInfo(self, request: Any, context: Any) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(model="m", engine="emulated", synthetic=True, vocab_size=300)

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        self.seen.append(request)
        task = request.task_type
        if task in grpc.StatusCode.__members__:
            await context.abort(grpc.StatusCode[task], "as scripted")
        if task == "empty":
            return
        yield pb.GenerateStreamResponse(token_ids=[1, 2])
        if task == "hang":
            self.hanging.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.let_go.set()
        completion = pb.Completion(usage=pb.Usage(output_tokens=request.emulation.output_tokens))
        if task == "told":
            completion.timing.queue_ms = 40.0
            completion.predicted.output_tokens = 7.5
        yield pb.GenerateStreamResponse(token_ids=[3], completion=completion)


@asynccontextmanager
async def served(servicer: inference_pb2_grpc.InferenceServiceServicer) -> AsyncIterator[str]:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
