"""Metrics, traces and logs put on a server: by its configuration, as a process, and taken off again."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from typing import Any

import pytest
from runtime_bench import Bench, outcome, virtual

from lmdeploy_slo.app import serving
from lmdeploy_slo.client import AsyncClient, Client
from lmdeploy_slo.config import LogFormat, LogLevel, load
from lmdeploy_slo.errors import ConfigError, MissingExtra
from lmdeploy_slo.observability.sampler import PERIOD_S, Sampler
from lmdeploy_slo.observability.watch import Watch, WatchOptions
from lmdeploy_slo.runtime.statistics import RuntimeLoad

FCFS = {"server.port": 0, "scheduler.policy": "fcfs"}


def read(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
        page: str = answer.read().decode()
    return page


def number(page: str, sample: str) -> float | None:
    found = re.search(rf"^{re.escape(sample)} (\S+)$", page, re.MULTILINE)
    return None if found is None else float(found[1])


async def test_a_server_with_metrics() -> None:
    """Configured tasks are named whatever comes; with the server its port goes."""
    flags = {**FCFS, "observability.metrics_port": 0, "tasks.chat.ttft_ms": 60_000.0}
    async with serving(load(environ={}, flags=flags)) as server:
        assert server.metrics_address is not None
        assert f"; metrics on {server.metrics_address})" in str(server)
        async with AsyncClient(server.address) as client:
            for task in ("chat", "", "x"):
                await client.generate("Hello", max_new_tokens=3, task_type=task)
        page = await asyncio.to_thread(read, server.metrics_address)
    assert number(page, 'lmdeploy_slo:slo_met_total{task="chat"}') == 1
    assert number(page, 'lmdeploy_slo:requests_total{status="finished",task="none"}') == 1
    assert number(page, "lmdeploy_slo:serving") == 1
    assert 'lmdeploy_slo:server_info{engine="emulated",model="emulated",policy="fcfs"' in page
    with pytest.raises(OSError):
        await asyncio.to_thread(read, server.metrics_address)


async def test_a_taken_metrics_port_is_told_and_nothing_stays_behind() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = {**FCFS, "observability.metrics_port": taken.getsockname()[1]}
        with pytest.raises(ConfigError, match="metrics: cannot listen"):
            async with serving(load(environ={}, flags=flags)):
                pass


@virtual()
async def test_without_settings_only_failures_are_watched(bench: Bench) -> None:
    watch = Watch(bench.runtime, WatchOptions())
    watch.start()
    assert watch.metrics is None
    assert watch.metrics_address is None
    (stream,) = await bench.running("r")
    bench.engine.step("r")
    await outcome(stream)
    await watch.close()
    await watch.close()


@virtual()
async def test_traces_need_their_extra(bench: Bench) -> None:
    before = sys.modules.get("lmdeploy_slo.observability.tracing")
    sys.modules["lmdeploy_slo.observability.tracing"] = None  # type: ignore[assignment]
    try:
        with pytest.raises(MissingExtra, match=r"lmdeploy-slo\[otel\]"):
            Watch(bench.runtime, WatchOptions(otlp_traces_endpoint="http://localhost:4317")).start()
    finally:
        if before is None:
            del sys.modules["lmdeploy_slo.observability.tracing"]
        else:
            sys.modules["lmdeploy_slo.observability.tracing"] = before


@virtual()
async def test_samples_come_in_time_and_tell_how_late_they_are(bench: Bench) -> None:
    seen: list[tuple[float, float]] = []

    def on_sample(load: RuntimeLoad, lag_s: float) -> None:
        seen.append((bench.clock.now_s(), lag_s))
        if len(seen) == 2:
            raise RuntimeError("nobody should be harmed")

    sampler = Sampler(bench.runtime, bench.clock, on_sample)
    sampler.start()
    await asyncio.sleep(2.1 * PERIOD_S)
    bench.clock.advance(1.0)  # the loop stands still
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    sampler.close()
    sampler.close()
    times, lags = zip(*seen)
    assert times[:3] == (0.0, PERIOD_S, 2 * PERIOD_S)
    assert lags[:3] == (0.0, 0.0, 0.0)
    assert lags[3] == pytest.approx(0.1 * PERIOD_S + 1.0 - PERIOD_S)
    assert len(seen) == 4


def test_settings() -> None:
    defaults = load(environ={}).observability
    assert (defaults.metrics_port, defaults.otlp_traces_endpoint, defaults.log_requests) == (None, None, False)
    environ = {
        "LMDEPLOY_SLO_OBSERVABILITY_METRICS_PORT": "9400",
        "LMDEPLOY_SLO_OBSERVABILITY_LOG_FORMAT": "json",
        "LMDEPLOY_SLO_OBSERVABILITY_LOG_LEVEL": "debug",
    }
    told = load(environ=environ).observability
    assert (told.metrics_port, told.log_format, told.log_level) == (9400, LogFormat.JSON, LogLevel.DEBUG)


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        (
            "observability.log_format",
            "xml",
            "--log-format: observability.log_format = 'xml': input should be 'human' or",
        ),
        (
            "observability.log_level",
            "loud",
            "--log-level: observability.log_level = 'loud': input should be 'debug' or",
        ),
        ("observability.otlp_traces_endpoint", "collector:4317", "--otlp-traces-endpoint"),
        ("observability.metrics_port", 70_000, "--metrics-port"),
    ],
)
def test_settings_that_cannot_be(flag: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environ={}, flags={flag: value})
    assert str(caught.value).startswith(expected)


def test_a_process_with_everything() -> None:
    """One line a request, as JSON on stderr, with its id and without its text."""
    command = [sys.executable, "-m", "lmdeploy_slo", "serve", "--port", "0", "--policy", "fcfs"]
    flags = ["--metrics-port", "0", "--log-format", "json", "--log-requests"]
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = re.search(r"serving on (\S+) .*metrics on ([\d.:]+)\)", process.stdout.readline())
            assert ready is not None
            with Client(ready[1]) as client:
                client.generate("nobody may read this", request_id="ours", max_new_tokens=3, task_type="chat")
            assert number(read(ready[2]), 'lmdeploy_slo:requests_total{status="finished",task="chat"}') == 1
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    lines = [json.loads(line) for line in err.splitlines()]
    (ended,) = [line for line in lines if line["logger"] == "lmdeploy_slo.requests"]
    assert (ended["request_id"], ended["task"], ended["status"], ended["output_tokens"]) == (
        "ours",
        "chat",
        "finished",
        3,
    )
    assert "nobody may read" not in err
