"""Generating over gRPC: what goes in, what comes out, and how calls end."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from served import Served, detail, reason, refusal, request, served, soon, violated

from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.errors import EngineError
from lmdeploy_slo.gateway.options import GatewayOptions
from lmdeploy_slo.testing.builders import make_slo
from lmdeploy_slo.v1 import inference_pb2 as pb

Code = grpc.StatusCode


async def one_running_one_waiting(server: Served) -> tuple[Any, Any]:
    running = server.stream("running")
    await server.engine.has("running")
    waiting = server.stream("waiting")
    while (await server.load()).waiting < 1:  # each look is a round trip to the server
        pass
    return running, waiting


async def test_a_stream_sends_each_token_as_it_comes_and_ends_with_how_it_went() -> None:
    async with served() as server:
        call = server.stream(slo=pb.Slo(e2e_ms=60_000), task_type="chat")
        await server.engine.has("r")
        for token in b"abc":
            server.engine.emit("r", token)
            message = await soon(call.read())
            assert (list(message.token_ids), message.text) == ([token], chr(token))
            assert not message.HasField("completion")
        server.engine.emit("r", ord("d"), end=FinishReason.STOP, cached_tokens=2)
        last = await soon(call.read())
        assert await soon(call.read()) is grpc.aio.EOF

        assert (list(last.token_ids), last.text) == ([100], "d")
        completion = last.completion
        assert completion.request_id == "r"
        assert completion.finish_reason == pb.FINISH_REASON_STOP
        assert completion.usage == pb.Usage(prompt_tokens=2, cached_tokens=2, output_tokens=4)
        timing = completion.timing
        assert 0 <= timing.queue_ms <= timing.ttft_ms <= timing.e2e_ms
        assert timing.tpot_ms == pytest.approx((timing.e2e_ms - timing.ttft_ms) / 3)
        assert completion.slo_met is True
        assert completion.slo == pb.Slo(e2e_ms=60_000)
        assert completion.predicted.output_tokens >= 1
        assert (completion.effective_priority, completion.instance) == (0, "scripted-0")
        assert await call.code() is Code.OK
        load = await server.load()
        assert (load.finished, load.with_slo, load.slo_met, load.in_flight, load.waiting) == (1, 1, 1, 0, 0)


async def test_a_unary_call_returns_the_whole_answer() -> None:
    async with served() as server:
        call = asyncio.ensure_future(server.generate(task_type="chat"))
        await server.engine.has("r")
        server.engine.emit("r", *b"hello ")
        server.engine.emit("r", *b"world", end=FinishReason.LENGTH)
        answer = await soon(call)
        assert answer.text == "hello world"
        assert bytes(answer.token_ids) == b"hello world"
        assert answer.completion.finish_reason == pb.FINISH_REASON_LENGTH
        assert not answer.completion.HasField("slo_met")
        assert not answer.completion.HasField("slo")


async def test_without_an_id_the_server_makes_one() -> None:
    async with served() as server:
        call = server.stub.GenerateStream(request(None))
        await server.engine.until(lambda: bool(server.engine.submitted))
        (made,) = server.engine.submitted
        server.engine.step(made)
        assert (await soon(call.read())).completion.request_id == made


async def test_the_callers_ids_come_back_with_the_status() -> None:
    metadata = (("x-request-id", "proxy-1"), ("traceparent", "00-abc-def-01"), ("other", "x"))
    async with served() as server:
        good = server.stub.GenerateStream(request(None), metadata=metadata)
        await server.engine.has("proxy-1")
        server.engine.step("proxy-1")
        await soon(good.read())
        assert {(k, v) for k, v in await good.trailing_metadata()} == set(metadata[:2])
        bad = await refusal(server.stub.Generate(request(None, text=""), metadata=metadata))
        assert {(k, v) for k, v in bad.trailing_metadata() or ()} >= set(metadata[:2])


async def test_default_objectives_of_a_task_apply() -> None:
    options = GatewayOptions(task_slos={"chat": make_slo(ttft_ms=0.000_001)})
    async with served(gateway_options=options) as server:
        call = server.stream(task_type="chat")
        await server.engine.has("r")
        server.engine.step("r")
        completion = (await soon(call.read())).completion
        assert completion.slo == pb.Slo(ttft_ms=0.000_001)
        assert completion.slo_met is False


async def test_messages_are_rendered_and_log_probabilities_returned() -> None:
    async with served() as server:
        conversation = pb.Conversation(messages=[pb.ChatMessage(role="user", content="hi")])
        call = server.stream(messages=conversation, sampling=pb.SamplingParams(logprobs=1))
        await server.engine.has("r")
        tokenizer = server.engine.tokenizer
        prompt = server.engine.requests["r"].prompt_token_ids
        assert tokenizer.decode(prompt) == "<|user|>\nhi\n<|assistant|>\n"
        assert server.engine.requests["r"].sampling.logprobs == 1
        call.cancel()


# -- refusals -----------------------------------------------------------------


async def test_a_malformed_request_is_told_all_that_is_wrong() -> None:
    async with served() as server:
        bad = pb.GenerateRequest(
            text="",
            task_type="x" * 65,
            sampling=pb.SamplingParams(n=2, temperature=float("nan")),
            slo=pb.Slo(e2e_ms=-1),
            stopping=pb.StoppingParams(max_new_tokens=0),
        )
        expected = {"text", "task_type", "sampling.n", "sampling.temperature", "slo.e2e_ms", "stopping.max_new_tokens"}
        assert set(violated(await refusal(server.stub.Generate(bad)))) == expected
        assert set(violated(await refusal(server.stub.GenerateStream(bad)))) == expected
        nested = await refusal(server.stub.Predict(pb.PredictRequest(request=bad)))
        assert set(violated(nested)) == {f"request.{field}" for field in expected}
        assert server.engine.submitted == []


TRUNCATED = b"\x0a\xff"
NOT_UTF8 = b"\x0a\x02\xff\xfe"  # as field 1, the id of a request


@pytest.mark.parametrize(
    ("method", "garbage"),
    [
        *((name, TRUNCATED) for name in ("Generate", "GenerateStream", "Predict", "Abort")),
        *((name, TRUNCATED) for name in ("GetModelInfo", "GetServerInfo", "GetLoad")),
        *((name, NOT_UTF8) for name in ("Generate", "GenerateStream", "Predict", "Abort")),
    ],
)
async def test_bytes_that_are_no_message_are_the_clients_fault(method: str, garbage: bytes) -> None:
    async with served() as server:
        path = f"/lmdeploy_slo.v1.InferenceService/{method}"
        kind = server.channel.unary_stream if method == "GenerateStream" else server.channel.unary_unary
        error = await refusal(kind(path)(garbage))
        assert violated(error)


async def test_an_unknown_model_is_not_found() -> None:
    async with served() as server:
        error = await refusal(server.generate(model="gpt-x"))
        assert (error.code(), reason(error)) == (Code.NOT_FOUND, "MODEL_NOT_FOUND")
        assert "scripted-model" in (error.details() or "")


async def test_an_id_in_use_is_refused() -> None:
    async with served() as server:
        first = server.stream()
        await server.engine.has("r")
        error = await refusal(server.generate())
        assert (error.code(), reason(error)) == (Code.ALREADY_EXISTS, "REQUEST_ID_IN_USE")
        server.engine.step("r")
        assert (await soon(first.read())).HasField("completion")


async def test_a_full_queue_says_when_to_come_back() -> None:
    async with served(batch_size=1, max_queued_requests=1) as server:
        running, waiting = await one_running_one_waiting(server)
        error = await refusal(server.generate("one-too-many"))
        assert (error.code(), reason(error)) == (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        retry = detail(error, error_details_pb2.RetryInfo)
        assert isinstance(retry, error_details_pb2.RetryInfo)
        assert retry.retry_delay.ToMilliseconds() >= 100
        assert (await server.load()).rejected == 1
        for call in (running, waiting):
            call.cancel()


async def test_a_sheddable_request_without_a_chance_is_refused() -> None:
    async with served(shed=True, batch_size=1) as server:
        server.runtime.scheduler.model = type(server.runtime.scheduler.model)(1.0, 0, 0, 0, 0)
        never = await refusal(server.generate("never", sheddable=True, slo=pb.Slo(ttft_ms=5)))
        assert (never.code(), reason(never)) == (Code.RESOURCE_EXHAUSTED, "SLO_UNATTAINABLE")
        assert detail(never, error_details_pb2.RetryInfo) is None
        running, waiting = await one_running_one_waiting(server)
        later = await refusal(server.generate("later", sheddable=True, slo=pb.Slo(ttft_ms=2500)))
        assert (later.code(), reason(later)) == (Code.RESOURCE_EXHAUSTED, "SLO_UNATTAINABLE")
        assert detail(later, error_details_pb2.RetryInfo) is not None
        for call in (running, waiting):
            call.cancel()


async def test_a_message_beyond_the_limit_is_refused() -> None:
    async with served(gateway_options=GatewayOptions(max_message_bytes=10_000)) as server:
        error = await refusal(server.generate(text="x" * 10_001))
        assert error.code() is Code.RESOURCE_EXHAUSTED
        assert server.engine.submitted == []


async def test_a_defect_is_told_without_its_text_and_logged_with_it(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as server:

        def defect(_: Any) -> Any:
            raise ZeroDivisionError("the secret of the house")

        server.engine.unsupported_fields = defect
        for call in (server.generate(), server.stream(), server.stub.Predict(pb.PredictRequest(request=request()))):
            with caplog.at_level(logging.ERROR):
                error = await refusal(call)
            assert (error.code(), reason(error)) == (Code.INTERNAL, "INTERNAL")
            assert "secret" not in str(error)
        assert caplog.text.count("ZeroDivisionError: the secret of the house") == 3


# -- other ends ---------------------------------------------------------------


async def test_what_the_engine_fails_is_internal_with_its_code() -> None:
    async with served() as server:
        call = server.stream()
        await server.engine.has("r")
        server.engine.emit("r", 97)
        await soon(call.read())
        server.engine.emit("r", text="", error=EngineError("out of memory", code="oom"))
        error = await refusal(call)
        assert (error.code(), reason(error)) == (Code.INTERNAL, "ENGINE_ERROR")
        info = detail(error, error_details_pb2.ErrorInfo)
        assert isinstance(info, error_details_pb2.ErrorInfo)
        assert info.metadata["engine_code"] == "oom"
        assert (await server.load()).failed == 1


async def test_abort_ends_waiting_and_running_requests() -> None:
    async with served(batch_size=1) as server:
        running, waiting = await one_running_one_waiting(server)
        for request_id, call in (("waiting", waiting), ("running", running)):
            assert (await server.stub.Abort(pb.AbortRequest(request_id=request_id))).aborted
            error = await refusal(call)
            assert (error.code(), reason(error)) == (Code.CANCELLED, "CANCELLED")
            assert not (await server.stub.Abort(pb.AbortRequest(request_id=request_id))).aborted
        assert server.engine.aborts == ["running"]
        load = await server.load()
        assert (load.cancelled, load.in_flight, load.waiting) == (2, 0, 0)


@pytest.mark.parametrize("request_id", ["", "x" * 129])
async def test_abort_needs_an_id(request_id: str) -> None:
    async with served() as server:
        assert violated(await refusal(server.stub.Abort(pb.AbortRequest(request_id=request_id)))) == ["request_id"]


async def test_a_client_that_cancels_frees_the_engine() -> None:
    async with served(batch_size=1) as server:
        first = server.stream("first")
        await server.engine.has("first")
        server.engine.step()
        await soon(first.read())
        first.cancel()
        await server.engine.until(lambda: server.engine.aborts == ["first"])
        second = asyncio.ensure_future(server.generate("second"))
        await server.engine.has("second")
        second.cancel()
        await server.engine.until(lambda: server.engine.aborts == ["first", "second"])
        load = await server.load()
        assert (load.cancelled, load.in_flight) == (2, 0)


async def test_a_client_that_disconnects_frees_the_engine() -> None:
    async with served() as server:
        channel = grpc.aio.insecure_channel(server.target)
        call = channel.unary_stream("/lmdeploy_slo.v1.InferenceService/GenerateStream")(request().SerializeToString())
        await server.engine.has("r")
        server.engine.step()
        await soon(call.read())
        await channel.close(None)
        await server.engine.until(lambda: server.engine.aborts == ["r"])
        assert (await server.load()).cancelled == 1


async def test_the_deadline_of_a_call_frees_the_engine() -> None:
    async with served(batch_size=1) as server:
        running = server.stream("running", timeout=0.3)
        await server.engine.has("running")
        waiting = server.generate("waiting", timeout=0.2)
        assert (await refusal(waiting)).code() is Code.DEADLINE_EXCEEDED
        assert (await refusal(running)).code() is Code.DEADLINE_EXCEEDED
        await server.engine.until(lambda: server.engine.aborts == ["running"])
        while (load := await server.load()).timed_out < 2:
            assert load.cancelled == 0
        assert (load.timed_out, load.cancelled, load.in_flight) == (2, 0, 0)


async def test_a_queue_timeout_is_told_by_its_reason() -> None:
    async with served(batch_size=1) as server:
        running = server.stream("running")
        await server.engine.has("running")
        error = await refusal(server.generate("waiting", queue_timeout_ms=1))
        assert (error.code(), reason(error)) == (Code.DEADLINE_EXCEEDED, "QUEUE_TIMEOUT")
        assert (await server.load()).timed_out == 1
        running.cancel()
