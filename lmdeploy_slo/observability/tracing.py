"""OpenTelemetry traces of requests: the only module that knows opentelemetry, which is an optional extra.

A request is one server span with a span for each phase it went through:

    generate             arrival to end
      queue              arrival to dispatch into the engine, or to the end of a request that was never sent
      prefill            dispatch to first token, or to its end
      decode             first token to last

They are made at its end, from its timing, so tracing costs nothing while tokens flow. The caller's `traceparent` (W3C
Trace Context) is the parent and decides whether the trace is sampled; without one, OTEL_TRACES_SAMPLER does. No span
holds a prompt, an answer, or who asked.
"""

from __future__ import annotations

import threading
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from lmdeploy_slo.clock import Clock, unix_time_s
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.errors import MissingExtra
from lmdeploy_slo.runtime.observer import AppliedPlan, EndedRequest, Refusal

SERVICE_NAME = "lmdeploy_slo"
SPAN_NAME = "generate"

FLUSH_S = 5.0
"""So long the end of a server waits for a collector to take the last traces."""

_PROPAGATOR = TraceContextTextMapPropagator()


class Tracing:
    """An observer of the runtime whose clock is `clock`. processor: what spans go to."""

    def __init__(self, processor: SpanProcessor, clock: Clock, *, model: str = "", version: str = "") -> None:
        attributes = {"service.version": version} if version else {}
        resource = Resource.create(attributes)
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):  # OTEL_SERVICE_NAME wins
            resource = resource.merge(Resource({"service.name": SERVICE_NAME}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer: Tracer = self._provider.get_tracer("lmdeploy_slo", version or None)
        self._clock = clock
        self._model = model
        self._epoch_s = 0.0  # the clock's 0, in seconds since 1970

    def on_end(self, ended: EndedRequest) -> None:
        timing, spec = ended.timing, ended.spec
        assert timing.ended_at_s is not None, "it has ended"
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": self._model,
            "gen_ai.usage.input_tokens": spec.prompt_tokens,
            "gen_ai.usage.output_tokens": timing.output_tokens,
            "lmdeploy_slo.request_id": spec.request_id,
            "lmdeploy_slo.task": ended.task,
            "lmdeploy_slo.priority_class": spec.priority_class.name.lower(),
            "lmdeploy_slo.status": ended.status.value,
            "lmdeploy_slo.reason": ended.reason,
            "lmdeploy_slo.predicted.output_tokens": ended.predicted.output_tokens,
            "lmdeploy_slo.predicted.queue_ms": ended.predicted.queue_s * 1e3,
            "lmdeploy_slo.predicted.ttft_ms": ended.predicted.ttft_s * 1e3,
            "lmdeploy_slo.predicted.e2e_ms": ended.predicted.e2e_s * 1e3,
        }
        if ended.status is EndStatus.FINISHED:
            attributes["gen_ai.response.finish_reasons"] = (ended.reason,)
        for name in ("ttft", "tpot", "e2e"):
            objective_s = getattr(spec.slo, f"{name}_s")
            if objective_s is not None:
                attributes[f"lmdeploy_slo.slo.{name}_ms"] = objective_s * 1e3
        optional = {"slo_met": ended.slo_met, "rank": ended.rank, "cached_tokens": ended.cached_tokens}
        attributes |= {f"lmdeploy_slo.{name}": value for name, value in optional.items() if value is not None}

        span = self._begin(timing.arrival_at_s, ended.traceparent, attributes)
        instants = (timing.arrival_at_s, timing.dispatched_at_s, timing.first_token_at_s, timing.ended_at_s)
        parent, began_at_s = set_span_in_context(span), timing.arrival_at_s
        for phase, until_s in zip(("queue", "prefill", "decode"), instants[1:]):
            over_at_s = timing.ended_at_s if until_s is None else until_s
            self._tracer.start_span(phase, parent, start_time=self._ns(began_at_s)).end(self._ns(over_at_s))
            if until_s is None:
                break
            began_at_s = over_at_s
        self._end(span, timing.ended_at_s, None if ended.status is EndStatus.FINISHED else ended.reason)

    def on_refusal(self, refusal: Refusal) -> None:
        attributes = {
            "lmdeploy_slo.request_id": refusal.request_id,
            "lmdeploy_slo.task": refusal.task,
            "lmdeploy_slo.status": refusal.status.value,
            "lmdeploy_slo.reason": refusal.reason,
        }
        span = self._begin(refusal.arrival_at_s, refusal.traceparent, attributes)
        self._end(span, refusal.at_s, refusal.reason)

    def on_plan(self, applied: AppliedPlan) -> None:
        """Plans have metrics."""

    def close(self) -> None:
        """Sends what is still here, for `FLUSH_S` at most; to be called from a thread."""
        flushing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        flushing.start()
        flushing.join(FLUSH_S)

    # -- inside ---------------------------------------------------------------

    def _begin(self, at_s: float, traceparent: str | None, attributes: dict[str, Any]) -> Span:
        self._epoch_s = unix_time_s() - self._clock.now_s()  # that of the whole trace
        parent = _PROPAGATOR.extract({"traceparent": traceparent}) if traceparent else None
        return self._tracer.start_span(
            SPAN_NAME, parent, kind=SpanKind.SERVER, attributes=attributes, start_time=self._ns(at_s)
        )

    def _end(self, span: Span, at_s: float, error: str | None) -> None:
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(self._ns(at_s))

    def _ns(self, at_s: float) -> int:
        """An instant of the clock in nanoseconds since 1970."""
        return round((self._epoch_s + at_s) * 1e9)


def otlp_tracing(endpoint: str, clock: Clock, *, model: str = "", version: str = "") -> Tracing:
    """Sends traces to an OTLP collector over gRPC; http:// is plain text, https:// TLS. What cannot be sent is dropped
    and logged. Raises MissingExtra where the exporter is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError:
        raise MissingExtra("sending traces with OTLP", "otel") from None
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
    return Tracing(BatchSpanProcessor(exporter), clock, model=model, version=version)
