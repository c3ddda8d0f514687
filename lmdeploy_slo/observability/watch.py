"""Metrics, traces and request logs of one server, put on its runtime together and taken off together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmdeploy_slo.errors import MissingExtra
from lmdeploy_slo.observability.logs import RequestLog
from lmdeploy_slo.observability.metrics import Metrics, MetricsServer
from lmdeploy_slo.observability.sampler import Sampler
from lmdeploy_slo.runtime.runtime import Runtime

if TYPE_CHECKING:
    from lmdeploy_slo.observability.tracing import Tracing


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """metrics_port: None for no metrics, 0 for a free one. otlp_traces_endpoint: URL of a collector, None: no traces.
    log_requests: a line for each request, not only for those the engine failed. info: labels of `server_info`."""

    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None
    otlp_traces_endpoint: str | None = None
    log_requests: bool = False
    info: Mapping[str, str] = field(default_factory=dict)


class Watch:
    """On the loop of `runtime`, which it does not own. metrics: None where none are served."""

    def __init__(self, runtime: Runtime, options: WatchOptions) -> None:
        self.metrics: Metrics | None = None
        self.metrics_address: str | None = None
        self._runtime = runtime
        self._options = options
        self._server: MetricsServer | None = None
        self._sampler: Sampler | None = None
        self._tracing: Tracing | None = None

    def start(self) -> None:
        """Of a started runtime. Raises ConfigError where the port cannot be bound or an extra is missing."""
        options, journal = self._options, self._runtime.journal
        journal.watch(RequestLog(every=options.log_requests))
        if options.otlp_traces_endpoint is not None:
            self._tracing = self._start_tracing(options.otlp_traces_endpoint)
            journal.watch(self._tracing)
        if options.metrics_port is not None:
            self.metrics = Metrics(options.info)
            self._server = MetricsServer(self.metrics.registry, options.metrics_host, options.metrics_port)
            host = f"[{options.metrics_host}]" if ":" in options.metrics_host else options.metrics_host
            self.metrics_address = f"{host}:{self._server.port}"
            journal.watch(self.metrics)
            self._sampler = Sampler(self._runtime, self._runtime.clock, self.metrics.on_sample)
            self._sampler.start()

    async def close(self) -> None:
        """After the runtime, so that the ends it brings about are seen. Sends the last traces. Idempotent."""
        if self._sampler is not None:
            self._sampler.close()
        if self._server is not None:
            server, self._server = self._server, None
            await asyncio.to_thread(server.close)
        if self._tracing is not None:
            tracing, self._tracing = self._tracing, None
            await asyncio.to_thread(tracing.close)

    def _start_tracing(self, endpoint: str) -> Tracing:
        try:
            from lmdeploy_slo.observability.tracing import otlp_tracing
        except ModuleNotFoundError as missing:
            raise MissingExtra("sending traces", "otel") from missing
        info = self._runtime.engine.info
        return otlp_tracing(
            endpoint, self._runtime.clock, model=info.model, version=self._options.info.get("version", "")
        )
