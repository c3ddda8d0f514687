"""LMDeploy's own HTTP routes (OpenAI, Anthropic, its /generate) over the scheduled engine, on the server's event loop.

A request's SLO comes in headers (`x-llm-d-slo-ttft-ms`, `x-llm-d-slo-tpot-ms`, `x-slo-e2e-ms`, `x-task-type`) or in
its body (`slo`, `task_type`, `expected_output_tokens`: `extra_body` of the openai client). A wrong one is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from lmdeploy_slo.core.slo import NO_SLO, Slo
from lmdeploy_slo.engine.lmdeploy import LmdeployEngine
from lmdeploy_slo.engine.supervised import SupervisedEngine
from lmdeploy_slo.errors import ConfigError, InvalidRequest
from lmdeploy_slo.frontend.gate import Gate, HttpAccess
from lmdeploy_slo.frontend.scheduled_engine import ScheduledEngine
from lmdeploy_slo.frontend.terms import current_terms, terms_of_http
from lmdeploy_slo.runtime.runtime import Runtime

logger = logging.getLogger(__name__)


def build_http_app(
    runtime: Runtime,
    *,
    task_slos: Mapping[str, Slo] | None = None,
    generation_config: str = "auto",
    access: HttpAccess | None = None,
) -> Any:
    """An ASGI application; `runtime` has been started and its engine is LMDeploy.

    access: what is demanded of a call; None for nothing.

    task_slos: objectives of requests that name a task and carry none. generation_config: where sampling defaults come
    from, as LMDeploy's option of that name.
    """
    import fastapi
    from fastapi.exceptions import RequestValidationError
    from lmdeploy.serve.anthropic import create_anthropic_router
    from lmdeploy.serve.core.generation_config import resolve_default_gen_config
    from lmdeploy.serve.openai import api_server
    from lmdeploy.serve.openai.endpoints import create_openai_router
    from lmdeploy.serve.openai.responses import create_responses_router

    engine = runtime.engine.inner if isinstance(runtime.engine, SupervisedEngine) else runtime.engine
    if not isinstance(engine, LmdeployEngine):
        raise ConfigError("http_port: only LMDeploy serves HTTP; the emulated engine has gRPC")
    options, plain = engine.options, engine.async_engine
    scheduled = ScheduledEngine(plain, runtime)
    context = api_server.ServerContext()
    context.async_engine = scheduled
    context.enable_abort_handling = True
    context.default_gen_config = resolve_default_gen_config(generation_config, options.model, options.trust_remote_code)
    api_server.set_parsers(context)
    app = fastapi.FastAPI(
        title="lmdeploy_slo",
        docs_url="/",
        lifespan=api_server.create_lifespan_handler(plain.backend_config, scheduled, context),
    )
    terms = fastapi.Depends(_terms_reader(fastapi.Request, task_slos or {}))
    for create in (create_openai_router, create_anthropic_router, create_responses_router):
        app.include_router(create(context), dependencies=[terms])
    app.add_exception_handler(RequestValidationError, api_server.validation_exception_handler)
    api_server.mount_metrics(app, plain.backend_config)
    return Gate(app, access or HttpAccess())


def _terms_reader(request_type: Any, task_slos: Mapping[str, Slo]) -> Callable[[Any], Awaitable[None]]:
    """A dependency of every route: what the request says of itself becomes the context's `current_terms`."""
    from fastapi.exceptions import RequestValidationError

    async def read_terms(request: Any) -> None:
        body: Any = {}
        if request.headers.get("content-type", "").startswith("application/json"):
            with contextlib.suppress(ValueError):  # no JSON: the route itself says so
                body = await request.json()
        try:
            terms = terms_of_http(request.headers, body if isinstance(body, dict) else {})
        except InvalidRequest as error:
            told = [{"loc": ("body", v.field), "msg": v.description} for v in error.violations]
            raise RequestValidationError(told) from error
        if not terms.slo.has_objective:
            terms = replace(terms, slo=task_slos.get(terms.task_type, NO_SLO))
        current_terms.set(terms)

    read_terms.__annotations__["request"] = request_type  # FastAPI looks at it, and is imported late
    return read_terms


def _protocol_with_certificate() -> Any:
    """uvicorn's, which puts what the client's certificate says into `scope["state"]`."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    class WithCertificate(AutoHTTPProtocol):  # type: ignore[misc]
        app_state: dict[str, Any]

        def connection_made(self, transport: Any) -> None:
            secured = transport.get_extra_info("ssl_object")
            certificate = None if secured is None else secured.getpeercert()
            self.app_state = {**self.app_state, "certificate": certificate}
            super().connection_made(transport)

    return WithCertificate


class HttpServer:
    """Serves an ASGI application on the running event loop, without touching signals."""

    def __init__(self, app: Any, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        """port 0: the operating system chooses. tls: None for plain text."""
        self._app = app
        self._tls = tls
        self._host = host
        self._port = port
        self._server: Any = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Takes connections when it returns; the port. Raises ConfigError where the address cannot be bound."""
        import uvicorn

        class Server(uvicorn.Server):  # type: ignore[misc]
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((self._host, self._port))
        except OSError as error:
            listening.close()
            raise ConfigError(f"http_port: {self._host}:{self._port} cannot be bound: {error}") from error
        port: int = listening.getsockname()[1]
        config = uvicorn.Config(
            self._app,
            http=_protocol_with_certificate(),
            ws="none",
            proxy_headers=False,
            server_header=False,
            log_level="warning",
            lifespan="on",
            timeout_graceful_shutdown=1,
        )
        config.load()
        config.ssl = self._tls
        self._server = Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]), name="http-door")
        while not self._server.started:
            if self._task.done():
                await self._task
                raise ConfigError("http_port: the HTTP server did not start")
            await asyncio.sleep(0.01)
        return port

    async def close(self) -> None:
        """Stops taking connections and ends those there are. Idempotent."""
        if self._task is not None:
            self._server.should_exit = True
            await asyncio.wait([self._task])
            self._task = None
