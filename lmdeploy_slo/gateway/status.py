"""From exceptions to google.rpc.Status: the code, the details a program can read, and nothing internal."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from lmdeploy_slo.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
    PermissionDenied,
    QueueTimeout,
    Rejected,
    RequestError,
    RequestIdInUse,
    RequestNotFound,
    Unauthenticated,
)

ERROR_DOMAIN = "lmdeploy_slo"

_CODES: tuple[tuple[type[RequestError], grpc.StatusCode], ...] = (  # the first that matches
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (ModelNotFound, grpc.StatusCode.NOT_FOUND),
    (RequestNotFound, grpc.StatusCode.NOT_FOUND),
    (RequestIdInUse, grpc.StatusCode.ALREADY_EXISTS),
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (Rejected, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (QueueTimeout, grpc.StatusCode.DEADLINE_EXCEEDED),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (Cancelled, grpc.StatusCode.CANCELLED),
    (Draining, grpc.StatusCode.UNAVAILABLE),
    (EngineUnavailable, grpc.StatusCode.UNAVAILABLE),
    (RequestError, grpc.StatusCode.INTERNAL),
)


def internal_error() -> RequestError:
    """What a client is told of a defect."""
    return RequestError("internal error")


def to_status(error: RequestError) -> status_pb2.Status:
    """The status of an expected error, with ErrorInfo and, by its kind, BadRequest or RetryInfo."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN)
    code_of_engine = getattr(error, "code", None)
    if code_of_engine is not None:
        info.metadata["engine_code"] = code_of_engine
    details: list[Message] = [info]
    if isinstance(error, InvalidRequest):
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
                    for v in error.violations
                ]
            )
        )
    elif isinstance(error, Rejected) and error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(max(1, round(error.retry_after_s * 1e3)))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(
        code=status_code(error).value[0], message=str(error), details=[_packed(d) for d in details]
    )


def status_code(error: RequestError) -> grpc.StatusCode:
    return next(code for kind, code in _CODES if isinstance(error, kind))


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
