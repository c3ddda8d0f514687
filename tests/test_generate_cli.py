"""`lmdeploy_slo generate`: what is printed where, and the exit status."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import scripted_server
from scripted_server import COMPLETION, ScriptedServer, answers, fails, info, retry_info, streams, whole_stream
from serve_process import serve
from typer.testing import CliRunner, Result

from lmdeploy_slo.cli.main import app
from lmdeploy_slo.client import Client
from lmdeploy_slo.v1 import inference_pb2 as pb

server = scripted_server.server  # a fixture


def run(target: str, *arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, ["generate", "--target", target, *arguments], input=stdin)


def test_the_answer_goes_to_stdout_and_the_timing_to_stderr(server: ScriptedServer) -> None:
    server.script = [whole_stream()]
    result = run(server.target, "--prompt", "Hi")
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    assert result.stderr.splitlines() == [
        "tokens: 5 in, 2 out (length)  queue 1.0 ms  TTFT 0.0 ms  TPOT 3.0 ms  E2E 4.0 ms",
        "predicted: 2 tokens  E2E 9.0 ms",
        "SLO missed: E2E within 3 ms (missed)",
    ]


def test_what_is_unknown_is_left_out(server: ScriptedServer) -> None:
    bare = pb.Completion(usage=pb.Usage(prompt_tokens=1, cached_tokens=0, output_tokens=1))
    server.script = [streams(pb.GenerateStreamResponse(text="a\n", completion=bare))]
    result = run(server.target, "--prompt", "Hi")
    assert result.stdout == "a\n"
    assert result.stderr.splitlines() == ["tokens: 1 in, 0 cached, 1 out", "predicted: nothing", "no SLO"]


def test_every_flag_reaches_its_field(server: ScriptedServer) -> None:
    flags = {
        "ttft-ms": 1, "tpot-ms": 2, "e2e-ms": 3, "task-type": "chat", "expected-output-tokens": 4,
        "max-new-tokens": 5, "min-new-tokens": 6, "temperature": 0, "top-p": 0.5, "top-k": 7, "min-p": 0.25,
        "repetition-penalty": 1.5, "seed": 8, "model": "m", "request-id": "r", "fairness-id": "f",
        "priority-class": "bulk", "queue-timeout-ms": 9, "conversation-id": "c",
    }  # fmt: skip
    server.script = [whole_stream()]
    pairs = [f"--{name}={value}" for name, value in flags.items()]
    result = run(server.target, "--prompt=Hi", *pairs, "--stop=a", "--stop=b", "--ignore-eos", "--sheddable")
    assert result.exit_code == 0
    assert server.requests == [
        pb.GenerateRequest(
            request_id="r",
            model="m",
            text="Hi",
            sampling=pb.SamplingParams(temperature=0, top_p=0.5, top_k=7, min_p=0.25, repetition_penalty=1.5, seed=8),
            stopping=pb.StoppingParams(max_new_tokens=5, min_new_tokens=6, stop=["a", "b"], ignore_eos=True),
            slo=pb.Slo(ttft_ms=1, tpot_ms=2, e2e_ms=3),
            task_type="chat",
            expected_output_tokens=4,
            queue_timeout_ms=9,
            fairness_id="f",
            priority_class=pb.PRIORITY_CLASS_BULK,
            sheddable=True,
            conversation_id="c",
        )
    ]


def test_no_flag_sets_nothing(server: ScriptedServer) -> None:
    server.script = [whole_stream()]
    run(server.target, "--prompt=Hi")
    assert server.requests == [pb.GenerateRequest(text="Hi")]


def test_chat_and_stdin(server: ScriptedServer) -> None:
    server.script = [whole_stream(), whole_stream()]
    run(server.target, "--prompt", "-", "--chat", stdin="Grüße\n")
    run(server.target, "--prompt", "Hi", "--system", "Be brief.")
    user = pb.ChatMessage(role="user", content="Grüße\n")
    assert server.requests[0].messages.messages == [user]
    assert [(m.role, m.content) for m in server.requests[1].messages.messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
    ]


def test_json(server: ScriptedServer) -> None:
    server.script = [answers(pb.GenerateResponse(text="Grüße", token_ids=[1, 2], completion=COMPLETION))]
    result = run(server.target, "--prompt=Hi", "--json")
    answer = json.loads(result.stdout)
    assert (answer["text"], answer["token_ids"]) == ("Grüße", [1, 2])
    assert answer["completion"]["finish_reason"] == "length"
    assert answer["completion"]["usage"] == {"prompt_tokens": 5, "cached_tokens": None, "output_tokens": 2}
    assert answer["completion"]["slo_met"] is False
    assert result.stderr == ""


def test_predict(server: ScriptedServer) -> None:
    late = pb.PredictResponse(
        predicted=pb.Prediction(e2e_ms=5), would_meet_slo=False, queue_position=3, reason="e2e_ms: too late"
    )
    told = pb.Prediction(
        output_tokens=7,
        ttft_ms=3,
        output_tokens_interval=pb.Interval(low=2, high=9),
        ttft_ms_interval=pb.Interval(low=2.5, high=40),
        slo_probability=0.934,
    )
    server.script = [answers(late), answers(late), answers(pb.PredictResponse(predicted=told, would_meet_slo=True))]
    assert run(server.target, "--prompt=Hi", "--predict").stdout.splitlines() == [
        "would miss its SLO: e2e_ms: too late",
        "waiting requests that would go before it: 3",
        "predicted: E2E 5.0 ms",
    ]
    assert json.loads(run(server.target, "--prompt=Hi", "--predict", "--json").stdout)["queue_position"] == 3
    assert run(server.target, "--prompt=Hi", "--predict").stdout.splitlines() == [
        "would meet its SLO (93 % likely)",
        "waiting requests that would go before it: 0",
        "predicted: 7 tokens  TTFT 3.0 ms",
        "in 8 of 10 cases: 2 to 9 tokens  TTFT 2.5 to 40.0 ms",
    ]


@pytest.mark.parametrize(
    ("refusal", "line"),
    [
        (fails(grpc.StatusCode.INTERNAL, "out of\nmemory", info("ENGINE_ERROR")), "ENGINE_ERROR: out of memory"),
        (
            fails(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", info("QUEUE_FULL"), retry_info(60)),
            "QUEUE_FULL: full (try again in 60 s)",
        ),
        (fails(grpc.StatusCode.UNIMPLEMENTED, "Method not found!"), "UNIMPLEMENTED: Method not found!"),
    ],
)
def test_an_error_is_one_line(server: ScriptedServer, refusal: Any, line: str) -> None:
    server.script = [refusal]
    result = run(server.target, "--prompt=Hi")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"lmdeploy_slo: {line}\n")


def test_an_error_halfway_keeps_what_came(server: ScriptedServer) -> None:
    def breaks(request: Any, context: grpc.ServicerContext) -> Any:
        yield pb.GenerateStreamResponse(text="Hel")
        fails(grpc.StatusCode.UNAVAILABLE, "gone", info("ENGINE_UNAVAILABLE"))(request, context)

    server.script = [breaks]
    result = run(server.target, "--prompt=Hi")
    assert (result.exit_code, result.stdout) == (1, "Hel\n")
    assert result.stderr == "lmdeploy_slo: ENGINE_UNAVAILABLE: gone\n"


def test_no_server() -> None:
    result = run("localhost:1", "--prompt=Hi")
    assert result.exit_code == 1
    assert result.stderr.startswith("lmdeploy_slo: cannot reach localhost:1: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--target=nowhere", "--prompt=x"],
        ["--target=localhost:70000", "--prompt=x"],
        ["--target=http://localhost:1", "--prompt=x"],
        ["--target=localhost:1"],
        ["--target=localhost:1", "--prompt=x", "--e2e-ms=soon"],
        ["--target=localhost:1", "--prompt=x", "--timeout-s=0"],
        ["--target=localhost:1", "--prompt=x", "--timeout-s=nan"],
        ["--target=localhost:1", "--prompt=x", "--timeout-s=1e300"],
        ["--target=localhost:1", "--prompt=x", "--priority-class=urgent"],
        ["--target=localhost:1", "--prompt=x", "--no-such-flag"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["generate", *arguments])
    assert (result.exit_code, result.stdout) == (2, "")


def test_stdin_that_is_not_text() -> None:
    assert run("localhost:1", "--prompt", "-", stdin=b"\xff\xfe").exit_code == 2


# -- against the real server ----------------------------------------------------


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(tmp_path_factory.mktemp("serve"), "--policy", "fcfs") as (address, _):
        yield address


def test_a_real_answer(address: str) -> None:
    arguments = ("--prompt=Hi", "--max-new-tokens=20", "--ignore-eos", "--e2e-ms=60000")
    streamed = run(address, *arguments)
    assert streamed.exit_code == 0
    assert "tokens: 1 in, 20 out (length)" in streamed.stderr
    assert "SLO met: E2E within 60000 ms" in streamed.stderr
    whole = json.loads(run(address, *arguments, "--json").stdout)
    assert whole["completion"]["usage"]["output_tokens"] == 20


def test_every_violation_is_named(address: str) -> None:
    result = run(address, "--prompt=", "--temperature=9", "--e2e-ms=-1")
    assert result.exit_code == 1
    assert result.stderr.startswith("lmdeploy_slo: INVALID_REQUEST: ")
    assert [field in result.stderr for field in ("text:", "sampling.temperature:", "slo.e2e_ms:")] == [True] * 3
    assert result.stderr.count("\n") == 1


def test_a_deadline(address: str) -> None:
    result = run(address, "--prompt=Hi", "--max-new-tokens=1000000", "--ignore-eos", "--timeout-s=0.2")
    assert result.exit_code == 1
    assert "lmdeploy_slo: DEADLINE_EXCEEDED: the " in result.stderr


def test_a_server_that_dies(tmp_path: Path) -> None:
    with serve(tmp_path, "--policy", "fcfs") as (address, server_process):
        command = [sys.executable, "-m", "lmdeploy_slo", "generate", "--prompt=Hi", "--max-new-tokens=1000000"]
        command += ["--ignore-eos", "--target", address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.read(1)
            server_process.kill()
            _, err = process.communicate(timeout=30)
        assert process.returncode == 1
        assert err.startswith(f"lmdeploy_slo: lost the connection to {address}: ")
        assert err.count("\n") == 1


def test_ctrl_c_cancels_the_request_in_the_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lmdeploy_slo", "generate", "--prompt=Hi", "--max-new-tokens=1000000"]
    with serve(tmp_path, "--policy", "fcfs") as (address, _), Client(address) as client:
        command += ["--ignore-eos", "--target", address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.read(1)  # the first text is there
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (130, "\ncancelled\n")
        gives_up_at_s = time.monotonic() + scripted_server.WAIT_S
        while (load := client.load()).in_flight:  # the cancel is on its way
            assert time.monotonic() < gives_up_at_s, load
        assert (load.waiting, load.cancelled, load.finished) == (0, 1, 0)
