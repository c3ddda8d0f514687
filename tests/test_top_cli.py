"""`lmdeploy_slo top`: what a frame shows, how fast things go between two, and the command against a real server."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from serve_process import serve

from lmdeploy_slo.cli.top import Picture, frame, look
from lmdeploy_slo.client import (
    Client,
    Load,
    ModelInfo,
    PlanQuality,
    ReplicaLoad,
    ServerInfo,
    StepForecasts,
    TaskLoad,
)
from lmdeploy_slo.clock import VirtualClock

MODEL = ModelInfo("qwen", "lmdeploy", False, None, None, 256, 8192, None)
SERVER = ServerInfo("1.2", "annealing", {}, {}, 3725.0, None)
CHAT = TaskLoad("chat", 40, 38, 40, 38, 1, 0, 0, 1, 4000, 6000, 123.4, 21.5)


def load(**changes: Any) -> Load:
    """A server where nothing happens, but for `changes`."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Load):
        values[field.name] = {"last_minute": (), "replicas": (), "refused": {}, "draining": False}.get(field.name, 0)
    values["step_forecasts"] = StepForecasts(0.0, 1.0, False, 0)
    values |= {"kv_usage": None, "oldest_wait_ms": None, "last_plan": None, "last_plan_ms": None, "mean_plan_ms": None}
    return Load(**(values | changes))


def shown(seen: Load, server: ServerInfo = SERVER, **picture: Any) -> str:
    console = Console(width=100, record=True, file=io.StringIO(), force_terminal=False)
    console.print(frame(Picture("h:1", server, MODEL, seen, **picture)))
    return console.export_text()


def unwrapped(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def test_a_server_where_nothing_has_happened() -> None:
    text = shown(load())
    assert "h:1  serving  up 1:02:05" in text
    assert "lmdeploy_slo 1.2, lmdeploy (qwen), policy annealing" in text
    assert "nothing has ended" in text
    assert "0 plans" in text
    assert "refused" not in text


def test_what_waits_and_what_runs() -> None:
    server = dataclasses.replace(SERVER, max_queued_requests=500)
    seen = load(waiting=1234, waiting_prompt_tokens=56_789, oldest_wait_ms=4321.0, in_flight=200, max_in_flight=256)
    text = shown(dataclasses.replace(seen, kv_usage=0.42), server)
    assert "1,234  of 500, 56,789 prompt tokens, oldest for 4.3 s" in text
    assert "of 256, KV cache 42%" in text


def test_engines_where_there_are_several() -> None:
    steps = StepForecasts(0.02, 1.0, False, 5)
    one = ReplicaLoad("emulated-0", True, False, 3, 7, 8, 100, 0.5, 1000, 0, steps)
    two = dataclasses.replace(one, instance="emulated-1", up=False, kv_usage=None, engine_restarts=2)
    three = dataclasses.replace(one, instance="emulated-2", draining=True)
    lines = shown(load(replicas=(one, two, three))).splitlines()
    (first,) = [line for line in lines if "emulated-0" in line]
    assert first.split()[1:-1] == ["emulated-0", "up", "3", "7", "of", "8", "50%", "0", "2.0%"]
    assert any("emulated-1" in line and " down " in line for line in lines)
    assert any("emulated-2" in line and " draining " in line for line in lines)
    assert "engines" not in shown(load(replicas=(one,)))


def test_attainment_by_task() -> None:
    free = TaskLoad("none", 3, 3, 0, 0, 0, 0, 0, 0, 30, 60, 10.0, None)
    lines = shown(load(last_minute=(CHAT, free))).splitlines()
    (chat,) = [line for line in lines if " chat " in line]
    assert "95.0%" in chat
    assert "ttft 1, unfinished 1" in chat
    assert "123.4" in chat
    (none,) = [line for line in lines if " none " in line]
    assert none.split()[1:5] == ["none", "3", "-", "10.0"]
    assert any("101 of what has ended, 0.7 requests/s" in line for line in lines)


def test_how_good_plans_are() -> None:
    plan = PlanQuality("edf", 10.0, 11.5, 150, 2.5)
    text = shown(load(plans=7, last_plan_ms=1.5, mean_plan_ms=2.0, last_plan=plan, failed_plans=3))
    for part in (
        "7 plans",
        "last 1.50 ms, mean 2.00 ms",
        "150 scored",
        "from edf: 11.50",
        "+1.50 by",
        "3 failed",
        "2.50",
    ):
        assert part in text, part


def test_how_right_forecasts_are() -> None:
    assert "foreseen" not in shown(load())
    text = unwrapped(shown(load(step_forecasts=StepForecasts(0.034, 1.0, False, 500))))
    assert "steps are foreseen within 3.4%" in text
    assert "drifted" not in text
    assert "drifted: 1.70 x" in unwrapped(shown(load(step_forecasts=StepForecasts(0.3, 1.7, True, 500))))


def test_refusals_and_draining() -> None:
    text = shown(load(refused={"INVALID_REQUEST": 1, "QUEUE_FULL": 1200}, draining=True))
    assert "1,201  1,200 QUEUE_FULL, 1 INVALID_REQUEST" in text
    assert "draining" in text


def test_rates_are_those_between_two_pictures() -> None:
    before = (load(output_tokens=1000, plans=10), 2.0)
    text = shown(load(output_tokens=4000, plans=330), before=before)
    assert "1,500" in text
    assert "160 plans/s" in text


def test_a_restarted_server_has_no_rates_yet() -> None:
    before = (load(output_tokens=1000), 2.0)
    picture = Picture("h:1", SERVER, MODEL, load(output_tokens=10), before)
    assert picture.per_s(lambda seen: seen.output_tokens) is None


class AskedClient:
    """Answers at once; each load has 100 tokens more."""

    def __init__(self) -> None:
        self.loads = 0

    def model_info(self) -> ModelInfo:
        return MODEL

    def server_info(self) -> ServerInfo:
        return SERVER

    def load(self) -> Load:
        self.loads += 1
        return load(output_tokens=100 * self.loads)


def test_it_looks_again_and_again() -> None:
    clock, client = VirtualClock(), AskedClient()
    pictures = look(client, "h:1", clock.advance, 0.5, clock)  # type: ignore[arg-type]
    seen = [next(pictures) for _ in range(3)]
    assert [picture.per_s(lambda load: load.output_tokens) for picture in seen] == [None, 200.0, 200.0]
    assert clock.now_s() == 1.0


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(tmp_path_factory.mktemp("server"), "--policy", "fcfs") as (address, _):
        yield address


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lmdeploy_slo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=Path(__file__).parent)


def test_one_frame_of_a_real_server(address: str) -> None:
    with Client(address) as client:
        client.generate("Hello", max_new_tokens=5, task_type="chat", e2e_ms=60_000)
        assert client.load().last_minute[0].slo_met == 1
    done = run("top", address, "--once")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{address}  serving" in done.stdout
    assert "100.0%" in done.stdout
    assert "policy fcfs" in done.stdout


def test_a_server_that_is_not_there_is_told_in_one_line() -> None:
    done = run("top", "127.0.0.1:1", "--once")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("lmdeploy_slo: cannot reach 127.0.0.1:1")
