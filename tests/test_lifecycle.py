"""A serving process: what signals change, what it does when its engine is lost, and what clients and probes see."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lmdeploy_slo import app
from lmdeploy_slo.client import NO_RETRY, Client, Objectives
from lmdeploy_slo.config import Config, load
from lmdeploy_slo.core.slo import Slo
from lmdeploy_slo.errors import ConfigError, Draining, EngineUnavailable
from lmdeploy_slo.gateway import server as gateway_server
from lmdeploy_slo.lifecycle import EXIT_ENGINE_LOST
from lmdeploy_slo.reload import LIVE, Reloader

READY = re.compile(r"lmdeploy_slo: serving on (\S+:\d+) ")


def profile(folder: Path, *, step_ms: float) -> str:
    path = folder / "profile.json"
    step = {"c0": step_ms, "p1": 0.0, "p2": 0.0, "d1": 0.0, "d2": 0.0}
    path.write_text(json.dumps({"format": 1, "name": "made", "step_ms": step}))
    return str(path)


@contextmanager
def server(*flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(address, process); its log goes to a pipe."""
    command = [sys.executable, "-m", "lmdeploy_slo", "serve", "--port", "0", "--policy", "fcfs", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = READY.match(line := process.stdout.readline())
            assert ready, f"no ready line but {line!r}"
            yield ready[1], process
        finally:
            process.kill()


def until_logged(process: subprocess.Popen[str], text: str) -> str:
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if text in line:
            return seen
    pytest.fail(f"{text!r} was never logged\n{seen}")


# -- the engine is lost -------------------------------------------------------


def test_a_process_whose_engine_is_lost_says_so_and_ends(tmp_path: Path) -> None:
    """Its only step takes an hour: the engine stalls, is started anew, and stalls again."""
    flags = ("--profile", profile(tmp_path, step_ms=3_600_000), "--stall-timeout-s", "0.2", "--restarts", "1")
    with server(*flags) as (address, process):
        with Client(address, retry=NO_RETRY) as client, pytest.raises(EngineUnavailable):
            client.generate("Hello", max_new_tokens=5)
        _, log = process.communicate(timeout=30)
    assert process.returncode == EXIT_ENGINE_LOST
    assert log.count("the engine is gone: the engine made no progress") == 2, "its request was tried again, once"
    assert "the engine is back" in log
    assert "the engine is lost: ending with status 3" in log
    assert "Traceback" not in log


# -- signals ------------------------------------------------------------------


def test_sighup_reads_the_configuration_again(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("[tasks.chat]\nttft_ms = 1000\n")
    flags = ("--profile", profile(tmp_path, step_ms=1), "--config", str(file), "--drain-grace-s", "3600")
    with server(*flags) as (address, process), Client(address) as client:

        def objectives() -> Objectives:
            return client.generate("Hello", task_type="chat", max_new_tokens=2).completion.slo

        assert objectives() == Objectives(ttft_ms=1000)
        file.write_text("[server]\ndrain_grace_s = 0\n[engine]\nkv_tokens = 99\n[tasks.chat]\ne2e_ms = 5000\n")
        process.send_signal(signal.SIGHUP)
        log = until_logged(process, "the configuration was read again")
        assert "a change of engine.kv_tokens needs a restart" in log
        assert "tasks.chat" in log
        assert objectives() == Objectives(e2e_ms=5000)

        file.write_text("[tasks.chat]\nttft_ms = -1\n")
        process.send_signal(signal.SIGHUP)
        assert "server.toml: tasks.chat.ttft_ms" in until_logged(process, "the configuration stays as it was")
        assert objectives() == Objectives(e2e_ms=5000)


def health(stub: Any, service: str = "") -> int:
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status)


def test_while_it_drains_probes_are_told_and_streams_end(tmp_path: Path) -> None:
    flags = ("--profile", profile(tmp_path, step_ms=2), "--health-port", "0", "--drain-grace-s", "60")
    with server(*flags) as (address, process), Client(address, retry=NO_RETRY) as client:
        port = re.search(r"health checks on port (\d+)", until_logged(process, "health checks on port"))
        assert port is not None
        with grpc.insecure_channel(f"127.0.0.1:{port[1]}") as channel:
            probe = health_pb2_grpc.HealthStub(channel)
            service = "lmdeploy_slo.v1.InferenceService"
            serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
            assert {health(probe, name) for name in ("", service, "liveness")} == {serving}
            stream = iter(client.stream("Hello", max_new_tokens=500, ignore_eos=True))
            tokens = len(next(stream).token_ids)
            process.send_signal(signal.SIGTERM)
            until_logged(process, "shutting down")
            while health(probe) == serving:
                tokens += len(next(stream).token_ids)
            assert health(probe, service) == not_serving
            assert health(probe, "liveness") == serving, "draining is no reason to be killed"
            with pytest.raises(Draining):
                client.generate("late")
            assert tokens + sum(len(chunk.token_ids) for chunk in stream) == 500
        assert process.wait(timeout=30) == 0


# -- reload, from within ------------------------------------------------------


def settings(**flags: object) -> Config:
    return load(environ={}, flags={"server.port": 0, "scheduler.policy": "fcfs", **flags})


async def test_what_may_change_changes_everywhere() -> None:
    async with app.serving(settings()) as server:
        wanted = {
            "server.default_max_new_tokens": 7,
            "server.drain_grace_s": 1.5,
            "scheduler.plan_budget_ms": 9.0,
            "scheduler.max_queued_requests": 11,
            "scheduler.queue_timeout_ms": 250.0,
            "scheduler.shed": True,
            "limits.max_streams": 13,
            "limits.max_queued_tokens": 1700,
            "limits.max_wait_ms": 500.0,
            "limits.queue_share": 2.0,
            "tasks.chat.tpot_ms": 50.0,
        }
        named = {tuple(key.split(".")[:2]) for key in wanted}
        assert {(s, k) for s, keys in LIVE.items() for k in keys} - named == {("observability", "log_level")}
        reloader = Reloader(server, lambda: settings(**wanted))
        reloader.reload()
        runtime, options = server.runtime, server.gateway._options
        assert options.default_max_new_tokens == 7
        assert options.default_queue_timeout_s == 0.25
        assert options.max_queued_requests == runtime.scheduler.max_queued_requests == 11
        assert server.task_slos == options.task_slos == {"chat": Slo(tpot_s=0.05)}
        assert server.gateway._service is not None
        assert server.gateway._service._options is options
        assert reloader.config.server.drain_grace_s == 1.5
        assert server.budget.time_s == 0.009
        assert runtime.options.shed
        limits = runtime.limiter.limits
        assert (limits.max_streams, limits.max_queued_requests, limits.max_queued_tokens) == (13, 11, 1700)
        assert (limits.max_wait_s, limits.queue_share) == (0.5, 2.0)


async def test_what_is_wrong_or_cannot_change_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def wrong() -> Config:
        raise ConfigError("server.toml: not TOML")

    async with app.serving(settings()) as server:
        before = server.config
        for read in (None, wrong, lambda: settings(**{"engine.max_batch_size": 3})):
            reloader = Reloader(server, read)
            reloader.reload()
            assert reloader.config == before
        assert "the configuration stays as it was: server.toml: not TOML" in caplog.text
        assert "a change of engine.max_batch_size needs a restart" in caplog.text


def test_pings_every_ten_seconds_are_allowed() -> None:
    """With room for those that a network delivers late, and the next on time."""
    assert gateway_server.MIN_CLIENT_PING_MS <= 5_000
    assert gateway_server.KEEPALIVE_MS < 60_000, "many proxies forget a connection that is idle for a minute"
