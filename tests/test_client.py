"""The client library against a scripted server: what it asks, and what it makes of the answers."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import grpc
import pytest
import scripted_server
from scripted_server import COMPLETION, ScriptedServer, answers, streams, whole_stream

from lmdeploy_slo import client as sdk
from lmdeploy_slo import errors
from lmdeploy_slo.client.request import OPTION_PATHS, build_request
from lmdeploy_slo.gateway import metadata
from lmdeploy_slo.v1 import inference_pb2 as pb

server, connect = scripted_server.server, scripted_server.connect  # fixtures
DOCS = Path(__file__).parent.parent / "docs"


def test_importing_the_client_brings_in_nothing_of_the_server() -> None:
    code = "import sys, lmdeploy_slo.client; print('\\n'.join(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    loaded = set(output.split())
    assert not loaded & {"numpy", "numba", "pydantic", "typer", "rich", "uvloop", "lmdeploy", "torch"}
    own = {name.removeprefix("lmdeploy_slo.").split(".")[0] for name in loaded if name.startswith("lmdeploy_slo.")}
    assert own == {"client", "clock", "core", "errors", "v1"}


def test_five_lines(server: ScriptedServer) -> None:
    server.script = [answers(pb.GenerateResponse(text="Hi", completion=COMPLETION))]
    with sdk.Client(server.target) as client:
        assert client.generate("Hello", e2e_ms=2000).text == "Hi"
    assert server.requests == [pb.GenerateRequest(text="Hello", slo=pb.Slo(e2e_ms=2000))]


# -- requests -------------------------------------------------------------------


def leaf_paths(descriptor: Any, prefix: str = "") -> set[str]:
    paths: set[str] = set()
    for field in descriptor.fields:
        path = prefix + field.name
        paths |= leaf_paths(field.message_type, path + ".") if field.message_type else {path}
    return paths


def test_every_field_of_a_request_is_an_option() -> None:
    prompt = {"text", "token_ids.ids", "messages.messages.role", "messages.messages.content"}
    # `n` takes the one value that it has when unset
    assert leaf_paths(pb.GenerateRequest.DESCRIPTOR) - prompt - {"sampling.n"} == set(OPTION_PATHS.values())
    assert set(get_type_hints(sdk.GenerateOptions)) == set(OPTION_PATHS)


def test_options_land_in_their_fields() -> None:
    request = build_request(
        "p",
        {
            "ttft_ms": 1.5,
            "temperature": 0,
            "max_new_tokens": 7,
            "stop": "END",
            "stop_token_ids": [2, 3],
            "skip_special_tokens": False,
            "priority_class": sdk.PriorityClass.BULK,
            "sheddable": True,
            "emulated_output_tokens": 9,
            "task_type": None,
        },
    )
    assert request == pb.GenerateRequest(
        text="p",
        slo=pb.Slo(ttft_ms=1.5),
        sampling=pb.SamplingParams(temperature=0),
        stopping=pb.StoppingParams(max_new_tokens=7, stop=["END"], stop_token_ids=[2, 3], skip_special_tokens=False),
        priority_class=pb.PRIORITY_CLASS_BULK,
        sheddable=True,
        emulation=pb.Emulation(output_tokens=9),
    )
    assert request.sampling.HasField("temperature")  # 0 is not unset


def test_prompts() -> None:
    conversation = pb.Conversation(messages=[pb.ChatMessage(role="system", content="s"), pb.ChatMessage(role="user")])
    assert build_request([1, 2], {}) == pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2]))
    assert build_request([], {}).WhichOneof("prompt") == "token_ids"
    turns: list[sdk.ChatMessage | dict[str, str]] = [sdk.ChatMessage("system", "s"), {"role": "user", "content": ""}]
    assert build_request(turns, {}) == pb.GenerateRequest(messages=conversation)


@pytest.mark.parametrize(
    ("prompt", "options", "fields"),
    [
        ("x", {"max_new_tokens": -1, "top_k": "a"}, ["stopping.max_new_tokens", "sampling.top_k"]),
        ("x", {"stop": 5}, ["stopping.stop"]),
        ("x", {"request_id": 5}, ["request_id"]),
        ("x", {"priority_class": "bulk"}, ["priority_class"]),
        ([-1], {}, ["token_ids.ids"]),
        (["a"], {}, ["token_ids.ids"]),
        ("\ud800", {}, ["text"]),
        ([{"role": "user", "content": None}], {}, ["messages.messages[0].content"]),
        ([{"role": "user", "content": "x", "image": "y"}, 3], {}, ["messages.messages[0]", "messages.messages[1]"]),
    ],
)
def test_what_no_field_can_hold_is_refused_by_name(prompt: Any, options: dict[str, Any], fields: list[str]) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        build_request(prompt, options)
    assert [violation.field for violation in caught.value.violations] == fields


def test_an_option_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match="'max_tokens'"):
        build_request("x", {"max_tokens": 3})


def test_metadata_and_deadline_go_along(server: ScriptedServer, connect: Callable[..., Any]) -> None:
    remaining: list[float] = []

    def answer(_request: Any, context: grpc.ServicerContext) -> Any:
        remaining.append(context.time_remaining())
        return pb.GenerateResponse(completion=COMPLETION)

    server.script = [answer]
    connect(server.target).call("generate", "x", timeout_s=100, metadata=[("traceparent", "00-1")])
    assert server.metadata[0]["traceparent"] == "00-1"
    assert 50 < remaining[0] < 101  # gRPC rounds


# -- results --------------------------------------------------------------------


def test_a_generation(server: ScriptedServer, connect: Callable[..., Any]) -> None:
    candidates = pb.TokenLogprobs(candidates=[pb.TokenLogprob(token_id=1, logprob=-0.5, text="H")])
    server.script = [
        answers(pb.GenerateResponse(text="Hi", token_ids=[1, 2], logprobs=[candidates], completion=COMPLETION))
    ]
    assert connect(server.target).call("generate", "x") == sdk.Generation(
        text="Hi",
        token_ids=(1, 2),
        logprobs=((sdk.TokenLogprob(1, -0.5, "H"),),),
        completion=sdk.Completion(
            request_id="r1",
            finish_reason=sdk.FinishReason.LENGTH,
            usage=sdk.Usage(prompt_tokens=5, cached_tokens=None, output_tokens=2),
            timing=sdk.Timing(queue_ms=1, ttft_ms=0, tpot_ms=3, e2e_ms=4),
            predicted=sdk.Prediction(output_tokens=2.5, queue_ms=None, ttft_ms=None, tpot_ms=None, e2e_ms=9),
            slo=sdk.Objectives(ttft_ms=None, tpot_ms=None, e2e_ms=3),
            slo_met=False,
            effective_priority=0,
            instance="emulated-0",
        ),
    )


def test_what_the_server_leaves_unset_is_none(server: ScriptedServer, connect: Callable[..., Any]) -> None:
    server.script = [answers(pb.GenerateResponse(completion=pb.Completion(finish_reason=77)))]  # type: ignore[arg-type]
    completion = connect(server.target).call("generate", "x").completion
    assert completion.finish_reason is None
    assert completion.slo_met is None
    assert completion.effective_priority is None
    assert completion.timing == sdk.Timing(None, None, None, None)


def test_a_stream(server: ScriptedServer, connect: Callable[..., Any]) -> None:
    server.script = [whole_stream()]
    chunks, completion = connect(server.target).read()
    assert [(chunk.text, chunk.token_ids) for chunk in chunks] == [("Hel", (1,)), ("lo", (2, 3)), ("", ())]
    assert [chunk.completion for chunk in chunks] == [None, None, completion]
    assert completion.request_id == "r1"


def test_the_other_calls(server: ScriptedServer, connect: Callable[..., Any]) -> None:
    face = connect(server.target)
    server.script = [
        answers(
            pb.PredictResponse(
                predicted=pb.Prediction(e2e_ms=5, e2e_ms_interval=pb.Interval(low=4, high=9), slo_probability=0.0),
                queue_position=3,
                reason="late",
            )
        ),
        answers(pb.AbortResponse(aborted=True)),
        answers(pb.GetModelInfoResponse(model="m", engine="emulated", synthetic=True, max_batch_size=4)),
        answers(
            pb.GetServerInfoResponse(policy="fcfs", versions={"numba": "1"}, task_slos={"chat": pb.Slo(ttft_ms=1)})
        ),
        answers(pb.GetLoadResponse(waiting=2, kv_usage=0.0, draining=True, failed_plans=3)),
    ]
    forecast = face.call("predict", "x", e2e_ms=4)
    assert (forecast.predicted.e2e_ms, forecast.would_meet_slo, forecast.queue_position) == (5, None, 3)
    assert (forecast.predicted.e2e_ms_interval, forecast.predicted.ttft_ms_interval) == (sdk.Interval(4, 9), None)
    assert forecast.predicted.slo_probability == 0.0
    assert face.call("abort", "r1") is True
    model = face.call("model_info")
    assert (model.model, model.synthetic, model.max_batch_size, model.kv_tokens) == ("m", True, 4, None)
    info = face.call("server_info")
    assert (info.versions, info.task_slos) == ({"numba": "1"}, {"chat": sdk.Objectives(ttft_ms=1)})
    load = face.call("load")
    assert (load.waiting, load.kv_usage, load.last_plan_ms, load.draining) == (2, 0.0, None, True)
    assert load.failed_plans == 3
    assert server.requests[0] == pb.PredictRequest(request=pb.GenerateRequest(text="x", slo=pb.Slo(e2e_ms=4)))
    assert server.requests[1] == pb.AbortRequest(request_id="r1")


def test_a_stream_that_ends_without_completion_is_an_error(server: ScriptedServer, connect: Callable[..., Any]) -> None:
    server.script = [streams(pb.GenerateStreamResponse(text="a"))]
    with pytest.raises(sdk.ClientError, match="without a completion"):
        connect(server.target).read()


# -- the pages ------------------------------------------------------------------


def test_the_protocol_page_names_every_call_reason_and_alias() -> None:
    page = (DOCS / "protocol.md").read_text()
    calls = [method.name for method in pb.DESCRIPTOR.services_by_name["InferenceService"].methods]
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.RequestError)]
    reasons = {kind.reason for kind in kinds} - {errors.Rejected.reason}  # only its subclasses are raised
    aliases = [metadata.TTFT_MS, metadata.TPOT_MS, metadata.E2E_MS, metadata.FAIRNESS_ID, metadata.REQUEST_ID]
    assert [name for name in [*calls, *reasons, *aliases, metadata.TRACEPARENT] if name not in page] == []


def test_the_client_page_names_every_option_and_default() -> None:
    page = (DOCS / "client.md").read_text()
    assert [name for name in OPTION_PATHS if f"`{name}`" not in page] == []
    defaults = ", ".join(f"{field.name}={field.default}" for field in dataclasses.fields(sdk.RetryPolicy))
    assert f"RetryPolicy({defaults})" in page
