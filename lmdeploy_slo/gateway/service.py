"""The RPCs. Each reads its bytes, asks the runtime, and tells the client of everything that went wrong.

Messages are parsed and serialised here rather than by gRPC: a request that is no message is the client's fault, not a
defect, and a token is on the wire with the least work between.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_status import rpc_status

from lmdeploy_slo.core.request import ClientId
from lmdeploy_slo.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    EngineUnavailable,
    FieldViolation,
    InvalidRequest,
    PermissionDenied,
    Rejected,
    RequestError,
    RequestNotFound,
    Unauthenticated,
)
from lmdeploy_slo.gateway import encoding, metadata
from lmdeploy_slo.gateway.identity import authorization_of, name_in_auth_context
from lmdeploy_slo.gateway.metadata import Aliases, read_aliases
from lmdeploy_slo.gateway.options import GatewayOptions
from lmdeploy_slo.gateway.security import Security, caller
from lmdeploy_slo.gateway.status import internal_error, to_status
from lmdeploy_slo.gateway.telling import to_explanation, to_load
from lmdeploy_slo.gateway.validation import (
    MAX_ID_CHARS,
    MAX_TASK_CHARS,
    Accepted,
    accept,
    carries_objective,
    fairness_id_of,
    priority_class_of,
)
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.runtime.scaling import Scaling
from lmdeploy_slo.runtime.stream import Completion, Encoder, RequestStream
from lmdeploy_slo.scheduling.admission import unmet_objectives
from lmdeploy_slo.scheduling.limits import Ticket
from lmdeploy_slo.v1 import inference_pb2 as pb

logger = logging.getLogger(__name__)

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name

MAX_ECHO_CHARS = 256
"""Longer ids do not go back to the caller: they would take the room of what it has to be told."""

_M = TypeVar("_M", bound=Message)
_Context = grpc.aio.ServicerContext[Any, Any]
_request_id: ContextVar[str] = ContextVar("request_id", default="")
"""That of the call in whose context we are, as far as its client named one; for the log."""

_Rpc = Callable[[bytes, _Context], Awaitable[bytes]]


class InferenceService:
    """The service on a started runtime."""

    def __init__(self, runtime: Runtime, options: GatewayOptions, security: Security | None = None) -> None:
        self.scaling: Scaling | None = None  # where engines may come and go
        self._runtime = runtime
        self._options = options
        self._identifier = (security or Security()).identifier
        self._clock = runtime.clock
        self._encode = encoding.EventEncoder().encode
        self._ready_at_s = runtime.clock.now_s()

    def configure(self, options: GatewayOptions) -> None:
        """For requests that come from now on."""
        self._options = options

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a server registers."""
        unary: dict[str, _Rpc] = {
            "Generate": self.generate,
            "Predict": self.predict,
            "Abort": self.abort,
            "GetModelInfo": self.get_model_info,
            "GetServerInfo": self.get_server_info,
            "GetLoad": self.get_load,
            "Explain": self.explain,
            "Scale": self.scale,
        }
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            name: grpc.unary_unary_rpc_method_handler(self._guarded(rpc)) for name, rpc in unary.items()
        }
        methods["GenerateStream"] = grpc.unary_stream_rpc_method_handler(self.generate_stream)
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    # -- generation -----------------------------------------------------------

    async def generate(self, data: bytes, context: _Context) -> bytes:
        stream = await self._submit(data, context)
        try:
            return encoding.encode_whole(await stream.result())
        finally:
            stream.cancel(_why_gone(context))

    async def generate_stream(self, data: bytes, context: _Context) -> None:
        """Every token passes here: what is done between two writes counts, hence the batches and the flat body."""
        stream: RequestStream | None = None
        completion: Completion | None = None
        write = context.write
        try:
            self._identify(context)
            stream = await self._submit(data, context, self._encode)
            while completion is None:
                messages, completion = await stream.ready()
                if completion is not None:
                    encoding.add_completion(messages, completion)
                for message in messages:
                    await write(message)
                    if stream.failed:
                        break
        except grpc.aio.BaseError:  # the message could not be sent: the client went away a moment ago
            logger.debug("a client is gone before its last message")
        except Exception as error:
            await _tell(error, context)
        finally:
            if stream is not None:
                stream.cancel(_why_gone(context))

    async def _submit(self, data: bytes, context: _Context, encode: Encoder | None = None) -> RequestStream:
        arrival_at_s = self._clock.now_s()
        remaining_s = _remaining_s(context)
        aliases = read_aliases(context.invocation_metadata())
        passed_on = _passed_on(aliases)
        if passed_on:
            context.set_trailing_metadata(passed_on)
        traceparent = aliases.get(metadata.TRACEPARENT)
        refused = partial(self._runtime.journal.refused, arrival_at_s=arrival_at_s, traceparent=traceparent)
        try:
            request = _parse(pb.GenerateRequest, data)
        except InvalidRequest as refusal:
            refused(refusal, malformed=True)
            raise
        named = (request.request_id or aliases.get(metadata.REQUEST_ID) or "")[:MAX_ID_CHARS]
        _request_id.set(named)
        refused = partial(refused, request_id=named, task_type=request.task_type[:MAX_TASK_CHARS])
        try:
            ticket = self._enter(request, aliases)
        except RequestError as refusal:
            refused(refusal, with_slo=carries_objective(request, aliases, self._options))
            raise
        try:
            accepted = await self._accept(request, aliases, ticket, arrival_at_s)
        except RequestError as refusal:
            refused(refusal, malformed=True)
            raise
        if accepted.clamped:
            context.set_trailing_metadata((*passed_on, (metadata.CLAMPED, ",".join(accepted.clamped))))
        return self._runtime.submit(
            accepted.spec,
            accepted.engine_request,
            deadline_at_s=None if remaining_s is None else arrival_at_s + remaining_s,
            encode=encode,
            ticket=ticket,
            traceparent=traceparent,
        )

    def _enter(self, request: pb.GenerateRequest, aliases: Aliases, *, queues: bool = True) -> Ticket:
        """Before anything is done for it: whether its client may send it now."""
        fairness_id = fairness_id_of(request, aliases)[:MAX_ID_CHARS]
        client = self._runtime.limiter.policies().client_of(caller.get(), fairness_id)
        return self._runtime.enter(client, priority_class_of(request), queues=queues)

    async def _accept(
        self, request: pb.GenerateRequest, aliases: Aliases, ticket: Ticket, arrival_at_s: float, prefix: str = ""
    ) -> Accepted:
        """Checked, and with its claims as its client may make them; where it is refused its ticket has left."""
        engine, options = self._runtime.engine, self._options
        try:
            accepted = await accept(request, aliases, engine, options, arrival_at_s=arrival_at_s, prefix=prefix)
        except BaseException:
            ticket.leave(0, self._clock.now_s())
            raise
        return accepted.of(ticket.client, ticket.policy)

    async def predict(self, data: bytes, context: _Context) -> bytes:
        request = _parse(pb.PredictRequest, data)
        if not request.HasField("request"):
            raise InvalidRequest([FieldViolation("request", "must be set")])
        if not self._runtime.serving:
            raise (
                Draining("the server takes no requests")
                if self._runtime.load().draining
                else EngineUnavailable("the engine is not running")
            )
        request.request.ClearField("emulation")
        aliases = read_aliases(context.invocation_metadata())
        ticket = self._enter(request.request, aliases, queues=False)
        accepted = await self._accept(request.request, aliases, ticket, self._clock.now_s(), prefix="request.")
        slo = accepted.spec.slo
        expected = self._runtime.predict(accepted.spec)
        unmet = unmet_objectives(slo, expected)
        refusal = self._refusal(ticket, accepted.spec.prompt_tokens + math.ceil(expected.output_tokens))
        if refusal is not None and slo.has_objective:
            unmet.insert(0, refusal)
        response = pb.PredictResponse(
            predicted=encoding.to_prediction(expected),
            queue_position=expected.queue_position,
            reason="; ".join(unmet),
            slo=encoding.to_slo(slo),
        )
        if slo.has_objective:
            response.would_meet_slo = not unmet
        return response.SerializeToString()

    def _refusal(self, ticket: Ticket, tokens: int) -> str | None:
        """Why a request of so many tokens would not be taken, None where it would; its ticket leaves."""
        now_s = self._clock.now_s()
        try:
            ticket.check(tokens, now_s)
        except Rejected as refusal:
            return str(refusal)
        finally:
            ticket.leave(0, now_s)
        bound = self._options.max_queued_requests
        full = bound is not None and self._runtime.load().waiting >= bound
        return f"the queue is full: {bound} requests are waiting" if full else None

    async def abort(self, data: bytes, context: _Context) -> bytes:
        request = _parse(pb.AbortRequest, data)
        if not 1 <= len(request.request_id) <= 128:
            raise InvalidRequest([FieldViolation("request_id", "must be 1 to 128 characters")])
        aborted = self._runtime.abort(request.request_id, of=self._may_touch())
        return pb.AbortResponse(aborted=aborted).SerializeToString()

    # -- questions ------------------------------------------------------------

    async def get_model_info(self, data: bytes, context: _Context) -> bytes:
        _parse(pb.GetModelInfoRequest, data)
        info = self._runtime.engine.info
        return pb.GetModelInfoResponse(
            model=info.model,
            engine=info.name,
            synthetic=info.synthetic,
            max_session_tokens=info.max_session_tokens,
            vocab_size=info.vocab_size,
            max_batch_size=info.limits.max_batch_size,
            max_prefill_tokens=info.limits.max_prefill_tokens,
            kv_tokens=info.limits.kv_tokens,
        ).SerializeToString()

    async def get_server_info(self, data: bytes, context: _Context) -> bytes:
        _parse(pb.GetServerInfoRequest, data)
        options = self._options
        return pb.GetServerInfoResponse(
            version=options.version,
            policy=self._runtime.policy.name,
            versions=dict(options.versions),
            task_slos={task: encoding.to_slo(slo) or pb.Slo() for task, slo in options.task_slos.items()},
            uptime_s=self._clock.now_s() - self._ready_at_s,
            max_queued_requests=options.max_queued_requests,
        ).SerializeToString()

    async def get_load(self, data: bytes, context: _Context) -> bytes:
        _parse(pb.GetLoadRequest, data)
        return to_load(self._runtime.load()).SerializeToString()

    async def explain(self, data: bytes, context: _Context) -> bytes:
        request = _parse(pb.ExplainRequest, data)
        if not 1 <= len(request.request_id) <= 128:
            raise InvalidRequest([FieldViolation("request_id", "must be 1 to 128 characters")])
        told = self._runtime.journal.explain(request.request_id, of=self._may_touch())
        if told is None:
            raise RequestNotFound(f"nothing is remembered of a request {request.request_id!r}")
        return to_explanation(told).SerializeToString()

    # -- engines --------------------------------------------------------------

    async def scale(self, data: bytes, context: _Context) -> bytes:
        request = _parse(pb.ScaleRequest, data)
        if self._may_touch() is not None or (caller.get() is None and not self._options.strangers_scale):
            raise PermissionDenied("how many engines there are is for operators to say")
        if self.scaling is None:
            raise InvalidRequest([FieldViolation("replicas", "the engine of this server runs in its own process")])
        up = self.scaling.scale(request.replicas, request.drain)
        return pb.ScaleResponse(wanted=self.scaling.wanted, up=up).SerializeToString()

    # -- who calls ------------------------------------------------------------

    def _identify(self, context: _Context) -> None:
        """Sets `caller`. Raises Unauthenticated."""
        identifier = self._identifier
        if identifier.certain:
            authorization = authorization_of(context.invocation_metadata())
            try:
                caller.set(identifier.name_of(authorization, lambda: name_in_auth_context(context.auth_context())))
            except Unauthenticated as refusal:
                self._runtime.journal.refused(refusal, malformed=True)
                raise

    def _may_touch(self) -> str | None:
        """The client whose requests the caller may look at and end; None: anybody's."""
        name = caller.get()
        return None if name is None or self._runtime.limiter.policies().of(ClientId(name)).operator else name

    def _guarded(self, rpc: _Rpc) -> _Rpc:
        """Lets those in who may call, and has the client told of whatever the RPC raises."""

        async def guarded(data: bytes, context: _Context) -> bytes:
            try:
                self._identify(context)
                return await rpc(data, context)
            except Exception as error:
                return await _tell(error, context)

        return guarded


def _parse(kind: type[_M], data: bytes) -> _M:
    try:
        return kind.FromString(data)
    except DecodeError:
        raise InvalidRequest([FieldViolation("request", f"is not a {kind.DESCRIPTOR.full_name}")]) from None


def _why_gone(context: _Context) -> RequestError:
    """What to end a request with whose call is over; of no effect where the request has ended."""
    if _remaining_s(context) == 0:
        return DeadlineExceeded("the deadline passed")
    return Cancelled("the client went away")


def _remaining_s(context: _Context) -> float | None:
    """Until the caller's deadline, 0 after it; None where it set none."""
    return context.time_remaining()


def _passed_on(aliases: Aliases) -> tuple[tuple[str, str], ...]:
    """The caller's request and trace ids, which go back to it with the status, whatever that will be."""
    values = ((name, aliases.get(name)) for name in (metadata.REQUEST_ID, metadata.TRACEPARENT))
    return tuple((name, value) for name, value in values if value is not None and len(value) <= MAX_ECHO_CHARS)


async def _tell(error: Exception, context: _Context) -> NoReturn:
    """Ends the call: an expected error goes to the client as its status, of any other only that there was one."""
    named = _request_id.get()
    extra = {"request_id": named} if named else {}
    if isinstance(error, RequestError):
        expected = error
        logger.debug("%s: %s", error.reason, error, extra=extra)
    else:
        logger.error("an RPC failed unexpectedly", exc_info=error, extra=extra)
        expected = internal_error()
    status = rpc_status.to_status(to_status(expected))
    passed_on = _passed_on(read_aliases(context.invocation_metadata()))
    await context.abort(status.code, status.details, (*passed_on, *status.trailing_metadata))
