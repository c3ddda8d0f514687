"""The server as a client of another make sees it: grpclib, which is HTTP/2 by h2 and shares no code with grpcio."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

grpclib = pytest.importorskip("grpclib", reason="grpclib is not installed here: `make test-interop` runs this")

from conftest import PYTHON, serving  # noqa: E402
from google.rpc import error_details_pb2  # noqa: E402
from grpclib.client import Channel, UnaryStreamMethod, UnaryUnaryMethod  # noqa: E402
from grpclib.const import Status  # noqa: E402
from grpclib.events import RecvTrailingMetadata, listen  # noqa: E402
from grpclib.exceptions import GRPCError, StreamTerminatedError  # noqa: E402
from grpclib.health.v1.health_grpc import HealthStub  # noqa: E402
from grpclib.health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse  # noqa: E402
from grpclib.reflection.v1alpha.reflection_grpc import ServerReflectionStub  # noqa: E402
from grpclib.reflection.v1alpha.reflection_pb2 import ServerReflectionRequest  # noqa: E402

SERVICE = "/lmdeploy_slo.v1.InferenceService"
WAIT_S = 20.0
FOREVER = 100_000  # tokens, of a millisecond each


class Caller:
    """Calls by name, on one connection."""

    def __init__(self, channel: Any, pb: ModuleType) -> None:
        self.channel, self.pb = channel, pb
        self.trailing: dict[str, Any] = {}
        listen(channel, RecvTrailingMetadata, self._keep_trailing)

    async def _keep_trailing(self, event: Any) -> None:
        self.trailing = dict(event.metadata)

    def unary(self, name: str) -> Any:
        request = getattr(self.pb, f"{name}Request")
        return UnaryUnaryMethod(self.channel, f"{SERVICE}/{name}", request, getattr(self.pb, f"{name}Response"))

    async def call(self, name: str, request: Any = None, **options: Any) -> Any:
        request = request or getattr(self.pb, f"{name}Request")()
        return await asyncio.wait_for(self.unary(name)(request, **options), WAIT_S)

    def stream(self, **options: Any) -> Any:
        path = f"{SERVICE}/GenerateStream"
        method = UnaryStreamMethod(self.channel, path, self.pb.GenerateRequest, self.pb.GenerateStreamResponse)
        return method.open(**options)

    def request(self, tokens: int = 5, **fields: Any) -> Any:
        emulation, stopping = self.pb.Emulation(output_tokens=tokens), self.pb.StoppingParams(max_new_tokens=tokens)
        return self.pb.GenerateRequest(**({"text": "hello", "emulation": emulation, "stopping": stopping} | fields))

    async def idle(self) -> Any:
        """The load once nothing waits and nothing runs."""
        until = time.monotonic() + WAIT_S
        while True:
            load = await self.call("GetLoad")
            if load.waiting == load.in_flight == 0:
                return load
            assert time.monotonic() < until, f"still there: {load}"
            await asyncio.sleep(0.01)


@asynccontextmanager
async def calling(port: int, pb: ModuleType, **options: Any) -> AsyncIterator[Caller]:
    channel = Channel("127.0.0.1", port, **options)
    try:
        yield Caller(channel, pb)
    finally:
        channel.close()


@pytest.fixture
async def caller(port: int, pb: ModuleType) -> AsyncIterator[Caller]:
    async with calling(port, pb) as calls:
        await calls.idle()
        yield calls


async def refusal(call: Any) -> Any:
    with pytest.raises(GRPCError) as error:
        await call
    return error.value


def detail(error: Any, kind: type[Any]) -> Any:
    return next((found for found in error.details or () if isinstance(found, kind)), None)


def reason(error: Any) -> str:
    return str(detail(error, error_details_pb2.ErrorInfo).reason)


# -- calls ------------------------------------------------------------------------------------------------------------


async def test_unary(caller: Caller) -> None:
    answer = await caller.call("Generate", caller.request(7, request_id="u-1"))
    assert len(answer.token_ids) == answer.completion.usage.output_tokens == 7
    assert answer.text
    assert answer.completion.request_id == "u-1"
    assert answer.completion.timing.ttft_ms <= answer.completion.timing.e2e_ms


async def test_a_stream(caller: Caller) -> None:
    messages = []
    async with caller.stream() as stream:
        await stream.send_message(caller.request(50), end=True)
        async for message in stream:
            messages.append(message)
    whole = await caller.call("Generate", caller.request(50))
    assert [len(m.token_ids) for m in messages].count(0) <= 1
    assert sum(len(m.token_ids) for m in messages) == 50
    assert "".join(m.text for m in messages) == whole.text
    assert [m.HasField("completion") for m in messages] == [False] * (len(messages) - 1) + [True]


@pytest.mark.parametrize("name", ["GetModelInfo", "GetServerInfo", "GetLoad"])
async def test_questions(caller: Caller, name: str) -> None:
    assert (await caller.call(name)).ByteSize() > 0


async def test_predict_and_explain(caller: Caller) -> None:
    await caller.call("Generate", caller.request(3, request_id="explained"))
    told = await caller.call("Explain", caller.pb.ExplainRequest(request_id="explained"))
    assert (told.request_id, told.output_tokens) == ("explained", 3)
    wish = caller.request(text="a", slo=caller.pb.Slo(e2e_ms=60_000))
    assert (await caller.call("Predict", caller.pb.PredictRequest(request=wish))).would_meet_slo


async def test_many_streams_on_one_connection(caller: Caller) -> None:
    """Four may wait, and two run once a plan was made: what is more is refused, and harms nobody."""

    async def one() -> str:
        try:
            answer = await caller.call("Generate", caller.request(100))
        except GRPCError as error:
            retry = detail(error, error_details_pb2.RetryInfo)
            return reason(error) if retry.retry_delay.ToMilliseconds() > 0 else "no time to come back"
        return f"{len(answer.token_ids)} tokens"

    ends = await asyncio.gather(*(one() for _ in range(20)))
    assert set(ends) == {"100 tokens", "QUEUE_FULL"}
    assert ends.count("100 tokens") >= 4


async def test_a_prompt_of_a_megabyte(caller: Caller) -> None:
    """Larger than any flow-control window."""
    ids = caller.pb.TokenIds(ids=[100] * 150_000 + [2_000_000] * 40_000)
    request = caller.request(2, token_ids=ids)
    request.ClearField("text")
    request.token_ids.CopyFrom(ids)
    assert (await caller.call("Generate", request)).completion.usage.prompt_tokens == 190_000


async def test_a_message_beyond_the_limit(caller: Caller) -> None:
    request = caller.request(2, text="x" * (17 << 20))
    with pytest.raises((GRPCError, StreamTerminatedError)) as refused:  # it need not be read to the end
        await asyncio.wait_for(caller.unary("Generate")(request), WAIT_S)
    assert getattr(refused.value, "status", Status.RESOURCE_EXHAUSTED) is Status.RESOURCE_EXHAUSTED
    assert (await caller.call("Generate", caller.request())).text


# -- the end of a call ------------------------------------------------------------------------------------------------


async def test_cancelling_frees_the_engine(caller: Caller) -> None:
    before = (await caller.idle()).cancelled
    async with caller.stream() as stream:
        await stream.send_message(caller.request(FOREVER), end=True)
        assert (await stream.recv_message()).token_ids
        await stream.cancel()
    assert (await caller.idle()).cancelled == before + 1


async def test_a_connection_that_goes_away_frees_the_engine(caller: Caller, port: int, pb: ModuleType) -> None:
    before = (await caller.idle()).cancelled
    async with calling(port, pb) as other:
        stream = await other.stream().__aenter__()
        await stream.send_message(other.request(FOREVER), end=True)
        assert (await stream.recv_message()).token_ids
    assert (await caller.idle()).cancelled == before + 1


async def test_the_server_keeps_the_deadline_of_a_client_that_does_not(caller: Caller) -> None:
    """grpclib sends grpc-timeout, and would give up itself; here the header alone is sent."""
    before = (await caller.idle()).timed_out
    received = 0

    async def read() -> None:
        nonlocal received
        async with caller.stream() as stream:
            stream._deadline = _Told()
            await stream.send_message(caller.request(FOREVER), end=True)
            async for message in stream:
                received += len(message.token_ids)

    error = await refusal(asyncio.wait_for(read(), WAIT_S))
    assert received > 0
    assert error.status is Status.DEADLINE_EXCEEDED
    assert not error.details or reason(error) == "DEADLINE_EXCEEDED"  # the transport may be the first to notice
    assert (await caller.idle()).timed_out == before + 1


class _Told:
    """A deadline of which the server alone is told."""

    def time_remaining(self) -> float:
        return 0.2


async def test_a_deadline_on_the_clients_side(caller: Caller) -> None:
    before = (await caller.idle()).timed_out
    with pytest.raises((asyncio.TimeoutError, GRPCError)):
        await caller.unary("Generate")(caller.request(FOREVER), timeout=0.2)
    load = await caller.idle()
    assert load.timed_out + load.cancelled >= before + 1


async def test_abort_by_another_call(caller: Caller) -> None:
    async def read() -> None:
        async with caller.stream() as stream:
            await stream.send_message(caller.request(FOREVER, request_id="doomed"), end=True)
            await stream.recv_message()
            assert (await caller.call("Abort", caller.pb.AbortRequest(request_id="doomed"))).aborted
            async for _ in stream:
                pass

    error = await refusal(asyncio.wait_for(read(), WAIT_S))
    assert (error.status, reason(error)) == (Status.CANCELLED, "CANCELLED")


async def test_who_reads_slowly_gets_everything(caller: Caller) -> None:
    async with caller.stream() as stream:
        await stream.send_message(caller.request(3000), end=True)
        await stream.recv_message()
        other = await caller.call("Generate", caller.request(20))  # on the same connection
        await caller.idle()  # all is generated, most of it not read
        tokens = 0
        async for message in stream:
            tokens += len(message.token_ids)
    assert len(other.token_ids) == 20
    assert tokens >= 2999


# -- errors and metadata ----------------------------------------------------------------------------------------------


def _violate(pb: ModuleType) -> Any:
    return pb.GenerateRequest(text="", sampling=pb.SamplingParams(temperature=9, n=2), slo=pb.Slo(ttft_ms=-1))


@pytest.mark.parametrize(
    ("name", "request_of", "status", "told"),
    [
        ("Generate", _violate, Status.INVALID_ARGUMENT, "INVALID_REQUEST"),
        ("Generate", lambda pb: pb.GenerateRequest(text="a", model="ä"), Status.NOT_FOUND, "MODEL_NOT_FOUND"),
        ("Explain", lambda pb: pb.ExplainRequest(request_id="?"), Status.NOT_FOUND, "REQUEST_NOT_FOUND"),
        ("Predict", lambda pb: pb.PredictRequest(), Status.INVALID_ARGUMENT, "INVALID_REQUEST"),
    ],
)
async def test_errors_have_details(
    caller: Caller, name: str, request_of: Callable[[ModuleType], Any], status: Status, told: str
) -> None:
    error = await refusal(caller.call(name, request_of(caller.pb)))
    assert error.status is status
    info = detail(error, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (told, "lmdeploy_slo")
    assert error.message


async def test_every_wrong_field_is_named(caller: Caller) -> None:
    error = await refusal(caller.call("Generate", _violate(caller.pb)))
    fields = {v.field for v in detail(error, error_details_pb2.BadRequest).field_violations}
    assert fields == {"text", "sampling.temperature", "sampling.n", "slo.ttft_ms"}


async def test_text_of_errors_beyond_ascii_arrives(caller: Caller) -> None:
    error = await refusal(caller.call("Generate", caller.request(model="modèle-\N{SNOWMAN}")))
    assert "modèle-\N{SNOWMAN}" in error.message


async def test_a_status_is_no_larger_than_the_client_takes(caller: Caller) -> None:
    stops = caller.pb.StoppingParams(stop=[""] * 5000)
    error = await refusal(caller.call("Generate", caller.request(stopping=stops, model="")))
    assert error.status is Status.INVALID_ARGUMENT
    error = await refusal(caller.call("Generate", caller.request(model="\N{SNOWMAN}" * 5000)))
    assert error.status is Status.NOT_FOUND


async def test_metadata_in_and_out(caller: Caller) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    metadata = {
        "x-request-id": "from-header",
        "traceparent": trace,
        "x-slo-e2e-ms": "60000",
        "x-binary-bin": b"\x00\xff",
    }
    answer = await caller.call("Generate", caller.request(), metadata=metadata)
    assert answer.completion.request_id == "from-header"
    assert answer.completion.slo.e2e_ms == 60_000
    assert answer.completion.slo_met is True
    assert caller.trailing["x-request-id"] == "from-header"
    assert caller.trailing["traceparent"] == trace


async def test_metadata_comes_back_with_errors_too(caller: Caller) -> None:
    error = await refusal(caller.call("Generate", _violate(caller.pb), metadata={"x-request-id": "wrong-1"}))
    assert error.status is Status.INVALID_ARGUMENT
    assert caller.trailing["x-request-id"] == "wrong-1"


async def test_a_method_that_does_not_exist(caller: Caller) -> None:
    method = UnaryUnaryMethod(caller.channel, f"{SERVICE}/Nothing", caller.pb.AbortRequest, caller.pb.AbortResponse)
    assert (await refusal(method(caller.pb.AbortRequest()))).status is Status.UNIMPLEMENTED


async def test_bytes_that_are_no_message(caller: Caller) -> None:
    """A message of another type that cannot be read as a GenerateRequest."""
    method = UnaryUnaryMethod(caller.channel, f"{SERVICE}/Generate", caller.pb.TokenIds, caller.pb.GenerateResponse)
    error = await refusal(method(caller.pb.TokenIds(ids=[0xFFFFFFF] * 3)))  # a request_id that is not UTF-8
    assert (error.status, reason(error)) == (Status.INVALID_ARGUMENT, "INVALID_REQUEST")


# -- beside the service -----------------------------------------------------------------------------------------------


async def test_health(caller: Caller) -> None:
    stub = HealthStub(caller.channel)
    for service in ("", SERVICE[1:]):
        answer = await stub.Check(HealthCheckRequest(service=service))
        assert answer.status == HealthCheckResponse.SERVING
    assert (await refusal(stub.Check(HealthCheckRequest(service="nothing")))).status is Status.NOT_FOUND


async def test_reflection(caller: Caller) -> None:
    stub = ServerReflectionStub(caller.channel)
    (answer,) = await stub.ServerReflectionInfo([ServerReflectionRequest(list_services="")])
    assert SERVICE[1:] in {service.name for service in answer.list_services_response.service}


# -- TLS --------------------------------------------------------------------------------------------------------------


class Certificates:
    def __init__(self, folder: Path) -> None:
        import trustme

        self.ca = trustme.CA()
        issued, client = self.ca.issue_cert("127.0.0.1", "localhost"), self.ca.issue_cert("client.test")
        self.cert, self.key = folder / "server.pem", folder / "server.key"
        self.root, self.client = folder / "ca.pem", folder / "client.pem"
        self.cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        self.key.write_bytes(issued.private_key_pem.bytes())
        self.root.write_bytes(self.ca.cert_pem.bytes())
        self.client.write_bytes(client.private_key_and_cert_chain_pem.bytes())

    def context(self, *, shows_certificate: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.root))
        context.set_alpn_protocols(["h2"])
        if shows_certificate:
            context.load_cert_chain(str(self.client))
        return context


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


async def test_tls(certificates: Certificates, pb: ModuleType, tmp_path: Path) -> None:
    flags = ("--tls-cert", str(certificates.cert), "--tls-key", str(certificates.key))
    with serving(tmp_path, *flags) as port:
        async with calling(port, pb, ssl=certificates.context()) as caller:
            assert len((await caller.call("Generate", caller.request(9))).token_ids) == 9
        async with calling(port, pb, ssl=ssl.create_default_context()) as distrustful:
            with pytest.raises(ssl.SSLCertVerificationError):
                await distrustful.call("GetLoad")
        async with calling(port, pb) as plain:
            with pytest.raises((StreamTerminatedError, ConnectionError, OSError)):
                await plain.call("GetLoad")


async def test_mutual_tls(certificates: Certificates, pb: ModuleType, tmp_path: Path) -> None:
    flags = ("--tls-cert", str(certificates.cert), "--tls-key", str(certificates.key))
    with serving(tmp_path, *flags, "--tls-client-ca", str(certificates.root)) as port:
        async with calling(port, pb, ssl=certificates.context(shows_certificate=True)) as known:
            assert (await known.call("Generate", known.request(4))).completion.usage.output_tokens == 4
        async with calling(port, pb, ssl=certificates.context()) as stranger:
            with pytest.raises((StreamTerminatedError, ConnectionError, ssl.SSLError)):
                await stranger.call("GetLoad")


@pytest.fixture
def token(tmp_path: Path) -> str:
    command = [str(PYTHON), "-m", "lmdeploy_slo", "token", "new", "alice", "--file", str(tmp_path / "tokens")]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return next(word for word in made if word.startswith("slo_"))


async def test_tokens(pb: ModuleType, tmp_path: Path, token: str) -> None:
    with serving(tmp_path, "--tokens-file", str(tmp_path / "tokens")) as port:
        async with calling(port, pb) as caller:
            error = await refusal(caller.call("Generate", caller.request()))
            assert (error.status, reason(error)) == (Status.UNAUTHENTICATED, "UNAUTHENTICATED")
            answer = await caller.call("Generate", caller.request(), metadata={"authorization": f"Bearer {token}"})
            assert answer.text
