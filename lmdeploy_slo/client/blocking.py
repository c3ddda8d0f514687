"""The client for programs with threads."""

from __future__ import annotations

import random as random_module
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc

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


class Client:
    """A connection to one gateway; safe to use from many threads.

    with Client("localhost:50051") as client:
        print(client.generate("Hello", e2e_ms=2000).text)

    target: "host:port", or any other name that gRPC resolves. The connection is made by the first call.
    credentials: for TLS, as from tls_credentials(); None is plain text.
    token: a bearer token that every call carries; over plain text to this machine alone, unless `insecure`.
    clock, sleep and random: what repeating uses; tests pass their own.

    Every call raises InvalidRequest, another RequestError or a ClientError (see lmdeploy_slo.client.errors).
    timeout_s, above 0, limits a whole call, repetitions included; it is a hard end (DeadlineExceeded), not an SLO. An
    exception that interrupts a call, KeyboardInterrupt included, cancels it in the server.
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
        sleep: Callable[[float], None] = time.sleep,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        self._metadata = Access(credentials, token, insecure).metadata_for(target)
        options = (*CHANNEL_OPTIONS, *channel_options)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options=options)
        else:
            self._channel = grpc.secure_channel(target, credentials, options=options)
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._attempts = partial(Attempts, retry or RetryPolicy(), clock=clock or MonotonicClock(), random=random)
        self._sleep = sleep

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """The whole answer at once."""
        request = build_request(prompt, options)
        return generation_of(
            self._unary(self._stub.Generate, request, timeout_s, metadata, resend_safe=request.sheddable)
        )

    def stream(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
        **options: Unpack[GenerateOptions],
    ) -> Stream:
        """The answer as it is generated. The request is sent at once; leaving or closing the stream cancels it."""
        request = build_request(prompt, options)
        attempts = self._attempts(timeout_s=timeout_s, resend_safe=True)
        start = partial(self._stub.GenerateStream, request, metadata=(*metadata, *self._metadata))
        return Stream(start, attempts, self._sleep)

    def predict(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = INFO_TIMEOUT_S,
        metadata: Metadata = (),
        **options: Unpack[GenerateOptions],
    ) -> Forecast:
        """Whether the request would meet its SLO if it were sent now; nothing is queued."""
        request = pb.PredictRequest(request=build_request(prompt, options))
        return forecast_of(self._unary(self._stub.Predict, request, timeout_s, metadata))

    def abort(self, request_id: str, *, timeout_s: float | None = INFO_TIMEOUT_S) -> bool:
        """Ends a waiting or running request; its caller gets Cancelled. False where there was none."""
        request = pb.AbortRequest(request_id=request_id)
        response: pb.AbortResponse = self._unary(self._stub.Abort, request, timeout_s, resend_safe=False)
        return response.aborted

    def model_info(self, *, timeout_s: float | None = INFO_TIMEOUT_S) -> ModelInfo:
        """The model, its limits and what the engine can do."""
        return model_info_of(self._unary(self._stub.GetModelInfo, pb.GetModelInfoRequest(), timeout_s))

    def server_info(self, *, timeout_s: float | None = INFO_TIMEOUT_S) -> ServerInfo:
        """Versions, scheduling policy, default SLOs."""
        return server_info_of(self._unary(self._stub.GetServerInfo, pb.GetServerInfoRequest(), timeout_s))

    def load(self, *, timeout_s: float | None = INFO_TIMEOUT_S) -> Load:
        """What the server is doing at this moment."""
        return load_of(self._unary(self._stub.GetLoad, pb.GetLoadRequest(), timeout_s))

    def explain(self, request_id: str, *, timeout_s: float | None = INFO_TIMEOUT_S) -> Explanation:
        """Why a request waited. Raises RequestNotFound where the server remembers nothing of it."""
        request = pb.ExplainRequest(request_id=request_id)
        return explanation_of(self._unary(self._stub.Explain, request, timeout_s))

    def scale(self, replicas: int, *, drain: Sequence[str] = (), timeout_s: float | None = INFO_TIMEOUT_S) -> Scaled:
        """There shall be so many engines, 1 to 1024; those named in `drain` go, whatever the number. For operators.
        Answers at once, `load` shows how it goes on."""
        request = pb.ScaleRequest(replicas=replicas, drain=drain)
        return scaled_of(self._unary(self._stub.Scale, request, timeout_s))

    def close(self) -> None:
        """Cancels what is running and closes the connection; later calls raise ValueError. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _unary(
        self,
        method: Any,
        request: object,
        timeout_s: float | None,
        metadata: Metadata = (),
        *,
        resend_safe: bool = True,
    ) -> Any:
        attempts = self._attempts(timeout_s=timeout_s, resend_safe=resend_safe)
        while True:
            call = method.future(request, timeout=attempts.remaining_s(), metadata=(*metadata, *self._metadata))
            try:
                return call.result()
            except grpc.FutureCancelledError:
                raise Cancelled("the client was closed") from None
            except grpc.RpcError as failure:
                error = error_of(failure)
                wait_s = attempts.wait_after_s(error)
                if wait_s is None:
                    raise error from failure
            except BaseException:
                call.cancel()
                raise
            self._sleep(wait_s)


class Stream(Iterator[StreamChunk]):
    """The chunks of one request, in order; for one thread at a time.

    Ends after the chunk that carries the completion. Closing it, leaving its `with` block or dropping it before that
    cancels the request in the server. Errors are raised by `next`; after one the stream is over.
    """

    def __init__(self, start: Callable[..., Any], attempts: Attempts, sleep: Callable[[float], None]) -> None:
        self._start = start
        self._attempts = attempts
        self._sleep = sleep
        self._completion: Completion | None = None
        self._over = False
        self._begun = False
        self._call = start(timeout=attempts.remaining_s())

    @property
    def completion(self) -> Completion:
        """How the request went. Raises RuntimeError before the stream has run to its end."""
        if self._completion is None:
            raise RuntimeError("the stream has not run to its end")
        return self._completion

    def __next__(self) -> StreamChunk:
        if self._over:
            raise StopIteration
        chunk = chunk_of(self._receive())
        self._begun = True
        if chunk.completion is not None:
            self._completion = chunk.completion
            self._over = True
            with suppress(grpc.RpcError, StopIteration):
                next(self._call)  # takes in the status, lest dropping the call looks like a cancel
        return chunk

    def close(self) -> None:
        """Cancels the request if it has not ended. Idempotent."""
        self._over = True
        self._call.cancel()  # nothing happens to a call that has ended

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_call"):  # else it could not even be started
            self.close()

    def _receive(self) -> pb.GenerateStreamResponse:
        while True:
            try:
                message: pb.GenerateStreamResponse = next(self._call)
                return message
            except StopIteration:
                self._over = True
                raise ClientError("the stream ended without a completion", grpc.StatusCode.UNKNOWN) from None
            except grpc.RpcError as failure:
                error = error_of(failure)
                wait_s = None if self._begun else self._attempts.wait_after_s(error)
                if wait_s is None:
                    self._over = True
                    raise error from failure
            self._sleep(wait_s)
            self._call = self._start(timeout=self._attempts.remaining_s())
