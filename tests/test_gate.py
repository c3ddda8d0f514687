"""The gate before the HTTP routes: who is let through to what, and with how much."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import pytest

from lmdeploy_slo.errors import Unauthenticated
from lmdeploy_slo.frontend.gate import CLIENT_PATHS, Gate, HttpAccess, current_call

TOKENS = {"Bearer a": "alice", "Bearer r": "root"}


def name_of(authorization: str | None, certificate: Callable[[], Mapping[str, Any]]) -> str | None:
    if authorization not in TOKENS:
        raise Unauthenticated("a token is needed")
    return TOKENS[authorization]


KNOWN = HttpAccess(name_of=name_of, is_operator=lambda name: name == "root", max_body_bytes=10)


class Answer:
    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.starts = 0

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.starts += 1
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.body += message.get("body", b"")


async def ask(
    app: Any, path: str = "/v1/models", access: HttpAccess = KNOWN, body: tuple[bytes, ...] = (b"",), **headers: str
) -> Answer:
    scope = {
        "type": "http",
        "path": path,
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        "state": {"certificate": {"subject": ((("commonName", "cert"),),)}},
    }
    pieces = [{"type": "http.request", "body": piece, "more_body": i < len(body) - 1} for i, piece in enumerate(body)]

    async def receive() -> MutableMapping[str, Any]:
        return pieces.pop(0) if pieces else {"type": "http.disconnect"}

    answer = Answer()
    await Gate(app, access)(scope, receive, answer.send)
    assert answer.starts == 1
    return answer


async def route(scope: Any, receive: Any, send: Any) -> None:
    """Says who called, and what it received."""
    call, got = current_call.get(), b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        got += message["body"]
        if not message["more_body"]:
            break
    text = f"{call.name if call else None}:{got.decode()}"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": text.encode()})


@pytest.mark.parametrize("path", sorted(CLIENT_PATHS))
async def test_known_callers_reach_the_routes_of_clients(path: str) -> None:
    assert (await ask(route, path, authorization="Bearer a")).body == b"alice:"
    assert (await ask(route, path, x_api_key="a")).body == b"alice:"
    for wrong in ({}, {"authorization": "Bearer x"}, {"authorization": "Bearer x", "x_api_key": "a"}):
        answer = await ask(route, path, **wrong)
        assert (answer.status, answer.headers[b"www-authenticate"]) == (401, b"Bearer")
        assert json.loads(answer.body)["error"]["type"] == "unauthenticated"
    assert current_call.get() is None


@pytest.mark.parametrize(
    "path", ["/update_weights", "/terminate", "/sleep", "/abort_request", "/metrics", "/", "/openapi.json", "/pooling"]
)
async def test_all_other_routes_are_for_operators(path: str) -> None:
    assert (await ask(route, path, authorization="Bearer r")).status == 200
    refused = await ask(route, path, authorization="Bearer a")
    assert (refused.status, json.loads(refused.body)["error"]["type"]) == (403, "permission_denied")
    assert (await ask(route, path)).status == 401


@pytest.mark.parametrize("path", ["/v1/models/", "/V1/models", "//v1/models", "/v1/completions/../../terminate"])
async def test_a_path_that_only_looks_like_a_clients_is_none(path: str) -> None:
    assert (await ask(route, path, authorization="Bearer a")).status == 403


async def test_health_is_open() -> None:
    assert (await ask(route, "/health")).body == b"None:"


async def test_the_certificate_is_there_to_be_asked() -> None:
    access = HttpAccess(name_of=lambda authorization, certificate: str(certificate()["subject"][0][0][1]))
    assert (await ask(route, access=access)).body == b"cert:"


async def test_a_body_that_is_too_long_is_not_read_to_its_end() -> None:
    token = {"authorization": "Bearer a"}
    assert (await ask(route, body=(b"12345", b"67890"), **token)).body == b"alice:1234567890"
    told = await ask(route, body=(b"x",), content_length="11", **token)
    untold = await ask(route, body=(b"12345", b"67890", b"1"), **token)
    for answer in (told, untold):
        assert (answer.status, json.loads(answer.body)["error"]["type"]) == (413, "too_large")


async def test_what_the_route_says_of_a_body_cut_short_is_not_heard() -> None:
    async def lenient(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"what?"})

    answer = await ask(lenient, body=(b"x" * 11,), authorization="Bearer a")
    assert answer.status == 413
    assert b"what?" not in answer.body


async def test_a_route_that_fails_still_fails() -> None:
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await ask(failing, authorization="Bearer a")
    assert current_call.get() is None


async def test_a_rejection_says_when_to_come_back() -> None:
    def refusing(status: int, retry_after_s: float | None) -> Any:
        async def refuse(scope: Any, receive: Any, send: Any) -> None:
            call = current_call.get()
            assert call is not None
            call.retry_after_s = retry_after_s
            await send({"type": "http.response.start", "status": status, "headers": []})

        return refuse

    told = [
        (await ask(refusing(*case), authorization="Bearer a")).headers for case in ((429, 1.2), (429, None), (200, 1.0))
    ]
    assert told == [{b"retry-after": b"2"}, {}, {}]


async def test_nothing_but_http_is_taken() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await Gate(route, KNOWN)({"type": "websocket", "path": "/v1/models"}, None, send)  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]
