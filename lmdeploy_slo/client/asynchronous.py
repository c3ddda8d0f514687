"""The client for programs on an event loop; the same calls as the blocking one, awaited."""

from __future__ import annotations

import asyncio
import random as random_module
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from lmdeploy_slo.client.channel import CHANNEL_OPTIONS, INFO_TIMEOUT_S, Access, ChannelOptions, Metadata
from lmdeploy_slo.client.errors import ClientError, error_of
from lmdeploy_slo.client.explanation import Explanation, explanation_of
from lmdeploy_slo.client.request import GenerateOptions, Prompt, build_request
from lmdeploy_slo.client.results import (
    Completion,
    Forecast,
    Generation,
    Load,
    ModelInfo,
    Scaled,
    ServerInfo,
    StreamChunk,
    chunk_of,
    forecast_of,
    generation_of,
    load_of,
    model_info_of,
    scaled_of,
    server_info_of,
)
from lmdeploy_slo.client.retry import Attempts, RetryPolicy
from lmdeploy_slo.clock import Clock, MonotonicClock
from lmdeploy_slo.errors import Cancelled
from lmdeploy_slo.v1 import inference_pb2 as pb
from lmdeploy_slo.v1 import inference_pb2_grpc

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class AsyncClient:
    """A connection to one gateway, for one event loop: the one that makes the first call.

    async with AsyncClient("localhost:50051") as client:
        print((await client.generate("Hello", e2e_ms=2000)).text)

    Parameters, errors and time limits are those of `Client`. A task that is cancelled while it waits cancels its
    request in the server.
    """

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        insecure: bool = False,
        channel_options: ChannelOptions = (),
        retry: RetryPolicy | None = None,
        clock: Clock | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        self._target = target
        self._metadata = Access(credentials, token, insecure).metadata_for(target)
        self._credentials = credentials
        self._options = (*CHANNEL_OPTIONS, *channel_options)
        self._channel: grpc.aio.Channel | None = None
        self._service: Any = None
        self._attempts = partial(Attempts, retry or RetryPolicy(), clock=clock or MonotonicClock(), random=random)
        self._sleep = sleep

    async def generate(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """The whole answer at once."""
        request = build_request(prompt, options)
        return generation_of(await self._unary("Generate", request, timeout_s, metadata, resend_safe=request.sheddable))

    def stream(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream:
        """The answer as it is generated. The request is sent at once; leaving or closing the stream cancels it."""
        request = build_request(prompt, options)
        attempts = self._attempts(timeout_s=timeout_s, resend_safe=True)
        start = partial(self._stub().GenerateStream, request, metadata=(*metadata, *self._metadata))
        return AsyncStream(start, attempts, self._sleep)

    async def predict(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = INFO_TIMEOUT_S,
        metadata: Metadata = (),
        **options: Unpack[GenerateOptions],
    ) -> Forecast:
        """Whether the request would meet its SLO if it were sent now; nothing is queued."""
        request = pb.PredictRequest(request=build_request(prompt, options))
        return forecast_of(await self._unary("Predict", request, timeout_s, metadata))

    async def abort(self, request_id: str, *, timeout_s: float | None = INFO_TIMEOUT_S) -> bool:
        """Ends a waiting or running request; its caller gets Cancelled. False where there was none."""
        request = pb.AbortRequest(request_id=request_id)
        response: pb.AbortResponse = await self._unary("Abort", request, timeout_s, resend_safe=False)
        return response.aborted

    async def model_info(self, *, timeout_s: float | None = INFO_TIMEOUT_S) -> ModelInfo:
        """The model, its limits and what the engine can do."""
        return model_info_of(await self._unary("GetModelInfo", pb.GetModelInfoRequest(), timeout_s))

    async def server_info(self, *, timeout_s: float | None = INFO_TIMEOUT_S) -> ServerInfo:
        """Versions, scheduling policy, default SLOs."""
        return server_info_of(await self._unary("GetServerInfo", pb.GetServerInfoRequest(), timeout_s))

    async def load(self, *, timeout_s: float | None = INFO_TIMEOUT_S) -> Load:
        """What the server is doing at this moment."""
        return load_of(await self._unary("GetLoad", pb.GetLoadRequest(), timeout_s))

    async def explain(self, request_id: str, *, timeout_s: float | None = INFO_TIMEOUT_S) -> Explanation:
        """Why a request waited. Raises RequestNotFound where the server remembers nothing of it."""
        request = pb.ExplainRequest(request_id=request_id)
        return explanation_of(await self._unary("Explain", request, timeout_s))

    async def scale(
        self, replicas: int, *, drain: Sequence[str] = (), timeout_s: float | None = INFO_TIMEOUT_S
    ) -> Scaled:
        """There shall be so many engines, 1 to 1024; those named in `drain` go, whatever the number. For operators.
        Answers at once, `load` shows how it goes on."""
        request = pb.ScaleRequest(replicas=replicas, drain=drain)
        return scaled_of(await self._unary("Scale", request, timeout_s))

    async def close(self) -> None:
        """Cancels what is running and closes the connection; later calls raise. Idempotent."""
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _stub(self) -> Any:
        """The generated stub. Its channel belongs to the loop it is made on, so it is not made before it is needed."""
        if self._channel is None:
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self._target, options=self._options)
            else:
                self._channel = grpc.aio.secure_channel(self._target, self._credentials, options=self._options)
            self._service = inference_pb2_grpc.InferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        return self._service

    async def _unary(
        self,
        method: str,
        request: object,
        timeout_s: float | None,
        metadata: Metadata = (),
        *,
        resend_safe: bool = True,
    ) -> Any:
        send = getattr(self._stub(), method)
        attempts = self._attempts(timeout_s=timeout_s, resend_safe=resend_safe)
        while True:
            try:
                return await send(request, timeout=attempts.remaining_s(), metadata=(*metadata, *self._metadata))
            except grpc.aio.AioRpcError as failure:
                error = error_of(failure)
                wait_s = attempts.wait_after_s(error)
                if wait_s is None:
                    raise error from failure
            await self._sleep(wait_s)


class AsyncStream(AsyncIterator[StreamChunk]):
    """The chunks of one request, in order; for one task at a time.

    Ends after the chunk that carries the completion. Closing it, leaving its `async with` block or dropping it before
    that cancels the request in the server. Errors are raised by the iteration; after one the stream is over.
    """

    def __init__(
        self, start: Callable[..., Any], attempts: Attempts, sleep: Callable[[float], Awaitable[None]]
    ) -> None:
        self._start = start
        self._attempts = attempts
        self._sleep = sleep
        self._completion: Completion | None = None
        self._over = False
        self._begun = False
        self._open()

    @property
    def completion(self) -> Completion:
        """How the request went. Raises RuntimeError before the stream has run to its end."""
        if self._completion is None:
            raise RuntimeError("the stream has not run to its end")
        return self._completion

    async def __anext__(self) -> StreamChunk:
        if self._over:
            raise StopAsyncIteration
        chunk = chunk_of(await self._receive())
        self._begun = True
        if chunk.completion is not None:
            self._completion = chunk.completion
            self._over = True
            with suppress(grpc.aio.AioRpcError, StopAsyncIteration):
                await anext(self._messages)  # takes in the status, lest dropping the call looks like a cancel
        return chunk

    def cancel(self) -> None:
        """Cancels the request if it has not ended. Idempotent."""
        self._over = True
        self._call.cancel()  # nothing happens to a call that has ended

    async def aclose(self) -> None:
        """The same, for contextlib.aclosing and its like."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        if hasattr(self, "_call"):  # else it could not even be started
            with suppress(RuntimeError):  # its loop is closed, and the call with it
                self.cancel()

    def _open(self) -> None:
        self._call = self._start(timeout=self._attempts.remaining_s())
        self._messages: AsyncIterator[pb.GenerateStreamResponse] = aiter(self._call)

    async def _receive(self) -> pb.GenerateStreamResponse:
        while True:
            try:
                return await anext(self._messages)
            except StopAsyncIteration:
                self._over = True
                raise ClientError("the stream ended without a completion", grpc.StatusCode.UNKNOWN) from None
            except asyncio.CancelledError:
                if self._over:  # closed by another task; the one that reads was not cancelled
                    raise Cancelled("the stream was closed") from None
                self._over = True
                raise
            except grpc.aio.AioRpcError as failure:
                error = error_of(failure)
                wait_s = None if self._begun else self._attempts.wait_after_s(error)
                if wait_s is None:
                    self._over = True
                    raise error from failure
            await self._sleep(wait_s)
            self._open()
