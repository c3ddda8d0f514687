"""From exceptions to google.rpc.Status: the code, the details a program can read, and nothing internal."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from lmdeploy_slo.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    EngineUnavailable,
    FieldViolation,
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

MESSAGE_BYTES, VIOLATION_BYTES = 1000, 2400
"""Of a status, at most: with what else is in the trailing metadata it has to stay below the 8 KiB that clients take,
which are told of nothing but the size otherwise."""

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
                    for v in _told(error.violations)
                ]
            )
        )
    elif isinstance(error, Rejected) and error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(max(1, round(error.retry_after_s * 1e3)))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(
        code=status_code(error).value[0], message=_cut(str(error), MESSAGE_BYTES), details=[_packed(d) for d in details]
    )


def status_code(error: RequestError) -> grpc.StatusCode:
    return next(code for kind, code in _CODES if isinstance(error, kind))


def _told(violations: Sequence[FieldViolation]) -> list[FieldViolation]:
    """As many as there is room for, and how many there are besides."""
    told: list[FieldViolation] = []
    left = VIOLATION_BYTES
    for violation in violations:
        short = FieldViolation(_cut(violation.field, 200), _cut(violation.description, 400))
        left -= len(short.field.encode()) + len(short.description.encode()) + 8
        if left < 0:
            return [*told, FieldViolation("request", f"{len(violations) - len(told)} or more other violations")]
        told.append(short)
    return told


def _cut(text: str, most: int) -> str:
    """As much of it as takes `most` bytes in a header, where all but printable ASCII takes three times its bytes."""
    size = 0
    for at, character in enumerate(text):
        size += 1 if " " <= character <= "~" else 3 * len(character.encode("utf-8", "replace"))
        if size > most:
            return f"{text[:at]}..."
    return text


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
