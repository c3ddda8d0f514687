"""The figures of a run, the two files it leaves behind, and the table in the terminal."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lmdeploy_slo.core.metrics import RequestRecord, summarize
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.core.slo import NO_SLO, Slo, Timing
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.offline.report import runs_table
from lmdeploy_slo.offline.results import REQUEST_COLUMNS, check_writable, results_json, write_requests, write_results

RUN_KEYS = [
    *("policy", "speedup", "seed", "offered", "with_slo", "met", "slo_attainment", "finished", "rejected"),
    *("timed_out", "failed", "cancelled", "goodput_rps", "by_task", "ttft_ms", "tpot_ms", "e2e_ms", "queue_ms"),
    "duration_s",
]


def finished(
    name: str, task: str, slo: Slo, arrival_s: float, *, ttft_s: float = 0.5, tokens: int = 11, e2e_s: float = 1.5
) -> RequestRecord:
    timing = Timing(arrival_s, arrival_s + 0.25, arrival_s + ttft_s, arrival_s + e2e_s, tokens)
    return RequestRecord(name, task, 100, slo, timing, EndStatus.FINISHED, 12.5)


def ended(name: str, task: str, slo: Slo, arrival_s: float, status: EndStatus) -> RequestRecord:
    return RequestRecord(name, task, 100, slo, Timing(arrival_s, ended_at_s=arrival_s + 0.125), status)


CHAT = Slo(ttft_s=0.5, tpot_s=0.1)
CODE = Slo(e2e_s=1.0)
RECORDS = [
    finished("0", "chat", CHAT, 0.0),  # exactly at both objectives: met
    finished("1", "chat", CHAT, 1.0, ttft_s=0.75),
    finished("2", "code", CODE, 2.0, tokens=1, e2e_s=0.5),
    finished("3", "bulk", NO_SLO, 3.0),
    ended("10", "chat", CHAT, 4.0, EndStatus.REJECTED),
    ended("9", "chat", CHAT, 4.0, EndStatus.TIMED_OUT),
    ended("6", "code", CODE, 4.0, EndStatus.FAILED),
    ended("7", "code", CODE, 4.0, EndStatus.CANCELLED),
]


def test_the_figures_of_a_run() -> None:
    run = summarize(RECORDS, policy="annealing", speedup=2.0, seed=7)
    assert list(run) == RUN_KEYS
    assert (run["policy"], run["speedup"], run["seed"]) == ("annealing", 2.0, 7)
    assert (run["offered"], run["with_slo"], run["met"]) == (8, 6, 2)  # one without SLO, one cancelled
    assert run["slo_attainment"] == pytest.approx(2 / 6)
    assert [run[s] for s in ("finished", "rejected", "timed_out", "failed", "cancelled")] == [4, 1, 1, 1, 1]
    assert run["goodput_rps"] == pytest.approx(2 / 4.0)
    assert run["by_task"] == {
        "bulk": {"offered": 1, "met": 0, "slo_attainment": None},
        "chat": {"offered": 4, "met": 1, "slo_attainment": 0.25},
        "code": {"offered": 3, "met": 1, "slo_attainment": 0.5},
    }
    assert run["e2e_ms"]["mean"] == pytest.approx((3 * 1500 + 500) / 4)  # of the four that ran to their end
    assert run["tpot_ms"] == pytest.approx({"mean": (100 + 75 + 100) / 3, "p50": 100, "p90": 100, "p99": 100})
    assert run["queue_ms"]["p99"] == pytest.approx(250)
    assert run["duration_s"] == pytest.approx(4.5)  # the request without SLO ended last


def test_what_is_missing_is_null_never_zero() -> None:
    nothing = {"mean": None, "p50": None, "p90": None, "p99": None}
    for records in ([], [ended("0", "chat", NO_SLO, 0.0, EndStatus.FAILED)]):
        run = json.loads(results_json([summarize(records, policy="fcfs", speedup=1.0, seed=0)]))["runs"][0]
        assert run["slo_attainment"] is run["goodput_rps"] is None
        assert [run[m] for m in ("ttft_ms", "tpot_ms", "e2e_ms", "queue_ms")] == [nothing] * 4
    assert run["duration_s"] == 0.125
    assert summarize([], policy="fcfs", speedup=1.0, seed=0)["duration_s"] is None


def test_one_line_per_request(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    write_requests(path, RECORDS)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == REQUEST_COLUMNS
    assert [line["id"] for line in lines] == ["0", "1", "2", "3", "6", "7", "9", "10"]
    assert list(lines[0].values()) == [
        *("0", "0.000", "chat", "100", "11", "12.500", "250.000", "500.000", "100.000", "1500.000", "true", "finished")
    ]
    by_id = {line["id"]: line for line in lines}
    assert by_id["1"]["slo_met"] == "false"
    assert by_id["1"]["dispatched_ms"] == "1250.000"
    assert (by_id["2"]["tpot_ms"], by_id["2"]["slo_met"]) == ("", "true")
    assert by_id["3"]["slo_met"] == ""
    assert list(by_id["10"].values()) == ["10", "4000.000", "chat", "100", *[""] * 6, "false", "rejected"]
    assert (by_id["7"]["slo_met"], by_id["7"]["status"]) == ("", "cancelled")


@given(st.permutations(RECORDS))
def test_the_bytes_do_not_depend_on_the_order_of_ending(records: list[RequestRecord]) -> None:
    def text(of: list[RequestRecord]) -> str:
        return results_json([summarize(of, policy="fcfs", speedup=1.0, seed=0)])

    assert text(records) == text(RECORDS)


def test_files_are_written_and_failures_are_told_before_the_run(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    check_writable([path, None])
    assert not path.exists()
    write_results(path, [summarize(RECORDS, policy="fcfs", speedup=1.0, seed=0)])
    assert path.read_text() == results_json([summarize(RECORDS, policy="fcfs", speedup=1.0, seed=0)])
    check_writable([path])
    assert json.loads(path.read_text())["runs"][0]["policy"] == "fcfs"
    missing = tmp_path / "no" / "where.json"
    with pytest.raises(ConfigError, match=r"where\.json: cannot be written: No such file"):
        check_writable([missing])
    with pytest.raises(ConfigError, match=r"where\.json: cannot be written"):
        write_results(missing, [])
    with pytest.raises(ConfigError, match=r"where\.json: cannot be written"):
        write_requests(missing, [])


@pytest.mark.parametrize("count", [2, 6])
def test_the_table_shows_every_run_with_its_tasks(count: int) -> None:
    runs = [summarize(RECORDS, policy=f"policy{n}", speedup=1.0 + n, seed=0) for n in range(count)]
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(runs_table(runs, title="Two tasks"))
    text = console.export_text()
    for expected in (
        *(f"policy{n}" for n in range(count)),
        "speedup",
        "chat",
        "0.250",
        "bulk",
        "timed out",
        "Two tasks",
    ):
        assert expected in text
    assert "seed" not in text  # the same for all
