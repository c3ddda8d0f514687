"""What protects a port: TLS, who may call, and what is told to strangers."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_status import rpc_status

from lmdeploy_slo.errors import Unauthenticated
from lmdeploy_slo.gateway.identity import Identifier, authorization_of
from lmdeploy_slo.gateway.status import to_status
from lmdeploy_slo.gateway.tls import TlsCredentials

caller: ContextVar[str | None] = ContextVar("caller", default=None)
"""The name of who made the call that is being answered; None where nobody is known."""


@dataclass(frozen=True, slots=True)
class Security:
    """identifier: who calls. tls: None for plain text. reflection: whether the port describes its services."""

    identifier: Identifier = field(default_factory=Identifier)
    tls: TlsCredentials | None = None
    reflection: bool = True


def guarded(server: grpc.aio.Server, identifier: Identifier) -> Any:
    """The server as one registers a service with that only callers with a token are to see; where there are no tokens,
    the server itself."""
    return _Registrar(server, identifier) if identifier.demands_token else server


class _Registrar:
    def __init__(self, server: grpc.aio.Server, identifier: Identifier) -> None:
        self._server = server
        self._identifier = identifier

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._server.add_generic_rpc_handlers(tuple(_ForTokens(handler, self._identifier) for handler in handlers))

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """Of no use: those would be found first, and are not guarded."""


class _ForTokens(grpc.GenericRpcHandler):
    """What it handles is refused to callers without a token."""

    def __init__(self, handler: grpc.GenericRpcHandler, identifier: Identifier) -> None:
        self._handler = handler
        self._identifier = identifier

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = self._handler.service(details)
        if handler is None:
            return None
        try:
            self._identifier.token_name(authorization_of(details.invocation_metadata))
        except Unauthenticated as refusal:
            return grpc.stream_stream_rpc_method_handler(_refusing(refusal))
        return handler


def _refusing(refusal: Unauthenticated) -> Any:
    async def refuse(requests: Any, context: Any) -> None:
        status = rpc_status.to_status(to_status(refusal))
        await context.abort(status.code, status.details, status.trailing_metadata)

    return refuse
