"""Each kind of error has its code, its reason and what a program needs to act on it."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from lmdeploy_slo import errors
from lmdeploy_slo.errors import FieldViolation, RequestError
from lmdeploy_slo.gateway.status import ERROR_DOMAIN, internal_error, to_status

Code = grpc.StatusCode
CASES: list[tuple[RequestError, grpc.StatusCode, str]] = [
    (errors.InvalidRequest([FieldViolation("a.b", "wrong")]), Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
    (errors.ModelNotFound("m"), Code.NOT_FOUND, "MODEL_NOT_FOUND"),
    (errors.RequestNotFound("m"), Code.NOT_FOUND, "REQUEST_NOT_FOUND"),
    (errors.RequestIdInUse("m"), Code.ALREADY_EXISTS, "REQUEST_ID_IN_USE"),
    (errors.Unauthenticated("m"), Code.UNAUTHENTICATED, "UNAUTHENTICATED"),
    (errors.PermissionDenied("m"), Code.PERMISSION_DENIED, "PERMISSION_DENIED"),
    (errors.ClientQueueFull("m", 1.0), Code.RESOURCE_EXHAUSTED, "CLIENT_QUEUE_FULL"),
    (errors.TooManyStreams("m", 1.0), Code.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS"),
    (errors.RateLimited("m", 1.0), Code.RESOURCE_EXHAUSTED, "RATE_LIMITED"),
    (errors.Overloaded("m", 1.0), Code.RESOURCE_EXHAUSTED, "OVERLOADED"),
    (errors.QueueFull("m", 1.0), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    (errors.Unattainable("m", 1.0), Code.RESOURCE_EXHAUSTED, "SLO_UNATTAINABLE"),
    (errors.QueueTimeout("m"), Code.DEADLINE_EXCEEDED, "QUEUE_TIMEOUT"),
    (errors.DeadlineExceeded("m"), Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    (errors.Cancelled("m"), Code.CANCELLED, "CANCELLED"),
    (errors.Draining("m"), Code.UNAVAILABLE, "DRAINING"),
    (errors.EngineUnavailable("m"), Code.UNAVAILABLE, "ENGINE_UNAVAILABLE"),
    (errors.EngineError("m", code="oom"), Code.INTERNAL, "ENGINE_ERROR"),
    (internal_error(), Code.INTERNAL, "INTERNAL"),
]


def detail(status: status_pb2.Status, kind: type[Message]) -> Message | None:
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            message = kind()
            packed.Unpack(message)
            return message
    return None


@pytest.mark.parametrize(("error", "code", "reason"), CASES, ids=[reason for _, _, reason in CASES])
def test_code_and_reason(error: RequestError, code: grpc.StatusCode, reason: str) -> None:
    status = to_status(error)
    assert status.code == code.value[0]
    assert status.message == str(error)
    info = detail(status, error_details_pb2.ErrorInfo)
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (reason, ERROR_DOMAIN)


def test_every_kind_of_request_error_has_a_case() -> None:
    def kinds(kind: type[RequestError]) -> set[type[RequestError]]:
        return {kind}.union(*(kinds(k) for k in kind.__subclasses__()))

    ours = {kind for kind in kinds(RequestError) if kind.__module__ == errors.__name__}
    assert ours - {errors.Rejected} == {type(error) for error, _, _ in CASES}


def test_violations_are_told_one_by_one() -> None:
    status = to_status(errors.InvalidRequest([FieldViolation("a", "x"), FieldViolation("b[1]", "y")]))
    bad = detail(status, error_details_pb2.BadRequest)
    assert isinstance(bad, error_details_pb2.BadRequest)
    assert [(v.field, v.description) for v in bad.field_violations] == [("a", "x"), ("b[1]", "y")]


@pytest.mark.parametrize(("retry_after_s", "millis"), [(1.5, 1500), (0.0, 1), (30.0, 30000)])
def test_rejections_say_when_to_try_again(retry_after_s: float, millis: int) -> None:
    retry = detail(to_status(errors.QueueFull("m", retry_after_s)), error_details_pb2.RetryInfo)
    assert isinstance(retry, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == millis


def test_without_a_hint_there_is_none() -> None:
    assert detail(to_status(errors.QueueFull("m")), error_details_pb2.RetryInfo) is None


def test_the_engines_own_code_is_told() -> None:
    info = detail(to_status(errors.EngineError("m", code="oom")), error_details_pb2.ErrorInfo)
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert dict(info.metadata) == {"engine_code": "oom"}


def test_a_status_is_no_larger_than_clients_take() -> None:
    """A field, a model, an id come from the client and may have any length, in any script."""
    violations = [FieldViolation(f"stop[{i}]", "\N{SNOWMAN}" * 500) for i in range(64)]
    for error in (errors.InvalidRequest(violations), errors.ModelNotFound("\N{SNOWMAN}" * 10_000)):
        status = to_status(error)
        assert len(status.message.encode()) * 3 + len(status.SerializeToString()) * 4 / 3 < 7000
        assert status.message.endswith("...")
    bad = detail(to_status(errors.InvalidRequest(violations)), error_details_pb2.BadRequest)
    assert isinstance(bad, error_details_pb2.BadRequest)
    *told, last = bad.field_violations
    assert (last.field, last.description) == ("request", f"{64 - len(told)} or more other violations")
