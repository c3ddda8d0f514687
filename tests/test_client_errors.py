"""The client library against a scripted server: statuses become exceptions, some calls are repeated."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import scripted_server
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import COMPLETION, WAIT_S, ScriptedServer, answers, fails, info, retry_info, whole_stream

from lmdeploy_slo import client as sdk
from lmdeploy_slo import errors
from lmdeploy_slo.client.retry import Attempts
from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.v1 import inference_pb2 as pb

server, connect = scripted_server.server, scripted_server.connect  # fixtures


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", errors.QueueFull),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLO_UNATTAINABLE", errors.Unattainable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "QUEUE_TIMEOUT", errors.QueueTimeout),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, "CANCELLED", errors.Cancelled),
        (grpc.StatusCode.UNAVAILABLE, "DRAINING", errors.Draining),
        (grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE", errors.EngineUnavailable),
        (grpc.StatusCode.INTERNAL, "ENGINE_ERROR", errors.EngineError),
        (grpc.StatusCode.INTERNAL, "INTERNAL", errors.RequestError),
        (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_IN_USE", errors.RequestIdInUse),
        (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", errors.ModelNotFound),
        (grpc.StatusCode.ABORTED, "SOMETHING_NEW", sdk.ClientError),
    ],
)
def test_a_reason_becomes_its_exception(
    server: ScriptedServer,
    connect: Callable[..., Any],
    code: grpc.StatusCode,
    reason: str,
    expected: type[Exception],
) -> None:
    face = connect(server.target, retry=sdk.NO_RETRY)
    for call in (lambda: face.call("generate", "x"), face.read):
        server.script = [fails(code, "so it is", info(reason))]
        with pytest.raises(errors.SloError, match="so it is") as caught:
            call()
        assert type(caught.value) is expected
        if isinstance(caught.value, sdk.ClientError):
            assert (caught.value.code, caught.value.reason) == (code, reason)


def test_violations_come_back(server: ScriptedServer, connect: Callable[..., Any]) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="slo.e2e_ms", description="must be above 0")
    bad = error_details_pb2.BadRequest(field_violations=[violation])
    server.script = [fails(grpc.StatusCode.INVALID_ARGUMENT, "bad", info("INVALID_REQUEST"), bad)]
    with pytest.raises(errors.InvalidRequest) as caught:
        connect(server.target).call("generate", "x")
    assert caught.value.violations == (errors.FieldViolation("slo.e2e_ms", "must be above 0"),)


def test_retry_info_and_engine_code_come_back(server: ScriptedServer, connect: Callable[..., Any]) -> None:
    face = connect(server.target, retry=sdk.NO_RETRY)
    full = fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", info("QUEUE_FULL"), retry_info(2, 500_000_000))
    server.script = [full, fails(grpc.StatusCode.INTERNAL, "x", info("ENGINE_ERROR", engine_code="out_of_memory"))]
    with pytest.raises(errors.QueueFull) as rejected:
        face.call("generate", "x")
    assert rejected.value.retry_after_s == 2.5
    with pytest.raises(errors.EngineError) as failed:
        face.call("generate", "x")
    assert failed.value.code == "out_of_memory"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, errors.Cancelled),
        (grpc.StatusCode.UNAVAILABLE, sdk.ServerUnreachable),
        (grpc.StatusCode.UNIMPLEMENTED, sdk.ClientError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, sdk.ClientError),
    ],
)
@pytest.mark.parametrize("details", [(), (info("QUEUE_FULL", domain="elsewhere"),)], ids=["bare", "foreign"])
def test_a_status_that_is_not_the_gateways(
    server: ScriptedServer, connect: Callable[..., Any], code: grpc.StatusCode, expected: type[Exception], details: Any
) -> None:
    server.script = [fails(code, "a proxy says no", *details)]
    with pytest.raises(errors.SloError, match="a proxy says no") as caught:
        connect(server.target, retry=sdk.NO_RETRY).call("generate", "x")
    assert type(caught.value) is expected


def test_details_that_cannot_be_read_are_left_out(server: ScriptedServer, connect: Callable[..., Any]) -> None:
    def refuse(_request: Any, context: grpc.ServicerContext) -> Any:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff\xff"),))
        context.abort(grpc.StatusCode.ABORTED, "odd")

    server.script = [refuse]
    with pytest.raises(sdk.ClientError, match="ABORTED: odd"):
        connect(server.target).call("generate", "x")


@pytest.mark.parametrize("target", ["localhost:1", "unix:/nowhere/socket", "localhost:port", "no.such.invalid:80"])
def test_no_server(connect: Callable[..., Any], target: str) -> None:
    face = connect(target, retry=sdk.RetryPolicy(max_attempts=3, first_wait_s=0.1, jitter=0))
    with pytest.raises(sdk.ServerUnreachable) as caught:
        face.call("generate", "x")
    assert caught.value.not_sent
    assert face.slept_s == [0.1, 0.2]


@pytest.mark.parametrize("call", ["generate", "read"])
def test_a_deadline_of_the_client(server: ScriptedServer, connect: Callable[..., Any], call: str) -> None:
    gone = threading.Event()

    def hang(_request: Any, context: grpc.ServicerContext) -> Any:
        context.add_callback(gone.set)
        gone.wait(WAIT_S)
        return iter(())

    server.script = [hang]
    face = connect(server.target)
    with pytest.raises(errors.DeadlineExceeded):
        face.call("generate", "x", timeout_s=0.05) if call == "generate" else face.read(timeout_s=0.05)
    assert gone.wait(WAIT_S)


# -- retries --------------------------------------------------------------------

FULL = fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", info("QUEUE_FULL"), retry_info(3))
LOST = fails(grpc.StatusCode.UNAVAILABLE, "Socket closed")


def test_a_full_queue_is_tried_again_when_it_says(server: ScriptedServer, connect: Callable[..., Any]) -> None:
    face = connect(server.target)
    server.script = [FULL, FULL, answers(pb.GenerateResponse(text="ok", completion=COMPLETION))]
    assert face.call("generate", "x").text == "ok"
    server.script = [FULL, whole_stream()]
    assert len(face.read()[0]) == 3
    assert face.slept_s == [3, 3, 3]


@pytest.mark.parametrize(
    "refusal",
    [
        fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "no hint", info("QUEUE_FULL")),
        fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "too long", info("QUEUE_FULL"), retry_info(11)),
        fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "not the gateway's", retry_info(1)),
        fails(grpc.StatusCode.INVALID_ARGUMENT, "bad", info("INVALID_REQUEST")),
        fails(grpc.StatusCode.INTERNAL, "broken", info("ENGINE_ERROR")),
        fails(grpc.StatusCode.DEADLINE_EXCEEDED, "late", info("QUEUE_TIMEOUT")),
        LOST,
    ],
)
def test_what_is_not_tried_again(server: ScriptedServer, connect: Callable[..., Any], refusal: Any) -> None:
    face = connect(server.target)
    server.script = [refusal]
    with pytest.raises(errors.SloError):
        face.call("generate", "x")
    assert (len(server.requests), face.slept_s) == (1, [])


@pytest.mark.parametrize("reason", ["DRAINING", "ENGINE_UNAVAILABLE"])
def test_unavailable_is_tried_again_with_growing_waits(
    server: ScriptedServer, connect: Callable[..., Any], reason: str
) -> None:
    face = connect(
        server.target, retry=sdk.RetryPolicy(max_attempts=4, first_wait_s=0.5, jitter=0.5), random=lambda: 0.5
    )
    server.script = [fails(grpc.StatusCode.UNAVAILABLE, "gone", info(reason))] * 4
    with pytest.raises(errors.RequestError, match="gone"):
        face.call("generate", "x")
    assert face.slept_s == [0.625, 1.25, 2.5]


def test_a_request_that_may_be_running_is_sent_again_only_if_sheddable(
    server: ScriptedServer, connect: Callable[..., Any]
) -> None:
    face = connect(server.target)
    server.script = [LOST, answers(pb.GenerateResponse(completion=COMPLETION))]
    face.call("generate", "x", sheddable=True)
    server.script = [LOST, answers(pb.AbortResponse())]
    with pytest.raises(sdk.ServerUnreachable) as caught:
        face.call("abort", "r1")
    assert not caught.value.not_sent
    assert len(face.slept_s) == 1


def test_a_stream_is_opened_again_only_before_its_first_message(
    server: ScriptedServer, connect: Callable[..., Any]
) -> None:
    face = connect(server.target)
    server.script = [LOST, whole_stream()]
    assert len(face.read()[0]) == 3

    def breaks(request: Any, context: grpc.ServicerContext) -> Any:
        yield pb.GenerateStreamResponse(text="a")
        FULL(request, context)

    server.script = [breaks, whole_stream()]
    with pytest.raises(errors.QueueFull):
        face.read()
    assert len(face.slept_s) == 1


errors_that_repeat = st.sampled_from([errors.Draining("x"), sdk.ServerUnreachable("x", not_sent=True)]) | st.builds(
    errors.QueueFull, st.just("x"), st.floats(0, 100)
)


@given(
    policy=st.builds(sdk.RetryPolicy, st.integers(1, 200), st.floats(0.01, 9), st.floats(0.01, 30), st.floats(0, 2)),
    failures=st.lists(errors_that_repeat, min_size=1, max_size=210),
    draw=st.floats(0, 1, exclude_max=True),
    timeout_s=st.none() | st.floats(0.001, 100),
)
def test_waits_keep_their_bounds(
    policy: sdk.RetryPolicy, failures: list[errors.SloError], draw: float, timeout_s: float | None
) -> None:
    clock = VirtualClock()
    attempts = Attempts(policy, clock=clock, random=lambda: draw, timeout_s=timeout_s, resend_safe=False)
    sent = 1
    for error in failures:
        wait_s = attempts.wait_after_s(error)
        if wait_s is None:
            break
        sent += 1
        asked_s = error.retry_after_s if isinstance(error, errors.QueueFull) else 0.0
        assert asked_s is not None and asked_s <= wait_s <= policy.longest_wait_s * (1 + policy.jitter)
        clock.advance(wait_s)
    assert sent <= policy.max_attempts
    assert timeout_s is None or clock.now_s() <= timeout_s
    remaining_s = attempts.remaining_s()
    assert remaining_s is None if timeout_s is None else remaining_s is not None and 0 <= remaining_s <= timeout_s


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), float("inf"), 1e300])
def test_a_time_limit_is_a_positive_number(connect: Callable[..., Any], timeout_s: float) -> None:
    face = connect("localhost:1")
    with pytest.raises(ValueError, match="timeout_s"):
        face.call("generate", "x", timeout_s=timeout_s)
    with pytest.raises(ValueError, match="timeout_s"):
        face.read("x", timeout_s=timeout_s)


@pytest.mark.parametrize("values", [{"max_attempts": 0}, {"first_wait_s": 0}, {"longest_wait_s": -1}, {"jitter": -0.1}])
def test_a_retry_policy_has_bounds(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        sdk.RetryPolicy(**values)
