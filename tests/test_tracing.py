"""Traces: one span a phase under one server span, the caller's trace respected, and a real collector that gets them."""

from __future__ import annotations

import asyncio
import threading
from concurrent import futures
from typing import Any

import grpc
import pytest
from runtime_bench import Bench, outcome, virtual

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from lmdeploy_slo.app import serving
from lmdeploy_slo.client import AsyncClient, ClientError
from lmdeploy_slo.config import load
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.errors import InvalidRequest, SloError
from lmdeploy_slo.observability import tracing
from lmdeploy_slo.observability.tracing import Tracing
from lmdeploy_slo.testing.builders import make_request, make_slo, make_spec

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"
NOT_SAMPLED = f"00-{TRACE}-{CALLER}-00"


class Traced:
    """What a runtime's requests leave behind."""

    def __init__(self, bench: Bench) -> None:
        self._kept = InMemorySpanExporter()
        self._tracing = Tracing(SimpleSpanProcessor(self._kept), bench.clock, model="m", version="1.2")
        bench.runtime.journal.watch(self._tracing)

    def spans(self) -> dict[str, ReadableSpan]:
        spans = self._kept.get_finished_spans()
        assert len({span.name for span in spans}) == len(spans)
        return {span.name: span for span in spans}


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def submit(bench: Bench, request_id: str, traceparent: str | None = None, **spec: Any) -> Any:
    made = make_spec(request_id, **({"arrival_at_s": bench.clock.now_s()} | spec))
    return bench.runtime.submit(made, make_request(request_id), traceparent=traceparent)


@virtual(EngineLimits(max_batch_size=1))
async def test_phases_of_a_request(bench: Bench) -> None:
    traced = Traced(bench)
    await bench.running("first")
    stream = submit(bench, "ours", task_type="chat", slo=make_slo(ttft_ms=1000), prompt_tokens=30)
    bench.clock.advance(2.0)
    bench.runtime.abort("first")
    traced._kept.clear()
    await bench.engine.has("ours")
    bench.clock.advance(0.25)
    bench.engine.step()
    bench.clock.advance(0.5)
    bench.engine.step("ours")
    await outcome(stream)
    spans = traced.spans()
    durations = {name: seconds(span) for name, span in spans.items()}
    assert durations == pytest.approx({"generate": 2.75, "queue": 2.0, "prefill": 0.25, "decode": 0.5}, abs=1e-6)
    whole = spans["generate"]
    assert whole.kind is SpanKind.SERVER
    assert whole.parent is None
    assert whole.status.status_code is StatusCode.UNSET
    for name in ("queue", "prefill", "decode"):
        parent = spans[name].parent
        assert parent is not None
        assert parent.span_id == whole.context.span_id
        assert whole.start_time <= spans[name].start_time <= spans[name].end_time <= whole.end_time
    told = dict(whole.attributes or {})
    assert told["lmdeploy_slo.request_id"] == "ours"
    assert told["lmdeploy_slo.task"] == "chat"
    assert told["lmdeploy_slo.slo.ttft_ms"] == 1000
    assert told["lmdeploy_slo.slo_met"] is False
    assert told["gen_ai.request.model"] == "m"
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (30, 2)
    assert told["gen_ai.response.finish_reasons"] == ("stop",)
    assert whole.resource.attributes["service.name"] == "lmdeploy_slo"


@virtual()
async def test_the_callers_trace_goes_on(bench: Bench) -> None:
    traced = Traced(bench)
    stream = submit(bench, "r", TRACEPARENT)
    await bench.engine.has("r")
    bench.engine.step("r")
    await outcome(stream)
    spans = traced.spans()
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {TRACE}
    assert spans["generate"].parent is not None
    assert f"{spans['generate'].parent.span_id:016x}" == CALLER


@virtual()
async def test_a_caller_that_does_not_sample_is_respected(bench: Bench) -> None:
    traced = Traced(bench)
    stream = submit(bench, "r", NOT_SAMPLED)
    await bench.engine.has("r")
    bench.engine.step("r")
    await outcome(stream)
    assert traced.spans() == {}


@virtual()
async def test_a_traceparent_that_is_none_begins_a_new_trace(bench: Bench) -> None:
    traced = Traced(bench)
    stream = submit(bench, "r", "what is this?")
    await bench.engine.has("r")
    bench.engine.step("r")
    await outcome(stream)
    assert traced.spans()["generate"].parent is None


@virtual(EngineLimits(max_batch_size=1))
async def test_a_request_that_never_ran_has_waited_only(bench: Bench) -> None:
    traced = Traced(bench)
    (running,) = await bench.running("runs")
    stream = submit(bench, "ours", queue_timeout_s=3.0)
    await outcome(stream)
    spans = traced.spans()
    assert spans.keys() == {"generate", "queue"}
    assert seconds(spans["queue"]) == seconds(spans["generate"]) == pytest.approx(3.0)
    assert spans["generate"].status.status_code is StatusCode.ERROR
    assert dict(spans["generate"].attributes or {})["error.type"] == "QUEUE_TIMEOUT"
    running.cancel()


@virtual()
async def test_a_refusal_is_a_span_with_an_error(bench: Bench) -> None:
    traced = Traced(bench)
    bench.clock.advance(1.0)
    bench.runtime.journal.refused(InvalidRequest([]), arrival_at_s=0.5, traceparent=TRACEPARENT, malformed=True)
    span = traced.spans()["generate"]
    assert seconds(span) == pytest.approx(0.5)
    assert span.status.description == "INVALID_REQUEST"
    assert f"{span.context.trace_id:032x}" == TRACE


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that are sent to it."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        self.came = threading.Event()

    def Export(self, request: Any, context: Any) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            self.services.add(names["service.name"])
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        self.came.set()
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_a_collector_gets_the_traces_of_a_server() -> None:
    """Over real gRPC, from call metadata to OTLP; what is still here at the end is sent."""
    collector = Collector()
    receiver = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, receiver)
    port = receiver.add_insecure_port("127.0.0.1:0")
    receiver.start()
    endpoint = f"http://127.0.0.1:{port}"
    flags = {"server.port": 0, "scheduler.policy": "fcfs", "observability.otlp_traces_endpoint": endpoint}
    secret = "the prompt nobody may see"
    try:
        async with serving(load(environ={}, flags=flags)) as server, AsyncClient(server.address) as client:
            metadata = (("traceparent", TRACEPARENT),)
            await client.generate(secret, max_new_tokens=3, request_id="ours", metadata=metadata)
            with pytest.raises((SloError, ClientError)):
                await client.generate("", metadata=metadata)
        await asyncio.to_thread(collector.came.wait, 20)
    finally:
        receiver.stop(0)
    assert collector.services == {"lmdeploy_slo"}
    assert sorted(span.name for span in collector.spans) == ["decode", "generate", "generate", "prefill", "queue"]
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    assert secret not in str(collector.spans)


async def test_an_unreachable_collector_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "FLUSH_S", 0.1)
    flags = {"server.port": 0, "scheduler.policy": "fcfs", "observability.otlp_traces_endpoint": "http://127.0.0.1:1"}
    async with serving(load(environ={}, flags=flags)) as server, AsyncClient(server.address) as client:
        answer = await client.generate("Hello", max_new_tokens=3)
        assert len(answer.token_ids) == 3
