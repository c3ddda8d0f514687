"""From a gRPC failure to the package's exceptions.

A failure that the server named (google.rpc.ErrorInfo) becomes the exception of `lmdeploy_slo.errors` with that
reason, so that a program handles the same types on both sides of the wire. The rest is a `ClientError`:

    SloError
    +-- RequestError ...       see lmdeploy_slo.errors
    +-- ClientError            a status without a reason this client knows; `code` is the gRPC status
        +-- ServerUnreachable  the connection was refused or lost
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from lmdeploy_slo.errors import (
    Cancelled,
    ClientQueueFull,
    DeadlineExceeded,
    Draining,
    EngineError,
    EngineUnavailable,
    FieldViolation,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    QueueFull,
    QueueTimeout,
    RateLimited,
    Rejected,
    RequestError,
    RequestIdInUse,
    RequestNotFound,
    SloError,
    TooManyStreams,
    Unattainable,
    Unauthenticated,
)

ERROR_DOMAIN = "lmdeploy_slo"
_DETAILS_KEY = "grpc-status-details-bin"

# What gRPC says where it never had a connection, so the request never left. Should its wording change, such a failure
# only counts as a lost connection, after which less is sent again.
_NOT_SENT = ("failed to connect", "errors resolving", "dns resolution failed", "name resolution")


class ClientError(SloError):
    """A call failed for a reason this client has no type for; `reason` is the server's name for it, if it gave one."""

    def __init__(self, message: str, code: grpc.StatusCode, reason: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


class ServerUnreachable(ClientError):
    """No connection, or it was lost during the call. `not_sent`: the request certainly never left this process."""

    def __init__(self, message: str, not_sent: bool) -> None:
        super().__init__(message, grpc.StatusCode.UNAVAILABLE)
        self.not_sent = not_sent


_Detail = TypeVar("_Detail", bound=Message)


class _FailedCall(Protocol):
    """What grpc.RpcError of both the blocking and the asyncio API offers."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> object: ...


_BY_REASON: dict[str, type[RequestError]] = {
    cls.reason: cls
    for cls in (
        Cancelled,
        DeadlineExceeded,
        Draining,
        EngineUnavailable,
        ModelNotFound,
        PermissionDenied,
        QueueTimeout,
        RequestError,
        RequestIdInUse,
        RequestNotFound,
        Unauthenticated,
    )
}
_REJECTIONS: dict[str, type[Rejected]] = {
    cls.reason: cls
    for cls in (Rejected, QueueFull, ClientQueueFull, TooManyStreams, RateLimited, Overloaded, Unattainable)
}


def error_of(call: _FailedCall) -> SloError:
    """The exception to raise for a failed call; never raises."""
    code, message = call.code(), call.details() or ""
    details = _details_of(call)
    info = _unpacked(details, error_details_pb2.ErrorInfo())
    if info is None or info.domain != ERROR_DOMAIN:
        return _unnamed(code, message)
    reason = info.reason
    if reason == InvalidRequest.reason:
        return _invalid(message, _unpacked(details, error_details_pb2.BadRequest()))
    if reason in _REJECTIONS:
        return _REJECTIONS[reason](message, _retry_after_s(_unpacked(details, error_details_pb2.RetryInfo())))
    if reason == EngineError.reason:
        return EngineError(message, info.metadata.get("engine_code", "internal_error"))
    if reason in _BY_REASON:
        return _BY_REASON[reason](message)
    return ClientError(f"{reason}: {message}", code, reason)


def _unnamed(code: grpc.StatusCode, message: str) -> SloError:
    """A status that this process, a proxy or gRPC itself made: there is no ErrorInfo of ours."""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"the time limit of the call passed ({message})")
    if code is grpc.StatusCode.CANCELLED:
        return Cancelled(message)
    if code is grpc.StatusCode.UNAVAILABLE:
        return ServerUnreachable(message, not_sent=message.lower().startswith(_NOT_SENT))
    return ClientError(f"{code.name}: {message}", code)


def _invalid(message: str, bad_request: error_details_pb2.BadRequest | None) -> InvalidRequest:
    found = [] if bad_request is None else bad_request.field_violations
    violations = [FieldViolation(v.field, v.description) for v in found]
    return InvalidRequest(violations or [FieldViolation("request", message)])


def _retry_after_s(retry: error_details_pb2.RetryInfo | None) -> float | None:
    return None if retry is None else max(0.0, retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9)


def _details_of(call: _FailedCall) -> status_pb2.Status:
    status = status_pb2.Status()
    for key, value in call.trailing_metadata() or ():  # type: ignore[attr-defined]
        if key == _DETAILS_KEY:
            try:
                status.ParseFromString(value)
            except DecodeError:  # not ours; the status itself still says something
                return status_pb2.Status()
    return status


def _unpacked(status: status_pb2.Status, empty: _Detail) -> _Detail | None:
    for detail in status.details:
        if detail.Unpack(empty):
            return empty
    return None
