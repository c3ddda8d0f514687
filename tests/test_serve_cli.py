"""`lmdeploy_slo serve` as a process: its ready line, one real request, its end, and what it says of a bad command."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from lmdeploy_slo import __version__
from lmdeploy_slo.client import Client, FinishReason, Objectives
from lmdeploy_slo.config import load
from lmdeploy_slo.errors import Draining

COMMAND = [sys.executable, "-m", "lmdeploy_slo"]
READY = re.compile(r"lmdeploy_slo: serving on (?P<address>127\.0\.0\.1:\d+) \((?P<what>.*)\)\n")
ENDLESS = 1_000_000


@pytest.fixture
def profile(tmp_path: Path) -> str:
    """One millisecond a step."""
    path = tmp_path / "fast.json"
    step_ms = {"c0": 1.0, "p1": 0.0, "p2": 0.0, "d1": 0.0, "d2": 0.0}
    path.write_text(json.dumps({"format": 1, "name": "fast", "step_ms": step_ms}))
    return str(path)


@contextmanager
def server(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A serving process, its address and the rest of its ready line; killed at the end if it still runs."""
    command = [*COMMAND, "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            ready = READY.fullmatch(line)
            if ready is None:
                process.kill()
                pytest.fail(f"no ready line but {line!r}\n{process.communicate()[1]}")
            yield process, ready["address"], ready["what"]
        finally:
            process.kill()


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status and what is left on stdout and stderr."""
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize("policy", ["fcfs", "annealing"])
def test_serves_and_ends(profile: str, policy: str) -> None:
    with server("--profile", profile, "--policy", policy) as (process, address, what):
        assert what == f"emulated engine, tokens are synthetic; profile {profile}; policy {policy}"
        with Client(address) as client:
            answer = client.generate("Hello", max_new_tokens=7, ignore_eos=True, e2e_ms=60_000)
            assert len(answer.token_ids) == 7
            assert answer.completion.finish_reason is FinishReason.LENGTH
            assert answer.completion.slo_met is True
            assert client.server_info().version == __version__
            assert client.server_info().policy == policy
            assert client.model_info().synthetic
        process.send_signal(signal.SIGTERM)
        status, out, err = end(process)
    assert (status, out) == (0, "")
    assert "Traceback" not in err


def test_sigterm_lets_a_running_stream_end(profile: str) -> None:
    with server("--profile", profile, "--policy", "fcfs") as (process, address, _), Client(address) as client:
        stream = iter(client.stream("Hello", max_new_tokens=300, ignore_eos=True))
        chunks = [next(stream)]
        process.send_signal(signal.SIGTERM)
        chunks += stream
        assert sum(len(chunk.token_ids) for chunk in chunks) == 300
        assert chunks[-1].completion is not None
        assert end(process)[0] == 0


def test_what_outlasts_the_grace_is_told(profile: str) -> None:
    arguments = ("--profile", profile, "--policy", "fcfs", "--drain-grace-s", "0")
    with server(*arguments) as (process, address, _), Client(address) as client:
        stream = iter(client.stream("Hello", max_new_tokens=ENDLESS, ignore_eos=True))
        next(stream)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(Draining):
            list(stream)
        assert end(process)[0] == 0


def test_a_second_signal_does_not_wait(profile: str) -> None:
    arguments = ("--profile", profile, "--policy", "fcfs", "--drain-grace-s", "3600")
    with server(*arguments) as (process, address, _), Client(address) as client:
        stream = iter(client.stream("Hello", max_new_tokens=ENDLESS, ignore_eos=True))
        next(stream)
        process.send_signal(signal.SIGTERM)
        while not client.load().draining:
            next(stream)
        process.send_signal(signal.SIGINT)
        with pytest.raises(Draining):
            list(stream)
        assert end(process)[0] == 0


def test_options_reach_the_server(profile: str, tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text("[engine]\nmax_batch_size = 3\nkv_tokens = 5000\n[tasks.chat]\nttft_ms = 1000\n")
    arguments = ("--config", str(config), "--profile", profile, "--policy", "fcfs", "--max-batch-size", "5")
    limits = ("--max-prefill-tokens", "100", "--max-queued-requests", "9", "--max-session-tokens", "4000")
    with server(*arguments, *limits) as (_, address, _), Client(address) as client:
        model, info = client.model_info(), client.server_info()
        assert (model.max_batch_size, model.max_prefill_tokens, model.kv_tokens) == (5, 100, 5000)
        assert model.max_session_tokens == 4000
        assert info.max_queued_requests == 9
        assert info.task_slos == {"chat": Objectives(ttft_ms=1000.0)}


def refused(*arguments: str) -> str:
    """The one line on stderr of a command line that cannot be served."""
    done = subprocess.run([*COMMAND, "serve", *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_a_taken_port_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [*COMMAND, "serve", "--policy", "fcfs", "--port", str(port)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 2
    assert f"lmdeploy_slo: cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--policy", "fifo"), "policy: 'fifo' is unknown; choose one of annealing, slack-guard, fcfs, "),
        (("--profile", "h100"), "profile 'h100' is unknown; "),
        (("--max-batch-size", "0"), "--max-batch-size: engine.max_batch_size = 0: input should be greater than"),
        (("--engine", "vllm"), "--engine: engine.kind = 'vllm': input should be 'emulated' or 'lmdeploy'"),
        (("--config", "absent.toml"), "absent.toml: No such file or directory"),
        (("some/model", "--engine", "emulated"), "the emulated engine takes no model: leave 'some/model' out"),
        (("--engine", "lmdeploy"), "the engine lmdeploy needs a model"),
        (("some/model", "--turbomind", "tp"), "--turbomind tp: KEY=VALUE is expected"),
    ],
)
def test_what_cannot_be_served_is_told_in_one_line(arguments: tuple[str, ...], expected: str) -> None:
    assert refused(*arguments).startswith(f"lmdeploy_slo: {expected}")


@pytest.mark.skipif(find_spec("lmdeploy") is not None, reason="LMDeploy is installed")
def test_a_model_is_never_served_by_the_emulated_engine() -> None:
    assert refused("some/model").endswith("pip install 'lmdeploy-slo[turbomind]'")


def test_the_printed_configuration_is_the_effective_one(tmp_path: Path) -> None:
    arguments = ["--print-config", "--policy", "swf-feasible", "--kv-tokens", "1000", "--shed"]
    printed = subprocess.run([*COMMAND, "serve", *arguments], capture_output=True, text=True, check=True).stdout
    (tmp_path / "printed.toml").write_text(printed)
    config = load(tmp_path / "printed.toml", environ={})
    assert config.scheduler.policy == "swf-feasible"
    assert config.scheduler.shed
    assert config.engine.kv_tokens == 1000
    assert config.to_toml() == printed
