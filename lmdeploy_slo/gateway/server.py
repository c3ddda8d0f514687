"""The gRPC server: the service, health and reflection on one port, and an orderly end.

Health is NOT_SERVING from the instant on at which the engine is known to be gone, until it is back.

Draining, in this order: health says NOT_SERVING, new requests are refused with UNAVAILABLE (DRAINING), those here run
to their end, those still here after the grace get UNAVAILABLE, and the port closes when the last byte is out.
"""

from __future__ import annotations

import asyncio
import logging

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.gateway.options import GatewayOptions
from lmdeploy_slo.gateway.security import Security, guarded
from lmdeploy_slo.gateway.service import SERVICE_NAME, InferenceService
from lmdeploy_slo.gateway.tls import TlsCredentials
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.runtime.scaling import Scaling

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
"""After a drain so much longer for clients that have not read their last messages."""

LIVENESS = "liveness"
"""A service whose health is SERVING as long as there is somebody to say so, also while draining."""

KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS = 30_000, 20_000
"""Shorter than what proxies and address translation commonly let an idle connection live, 60 s and more."""

MIN_CLIENT_PING_MS = 5_000
"""Clients may ping every 10 s while nothing else moves, as in a long prefill. What reaches us has gone through networks
and proxies, and pings that bunch up on the way must not count as an attack."""


class Gateway:
    """Serves a started runtime; it does not own it. All methods on the runtime's loop."""

    def __init__(
        self, runtime: Runtime, options: GatewayOptions | None = None, security: Security | None = None
    ) -> None:
        """security: None for plain text, open to everybody who reaches the port."""
        self.scaling: Scaling | None = None  # where engines may come and go; to be set before `start`
        self._runtime = runtime
        self._options = options or GatewayOptions()
        self._security = security or Security()
        self._health = health.aio.HealthServicer()
        self._service: InferenceService | None = None
        self._server: grpc.aio.Server | None = None
        self._probed: grpc.aio.Server | None = None
        self._telling: asyncio.Task[None] | None = None  # kept from the garbage collector

    async def start_health(self, host: str, port: int) -> int:
        """Answers health checks, and nothing else, in plain text: for probes that can do no TLS. May be called before
        the runtime is started. Returns the port, as `start`."""
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        bound = _bound(server, host, port, None)
        await self._tell_health(serving=False)
        await server.start()
        self._probed = server
        return bound

    async def start(self, host: str, port: int) -> int:
        """Takes requests when it returns; `port` 0 takes a free one. Returns the port.

        Raises ConfigError where the address cannot be bound.
        """
        size = self._options.max_message_bytes
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", size),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a lottery
                # A client that vanished without a word is found out, and those that ask whether we live are answered.
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", MIN_CLIENT_PING_MS),
            ]
        )
        security = self._security
        self._service = InferenceService(self._runtime, self._options, security)
        self._service.scaling = self.scaling
        server.add_generic_rpc_handlers((self._service.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)  # open to all: probes hold no token
        if security.reflection:
            names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, guarded(server, security.identifier))
        bound = _bound(server, host, port, security.tls)
        await server.start()
        self._server = server
        self._runtime.on_serving_change = self._on_serving_change
        await self._tell_health(serving=self._runtime.serving)
        return bound

    def configure(self, options: GatewayOptions) -> None:
        """For requests that come from now on; the longest message taken stays as it is."""
        self._options = options
        if self._service is not None:
            self._service.configure(options)

    async def drain(self, grace_s: float) -> None:
        """See the module; returns when the port is closed."""
        began_at_s = self._runtime.clock.now_s()
        await self._tell_health(serving=False)
        await self._runtime.drain(grace_s)
        left_s = grace_s - (self._runtime.clock.now_s() - began_at_s)
        await self.close(max(left_s, FLUSH_S))

    async def close(self, grace_s: float = 0.0) -> None:
        """Takes no more calls, waits up to `grace_s` seconds for those here, cancels the rest. Idempotent."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(grace_s)
        if self._probed is not None:
            probed, self._probed = self._probed, None
            await probed.stop(0)

    def _on_serving_change(self) -> None:
        self._telling = asyncio.get_running_loop().create_task(self._tell_health(serving=self._runtime.serving))

    async def _tell_health(self, *, serving: bool) -> None:
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE_NAME):
            await self._health.set(service, status)


def _bound(server: grpc.aio.Server, host: str, port: int, tls: TlsCredentials | None) -> int:
    """The port. Raises ConfigError where the address cannot be had."""
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(address) if tls is None else server.add_secure_port(address, tls.for_grpc())
    except RuntimeError as failure:
        raise ConfigError(f"cannot listen on {address}: {failure}") from failure
    if not bound:
        raise ConfigError(f"cannot listen on {address}")
    return int(bound)
