"""Engines in Ray actors, on a real Ray of this machine: the contract, and what becomes of everything when one dies,
hangs, is too fast for its reader, or finds no place."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from functools import partial
from typing import Any

import pytest
from ray_session import local_ray

from lmdeploy_slo.clock import Clock, MonotonicClock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import Engine, EventSink
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.engine.ray_replica import RayCluster, RayLink, ReplicaResources, ray_engine
from lmdeploy_slo.engine.remote import EngineFace, RemoteEngine
from lmdeploy_slo.engine.remote_reports import OutboxStatistics
from lmdeploy_slo.engine.supervised import EngineState, SupervisedEngine, Supervision
from lmdeploy_slo.errors import ConfigError, EngineUnavailable
from lmdeploy_slo.testing.builders import make_request
from lmdeploy_slo.testing.engine_contract import EngineContract
from lmdeploy_slo.testing.event_log import EventLog

__all__ = ["local_ray"]

WAIT_S = 60.0  # how long a test waits for what must come; never slept
on_ray = pytest.mark.usefixtures("local_ray")


def engine_with(step_s: float) -> partial[EmulatedEngine]:
    return partial(EmulatedEngine, StepModel(step_s, 0.0, 0.0, 0.0, 0.0), EngineLimits(max_batch_size=4))


def replica(
    make: Any = None, *, name: str = "0", clock: Clock | None = None, resources: ReplicaResources | None = None
) -> RemoteEngine:
    clock = clock or MonotonicClock()
    make = make or engine_with(1e-3)
    face = EngineFace(engine_with(1e-3)(clock=clock))
    resources = resources or ReplicaResources(cpus=0.5)
    return ray_engine(RayCluster(cpus=16), make, face, clock, resources=resources, name=name)


def actor_of(engine: Any) -> Any:
    return engine._link._actor


async def pid_of(engine: Any) -> int:
    _, _, pid = await actor_of(engine).hello.remote()
    assert isinstance(pid, int)
    return pid


async def process_ended(pid: int) -> None:
    """Waits for the end of a process that is nobody's child here."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(descriptor, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), WAIT_S)
    finally:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)


@on_ray
class TestContract(EngineContract):
    async def make_engine(self) -> Engine:
        return replica()


# -- failure ------------------------------------------------------------------


@on_ray
async def test_a_killed_process_ends_everything_once_and_is_gone() -> None:
    engine, log = replica(), EventLog()
    await engine.start(log.sink)
    ids = [f"r{n}" for n in range(10)]  # more than run at once
    for rank, request_id in enumerate(ids):
        engine.submit(make_request(request_id, output_tokens=100_000, max_new_tokens=100_000), rank)
    await log.tokens("r0", 20)
    os.kill(await pid_of(engine), signal.SIGKILL)
    await asyncio.wait_for(log.ended(*ids), WAIT_S)
    assert all(isinstance(log.error(i), EngineUnavailable) for i in ids)
    assert "replica 0 is gone" in (engine.load().gone or "")
    assert engine.load().in_flight == 0
    with pytest.raises(EngineUnavailable):
        engine.submit(make_request("late"), 0)
    await engine.close()
    await engine.close()
    assert log.violations == []


@on_ray
async def test_a_process_that_hangs_is_replaced() -> None:
    engines: list[RemoteEngine] = []

    def build() -> RemoteEngine:
        engines.append(replica(name=f"0-{len(engines)}"))
        return engines[-1]

    supervised = SupervisedEngine(build, MonotonicClock(), Supervision(stall_timeout_s=1.0, backoff_s=0.01))
    up = asyncio.Event()
    supervised.on_change = lambda state, _: up.set() if state is EngineState.UP else None
    log = EventLog()
    await supervised.start(log.sink)
    supervised.submit(make_request("a", output_tokens=100_000, max_new_tokens=100_000), 0)
    await log.tokens("a", 3)
    stopped = await pid_of(engines[0])
    os.kill(stopped, signal.SIGSTOP)
    await log.ended("a")
    assert isinstance(log.error("a"), EngineUnavailable)
    assert "no progress" in str(log.error("a"))
    await asyncio.wait_for(up.wait(), WAIT_S)
    assert len(engines) == 2
    supervised.submit(make_request("b", output_tokens=5), 0)
    await log.ended("b")
    assert log.end("b") is FinishReason.STOP
    await process_ended(stopped)
    await supervised.close()
    assert log.violations == []


@on_ray
async def test_a_ray_of_our_own_listens_to_this_machine_alone() -> None:
    import ray

    assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]


@on_ray
async def test_close_ends_the_process_though_it_is_busy() -> None:
    engine, log = replica(), EventLog()
    await engine.start(log.sink)
    engine.submit(make_request("a", output_tokens=100_000, max_new_tokens=100_000), 0)
    await log.tokens("a", 3)
    pid = await pid_of(engine)
    await engine.close()
    assert isinstance(log.error("a"), EngineUnavailable)
    await process_ended(pid)


OWNER = """
import asyncio
from lmdeploy_slo import config, engines
from lmdeploy_slo.clock import MonotonicClock
async def main():
    engine = engines.Engines(config.load(environ={}, flags={"engine.replicas": 2}), MonotonicClock()).build(0)
    await engine.start(lambda events, at_s: None)
    print((await engine._link._actor.hello.remote())[2], flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@on_ray  # which says whether there can be one
async def test_a_replica_ends_with_the_process_that_owns_it() -> None:
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", OWNER, stdout=asyncio.subprocess.PIPE)
    assert owner.stdout is not None
    pid = int(await asyncio.wait_for(owner.stdout.readline(), WAIT_S))
    owner.kill()
    await owner.wait()
    await process_ended(pid)


# -- side by side, and slow readers -------------------------------------------


@on_ray
async def test_replicas_side_by_side_answer_alike_and_die_alone() -> None:
    engines, logs = [replica(name=str(n)) for n in range(2)], [EventLog(), EventLog()]
    await asyncio.gather(*(engine.start(log.sink) for engine, log in zip(engines, logs)))
    assert await pid_of(engines[0]) != await pid_of(engines[1])
    for engine in engines:
        engine.submit(make_request("same", output_tokens=50), 0)
        engine.submit(make_request("long", output_tokens=100_000, max_new_tokens=100_000), 1)
    for log in logs:
        await log.ended("same")
    assert logs[0].token_ids("same") == logs[1].token_ids("same")
    os.kill(await pid_of(engines[0]), signal.SIGKILL)
    await logs[0].ended("long")
    engines[1].submit(make_request("after", output_tokens=5), 0)
    await logs[1].ended("after")
    assert not logs[1].has_ended("long")
    for engine in engines:
        await engine.close()
    assert logs[0].violations == logs[1].violations == []


@on_ray
async def test_a_slow_reader_costs_bounded_memory_and_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    reading = asyncio.Event()
    next_report = RayLink.next_report

    async def when_reading(link: RayLink) -> bytes:
        await reading.wait()
        return await next_report(link)

    monkeypatch.setattr(RayLink, "next_report", when_reading)
    engine, log = replica(), EventLog()
    await engine.start(log.sink)
    for request_id in "abc":
        engine.submit(make_request(request_id, output_tokens=1000), 0)
    while True:
        statistics: OutboxStatistics = await actor_of(engine).statistics.remote()
        assert statistics.steps <= statistics.max_steps
        if statistics.merges >= 3:
            break
    reading.set()
    await log.ended(*"abc")
    assert [len(log.token_ids(i)) for i in "abc"] == [1000] * 3
    assert all(log.text(i) == engine.tokenizer.decode(log.token_ids(i)) for i in "abc")
    assert max(map(len, (event.token_ids for event in log.events("a")))) > 100
    await engine.close()
    assert log.violations == []


@on_ray
async def test_steps_keep_their_instants_and_none_lies_ahead() -> None:
    clock = MonotonicClock()
    engine, log = replica(engine_with(5e-3), clock=clock), EventLog()
    ahead = []

    def sink(events: Any, at_s: float) -> None:
        ahead.append(at_s > clock.now_s())
        log.sink(events, at_s)

    await engine.start(sink)
    for request_id in "abcd":
        engine.submit(make_request(request_id, output_tokens=40), 0)
    await log.ended(*"abcd")
    assert not any(ahead)
    last = log.token_times_s("a")[-1] - log.token_times_s("a")[0]
    assert last >= 0.9 * 39 * 5e-3
    assert log.token_times_s("a") == log.token_times_s("d")
    await engine.close()
    assert log.violations == []


@on_ray
async def test_a_long_prompt_gets_there() -> None:
    engine, log = replica(), EventLog()
    await engine.start(log.sink)
    engine.submit(make_request("a", prompt_tokens=500_000, output_tokens=3), 0)
    await log.ended("a")
    assert len(log.token_ids("a")) == 3
    await engine.close()


# -- starting -----------------------------------------------------------------


class _Refusing(EmulatedEngine):
    error: Exception = EngineUnavailable("the model cannot be loaded")

    async def start(self, sink: EventSink) -> None:
        logging.getLogger("lmdeploy_slo.test").warning("about to fail")
        raise self.error


class _Misconfigured(_Refusing):
    error = ConfigError("turbomind.nonsense: no such field")


class _Defective(_Refusing):
    error = ZeroDivisionError("a defect")


@on_ray
@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        (_Refusing, EngineUnavailable, "^the model cannot be loaded$"),
        (_Misconfigured, ConfigError, r"^turbomind\.nonsense"),
        (_Defective, EngineUnavailable, "did not start: a defect"),
    ],
)
async def test_an_engine_that_does_not_start_says_why(kind: Any, error: type[Exception], said: str) -> None:
    engine = replica(partial(kind, StepModel(0, 0, 0, 0, 0), EngineLimits()))
    with pytest.raises(error, match=said):
        await engine.start(EventLog().sink)
    await engine.close()


@on_ray
async def test_what_no_machine_has_is_said_at_once() -> None:
    engine = replica(resources=ReplicaResources(cpus=1, gpus=4, custom={"h200": 1}))
    with pytest.raises(EngineUnavailable, match=r"no node has CPU 1 .*GPU 4 \(at most 0\), h200 1 \(at most 0\)"):
        await engine.start(EventLog().sink)
    await engine.close()


@on_ray
async def test_what_is_taken_is_said_after_a_while() -> None:
    first, log = replica(resources=ReplicaResources(cpus=16)), EventLog()
    await first.start(log.sink)
    face = EngineFace(engine_with(0)(clock=MonotonicClock()))
    waits = ray_engine(
        RayCluster(place_timeout_s=1.0),
        engine_with(0),
        face,
        MonotonicClock(),
        resources=ReplicaResources(cpus=1),
        name="1",
    )
    with pytest.raises(EngineUnavailable, match=r"no place for replica 1 within 1 s: it takes CPU 1 \(free 0 of 16\)"):
        await waits.start(log.sink)
    await first.close()


class _Talking(EmulatedEngine):
    async def start(self, sink: EventSink) -> None:
        await super().start(sink)
        log = logging.getLogger("lmdeploy_slo.test")
        log.warning("a word")
        try:
            raise ValueError(" ".join(["a", "secret", "prompt"]))
        except ValueError:
            log.exception("a failure")


@on_ray
async def test_its_log_is_told_here(caplog: pytest.LogCaptureFixture) -> None:
    engine, log = replica(partial(_Talking, StepModel(1e-3, 0, 0, 0, 0), EngineLimits()), name="7"), EventLog()
    await engine.start(log.sink)
    engine.submit(make_request("a", output_tokens=3), 0)
    await log.ended("a")
    await engine.close()
    told = [record.getMessage() for record in caplog.records if record.name == "lmdeploy_slo.test"]
    assert told[0] == "replica 7: a word"
    assert told[1].startswith("replica 7: a failure\n")
    assert told[1].endswith("ValueError")
    assert "a secret prompt" not in caplog.text
