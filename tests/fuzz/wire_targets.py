"""What a client may send: bytes as messages, and call metadata, into the code that the server hands them to.

    validation   a GenerateRequest into `gateway.validation`: refused with the fields that are wrong, or within limits
    calls        headers and bytes into each RPC on a runtime with an engine, in virtual time: a documented status that
                 a client can receive, and nothing is left behind

An input of `calls` is a byte for the RPC, header lines, an empty line, and the message.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from random import Random
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from mutation import change, made_up, mutated
from outcome import Broken, Target, promise
from scripted_engine import InlineExecutor

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.clients import ClientPolicies, ClientPolicy
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.errors import InvalidRequest, ModelNotFound
from lmdeploy_slo.gateway import metadata
from lmdeploy_slo.gateway.metadata import read_aliases
from lmdeploy_slo.gateway.options import GatewayOptions
from lmdeploy_slo.gateway.service import InferenceService
from lmdeploy_slo.gateway.status import to_status
from lmdeploy_slo.gateway.validation import MAX_DURATION_MS, Accepted, accept
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.runtime.live import RuntimeOptions
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.scheduling.limits import Limiter, Limits
from lmdeploy_slo.scheduling.rules import RulePolicy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import make_slo
from lmdeploy_slo.testing.virtual_time import VirtualTimeLoop
from lmdeploy_slo.v1 import inference_pb2 as pb

SESSION = 200
TASK_SLO = make_slo(ttft_ms=1000)
OPTIONS = GatewayOptions(default_max_new_tokens=20, task_slos={"chat": TASK_SLO})

RECEIVABLE_BYTES = 8000
"""Of trailing metadata: gRPC's peers take 8 KiB unless told otherwise."""

RPCS: tuple[tuple[str, type[Message]], ...] = (
    ("Generate", pb.GenerateRequest),
    ("GenerateStream", pb.GenerateRequest),
    ("Predict", pb.PredictRequest),
    ("Abort", pb.AbortRequest),
    ("Explain", pb.ExplainRequest),
    ("GetModelInfo", pb.GetModelInfoRequest),
    ("GetServerInfo", pb.GetServerInfoRequest),
    ("GetLoad", pb.GetLoadRequest),
)
REASONS = {
    grpc.StatusCode.INVALID_ARGUMENT: {"INVALID_REQUEST"},
    grpc.StatusCode.NOT_FOUND: {"MODEL_NOT_FOUND", "REQUEST_NOT_FOUND"},
    grpc.StatusCode.ALREADY_EXISTS: {"REQUEST_ID_IN_USE"},
    grpc.StatusCode.DEADLINE_EXCEEDED: {"QUEUE_TIMEOUT", "DEADLINE_EXCEEDED"},
    grpc.StatusCode.RESOURCE_EXHAUSTED: {
        *("QUEUE_FULL", "CLIENT_QUEUE_FULL", "TOO_MANY_STREAMS", "RATE_LIMITED", "OVERLOADED", "SLO_UNATTAINABLE"),
    },
}
"""What a healthy server may answer to a single call: INTERNAL is not among it."""

_FULL = pb.GenerateRequest(
    request_id="r-1",
    text="hello wörld",
    sampling=pb.SamplingParams(temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.1, seed=3),
    stopping=pb.StoppingParams(max_new_tokens=9, min_new_tokens=2, stop=["x", "end"], stop_token_ids=[3, 200]),
    slo=pb.Slo(ttft_ms=100, tpot_ms=20, e2e_ms=4000),
    task_type="chat",
    expected_output_tokens=12,
    queue_timeout_ms=500,
    fairness_id="team",
    priority_class=pb.PRIORITY_CLASS_INTERACTIVE,
    sheddable=True,
    emulation=pb.Emulation(output_tokens=4),
    conversation_id="c-7",
)
_CHAT = pb.GenerateRequest(
    messages=pb.Conversation(messages=[pb.ChatMessage(role=r, content="hi") for r in ("user", "assistant", "user")]),
)
_IDS = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2, 300, 70_000]))
GENERATE_EXAMPLES = tuple(
    m.SerializeToString() for m in (_FULL, _CHAT, _IDS, pb.GenerateRequest(text="a"), pb.GenerateRequest())
)
_HEADERS = (
    b"x-llm-d-slo-ttft-ms: 250\nx-llm-d-slo-tpot-ms: 20.5\nx-slo-e2e-ms: 4000",
    b"x-request-id: abc-1\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    b"x-llm-d-inference-fairness-id: team\nauthorization: Bearer x",
    b"",
)
_HEADER_WORDS = (*(f"{n}: ".encode() for n in sorted(metadata._NAMES)), b"a" * 400, b": ", b"-bin: ", b"0.0", b".5")


# -- validation -------------------------------------------------------------------------------------------------------


def _make_request(draw: Random) -> bytes:
    """Nearly right, made up, or damaged."""
    kind = draw.random()
    if kind < 0.5:
        request = pb.GenerateRequest.FromString(draw.choice(GENERATE_EXAMPLES[:4]))
        for _ in range(draw.choice((0, 1, 1, 2))):
            change(draw, request)
        return request.SerializeToString()
    if kind < 0.7:
        return made_up(draw, pb.GenerateRequest).SerializeToString()
    return mutated(draw, GENERATE_EXAMPLES)


@cache
def _engine() -> EmulatedEngine:
    return EmulatedEngine(StepModel(0, 0, 0, 0, 0), EngineLimits(), VirtualClock(), max_session_tokens=SESSION)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def validate(data: bytes) -> str:
    try:
        request = pb.GenerateRequest.FromString(data)
    except DecodeError:
        return "no message"
    try:
        accepted = _loop().run_until_complete(accept(request, read_aliases(()), _engine(), OPTIONS, arrival_at_s=1.0))
    except (InvalidRequest, ModelNotFound) as refusal:
        promise(len(to_status(refusal).SerializeToString()) < RECEIVABLE_BYTES // 2, "too much is told")
        if isinstance(refusal, InvalidRequest):
            promise(all(v.field and v.description for v in refusal.violations), "a violation says nothing")
            return "refused"
        return "another model"
    _check_limits(accepted)
    return "accepted"


def _check_limits(accepted: Accepted) -> None:
    """The limits of the .proto file, on what is handed to the scheduler and the engine."""
    spec, given = accepted.spec, accepted.engine_request
    slo, sampling, stopping = spec.slo, given.sampling, given.stopping
    durations = (slo.ttft_s, slo.tpot_s, slo.e2e_s, spec.queue_timeout_s)
    promise(all(d is None or 0 < d <= MAX_DURATION_MS / 1e3 for d in durations), f"durations {durations}")
    ids = given.prompt_token_ids
    vocab = _engine().info.vocab_size
    promise(0 < len(ids) == spec.prompt_tokens < SESSION, f"a prompt of {len(ids)} tokens")
    promise(vocab is not None and max(*ids, 0, *stopping.stop_token_ids) < vocab, "not in the vocabulary")
    promise(1 <= stopping.max_new_tokens <= SESSION - len(ids), f"max_new_tokens {stopping.max_new_tokens}")
    promise(stopping.min_new_tokens <= stopping.max_new_tokens, "min above max")
    promise(len(stopping.stop) <= 16 and all(1 <= len(s) <= 256 for s in stopping.stop), "stops")
    promise(len(stopping.stop_token_ids) <= 64, "stop ids")
    ranges = ((sampling.temperature, 0, 2), (sampling.top_p, 0, 1), (sampling.min_p, 0, 1), (sampling.logprobs, 1, 20))
    promise(all(v is None or low <= v <= high for v, low, high in ranges), f"sampling {sampling}")
    promise(spec.expected_output_tokens is None or spec.expected_output_tokens >= 1, "a hint below 1")
    promise(1 <= len(spec.request_id) <= 128 and spec.request_id.isascii(), "the request id")
    promise(max(len(spec.fairness_id), len(spec.conversation_id), len(spec.task_type) * 2) <= 128, "an id is too long")


# -- calls ------------------------------------------------------------------------------------------------------------


Trailing = tuple[tuple[str, "str | bytes"], ...]


class _Aborted(Exception):
    pass


class Call:
    """As much of grpc.aio.ServicerContext as the service uses. `deadline_s`: None for none."""

    def __init__(self, headers: list[tuple[str, str | bytes]]) -> None:
        self.headers = headers
        self.trailing: Trailing = ()
        self.messages: list[bytes] = []
        self.ended: tuple[grpc.StatusCode, str] | None = None

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        return self.headers

    def time_remaining(self) -> float | None:
        return None

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    def set_trailing_metadata(self, trailing: Trailing) -> None:
        self.trailing = trailing

    async def write(self, message: bytes) -> None:
        await asyncio.sleep(0)
        self.messages.append(message)

    async def abort(self, code: grpc.StatusCode, details: str, trailing: Trailing = ()) -> None:
        self.ended, self.trailing = (code, details), trailing
        raise _Aborted


class Defects(logging.Handler):
    """Keeps what is logged as an error: a defect that the client is not told of."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record)

    @contextmanager
    def listening(self) -> Iterator[None]:
        logger = logging.getLogger("lmdeploy_slo")
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)

    def check(self) -> None:
        if self.seen:
            record, self.seen = self.seen[0], []
            raise Broken(record.getMessage()) from (record.exc_info[1] if record.exc_info else None)


class Gatehouse:
    """The service on a runtime that stands still between calls."""

    def __init__(self) -> None:
        self.loop = VirtualTimeLoop()
        clock, model, limits = self.loop.clock, StepModel(0.01, 1e-5, 0, 0, 0), EngineLimits(max_batch_size=4)
        engine = EmulatedEngine(model, limits, clock, max_session_tokens=SESSION)
        policies = ClientPolicies(ClientPolicy(tightest_slo=make_slo(ttft_ms=50), max_queue_timeout_s=60.0))
        self.runtime = Runtime(
            engine,
            Scheduler(limits=limits, model=model, lengths=TaskLengthPredictor(), max_queued_requests=8),
            RulePolicy("edf"),
            clock,
            RuntimeOptions(flush_interval_s=0.02, explain_requests=64),
            limiter=Limiter(Limits(max_queued_requests=8), lambda: policies),
            executor=InlineExecutor(),
        )
        self.defects = Defects()
        self.loop.run_until_complete(self.runtime.start())
        handlers = InferenceService(self.runtime, OPTIONS).handlers()
        self.rpcs = {name: handlers.service(_Details(name)) for name, _ in RPCS}

    def call(self, name: str, headers: list[tuple[str, str | bytes]], data: bytes) -> tuple[Call, bytes | None]:
        call = Call(headers)
        handler = self.rpcs[name]
        assert handler is not None
        answer: bytes | None = None
        with self.defects.listening(), suppress(_Aborted):
            answer = self.loop.run_until_complete((handler.unary_unary or handler.unary_stream)(data, call))
        self.defects.check()
        load = self.runtime.load()
        promise(load.waiting == load.in_flight == 0, f"{name} left requests behind")
        promise(load.planner.failures == 0, "a plan failed")
        return call, answer


class _Details:
    invocation_metadata = ()

    def __init__(self, name: str) -> None:
        self.method = f"/{pb.DESCRIPTOR.services_by_name['InferenceService'].full_name}/{name}"


@cache
def gatehouse() -> Gatehouse:
    return Gatehouse()


def _make_call(draw: Random) -> bytes:
    number = draw.randrange(len(RPCS)) if draw.random() < 0.6 else draw.randrange(2)
    headers = draw.choice(_HEADERS)
    if draw.random() < 0.3:
        headers = mutated(draw, _HEADERS, _HEADER_WORDS).replace(b"\n\n", b"\n")
    kind = RPCS[number][1]
    if kind is pb.GenerateRequest:
        message = _make_request(draw)
    elif kind is pb.PredictRequest and draw.random() < 0.7:
        message = b"\x0a" + _varint(len(inner := _make_request(draw))) + inner
    else:
        message = made_up(draw, kind).SerializeToString()
        if draw.random() < 0.4:
            message = mutated(draw, (message, *GENERATE_EXAMPLES))
    return bytes([number]) + headers + b"\n\n" + message


def _varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


def answer_call(data: bytes) -> str:
    head, _, message = data[1:].partition(b"\n\n")
    name, _ = RPCS[(data[0] if data else 0) % len(RPCS)]
    call, answer = gatehouse().call(name, _headers(head), message)
    if call.ended is not None:
        return _check_status(call)
    if name == "GenerateStream":
        told = [pb.GenerateStreamResponse.FromString(m) for m in call.messages]
        completed = [m.HasField("completion") for m in told]
        promise(completed == [False] * (len(told) - 1) + [True], "no completion at the end")
        _check_timing(told[-1].completion)
    else:
        promise(answer is not None, "neither an answer nor a status")
    return f"{name} answered"


def _headers(head: bytes) -> list[tuple[str, str | bytes]]:
    """What gRPC would let through: names in lower case, values of printable ASCII, 8 KiB in all."""
    found: list[tuple[str, str | bytes]] = []
    for line in head[:4000].split(b"\n"):
        name, colon, value = line.partition(b": ")
        key = name.decode("latin-1").lower()
        if colon and key.isascii() and key.replace("-", "a").isalnum():
            printable = bytes(byte for byte in value if 0x20 <= byte < 0x7F).decode("ascii")
            found.append((key, value if key.endswith("-bin") else printable))
    return found


def _check_status(call: Call) -> str:
    assert call.ended is not None
    code, details = call.ended
    promise(code in REASONS, f"{code} is not documented for this: {details}")
    trailing = dict(call.trailing)
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])  # type: ignore[arg-type]
    promise(status.code == code.value[0] and status.message == details, "the details are of another status")
    info = error_details_pb2.ErrorInfo()
    promise(status.details[0].Unpack(info), "no ErrorInfo")
    promise(info.reason in REASONS[code], f"{info.reason} with {code}")
    size = len(details) + sum(len(k) + len(v) * (4 / 3 if k.endswith("-bin") else 1) + 32 for k, v in call.trailing)
    promise(size <= RECEIVABLE_BYTES, f"a status of {size:.0f} bytes: clients would be told of something else")
    return f"{info.reason}"


def _check_timing(completion: Any) -> None:
    values = [v for _, v in completion.timing.ListFields()]
    promise(all(math.isfinite(v) and v >= 0 for v in values), f"timing {completion.timing}")


_CALL_EXAMPLES = [
    bytes([number]) + headers + b"\n\n" + message
    for number in range(len(RPCS))
    for headers in _HEADERS
    for message in GENERATE_EXAMPLES
]

TARGETS = (
    Target("validation", _make_request, validate, GENERATE_EXAMPLES),
    Target("calls", _make_call, answer_call, _CALL_EXAMPLES, cost=4),
)
