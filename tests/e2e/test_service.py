"""The other calls, health, reflection, slow readers, and how a server goes away."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from scripted_engine import ScriptedEngine, make_runtime
from served import Served, reason, refusal, request, served, soon, violated

from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.core.snapshot import EngineLimits, Snapshot
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.gateway.options import GatewayOptions
from lmdeploy_slo.gateway.server import Gateway
from lmdeploy_slo.gateway.service import SERVICE_NAME, InferenceService
from lmdeploy_slo.scheduling.rules import RulePolicy
from lmdeploy_slo.testing.builders import NO_TIME, make_slo
from lmdeploy_slo.v1 import inference_pb2 as pb

Code = grpc.StatusCode
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


# -- predict ------------------------------------------------------------------


async def predict(server: Served, **fields: Any) -> pb.PredictResponse:
    answer = await soon(server.stub.Predict(pb.PredictRequest(request=request(**fields))))
    assert isinstance(answer, pb.PredictResponse)
    return answer


async def test_predict_says_whether_a_request_would_meet_its_slo() -> None:
    async with served(batch_size=1) as server:
        server.runtime.scheduler.model = StepModel(0.01, 0, 0, 0, 0)
        idle = await predict(server, expected_output_tokens=100, slo=pb.Slo(e2e_ms=1000))
        told = idle.predicted
        medians = (told.output_tokens, told.queue_ms, told.ttft_ms, told.tpot_ms, told.e2e_ms)
        assert medians == (100, 0, 10, 10, 1000)
        assert told.e2e_ms_interval.low < 1000 < told.e2e_ms_interval.high
        assert told.slo_probability == pytest.approx(0.5)
        assert idle.would_meet_slo is True
        assert (idle.queue_position, idle.reason, idle.slo) == (0, "", pb.Slo(e2e_ms=1000))

        too_slow = await predict(server, expected_output_tokens=100, slo=pb.Slo(e2e_ms=999))
        assert too_slow.would_meet_slo is False
        assert re.fullmatch(
            r"e2e is expected to be 1000\.0 ms \([\d.]+ to [\d.]+\), above the objective of 999 ms", too_slow.reason
        )

        running = server.stream("running", expected_output_tokens=50)
        await server.engine.has("running")
        busy = await predict(server, request_id="other", expected_output_tokens=100)
        assert busy.predicted.queue_ms == pytest.approx(500)
        assert not busy.HasField("would_meet_slo")
        assert (busy.reason, busy.HasField("slo")) == ("", False)
        running.cancel()


async def test_predict_queues_nothing_and_does_not_look_at_emulation_or_ids_in_use() -> None:
    async with served(info={"synthetic": False}) as server:
        running = server.stream("r")
        await server.engine.has("r")
        answer = await predict(server, request_id="r", emulation=pb.Emulation(output_tokens=3))
        assert answer.predicted.output_tokens > 3
        assert server.engine.submitted == ["r"]
        running.cancel()


async def test_predict_knows_the_defaults_and_the_bound_of_the_queue() -> None:
    options = GatewayOptions(task_slos={"chat": make_slo(e2e_ms=60_000)}, max_queued_requests=1)
    async with served(batch_size=1, max_queued_requests=1, gateway_options=options) as server:
        assert (await predict(server, task_type="chat")).would_meet_slo
        running = server.stream("running")
        await server.engine.has("running")
        waiting = server.stream("waiting")
        while (await server.load()).waiting < 1:
            pass
        full = await predict(server, request_id="x", task_type="chat")
        assert full.would_meet_slo is False
        assert full.queue_position == 1
        assert full.reason.startswith("the queue is full: 1 requests are waiting")
        for call in (running, waiting):
            call.cancel()


async def test_predict_needs_a_request() -> None:
    async with served() as server:
        assert violated(await refusal(server.stub.Predict(pb.PredictRequest()))) == ["request"]


# -- questions ----------------------------------------------------------------


async def test_model_server_and_load_are_told() -> None:
    options = GatewayOptions(
        version="1.2.3",
        versions={"grpcio": "9"},
        task_slos={"chat": make_slo(ttft_ms=5)},
        max_queued_requests=7,
    )
    engine = ScriptedEngine(
        MonotonicClock(), limits=EngineLimits(9, 99, 999), max_session_tokens=50, vocab_size=10, synthetic=False
    )
    async with served(engine=engine, gateway_options=options) as server:
        assert await server.stub.GetModelInfo(pb.GetModelInfoRequest()) == pb.GetModelInfoResponse(
            model="scripted-model",
            engine="scripted",
            synthetic=False,
            max_session_tokens=50,
            vocab_size=10,
            max_batch_size=9,
            max_prefill_tokens=99,
            kv_tokens=999,
        )
        info = await server.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert info.uptime_s > 0
        info.ClearField("uptime_s")
        assert info == pb.GetServerInfoResponse(
            version="1.2.3",
            policy="fcfs",
            versions={"grpcio": "9"},
            task_slos={"chat": pb.Slo(ttft_ms=5)},
            max_queued_requests=7,
        )
        load = await server.load()
        steps = pb.StepForecasts(slowness=load.step_forecasts.slowness)
        engine = pb.ReplicaLoad(instance="scripted-0", up=True, max_in_flight=9, kv_usage=0.25, step_forecasts=steps)
        assert load == pb.GetLoadResponse(kv_usage=0.25, max_in_flight=9, step_forecasts=steps, replicas=[engine])
        call = server.stream(token_ids=pb.TokenIds(ids=[1, 2]))
        await server.engine.has("r")
        load = await server.load()
        assert (load.in_flight, load.waiting, load.plans) == (1, 0, 1)
        assert load.last_plan_ms >= 0
        assert load.mean_plan_ms == load.last_plan_ms
        assert load.failed_plans == 0
        call.cancel()


async def test_a_failing_policy_shows_in_the_load() -> None:
    class Broken(RulePolicy):
        def plan(self, snapshot: Snapshot) -> Plan:
            raise ZeroDivisionError

    async with served(policy=Broken("fcfs")) as server:
        call = server.stream()
        await server.engine.has("r")  # in arrival order
        load = await server.load()
        assert load.failed_plans == load.plans == 1
        call.cancel()


async def test_without_bounds_they_stay_unset() -> None:
    async with served(info={"vocab_size": None}) as server:
        info = await server.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert not any(info.HasField(name) for name in ("max_session_tokens", "vocab_size", "kv_tokens"))
        answer = await server.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert not answer.HasField("max_queued_requests")


def test_every_rpc_of_the_protocol_is_served() -> None:
    runtime = make_runtime(ScriptedEngine(MonotonicClock()), MonotonicClock())
    handlers = InferenceService(runtime, GatewayOptions()).handlers()
    service = pb.DESCRIPTOR.services_by_name["InferenceService"]

    class Details:
        invocation_metadata = ()

        def __init__(self, method: str) -> None:
            self.method = method

    for method in service.methods:
        handler: Any = handlers.service(Details(f"/{SERVICE_NAME}/{method.name}"))  # type: ignore[arg-type]
        assert handler is not None, method.name
        assert handler.response_streaming is (method.name == "GenerateStream")
        assert not handler.request_streaming
    assert handlers.service(Details(f"/{SERVICE_NAME}/Other")) is None  # type: ignore[arg-type]


async def test_health_and_reflection_are_served() -> None:
    async with served() as server:
        health: Any = health_pb2_grpc.HealthStub(server.channel)
        for service in ("", SERVICE_NAME):
            assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == SERVING
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(server.channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = [answer async for answer in reflection.ServerReflectionInfo(iter([asked]))]
        names = {service.name for service in answers[0].list_services_response.service}
        assert names >= {SERVICE_NAME, "grpc.health.v1.Health"}
        symbol = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME)
        (answer,) = [answer async for answer in reflection.ServerReflectionInfo(iter([symbol]))]
        assert answer.file_descriptor_response.file_descriptor_proto


async def test_a_port_that_is_taken_is_a_configuration_error() -> None:
    async with served() as server:
        with pytest.raises(ConfigError, match=f"127.0.0.1:{server.port}"):
            await Gateway(server.runtime).start("127.0.0.1", server.port)


# -- going away ---------------------------------------------------------------


async def watch_health(server: Served) -> Any:
    health: Any = health_pb2_grpc.HealthStub(server.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
    assert (await soon(watch.read())).status == SERVING
    return watch


async def test_draining_lets_streams_end_and_refuses_new_requests() -> None:
    async with served() as server:
        health = await watch_health(server)
        running = server.stream("running")
        await server.engine.has("running")

        draining = asyncio.ensure_future(server.gateway.drain(60.0))

        assert (await soon(health.read())).status == NOT_SERVING
        for refused in (server.generate("late"), server.stub.Predict(pb.PredictRequest(request=request()))):
            error = await refusal(refused)
            assert (error.code(), reason(error)) == (Code.UNAVAILABLE, "DRAINING")
        assert (await server.load()).draining
        assert not draining.done()
        server.engine.step()
        assert (await soon(running.read())).text == "a"
        server.engine.step("running")
        assert (await soon(running.read())).HasField("completion")
        health.cancel()
        await soon(draining)
        error = await refusal(server.generate("later"))
        assert error.code() is Code.UNAVAILABLE


async def test_after_the_grace_streams_end_with_unavailable() -> None:
    async with served() as server:
        running = server.stream("running")
        await server.engine.has("running")
        draining = asyncio.ensure_future(server.gateway.drain(0.01))
        error = await refusal(running)
        assert (error.code(), reason(error)) == (Code.UNAVAILABLE, "DRAINING")
        assert server.engine.aborts == ["running"]
        await soon(draining)


async def test_a_crash_of_the_engine_is_told_to_all_and_to_health() -> None:
    async with served(batch_size=1) as server:
        health = await watch_health(server)
        running = server.stream("running")
        await server.engine.has("running")
        waiting = server.stream("waiting")
        while (await server.load()).waiting < 1:
            pass

        server.engine.crash()

        for call in (running, waiting):
            error = await refusal(call)
            assert (error.code(), reason(error)) == (Code.UNAVAILABLE, "ENGINE_UNAVAILABLE")
        assert (await soon(health.read())).status == NOT_SERVING
        assert reason(await refusal(server.stub.Predict(pb.PredictRequest(request=request())))) == "ENGINE_UNAVAILABLE"

        server.engine.submit_error = None  # it came back
        again = server.stream("again")
        await server.engine.has("again")
        assert (await soon(health.read())).status == SERVING
        server.engine.step("again")
        assert (await soon(again.read())).HasField("completion")
        health.cancel()


# -- readers ------------------------------------------------------------------


@pytest.mark.parametrize("flush_interval_s", [0.0, 0.005])
async def test_a_reader_that_does_not_read_holds_nobody_up(flush_interval_s: float) -> None:
    async with served(flush_interval_s=flush_interval_s) as server:
        slow, fast = server.stream("slow"), server.stream("fast")
        await server.engine.has("slow", "fast")
        text, tokens = "x" * 10_000, 300  # far more than the windows of a connection hold
        for i in range(0, tokens, 3):
            for token in range(i, i + 3):
                server.engine.emit("slow", token, text=text)
            server.engine.emit("fast", 97)
            assert (await soon(fast.read())).text == "a"
        server.engine.emit("slow", tokens, text="end", end=FinishReason.STOP)
        server.engine.emit("fast", 98, end=FinishReason.STOP)
        assert (await soon(fast.read())).HasField("completion")
        assert (await server.load()).in_flight == 0, "the engine is done with both"

        messages = []
        while (message := await soon(slow.read())) is not grpc.aio.EOF:
            messages.append(message)
        assert [token for m in messages for token in m.token_ids] == list(range(tokens + 1))
        assert "".join(m.text for m in messages) == text * tokens + "end"
        if flush_interval_s == 0:
            assert len(messages) == tokens + 1
        else:
            assert len(messages) < tokens
        assert [m.HasField("completion") for m in messages] == [False] * (len(messages) - 1) + [True]


async def test_abort_reaches_a_stream_whose_reader_does_not_read() -> None:
    async with served() as server:
        slow = server.stream("slow")
        await server.engine.has("slow")
        for i in range(100):
            server.engine.emit("slow", i, text="x" * 10_000)
        assert (await server.stub.Abort(pb.AbortRequest(request_id="slow"))).aborted
        assert server.engine.requests == {}
        error = await refusal(slow)
        assert (error.code(), reason(error)) == (Code.CANCELLED, "CANCELLED")


async def contents(flush_interval_s: float, streams: int, tokens: int) -> tuple[list[tuple[list[int], str]], int]:
    """What each stream of the emulated engine brought, and in how many messages altogether."""
    engine = EmulatedEngine(NO_TIME, EngineLimits(), MonotonicClock(), seed=5)
    async with served(engine=engine, flush_interval_s=flush_interval_s) as server:

        async def read(i: int) -> tuple[list[int], str, int]:
            call = server.stream(f"r{i}", emulation=pb.Emulation(output_tokens=tokens))
            messages = []
            while (message := await soon(call.read())) is not grpc.aio.EOF:
                messages.append(message)
            assert all(len(m.token_ids) >= 1 for m in messages[:-1])
            assert flush_interval_s or all(len(m.token_ids) == 1 for m in messages)
            assert messages[-1].completion.usage.output_tokens == tokens
            return [t for m in messages for t in m.token_ids], "".join(m.text for m in messages), len(messages)

        read_all = await asyncio.gather(*(read(i) for i in range(streams)))
        load = await server.load()
        assert (load.finished, load.in_flight, load.waiting) == (streams, 0, 0)
        return [(ids, text) for ids, text, _ in read_all], sum(count for _, _, count in read_all)


async def test_coalescing_changes_the_number_of_messages_and_nothing_else() -> None:
    streams, tokens = 16, 60
    apart, messages = await contents(0.0, streams, tokens)
    assert messages == streams * tokens
    merged, fewer = await contents(0.01, streams, tokens)
    assert merged == apart
    assert fewer < messages
