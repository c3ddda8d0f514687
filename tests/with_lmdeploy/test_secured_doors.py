"""Both doors with TLS, certificates, tokens, policies and limits: the same holds for gRPC and for HTTP."""

from __future__ import annotations

import asyncio
import itertools
import logging
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lmdeploy_slo.app import Server, serving
from lmdeploy_slo.client import AsyncClient
from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.config import load
from lmdeploy_slo.core.request import PriorityClass
from lmdeploy_slo.errors import TooManyStreams
from lmdeploy_slo.gateway.tokens import new_token

sys.path.insert(0, str(Path(__file__).parent.parent))

FLAGS: dict[str, Any] = {
    "engine.device": "cpu",
    "engine.max_batch_size": 2,
    "engine.look_ahead": 0,
    "scheduler.policy": "edf",
    "server.port": 0,
    "server.http_port": 0,
}

POLICY = """
[default]
max_streams = 1
classes = ["bulk"]
tightest_slo = { e2e_ms = 50_000 }

[clients.root]
operator = true

[clients.machine]
operator = true
"""


class LateClock(MonotonicClock):
    """May be moved on, so that files are looked at."""

    def __init__(self) -> None:
        self.later_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.later_s


class Secured:
    def __init__(self, folder: Path, model: Path, *, client_ca: bool, tokens: bool) -> None:
        from certificates import ServerFiles, new_authority

        self.clock = LateClock()
        self.authority = new_authority()
        self.server_files = ServerFiles(folder, self.authority, self.authority if client_ca else None)
        self.folder = folder
        (folder / "clients.toml").write_text(POLICY)
        pairs = {name: new_token(name) for name in ("alice", "root")}
        self.tokens = {name: token for name, (token, _) in pairs.items()}
        (folder / "tokens").write_text("\n".join(line for _, line in pairs.values()))
        files = self.server_files.files
        flags = {
            **FLAGS,
            "engine.model": str(model),
            "security.tls_cert": files.cert,
            "security.tls_key": files.key,
            "security.tls_client_ca": files.client_ca,
            "security.tokens_file": folder / "tokens" if tokens else None,
            "security.client_policy": folder / "clients.toml",
        }
        self.config = load(flags=flags, environ={})
        self.model = str(model)

    def context(self, name: str | None = None, authority: Any = None) -> ssl.SSLContext:
        """For a client that trusts `authority`, with a certificate of that name."""
        authority = authority or self.authority
        context = ssl.create_default_context(cadata=authority.ca.decode())
        if name is not None:
            chain, key = authority.issue("client.test", common_name=name)
            (self.folder / "c.pem").write_bytes(chain)
            (self.folder / "c.key").write_bytes(key)
            context.load_cert_chain(self.folder / "c.pem", self.folder / "c.key")
        return context

    @asynccontextmanager
    async def served(self) -> AsyncIterator[Server]:
        async with serving(self.config, self.clock) as server:
            yield server

    async def http(
        self, server: Server, path: str, *, context: ssl.SSLContext, token: str | None = None, **fields: Any
    ) -> Any:
        """The answer of one HTTP call on a connection of its own; POST where there are fields."""
        import httpx

        assert server.http_address is not None
        url = f"https://localhost:{server.http_address.rpartition(':')[2]}{path}"
        headers = {} if token is None else {"authorization": f"Bearer {self.tokens.get(token, token)}"}
        async with httpx.AsyncClient(verify=context, timeout=60) as client:
            return await (
                client.post(url, headers=headers, json=fields) if fields else client.get(url, headers=headers)
            )

    def prompt(self, **fields: Any) -> dict[str, Any]:
        return {"model": self.model, "prompt": "Hello", "max_tokens": 3, "temperature": 0, **fields}


async def test_tokens_are_asked_for_at_both_doors(tmp_path: Path, tiny_model: Path) -> None:
    secured = Secured(tmp_path, tiny_model, client_ca=False, tokens=True)
    tls = secured.context()
    async with secured.served() as server:
        assert (await secured.http(server, "/health", context=tls)).status_code == 200
        for token in (None, "slo_wrong"):
            assert (await secured.http(server, "/v1/models", context=tls, token=token)).status_code == 401
            refused = await secured.http(server, "/v1/completions", context=tls, token=token, **secured.prompt())
            assert refused.status_code == 401
        answer = await secured.http(server, "/v1/completions", context=tls, token="alice", **secured.prompt())
        assert answer.status_code == 200, answer.text
        for path in ("/metrics", "/is_sleeping", "/terminate", "/openapi.json"):
            assert (await secured.http(server, path, context=tls, token="alice")).status_code == 403
        assert (await secured.http(server, "/is_sleeping", context=tls, token="root")).json() == {"is_sleeping": False}
        async with AsyncClient(
            f"localhost:{server.address.rpartition(':')[2]}",
            credentials=secured.authority.credentials(),
            token=secured.tokens["alice"],
        ) as client:
            assert (await client.generate("Hello", max_new_tokens=3)).text == answer.json()["choices"][0]["text"]


async def test_certificates_are_asked_for_at_both_doors_and_renewed(tmp_path: Path, tiny_model: Path) -> None:
    import httpx
    from certificates import new_authority

    secured = Secured(tmp_path, tiny_model, client_ca=True, tokens=False)
    alice, machine = secured.context("alice"), secured.context("machine")
    async with secured.served() as server:
        assert (await secured.http(server, "/v1/models", context=alice)).status_code == 200
        assert (await secured.http(server, "/is_sleeping", context=alice)).status_code == 403
        assert (await secured.http(server, "/is_sleeping", context=machine)).status_code == 200
        with pytest.raises(httpx.TransportError):
            await secured.http(server, "/v1/models", context=secured.context())
        others = new_authority()
        secured.server_files.write(others, clients_of=others)
        secured.clock.later_s += 1.0
        renewed = secured.context("alice", others)
        assert (await secured.http(server, "/v1/models", context=renewed)).status_code == 200
        with pytest.raises(httpx.TransportError):
            await secured.http(server, "/v1/models", context=alice)
        old_certificate = secured.context(None, others)  # trusts the server, but shows one that is not trusted any more
        chain, key = secured.authority.issue("client.test", common_name="alice")
        (tmp_path / "old.pem").write_bytes(chain)
        (tmp_path / "old.key").write_bytes(key)
        old_certificate.load_cert_chain(tmp_path / "old.pem", tmp_path / "old.key")
        with pytest.raises(httpx.TransportError):
            await secured.http(server, "/v1/models", context=old_certificate)


async def test_limits_and_policies_hold_at_both_doors(tmp_path: Path, tiny_model: Path, pace: Any) -> None:
    secured = Secured(tmp_path, tiny_model, client_ca=False, tokens=True)
    tls = secured.context()
    async with (
        secured.served() as server,
        AsyncClient(
            f"localhost:{server.address.rpartition(':')[2]}",
            credentials=secured.authority.credentials(),
            token=secured.tokens["alice"],
        ) as client,
    ):
        pace.hold()
        fields = secured.prompt(slo={"e2e_ms": 1})
        running = asyncio.ensure_future(secured.http(server, "/v1/completions", context=tls, token="alice", **fields))
        for _ in itertools.takewhile(lambda _: not server.runtime._live, itertools.count()):
            await asyncio.sleep(0)
        (live,) = server.runtime._live.values()
        assert str(live.spec.client) == "alice"
        assert live.spec.priority_class is PriorityClass.BULK
        assert live.spec.slo.e2e_s == 50.0
        with pytest.raises(TooManyStreams):
            await client.generate("Hello", max_new_tokens=3, timeout_s=5)
        refused = await secured.http(server, "/v1/completions", context=tls, token="alice", **secured.prompt())
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert server.runtime.load().refused["TOO_MANY_STREAMS"] >= 2
        pace.release()
        assert (await running).status_code == 200
        assert server.runtime.limiter.statistics().open == 0


CANARY = "plover-4711"


async def test_no_prompt_is_logged(tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    secured = Secured(tmp_path, tiny_model, client_ca=False, tokens=True)
    tls = secured.context()
    async with secured.served() as server:
        for fields in ({}, {"temperature": -5}, {"slo": {"e2e_ms": -1}}, {"max_tokens": 100_000}, {"model": "none"}):
            asked = secured.prompt(prompt=f"{CANARY} " * 3, **fields)
            await secured.http(server, "/v1/completions", context=tls, token="alice", **asked)
        metrics = await secured.http(server, "/metrics", context=tls, token="root")
    assert CANARY not in caplog.text
    assert CANARY not in metrics.text
