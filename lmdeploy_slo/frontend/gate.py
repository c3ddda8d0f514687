"""What every HTTP call passes before a route sees it: who calls, what they may call, how much they may send.

Routes of LMDeploy that manage the server (weights, sleep, aborts of any session, metrics ...) or compute beside the
scheduler are for operators: known callers whose policy says so, and nobody in particular only where the port can be
reached from this machine alone. `/health` is open to all.
"""

from __future__ import annotations

import json
import math
import ssl
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from lmdeploy_slo.errors import PermissionDenied, RequestError, Unauthenticated

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN_PATHS = frozenset({"/health"})
CLIENT_PATHS = frozenset(
    {
        "/anthropic/v1/models",
        "/generate",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/encode",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/v1/responses",
    }
)
"""All others are for operators."""

_STATUS = {Unauthenticated: 401, PermissionDenied: 403}


@dataclass(slots=True)
class Call:
    """An HTTP call. name: its caller's, None where nobody is known. retry_after_s: goes out with a 429."""

    name: str | None = None
    retry_after_s: float | None = None


current_call: ContextVar[Call | None] = ContextVar("current_call", default=None)
"""The one that is being answered in this context; None for calls from within the program."""


def _nobody(authorization: str | None, certificate: Callable[[], Mapping[str, Any]]) -> None:
    return None


@dataclass(frozen=True, slots=True)
class HttpAccess:
    """What is demanded of a call.

    name_of: the caller, from the Authorization header and the certificate as ssl tells it; raises Unauthenticated.
    is_operator: by that name. max_body_bytes: longest body taken. tls: None for plain text.
    """

    name_of: Callable[[str | None, Callable[[], Mapping[str, Any]]], str | None] = _nobody
    is_operator: Callable[[str | None], bool] = lambda name: True
    max_body_bytes: int = 16 * 1024 * 1024
    tls: ssl.SSLContext | None = None


class Gate:
    """An ASGI application around another."""

    def __init__(self, app: Any, access: HttpAccess) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:  # LMDeploy has no websockets
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            call = Call(self._admit(scope))
        except RequestError as refusal:
            await _answer(send, _STATUS[type(refusal)], refusal.reason, str(refusal))
            return
        body = _Body(receive, send, call, self._access.max_body_bytes)
        length = _headers(scope).get("content-length", "")
        if length.isdecimal() and int(length) > self._access.max_body_bytes:
            await body.refuse()
            return
        token = current_call.set(call)
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if not body.too_long:
                raise
        finally:
            current_call.reset(token)
        if body.too_long:
            await body.refuse()

    def _admit(self, scope: Scope) -> str | None:
        """The caller's name. Raises Unauthenticated and PermissionDenied."""
        path = scope["path"]
        if path in OPEN_PATHS:
            return None
        headers = _headers(scope)
        authorization = headers.get("authorization")
        if authorization is None and "x-api-key" in headers:  # Anthropic's way
            authorization = f"Bearer {headers['x-api-key']}"
        name = self._access.name_of(authorization, lambda: scope.get("state", {}).get("certificate") or {})
        if path not in CLIENT_PATHS and not self._access.is_operator(name):
            raise PermissionDenied("this is for operators")
        return name


class _Body:
    """Counts what comes in; once it is too much the application hears no more and is heard no more."""

    def __init__(self, receive: Receive, send: Send, call: Call, most: int) -> None:
        self._receive = receive
        self._send = send
        self._call = call
        self._left = self._most = most
        self._answered = False
        self.too_long = False

    async def receive(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.too_long = True
            return {"type": "http.disconnect"}
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if self.too_long and not self._answered:
            return
        if message["type"] == "http.response.start":
            self._answered = True
            if message["status"] == 429 and self._call.retry_after_s is not None:
                seconds = str(max(1, math.ceil(self._call.retry_after_s))).encode()
                message = {**message, "headers": [*message.get("headers", ()), (b"retry-after", seconds)]}
        await self._send(message)

    async def refuse(self) -> None:
        if not self._answered:
            await _answer(self._send, 413, "TOO_LARGE", f"the body is above {self._most} bytes")


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in reversed(scope["headers"])}


async def _answer(send: Send, status: int, reason: str, text: str) -> None:
    """In the form of LMDeploy's errors, which is OpenAI's."""
    error = {"message": text, "type": reason.lower(), "code": status, "param": None}
    body = json.dumps({"error": error, "object": "error", "message": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
