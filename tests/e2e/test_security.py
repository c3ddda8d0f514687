"""TLS, certificates, tokens, policies and limits over real gRPC."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority, ServerFiles, new_authority, replace
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from scripted_engine import ScriptedEngine
from served import Served, detail, reason, refusal, request, served, soon

from lmdeploy_slo.clock import MonotonicClock, VirtualClock
from lmdeploy_slo.core.clients import ClientPolicies, ClientPolicy
from lmdeploy_slo.core.request import FinishReason, PriorityClass
from lmdeploy_slo.gateway.identity import Identifier
from lmdeploy_slo.gateway.security import Security
from lmdeploy_slo.gateway.tls import TlsCredentials
from lmdeploy_slo.gateway.tokens import new_token, read_tokens
from lmdeploy_slo.gateway.watched import LOOK_S, Watched
from lmdeploy_slo.scheduling.limits import Limiter, Limits
from lmdeploy_slo.testing.builders import make_slo
from lmdeploy_slo.v1 import inference_pb2 as pb
from lmdeploy_slo.v1 import inference_pb2_grpc

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def ours() -> Authority:
    return new_authority()


@pytest.fixture(scope="module")
def theirs() -> Authority:
    return new_authority()


@asynccontextmanager
async def connected(server: Served, credentials: grpc.ChannelCredentials) -> AsyncIterator[Any]:
    """A stub on a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(f"localhost:{server.port}", credentials, options=options) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]


async def is_served(server: Served, credentials: grpc.ChannelCredentials, **call: Any) -> bool:
    """Whether a fresh connection can be made and is let in."""
    async with connected(server, credentials) as stub:
        code = await soon(stub.GetModelInfo(pb.GetModelInfoRequest(), **call).code())
        assert code in (Code.OK, Code.UNAVAILABLE)
        return bool(code is Code.OK)


def bearer(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")]


class TokensFile:
    """Tokens of some clients in a file; `clock` decides when it is looked at."""

    def __init__(self, path: Path, *names: str) -> None:
        self.clock = VirtualClock()
        self.path = path
        pairs = {name: new_token(name) for name in names}
        self.of = {name: token for name, (token, _) in pairs.items()}
        self.lines = {name: line for name, (_, line) in pairs.items()}
        self.keep(*names)
        self.watched = Watched("tokens", [path], lambda: read_tokens(path), self.clock)

    def keep(self, *names: str) -> None:
        replace(self.path, "\n".join(self.lines[name] for name in names).encode())

    @property
    def security(self) -> Security:
        return Security(Identifier(self.watched))


# -- TLS ----------------------------------------------------------------------


async def test_tls_takes_whom_trusts_it_and_a_plain_call_gets_nowhere(tmp_path: Path, ours: Authority) -> None:
    tls = TlsCredentials(ServerFiles(tmp_path, ours).files, MonotonicClock())
    async with served(security=Security(tls=tls)) as server:
        assert await is_served(server, ours.credentials())
        assert not await is_served(server, new_authority().credentials())
        assert (await refusal(server.generate())).code() is Code.UNAVAILABLE


async def test_a_renewed_certificate_is_shown_without_a_restart(
    tmp_path: Path, ours: Authority, theirs: Authority
) -> None:
    clock = VirtualClock()
    files = ServerFiles(tmp_path, ours)
    tls = TlsCredentials(files.files, clock)
    async with served(security=Security(tls=tls)) as server, connected(server, ours.credentials()) as standing:
        await soon(standing.GetLoad(pb.GetLoadRequest()))
        files.write(theirs)
        assert await is_served(server, ours.credentials()), "nobody has looked yet"
        clock.advance(LOOK_S)
        assert await is_served(server, theirs.credentials())
        assert not await is_served(server, ours.credentials())
        await soon(standing.GetLoad(pb.GetLoadRequest()))


async def test_half_a_renewal_changes_nothing(
    tmp_path: Path, ours: Authority, theirs: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    clock = VirtualClock()
    files = ServerFiles(tmp_path, ours)
    async with served(security=Security(tls=TlsCredentials(files.files, clock))) as server:
        chain, key = theirs.issue("localhost")
        replace(files.files.cert, chain)
        clock.advance(LOOK_S)
        assert await is_served(server, ours.credentials())
        assert "certificates stay as they were" in caplog.text
        replace(files.files.key, key)
        clock.advance(LOOK_S)
        assert await is_served(server, theirs.credentials())


async def test_mutual_tls_takes_its_own_clients_alone(tmp_path: Path, ours: Authority, theirs: Authority) -> None:
    clock = VirtualClock()
    files = ServerFiles(tmp_path, ours, clients_of=ours)
    security = Security(Identifier(certificates=True), TlsCredentials(files.files, clock))
    async with served(security=security) as server:
        assert await is_served(server, ours.credentials("alice"))
        assert not await is_served(server, ours.credentials())
        assert not await is_served(server, ours.credentials("alice", of=theirs))
        replace(tmp_path / "clients.pem", theirs.ca)
        clock.advance(LOOK_S)
        assert await is_served(server, ours.credentials("alice", of=theirs))
        assert not await is_served(server, ours.credentials("alice"))


async def test_the_certificate_names_the_client(tmp_path: Path, ours: Authority) -> None:
    tls = TlsCredentials(ServerFiles(tmp_path, ours, clients_of=ours).files, MonotonicClock())
    policies = ClientPolicies(by_name={"alice": ClientPolicy(classes=frozenset({PriorityClass.BULK}))})
    security = Security(Identifier(certificates=True), tls)
    async with (
        served(security=security, limiter=Limiter(None, lambda: policies)) as server,
        connected(server, ours.credentials("alice")) as stub,
    ):
        call = stub.GenerateStream(request("r", priority_class=pb.PRIORITY_CLASS_SYSTEM, fairness_id="bob"))
        await server.engine.has("r")
        (live,) = server.runtime._live.values()
        assert str(live.spec.client) == "alice"
        assert live.spec.priority_class is PriorityClass.BULK
        server.engine.step("r")
        await soon(call.read())
        assert dict(await soon(call.trailing_metadata()))["x-slo-clamped"] == "priority_class"


async def test_probes_without_tls_have_a_port_with_health_alone(tmp_path: Path, ours: Authority) -> None:
    tls = TlsCredentials(ServerFiles(tmp_path, ours).files, MonotonicClock())
    engine = ScriptedEngine(MonotonicClock())
    server = Served(engine, None, Security(tls=tls))
    port = await server.gateway.start_health("127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

        async def health(service: str) -> int:
            asked = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
            return int((await soon(asked)).status)

        assert (await health("liveness"), await health("")) == (1, 2), "alive, and not serving yet"
        await server.start()
        assert (await health("liveness"), await health("")) == (1, 1)
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        assert (await refusal(stub.GetLoad(pb.GetLoadRequest()))).code() is Code.UNIMPLEMENTED
        await server.close()


# -- tokens -------------------------------------------------------------------


async def test_every_rpc_but_health_needs_a_token(tmp_path: Path) -> None:
    tokens = TokensFile(tmp_path / "tokens", "alice")
    async with served(security=tokens.security) as server:
        calls = {
            "Generate": request(),
            "GenerateStream": request(),
            "Predict": pb.PredictRequest(request=request()),
            "Abort": pb.AbortRequest(request_id="r"),
            "GetModelInfo": pb.GetModelInfoRequest(),
            "GetServerInfo": pb.GetServerInfoRequest(),
            "GetLoad": pb.GetLoadRequest(),
            "Explain": pb.ExplainRequest(request_id="r"),
            "Scale": pb.ScaleRequest(replicas=2),
        }
        assert set(calls) == set(pb.DESCRIPTOR.services_by_name["InferenceService"].methods_by_name)
        for name, message in calls.items():
            for metadata in (None, bearer("slo_wrong"), [("authorization", tokens.of["alice"])]):
                error = await refusal(getattr(server.stub, name)(message, metadata=metadata))
                assert (error.code(), reason(error)) == (Code.UNAUTHENTICATED, "UNAUTHENTICATED"), name
        assert server.engine.submitted == []
        load = await soon(server.stub.GetLoad(pb.GetLoadRequest(), metadata=bearer(tokens.of["alice"])))
        assert load.rejected == 0
        assert server.runtime.load().refused == {"UNAUTHENTICATED": 3 * len(calls)}
        health = health_pb2_grpc.HealthStub(server.channel)
        assert (await soon(health.Check(health_pb2.HealthCheckRequest()))).status == 1


async def test_a_withdrawn_token_ends_with_its_line(tmp_path: Path) -> None:
    tokens = TokensFile(tmp_path / "tokens", "alice", "bob")
    async with served(security=tokens.security) as server:

        async def ask(name: str) -> grpc.StatusCode:
            call = server.stub.GetLoad(pb.GetLoadRequest(), metadata=bearer(tokens.of[name]))
            return await soon(call.code())

        assert (await ask("alice"), await ask("bob")) == (Code.OK, Code.OK)
        tokens.keep("bob")
        tokens.clock.advance(LOOK_S)
        assert (await ask("alice"), await ask("bob")) == (Code.UNAUTHENTICATED, Code.OK)


async def test_reflection_is_for_holders_of_a_token_and_can_be_turned_off(tmp_path: Path) -> None:
    tokens = TokensFile(tmp_path / "tokens", "alice")
    question = reflection_pb2.ServerReflectionRequest(list_services="")

    async def ask(server: Served, metadata: Any = None) -> Any:
        stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        return await soon(anext(aiter(stub.ServerReflectionInfo(iter([question]), metadata=metadata))))

    async with served(security=tokens.security) as server:
        with pytest.raises(grpc.aio.AioRpcError) as stranger:
            await ask(server)
        assert (stranger.value.code(), reason(stranger.value)) == (Code.UNAUTHENTICATED, "UNAUTHENTICATED")
        answer = await ask(server, bearer(tokens.of["alice"]))
        assert "lmdeploy_slo.v1.InferenceService" in {s.name for s in answer.list_services_response.service}
    async with served() as server:
        assert (await ask(server)).list_services_response.service
    async with served(security=Security(reflection=False)) as server:
        with pytest.raises(grpc.aio.AioRpcError) as off:
            await ask(server)
        assert off.value.code() is Code.UNIMPLEMENTED


async def test_others_requests_can_be_neither_aborted_nor_explained(tmp_path: Path) -> None:
    tokens = TokensFile(tmp_path / "tokens", "alice", "bob", "root")
    policies = ClientPolicies(by_name={"root": ClientPolicy(operator=True)})
    async with served(security=tokens.security, limiter=Limiter(None, lambda: policies)) as server:
        call = server.stream("r", metadata=bearer(tokens.of["alice"]))
        await server.engine.has("r")

        async def abort(name: str) -> bool:
            asked = server.stub.Abort(pb.AbortRequest(request_id="r"), metadata=bearer(tokens.of[name]))
            return bool((await soon(asked)).aborted)

        def explain(name: str) -> Any:
            return server.stub.Explain(pb.ExplainRequest(request_id="r"), metadata=bearer(tokens.of[name]))

        assert (await refusal(explain("bob"))).code() is Code.NOT_FOUND
        for name in ("alice", "root"):
            assert (await soon(explain(name))).request_id == "r"
        assert not await abort("bob")
        assert server.engine.requests
        assert await abort("alice")
        assert (await refusal(call)).code() is Code.CANCELLED
        again = server.stream("r", metadata=bearer(tokens.of["alice"]))
        await server.engine.has("r")
        assert await abort("root")
        assert (await refusal(again)).code() is Code.CANCELLED


# -- limits and policies ------------------------------------------------------


def limited(limits: Limits | None = None, **policy: Any) -> Limiter:
    policies = ClientPolicies(ClientPolicy(**policy))
    return Limiter(limits, lambda: policies)


async def test_streams_of_one_client_leave_the_others_alone() -> None:
    async with served(limiter=limited(max_streams=1)) as server:
        first = server.stream("a", fairness_id="alice")
        await server.engine.has("a")
        error = await refusal(server.generate("b", fairness_id="alice"))
        assert (error.code(), reason(error)) == (Code.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
        assert detail(error, error_details_pb2.RetryInfo) is not None
        other = server.stream("c", metadata=[("x-llm-d-inference-fairness-id", "bob")])
        await server.engine.has("a", "c")
        server.engine.step("a", "c")
        for call in (first, other):
            assert (await soon(call.read())).completion.finish_reason == pb.FINISH_REASON_STOP
        again = server.stream("d", fairness_id="alice")
        await server.engine.has("d")
        again.cancel()


async def test_a_refused_request_is_not_even_tokenised() -> None:
    async with served(limiter=limited(max_streams=1)) as server:
        running = server.stream("a")
        await server.engine.has("a")
        server.engine.tokenizer = None
        for i in range(3):
            error = await refusal(server.generate(f"b{i}", slo=pb.Slo(e2e_ms=1)))
            assert reason(error) == "TOO_MANY_STREAMS"
        load = server.runtime.load()
        assert (load.refused, load.with_slo, load.slo_met) == ({"TOO_MANY_STREAMS": 3}, 3, 0)
        running.cancel()


async def test_tokens_are_charged_and_corrected() -> None:
    clock = MonotonicClock()
    engine = ScriptedEngine(clock)
    async with served(engine=engine, limiter=limited(tokens_per_s=0.001, burst_tokens=50.0)) as server:
        call = server.stream("a", text="x" * 20, expected_output_tokens=100)
        await engine.has("a")
        error = await refusal(server.generate("b"))
        assert (error.code(), reason(error)) == (Code.RESOURCE_EXHAUSTED, "RATE_LIMITED")
        retry = detail(error, error_details_pb2.RetryInfo)
        assert isinstance(retry, error_details_pb2.RetryInfo)
        assert retry.retry_delay.seconds > 50_000
        engine.emit("a", 97, end=FinishReason.STOP)  # one token rather than a hundred
        assert (await soon(call.read())).completion.usage.output_tokens == 1
        next_one = server.stream("b")
        await engine.has("b")
        next_one.cancel()


async def test_a_request_that_is_no_request_leaves_nothing_behind() -> None:
    async with served(limiter=limited(max_streams=1, tokens_per_s=1.0)) as server:
        for _ in range(3):
            assert (await refusal(server.generate(text=""))).code() is Code.INVALID_ARGUMENT
            assert (await refusal(server.generate(fairness_id="x" * 200))).code() is Code.INVALID_ARGUMENT
        counted = server.runtime.limiter.statistics()
        assert (counted.open, counted.clients) == (0, 0)


async def test_predict_says_what_would_be_refused_and_charges_nothing() -> None:
    limiter = limited(max_queued_tokens=50, tokens_per_s=0.001, burst_tokens=200.0, max_streams=2)
    async with served(limiter=limiter) as server:

        async def predict(**fields: Any) -> pb.PredictResponse:
            asked = pb.PredictRequest(request=request(slo=pb.Slo(e2e_ms=60_000), **fields))
            answer = await soon(server.stub.Predict(asked))
            assert isinstance(answer, pb.PredictResponse)
            return answer

        for _ in range(5):
            assert (await predict(text="x" * 10, expected_output_tokens=1)).would_meet_slo
        too_long = await predict(text="x" * 200, expected_output_tokens=1)
        assert not too_long.would_meet_slo
        assert "at most 50 of this client may wait" in too_long.reason
        assert limiter.statistics().open == 0


async def test_claims_are_clamped_and_told() -> None:
    policy = {"classes": frozenset({PriorityClass.BULK}), "tightest_slo": make_slo(ttft_ms=500), "sheddable": True}
    async with served(limiter=limited(**policy)) as server:
        asked = {"slo": pb.Slo(ttft_ms=1, e2e_ms=7000), "priority_class": pb.PRIORITY_CLASS_SYSTEM}
        call = server.stream("r", metadata=[("x-request-id", "mine")], **asked)
        await server.engine.has("r")
        server.engine.step("r")
        message = await soon(call.read())
        assert message.completion.slo == pb.Slo(ttft_ms=500, e2e_ms=7000)
        trailing = dict(await soon(call.trailing_metadata()))
        assert trailing["x-slo-clamped"] == "priority_class,slo.ttft_ms,sheddable"
        assert trailing["x-request-id"] == "mine"


async def test_users_that_a_proxy_names_are_counted_apart(tmp_path: Path) -> None:
    tokens = TokensFile(tmp_path / "tokens", "proxy", "alice")
    policies = ClientPolicies(ClientPolicy(max_streams=1), {"proxy": ClientPolicy(max_streams=1, names_users=True)})
    async with served(security=tokens.security, limiter=Limiter(None, lambda: policies)) as server:
        calls = [
            server.stream(user, fairness_id=user, metadata=bearer(tokens.of["proxy"])) for user in ("u1", "u2", "u3")
        ]
        await server.engine.has("u1", "u2", "u3")
        for user, name in (("u1", "proxy"), ("who-ever", "alice")):
            if name == "alice":
                calls.append(server.stream("first", metadata=bearer(tokens.of[name])))
                await server.engine.has("first")
            error = await refusal(server.stream("x", fairness_id=user, metadata=bearer(tokens.of[name])))
            assert reason(error) == "TOO_MANY_STREAMS", "a fairness_id of its own gets alice no further"
        for call in calls:
            call.cancel()


# -- what is not told ---------------------------------------------------------

CANARY = "plover-4711"


async def test_no_prompt_is_logged_or_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with served(batch_size=1) as server:
        errors = [
            await refusal(server.generate("a", text=CANARY, model="no-such-model")),
            await refusal(server.generate("a", text=CANARY, sampling=pb.SamplingParams(temperature=9))),
        ]
        running = server.stream("a", text=CANARY)
        await server.engine.has("a")
        errors.append(await refusal(server.generate("a", text=CANARY)))
        errors.append(await refusal(server.generate("b", text=CANARY, queue_timeout_ms=1)))
        server.engine.fail("a")
        errors.append(await refusal(running))
        running = server.stream("c", text=CANARY)
        await server.engine.has("c")
        server.engine.crash()
        errors.append(await refusal(running))
        told = [f"{error.details()} {error.trailing_metadata()!r}" for error in errors]
    assert len({error.code() for error in errors}) == 6
    assert CANARY not in "".join(told)
    assert CANARY not in caplog.text


async def test_a_defect_is_told_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as server:

        class Defective:
            def encode(self, text: str) -> list[int]:
                raise RuntimeError("secret-of-the-server")

        server.engine.tokenizer = Defective()
        for call in (server.generate("a"), server.stream("b")):
            error = await refusal(call)
            assert (error.code(), reason(error), error.details()) == (Code.INTERNAL, "INTERNAL", "internal error")
            assert "secret" not in repr(error.trailing_metadata())
        assert server.runtime.limiter.statistics().open == 0
    assert "secret-of-the-server" in caplog.text
