"""Hypothesis on every RPC over a real connection: whatever is sent, a documented status or a sound answer comes back,
and the server is idle afterwards."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

import grpc
import pytest
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st
from mutation import made_up, mutated
from scripted_engine import make_runtime
from wire_targets import GENERATE_EXAMPLES, REASONS, RPCS, SESSION

from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.gateway.server import Gateway
from lmdeploy_slo.gateway.service import SERVICE_NAME
from lmdeploy_slo.testing.builders import NO_TIME
from lmdeploy_slo.v1 import inference_pb2 as pb

ANSWERS: dict[str, Any] = {name: getattr(pb, f"{name}Response") for name, _ in RPCS}
HEADERS = ("x-llm-d-slo-ttft-ms", "x-llm-d-slo-tpot-ms", "x-slo-e2e-ms", "x-request-id", "traceparent", "x-other")
VALUES = st.one_of(
    st.floats(0, 1e9, width=32).map(lambda v: f"{v:.3f}"),
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=300),
)
METADATA = st.lists(st.tuples(st.sampled_from(HEADERS), VALUES), max_size=3)
CODES = {*REASONS, grpc.StatusCode.CANCELLED}


class Server:
    """The gateway on a free port, and a channel to it."""

    async def start(self) -> None:
        engine: Any = EmulatedEngine(
            NO_TIME, EngineLimits(max_batch_size=8), MonotonicClock(), max_session_tokens=SESSION
        )
        self.runtime = make_runtime(engine, MonotonicClock(), max_queued_requests=8)
        await self.runtime.start()
        self.gateway = Gateway(self.runtime)
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{await self.gateway.start('127.0.0.1', 0)}")

    async def close(self) -> None:
        await self.channel.close()
        await self.gateway.close()
        await self.runtime.close()


@pytest.fixture(scope="module")
def loop() -> Any:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def server(loop: asyncio.AbstractEventLoop) -> Any:
    server = Server()
    loop.run_until_complete(server.start())
    yield server
    loop.run_until_complete(server.close())


@st.composite
def messages(draw: st.DrawFn, kind: Any) -> bytes:
    """Of that kind, field by field, or damaged, or nothing at all alike."""
    random = Random(draw(st.integers(0, 2**32)))
    way = draw(st.integers(0, 3))
    if way == 0:
        return draw(st.binary(max_size=200))
    data: bytes = made_up(random, kind).SerializeToString()
    if way == 1:
        return mutated(random, (data, *GENERATE_EXAMPLES))
    return random.choice(GENERATE_EXAMPLES) if way == 2 and kind is pb.GenerateRequest else data


@pytest.mark.parametrize("name", ANSWERS)
def test_any_message_gets_an_answer_or_a_documented_status(
    name: str, server: Server, loop: asyncio.AbstractEventLoop
) -> None:
    kind = dict(RPCS)[name]
    streams = name == "GenerateStream"
    path = f"/{SERVICE_NAME}/{name}"
    method = server.channel.unary_stream(path) if streams else server.channel.unary_unary(path)
    ends: set[str] = set()

    async def call(data: bytes, metadata: list[tuple[str, str]], timeout_s: float) -> None:
        answered: list[bytes] = []
        try:
            made = method(data, timeout=timeout_s, metadata=metadata)
            answered = [message async for message in made] if streams else [await made]
        except grpc.aio.AioRpcError as error:
            ends.add(_status(error))
            return
        try:
            told = [ANSWERS[name].FromString(message) for message in answered]
        except DecodeError:
            pytest.fail("an answer that is no message")
        assert told
        assert not streams or told[-1].HasField("completion")
        ends.add("answered")

    @given(messages(kind), METADATA, st.sampled_from((10.0, 1e-3)))
    def check(data: bytes, metadata: list[tuple[str, str]], timeout_s: float) -> None:
        loop.run_until_complete(asyncio.wait_for(call(data, metadata, timeout_s), 20))

    check()
    load = loop.run_until_complete(idle(server))
    assert load.ended[EndStatus.FAILED] == load.planner.failures == 0
    assert ends - {"client's deadline"}, "nothing came back"


async def idle(server: Server) -> Any:
    """The load once nothing is left of a call whose client has gone; the limit of the test is that of the wait."""
    while (load := server.runtime.load()).waiting or load.in_flight:  # noqa: ASYNC110  # nothing tells of an end
        await asyncio.sleep(0)
    return load


def _status(error: grpc.aio.AioRpcError) -> str:
    assert error.code() in CODES, f"{error.code()}: {error.details()}"
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    if details is None:  # the client gave up, the server has not answered
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED, error
        return "client's deadline"
    status = status_pb2.Status.FromString(details)  # type: ignore[arg-type]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.reason in REASONS.get(error.code(), {"CANCELLED"})
    return info.reason
