"""The commands `replay` and `demo` in processes of their own."""

from __future__ import annotations

import asyncio
import csv
import json
import signal
import sys
from pathlib import Path

import pytest
import typer
from task_server import TaskServer, served
from typer.testing import CliRunner

from lmdeploy_slo.cli.demo import demo_workload, running_server
from lmdeploy_slo.cli.replay import find_traces, replay
from lmdeploy_slo.errors import SloError

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
    server = TaskServer()
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
    server = TaskServer()
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
        ((str(tmp_path / "trace.csv"), "--slo", "tole=e2e:9"), "--slo tole=...: no request of the trace has this task"),
        (("trace.csv",), "trace.csv: No such file"),
        ((str(tmp_path / "trace.csv"), "--json", str(tmp_path / "no" / "out")), "out: cannot be written"),
    ):
        status, stdout, stderr = await run_command("replay", *arguments, "--target", "127.0.0.1:1")
        assert status in (1, 2)
        assert stdout == ""
        assert len(stderr.splitlines()) == 1
        assert message in stderr


@pytest.mark.parametrize("wrong", [("--timeout-s", "inf"), ("--timeout-s", "0"), ("--target", "here")])
def test_replay_and_generate_refuse_the_same_targets_and_time_limits(wrong: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(TRACE)
    command = typer.Typer()
    command.command()(replay)
    result = CliRunner().invoke(command, [str(tmp_path / "trace.csv"), *wrong])
    assert result.exit_code == 2
    assert wrong[0] in result.output


def test_a_trace_is_looked_for_in_the_folder_only_where_it_does_not_exist_as_named(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(TRACE)
    assert find_traces(["trace.csv", "other.csv"], tmp_path) == [tmp_path / "trace.csv", Path("other.csv")]
    assert find_traces([str(tmp_path / "trace.csv")], Path("/elsewhere")) == [tmp_path / "trace.csv"]


# -- the demo -------------------------------------------------------------------------------------------------------


def test_the_demo_offers_what_is_due_in_its_time() -> None:
    requests = demo_workload(10.0, seed=8)
    assert requests[-1].due_s <= 10.0
    assert demo_workload(20.0, seed=8)[len(requests)].due_s > 10.0
    assert {request.task for request in requests} == {"code", "chat"}
    assert all(request.slo.has_objective and request.expected_output_tokens for request in requests)


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(SloError, match=r"did not start: .*no-such-policy"), running_server("no-such-policy", 1):
        pass


@pytest.mark.slow
async def test_the_demo_ends_with_both_policies_side_by_side(tmp_path: Path) -> None:
    status, stdout, stderr = await run_command("demo", "--seconds", "1", "--json", str(tmp_path / "out.json"))
    assert status == 0, stderr
    runs = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [run["policy"] for run in runs] == ["fcfs", "annealing"]
    assert runs[0]["offered"] == runs[1]["offered"] == runs[0]["finished"] == runs[1]["finished"] > 0
    assert "SLO attainment" in stdout
    assert "annealing" in stdout
