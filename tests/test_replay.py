"""The replayer against scripted servers over real gRPC, the command around it, and the gateway itself."""

from __future__ import annotations

import asyncio
import csv
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from lmdeploy_slo.cli.replay import find_traces, remarks
from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.core.slo import NO_SLO, Slo
from lmdeploy_slo.errors import SloError
from lmdeploy_slo.offline.replay import Replayed, replay, request_bytes
from lmdeploy_slo.offline.workload import OfferedRequest
from lmdeploy_slo.v1 import inference_pb2 as pb
from lmdeploy_slo.v1 import inference_pb2_grpc


def offered(index: int, task: str, due_s: float = 0.0, slo: Slo = NO_SLO) -> OfferedRequest:
    return OfferedRequest(index, due_s, 5, 3, 900, task, slo)


class ScriptedServer(inference_pb2_grpc.InferenceServiceServicer):
    """Does with a request what its task is called."""

    def __init__(self) -> None:
        self.seen: list[pb.GenerateRequest] = []
        self.hanging = asyncio.Event()
        self.let_go = asyncio.Event()

    async def GetServerInfo(self, request: Any, context: Any) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(policy="scripted")

    async def GetModelInfo(self, request: Any, context: Any) -> pb.GetModelInfoResponse:
        return pb.GetModelInfoResponse(model="m", engine="emulated", synthetic=True, vocab_size=300)

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        self.seen.append(request)
        task = request.task_type
        if task in grpc.StatusCode.__members__:
            await context.abort(grpc.StatusCode[task], "as scripted")
        if task == "empty":
            return
        yield pb.GenerateStreamResponse(token_ids=[1, 2])
        if task == "hang":
            self.hanging.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.let_go.set()
        completion = pb.Completion(usage=pb.Usage(output_tokens=request.emulation.output_tokens))
        if task == "told":
            completion.timing.queue_ms = 40.0
            completion.predicted.output_tokens = 7.5
        yield pb.GenerateStreamResponse(token_ids=[3], completion=completion)


@asynccontextmanager
async def served(servicer: inference_pb2_grpc.InferenceServiceServicer) -> AsyncIterator[str]:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


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
    server = ScriptedServer()
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
    async with served(ScriptedServer()) as target:
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
    server = ScriptedServer()
    async with served(server) as target:
        replayed = await replay(target, [offered(0, "hang")], clock=MonotonicClock(), timeout_s=0.05)
        (record,) = replayed.records
        assert record.status is EndStatus.TIMED_OUT
        await server.let_go.wait()


async def test_stopping_cancels_what_is_open_and_keeps_what_ended() -> None:
    server = ScriptedServer()
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
    server = ScriptedServer()
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

    async with served(ScriptedServer()) as target:
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
    async with served(ScriptedServer()) as target:
        pass
    with pytest.raises(SloError, match=f"--target {target}: "):
        await replay(target, [offered(0, "fine")], clock=MonotonicClock())


# -- the command ----------------------------------------------------------------------------------------------------

TRACE = "arrival_s,input_tokens,output_tokens,task_class\n0,100,3,told\n0.01,200,4,RESOURCE_EXHAUSTED\n"


async def run_command(*arguments: str, interrupt_on: asyncio.Event | None = None) -> tuple[int, str, str]:
    """(status, stdout, stderr) of `lmdeploy_slo` in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lmdeploy_slo", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    if interrupt_on is not None:
        await interrupt_on.wait()
        process.send_signal(signal.SIGINT)
    stdout, stderr = await process.communicate()
    assert process.returncode is not None
    return process.returncode, stdout.decode(), stderr.decode()


async def test_the_command_writes_both_files_and_prints_the_table(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(TRACE)
    server = ScriptedServer()
    async with served(server) as target:
        status, stdout, stderr = await run_command(
            *("replay", "trace.csv", "--traces", str(tmp_path), "--target", target, "--speedup", "2"),
            *("--slo", "default=e2e:60000", "--length-noise", "0", "--seed", "5"),
            *("--json", str(tmp_path / "out.json"), "--requests-out", str(tmp_path / "out.csv")),
        )
    assert status == 0, stderr
    assert sorted(request.expected_output_tokens for request in server.seen) == [3, 4]
    (run,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert (run["policy"], run["speedup"], run["seed"]) == ("scripted", 2.0, 5)
    assert (run["offered"], run["met"], run["finished"], run["rejected"], run["slo_attainment"]) == (2, 1, 1, 1, 0.5)
    with (tmp_path / "out.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["arrival_ms"], line["status"]) for line in lines] == [("0.000", "finished"), ("5.000", "rejected")]
    for expected in ("SLO attainment", "0.500", "sent late by p50", "1 x RESOURCE_EXHAUSTED: as scripted"):
        assert expected in stdout


async def test_an_interrupted_command_still_writes_what_ended(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("arrival_s,input_tokens,output_tokens,task_class\n0,9,3,hang\n3600,9,3,told\n")
    server = ScriptedServer()
    async with served(server) as target:
        status, stdout, stderr = await run_command(
            *("replay", str(tmp_path / "trace.csv"), "--target", target, "--json", str(tmp_path / "out.json")),
            interrupt_on=server.hanging,
        )
    assert status == 130, stderr
    assert "interrupted: 1 requests were cancelled" in stdout
    (run,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert (run["offered"], run["cancelled"], run["slo_attainment"]) == (1, 1, None)


async def test_what_is_wrong_is_said_in_one_line_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(TRACE)
    for arguments, message in (
        (("trace.csv", "--slo", "code"), "--slo 'code': expected TASK="),
        (("trace.csv",), "trace.csv: No such file"),
        ((str(tmp_path / "trace.csv"), "--json", str(tmp_path / "no" / "out")), "out: cannot be written"),
    ):
        status, stdout, stderr = await run_command("replay", *arguments, "--target", "127.0.0.1:1")
        assert status in (1, 2)
        assert stdout == ""
        assert len(stderr.splitlines()) == 1
        assert message in stderr


def test_a_trace_is_looked_for_in_the_folder_only_where_it_does_not_exist_as_named(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(TRACE)
    assert find_traces(["trace.csv", "other.csv"], tmp_path) == [tmp_path / "trace.csv", Path("other.csv")]
    assert find_traces([str(tmp_path / "trace.csv")], Path("/elsewhere")) == [tmp_path / "trace.csv"]
