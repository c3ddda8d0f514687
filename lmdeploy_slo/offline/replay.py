"""Replays a workload against a running server over gRPC: open loop, every request at the moment it is due.

A request is sent when it is due, whatever became of those before it, and its latencies count from that moment: a
replayer that falls behind does not make the server look better. How far behind it was is reported.

Each request is serialised before the run starts and each message is only stamped on receipt; what a message says is
read when its stream has ended. So the client stays well below one core at some thousand messages a second.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import numpy as np
from google.protobuf.message import DecodeError

from lmdeploy_slo.client.channel import OPEN_ACCESS, Access, Metadata
from lmdeploy_slo.client.errors import error_of
from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.metrics import RequestRecord
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.core.slo import Slo, Timing
from lmdeploy_slo.errors import SloError
from lmdeploy_slo.offline.workload import OfferedRequest
from lmdeploy_slo.v1 import inference_pb2, inference_pb2_grpc

CHANNELS = 4
"""Connections the requests are spread over, in turn: one connection's flow control does not hold up all streams."""

LEAD_S = 0.05
"""From the last preparation to the first request, so that nothing of the start-up delays it."""

_CONNECT_TIMEOUT_S = 10.0
_STREAM_METHOD = "/lmdeploy_slo.v1.InferenceService/GenerateStream"
_CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # else equal channels share one connection
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
)

# Prompts are random token ids, so that no prefix cache finds one twice. These take two bytes on the wire, and leave out
# the first ids of most vocabularies, which are special.
_PROMPT_STREAM = 0x50524F4D
_FIRST_TOKEN_ID, _LAST_TOKEN_ID = 256, 16383
_UNKNOWN_VOCABULARY = 1024

_STATUS_OF_CODE = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: EndStatus.REJECTED,
    grpc.StatusCode.DEADLINE_EXCEEDED: EndStatus.TIMED_OUT,
    grpc.StatusCode.CANCELLED: EndStatus.CANCELLED,
}


@dataclass(slots=True)
class Replayed:
    """What came of a replay.

    policy, synthetic: as the server says. records: one per request that was sent, their instants counted from the
    start of the run. lateness_s: how much later than due each was sent, in the order sent. failures: how often each
    reason was given for a request that did not finish. interrupted: it was stopped; what had not ended then is
    recorded as cancelled, and what was not yet sent is not recorded.
    """

    policy: str
    synthetic: bool
    records: list[RequestRecord] = field(default_factory=list)
    lateness_s: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    interrupted: bool = False


Progress = Callable[[int, int], None]
"""Called with (requests sent, requests ended) whenever one of them changes; must not block."""


async def replay(
    target: str,
    requests: Sequence[OfferedRequest],
    *,
    clock: Clock,
    timeout_s: float | None = None,
    stop: asyncio.Event | None = None,
    on_progress: Progress | None = None,
    access: Access = OPEN_ACCESS,
) -> Replayed:
    """Sends `requests`, which are in order of `due_s`, to the server at `target` (HOST:PORT) and waits for all ends.

    timeout_s: hard limit of each request, after which the server drops it; None for none.
    stop: once set, nothing more is sent and what is open is cancelled. A cancelled call does the same and raises.
    Raises SloError where the server cannot be reached or does not say what it is.
    """
    metadata = access.metadata_for(target)
    async with _open_channels(target, access) as channels:
        server, model = await _ask(channels[0], target, metadata)
        await asyncio.gather(*(_connect(channel, target) for channel in channels))
        replayed = Replayed(server.policy, model.synthetic)
        vocabulary = model.vocab_size if model.HasField("vocab_size") else _UNKNOWN_VOCABULARY
        run = _Run(replayed, channels, clock, timeout_s, on_progress, metadata)
        await run.run(requests, request_bytes(requests, vocabulary, emulation=model.synthetic), stop)
        return replayed


def request_bytes(requests: Sequence[OfferedRequest], vocabulary: int, *, emulation: bool) -> list[bytes]:
    """Each request as it goes over the wire; the true output length is in it only with `emulation`."""
    # Other replays of the same trace may run against the same server.
    prefix = uuid.uuid4().hex[:12]
    first, last = _FIRST_TOKEN_ID, min(_LAST_TOKEN_ID, vocabulary - 1)
    if last <= first:
        first = 0
    serialised = []
    for request in requests:
        message = inference_pb2.GenerateRequest(
            request_id=f"{prefix}-{request.index}",
            slo=_slo_message(request.slo),
            task_type=request.task,
            expected_output_tokens=request.expected_output_tokens,
        )
        random = np.random.default_rng([_PROMPT_STREAM, request.index])
        message.token_ids.ids.extend(random.integers(first, last, request.prompt_tokens, endpoint=True).tolist())
        message.stopping.max_new_tokens = request.max_new_tokens
        if emulation:
            message.emulation.output_tokens = request.output_tokens
        serialised.append(message.SerializeToString())
    return serialised


def _slo_message(slo: Slo) -> inference_pb2.Slo | None:
    if not slo.has_objective:
        return None
    milliseconds = [None if value is None else value * 1e3 for value in (slo.ttft_s, slo.tpot_s, slo.e2e_s)]
    return inference_pb2.Slo(ttft_ms=milliseconds[0], tpot_ms=milliseconds[1], e2e_ms=milliseconds[2])


# -- the connection -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _open_channels(target: str, access: Access) -> AsyncIterator[list[grpc.aio.Channel]]:
    def open_one() -> grpc.aio.Channel:
        if access.credentials is None:
            return grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(target, access.credentials, options=_CHANNEL_OPTIONS)

    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_one()) for _ in range(CHANNELS)]


async def _ask(
    channel: grpc.aio.Channel, target: str, metadata: Metadata
) -> tuple[inference_pb2.GetServerInfoResponse, inference_pb2.GetModelInfoResponse]:
    stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
    try:
        call = {"timeout": _CONNECT_TIMEOUT_S, "metadata": metadata}
        server = await stub.GetServerInfo(inference_pb2.GetServerInfoRequest(), **call)
        model = await stub.GetModelInfo(inference_pb2.GetModelInfoRequest(), **call)
    except grpc.aio.AioRpcError as error:
        raise SloError(f"--target {target}: {error_of(error)}") from error
    return server, model


async def _connect(channel: grpc.aio.Channel, target: str) -> None:
    try:
        await asyncio.wait_for(channel.channel_ready(), _CONNECT_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise SloError(f"--target {target}: no connection within {_CONNECT_TIMEOUT_S:g} s") from None


# -- the run --------------------------------------------------------------------------------------------------------


class _Run:
    """One replay: a task that sends, and a task for each open request."""

    def __init__(
        self,
        replayed: Replayed,
        channels: Sequence[grpc.aio.Channel],
        clock: Clock,
        timeout_s: float | None,
        on_progress: Progress | None,
        metadata: Metadata,
    ) -> None:
        self._metadata = metadata or None
        self._replayed = replayed
        # Without serialisers, messages are bytes both ways.
        self._calls: list[Any] = [channel.unary_stream(_STREAM_METHOD) for channel in channels]
        self._clock = clock
        self._timeout_s = timeout_s
        self._on_progress = on_progress or (lambda sent, ended: None)
        self._start_at_s = 0.0
        self._sent = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def run(
        self, requests: Sequence[OfferedRequest], payloads: Sequence[bytes], stop: asyncio.Event | None
    ) -> None:
        """Returns when every request that was sent has ended."""
        stopped = asyncio.ensure_future((stop or asyncio.Event()).wait())
        everything = asyncio.ensure_future(self._send_all(requests, payloads))
        try:
            await asyncio.wait((stopped, everything), return_when=asyncio.FIRST_COMPLETED)
            self._replayed.interrupted = not everything.done()
        finally:
            everything.cancel()
            stopped.cancel()
            for task in self._tasks:
                task.cancel()
            results = await asyncio.gather(everything, stopped, *self._tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):  # a defect of this module: what a server does is recorded
                raise result

    async def _send_all(self, requests: Sequence[OfferedRequest], payloads: Sequence[bytes]) -> None:
        self._start_at_s = self._clock.now_s() + LEAD_S
        for request, payload in zip(requests, payloads, strict=True):
            due_at_s = self._start_at_s + request.due_s
            # Also where it is late already: in a burst, requests that were sent need a turn of the loop to get out.
            await asyncio.sleep(max(0.0, due_at_s - self._clock.now_s()))
            self._tasks.append(asyncio.ensure_future(self._one(request, payload)))
        await asyncio.gather(*self._tasks)

    async def _one(self, request: OfferedRequest, payload: bytes) -> None:
        """Sends one request and records how it ended; ends early, as cancelled, when its task is cancelled."""
        clock, start_at_s = self._clock, self._start_at_s
        timing = Timing(request.due_s)
        record = RequestRecord(
            str(request.index), request.task, request.prompt_tokens, request.slo, timing, EndStatus.FAILED
        )
        sent_s = clock.now_s() - start_at_s
        self._replayed.lateness_s.append(sent_s - request.due_s)
        send = self._calls[self._sent % len(self._calls)]
        call = send(payload, timeout=self._timeout_s, metadata=self._metadata)
        self._sent += 1
        self._on_progress(self._sent, len(self._replayed.records))
        last_message = b""
        try:
            async for message in call:
                last_message, timing.ended_at_s = message, clock.now_s() - start_at_s
                if timing.first_token_at_s is None:
                    timing.first_token_at_s = timing.ended_at_s
        except grpc.aio.AioRpcError as error:
            record.status = _STATUS_OF_CODE.get(error.code(), EndStatus.FAILED)
            self._replayed.failures[f"{error.code().name}: {error.details() or 'no details'}"] += 1
        except asyncio.CancelledError:
            call.cancel()
            record.status = EndStatus.CANCELLED
        else:
            problem = _read_completion(record, last_message, sent_s)
            if problem:
                self._replayed.failures[problem] += 1
        if record.status is not EndStatus.FINISHED:
            timing.ended_at_s = clock.now_s() - start_at_s
        self._replayed.records.append(record)
        self._on_progress(self._sent, len(self._replayed.records))


def _read_completion(record: RequestRecord, last_message: bytes, sent_s: float) -> str | None:
    """Takes over what the server says in its last message; what is wrong with that message, None where nothing is."""
    try:
        response = inference_pb2.GenerateStreamResponse.FromString(last_message)
    except DecodeError:
        return "the last message cannot be read"
    if not response.HasField("completion"):
        return "the stream ended without a completion"
    completion, timing = response.completion, record.timing
    record.status = EndStatus.FINISHED
    timing.output_tokens = completion.usage.output_tokens
    if timing.output_tokens == 0:
        timing.first_token_at_s = None  # the only message was this one
    if completion.timing.HasField("queue_ms"):
        timing.dispatched_at_s = sent_s + completion.timing.queue_ms / 1e3
    if completion.predicted.HasField("output_tokens"):
        record.predicted_output_tokens = completion.predicted.output_tokens
    return None
