"""Explain and the last minute of GetLoad over real gRPC."""

from __future__ import annotations

import grpc
import pytest
from served import reason, refusal, served, soon, violated

from lmdeploy_slo.client import AsyncClient, PriorityClass, RequestState
from lmdeploy_slo.errors import RequestNotFound
from lmdeploy_slo.v1 import inference_pb2 as pb


async def test_a_waiting_request_is_explained() -> None:
    """What went before it is told by its numbers: the id of another request is nobody's business."""
    async with served(batch_size=1) as server:
        running = server.stream("runs")
        await server.engine.has("runs")
        chat = {"task_type": "chat", "slo": pb.Slo(e2e_ms=5000), "priority_class": pb.PRIORITY_CLASS_BULK}
        ours, other = server.stream("ours", **chat), server.stream("other")
        while (await server.load()).waiting < 2:
            pass
        async with AsyncClient(server.target) as client:
            told = await client.explain("ours")
            assert (told.state, told.priority_class) == (RequestState.WAITING, PriorityClass.BULK)
            assert (told.task_type, told.slo.e2e_ms, told.slo_met, told.output_tokens) == ("chat", 5000.0, None, None)
            assert told.places[-1].waiting == 2
            assert told.places[-1].in_flight == 1
            assert told.places[-1].spare_ms is not None
            server.engine.step("runs")
            await server.engine.has("other")  # of a higher class
            server.engine.step("other")
            await server.engine.has("ours")
            server.engine.step("ours")
            for call in (running, ours, other):
                while await soon(call.read()) is not grpc.aio.EOF:
                    pass
            told = await client.explain("ours")
            assert (told.state, told.reason, told.output_tokens, told.slo_met) == (RequestState.ENDED, "stop", 1, True)
            assert told.sent_before.requests == 1
            assert told.dearest[0].priority_class is PriorityClass.DEFAULT
            assert told.timing.queue_ms == pytest.approx(told.wait.total_ms)
            parts = told.wait.planning_ms + told.wait.engine_full_ms + told.wait.held_back_ms
            assert parts == pytest.approx(told.wait.total_ms)
            answer = await server.stub.Explain(pb.ExplainRequest(request_id="ours"))
            assert "other" not in str(answer)


async def test_what_is_not_remembered_is_not_found() -> None:
    async with served(explain_requests=0) as server:
        error = await refusal(server.stub.Explain(pb.ExplainRequest(request_id="nobody")))
        assert (error.code(), reason(error)) == (grpc.StatusCode.NOT_FOUND, "REQUEST_NOT_FOUND")
        call = server.stream("ours")
        await server.engine.has("ours")
        assert (await server.stub.Explain(pb.ExplainRequest(request_id="ours"))).state == pb.REQUEST_STATE_RUNNING
        server.engine.step("ours")
        while await soon(call.read()) is not grpc.aio.EOF:
            pass
        async with AsyncClient(server.target) as client:
            with pytest.raises(RequestNotFound):
                await client.explain("ours")


@pytest.mark.parametrize("request_id", ["", "x" * 129])
async def test_an_id_that_cannot_be_one(request_id: str) -> None:
    async with served() as server:
        assert violated(await refusal(server.stub.Explain(pb.ExplainRequest(request_id=request_id)))) == ["request_id"]


async def test_the_last_minute_is_told_by_task() -> None:
    async with served() as server:
        call = server.stream("ours", task_type="chat", slo=pb.Slo(ttft_ms=60_000))
        await server.engine.has("ours")
        server.engine.step()
        server.engine.step("ours")
        while await soon(call.read()) is not grpc.aio.EOF:
            pass
        async with AsyncClient(server.target) as client:
            load = await client.load()
            (chat,) = load.last_minute
            assert (chat.task, chat.requests, chat.with_slo, chat.slo_met, chat.output_tokens) == ("chat", 1, 1, 1, 2)
            assert chat.mean_ttft_ms is not None
            assert chat.mean_tpot_ms is not None
            assert load.output_tokens == 2
            assert load.last_plan is not None
            assert load.last_plan.engine_second_price is None
            assert load.oldest_wait_ms is None
