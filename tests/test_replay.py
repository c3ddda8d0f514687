"""The replayer against a scripted server over real gRPC, and against the gateway itself."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from task_server import TaskServer, served

from lmdeploy_slo.app import serving
from lmdeploy_slo.cli.replay import remarks
from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.config import Config
from lmdeploy_slo.core.metrics import summarize
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.core.slo import NO_SLO, Slo
from lmdeploy_slo.errors import SloError
from lmdeploy_slo.offline.generated import generate_workload
from lmdeploy_slo.offline.replay import Replayed, replay, request_bytes
from lmdeploy_slo.offline.slo_grammar import parse_slo_options
from lmdeploy_slo.offline.workload import OfferedRequest, build_workload
from lmdeploy_slo.v1 import inference_pb2 as pb


def offered(index: int, task: str, due_s: float = 0.0, slo: Slo = NO_SLO) -> OfferedRequest:
    return OfferedRequest(index, due_s, 5, 3, 900, task, slo)


def by_index(replayed: Replayed) -> list[Any]:
    return sorted(replayed.records, key=lambda record: int(record.request_id))


# -- what goes over the wire ----------------------------------------------------------------------------------------


def test_a_request_on_the_wire() -> None:
    request = replace(
        offered(4, "chat", slo=Slo(ttft_s=1.0, tpot_s=0.05)), prompt_tokens=500, expected_output_tokens=17
    )
    (payload,) = request_bytes([request], vocabulary=300, emulation=True)
    message = pb.GenerateRequest.FromString(payload)
    assert message.request_id.endswith("-4")
    assert (message.task_type, message.expected_output_tokens, message.stopping.max_new_tokens) == ("chat", 17, 900)
    assert len(message.token_ids.ids) == 500
    assert all(256 <= token_id < 300 for token_id in message.token_ids.ids)
    assert (message.slo.ttft_ms, message.slo.tpot_ms) == (1000.0, 50.0)
    assert not message.slo.HasField("e2e_ms")
    assert message.emulation.output_tokens == 3
    again = pb.GenerateRequest.FromString(request_bytes([request], vocabulary=300, emulation=True)[0])
    assert again.request_id != message.request_id
    assert again.token_ids == message.token_ids


def test_the_true_length_is_nowhere_on_the_wire_for_an_engine_that_is_not_emulated() -> None:
    request = replace(offered(0, "chat"), output_tokens=123)
    message = pb.GenerateRequest.FromString(request_bytes([request], vocabulary=10, emulation=False)[0])
    assert not message.HasField("emulation")
    assert not message.HasField("slo")
    assert not message.HasField("expected_output_tokens")
    assert message.stopping.max_new_tokens == 900
    assert all(token_id < 10 for token_id in message.token_ids.ids)


# -- how requests end -----------------------------------------------------------------------------------------------


async def test_a_finished_request_is_timed_at_the_client_and_told_by_the_server() -> None:
    server = TaskServer()
    async with served(server) as target:
        replayed = await replay(target, [offered(0, "told", 0.005, Slo(e2e_s=60.0))], clock=MonotonicClock())
    (record,) = replayed.records
    assert (replayed.policy, replayed.synthetic, replayed.interrupted) == ("scripted", True, False)
    assert record.status is EndStatus.FINISHED
    assert record.slo_met is True
    assert record.timing.arrival_at_s == 0.005
    assert record.timing.output_tokens == 3
    assert record.predicted_output_tokens == 7.5
    (late_s,) = replayed.lateness_s
    assert record.timing.queue_s == pytest.approx(late_s + 0.040)
    assert record.timing.first_token_at_s is not None
    assert record.timing.ended_at_s is not None
    assert 0.005 < record.timing.first_token_at_s <= record.timing.ended_at_s
    assert [request.stopping.max_new_tokens for request in server.seen] == [900]


async def test_every_status_becomes_an_end() -> None:
    expected = {
        "RESOURCE_EXHAUSTED": EndStatus.REJECTED,
        "DEADLINE_EXCEEDED": EndStatus.TIMED_OUT,
        "CANCELLED": EndStatus.CANCELLED,
        "INTERNAL": EndStatus.FAILED,
        "UNAVAILABLE": EndStatus.FAILED,
        "INVALID_ARGUMENT": EndStatus.FAILED,
        "empty": EndStatus.FAILED,  # an end without a completion
        "fine": EndStatus.FINISHED,
    }
    slo = Slo(e2e_s=60.0)
    async with served(TaskServer()) as target:
        requests = [offered(index, task, slo=slo) for index, task in enumerate(expected)]
        replayed = await replay(target, requests, clock=MonotonicClock())
    records = by_index(replayed)
    assert [record.status for record in records] == list(expected.values())
    assert [record.slo_met for record in records] == [False, False, None, False, False, False, False, True]
    assert all(record.timing.ended_at_s is not None for record in records)
    assert records[-1].timing.dispatched_at_s is None  # this server did not say
    assert replayed.failures["INTERNAL: as scripted"] == 1
    assert replayed.failures["the stream ended without a completion"] == 1
    assert len(replayed.failures) == 7


async def test_a_hard_limit_ends_a_request_on_both_sides() -> None:
    server = TaskServer()
    async with served(server) as target:
        replayed = await replay(target, [offered(0, "hang")], clock=MonotonicClock(), timeout_s=0.05)
        (record,) = replayed.records
        assert record.status is EndStatus.TIMED_OUT
        await server.let_go.wait()


async def test_stopping_cancels_what_is_open_and_keeps_what_ended() -> None:
    server = TaskServer()
    requests = [offered(0, "fine"), offered(1, "hang"), offered(2, "fine", due_s=3600.0)]
    stop = asyncio.Event()
    finished = asyncio.Event()

    def on_progress(sent: int, ended: int) -> None:
        if ended == 1:
            finished.set()

    async def interrupt() -> None:
        await server.hanging.wait()
        await finished.wait()
        stop.set()

    async with served(server) as target:
        replayed, _ = await asyncio.gather(
            replay(target, requests, clock=MonotonicClock(), stop=stop, on_progress=on_progress), interrupt()
        )
        await server.let_go.wait()
    assert replayed.interrupted
    assert [record.status for record in by_index(replayed)] == [EndStatus.FINISHED, EndStatus.CANCELLED]
    assert remarks(replayed)[-1] == "interrupted: 1 requests were cancelled, later ones were not sent"


async def test_cancelling_the_replay_leaves_nothing_open() -> None:
    server = TaskServer()
    async with served(server) as target:
        before = asyncio.all_tasks()
        running = asyncio.ensure_future(replay(target, [offered(0, "hang")], clock=MonotonicClock()))
        await server.hanging.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        ours = {task for task in asyncio.all_tasks() - before if "lmdeploy_slo/offline" in repr(task.get_coro())}
        assert not ours
        await server.let_go.wait()


class LeapingClock:
    """A clock that can be put forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self._clock = MonotonicClock()

    def now_s(self) -> float:
        return self._clock.now_s() + self.ahead_s


async def test_a_late_replayer_does_not_make_the_server_look_better() -> None:
    clock = LeapingClock()

    def fall_behind(sent: int, ended: int) -> None:
        clock.ahead_s = 100.0

    async with served(TaskServer()) as target:
        requests = [offered(0, "told"), offered(1, "told", due_s=0.001)]
        replayed = await replay(target, requests, clock=clock, on_progress=fall_behind)
    second = by_index(replayed)[1].timing
    assert second.arrival_at_s == 0.001
    assert replayed.lateness_s[1] > 99.9
    assert second.queue_s is not None
    assert second.queue_s > 99.9
    assert second.ttft_s is not None
    assert second.ttft_s > 99.9
    assert "at most 100" in remarks(replayed)[0]


async def test_a_server_that_is_not_there_is_named() -> None:
    async with served(TaskServer()) as target:
        pass
    with pytest.raises(SloError, match=f"--target {target}: "):
        await replay(target, [offered(0, "fine")], clock=MonotonicClock())


# -- the gateway ----------------------------------------------------------------------------------------------------


async def test_a_generated_workload_against_the_gateway(tmp_path: Path) -> None:
    profile = tmp_path / "fast.json"
    step_ms = {"c0": 0.05, "p1": 0.0, "p2": 0.0, "d1": 0.0, "d2": 0.0}
    profile.write_text(json.dumps({"format": 1, "name": "fast", "step_ms": step_ms}))
    scheduler = {"policy": "edf", "length_predictor": "gaussian"}  # which takes hints at their word
    config = Config.model_validate({"engine": {"profile": str(profile)}, "scheduler": scheduler})
    rows = generate_workload(60, seed=1)
    slos = parse_slo_options(["chat=ttft:60000,tpot:60000,e2e:60000"])
    requests = build_workload(rows, slos=slos, speedup=100.0, length_noise=0.3, seed=2)
    async with serving(config) as server:
        replayed = await replay(server.address, requests, clock=MonotonicClock())
        load = server.runtime.load()
    assert (replayed.policy, replayed.synthetic) == ("edf", True)
    assert replayed.failures == {}
    records = by_index(replayed)
    assert [record.timing.output_tokens for record in records] == [row.output_tokens for row in rows]
    assert [record.predicted_output_tokens for record in records] == [
        min(request.expected_output_tokens or 0, request.max_new_tokens) for request in requests
    ]
    for record in records:
        timing = record.timing
        assert record.status is EndStatus.FINISHED
        assert timing.dispatched_at_s is not None
        assert timing.first_token_at_s is not None
        assert timing.ended_at_s is not None
        assert timing.arrival_at_s <= timing.dispatched_at_s <= timing.ended_at_s
        assert timing.first_token_at_s <= timing.ended_at_s
    run = summarize(records, policy=replayed.policy, speedup=100.0, seed=2)
    chat = sum(row.task == "chat" for row in rows)
    assert 0 < chat < 60
    assert (run["offered"], run["finished"], run["with_slo"], run["slo_attainment"]) == (60, 60, chat, 1.0)
    assert run["by_task"]["code"]["slo_attainment"] is None
    assert load.ended[EndStatus.FINISHED] == 60
