"""The command `plan`: its answer alone on stdout, and one line for whatever is wrong with a snapshot."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmdeploy_slo.cli.main import main
from lmdeploy_slo.scheduling.static_planner import RULES

LATENCY = {"prefill": [0.1, 5.7, 0.01, 43.67], "decode": [0.0002, 0.275, 0.00088, 15.85]}


def request(name: Any, prompt_tokens: Any = 100, output_tokens: Any = 300, **slo: Any) -> dict[str, Any]:
    return {"id": name, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "slo": slo or None}


REQUESTS = [
    request("a", 100, 300, e2e_ms=9000),
    request("b", 150, 500, ttft_ms=3000.5, tpot_ms=25),
    request("c", 200, 100),
    request("d", 80, 700, e2e_ms=12000),
    request("e", 80, 200, e2e_ms=4000),
    request(6, 90, 210, e2e_ms=5000),
]


def snapshot(requests: Any = REQUESTS, **changes: Any) -> dict[str, Any]:
    return {"max_batch_size": 4, "latency": LATENCY, "requests": requests, **changes}


class Ended:
    """What became of a command."""

    def __init__(self, status: int, stdout: str, stderr: str) -> None:
        self.status, self.stdout, self.stderr = status, stdout, stderr

    @property
    def answer(self) -> Any:
        assert (self.status, self.stderr) == (0, "")
        assert self.stdout.count("\n") == 1
        return json.loads(self.stdout)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`plan -` with this on stdin: a snapshot, or the text or bytes themselves."""

    def run(given: Any, *options: str) -> Ended:
        text = given if isinstance(given, (str, bytes)) else json.dumps(given)
        stdin = io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode()))
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "argv", ["lmdeploy_slo", "plan", "-", *options])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return run


def test_the_answer_of_a_process_is_json_alone(tmp_path: Path) -> None:
    file = tmp_path / "snapshot.json"
    file.write_text(json.dumps(snapshot()))
    command = [sys.executable, "-m", "lmdeploy_slo", "plan", str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    answer = json.loads(ended.stdout)
    assert list(answer) == ["batches", "objective", "met", "sum_e2e_ms", "evaluations", "elapsed_ms"]
    assert sorted(str(name) for batch in answer["batches"] for name in batch) == ["6", "a", "b", "c", "d", "e"]
    assert answer["objective"] == pytest.approx(answer["met"] / answer["sum_e2e_ms"] * 1e3)
    assert answer["evaluations"] >= 6300
    assert answer["elapsed_ms"] > 0


def test_figures_by_hand(plan: Any) -> None:
    latency = {"prefill": [0, 1, 0, 9], "decode": [0, 2, 0, 8]}  # 9 + b, and 8 + 2 b a token
    requests = [request("long", 1, 10, e2e_ms=1000), request("short", 1, 1, ttft_ms=10, tpot_ms=10)]
    answer = plan(snapshot(requests, latency=latency, max_batch_size=2)).answer
    # alone and first, the short one takes 10 + 10; together both take 11 + 12 a token, which is too slow for it
    assert answer["batches"] == [["short"], ["long"]]
    assert answer["met"] == 2
    assert answer["sum_e2e_ms"] == pytest.approx(20 + 20 + 10 + 100)
    assert answer["objective"] == pytest.approx(2 / 0.15)
    assert plan(snapshot(requests, latency=latency, max_batch_size=2), "--policy", "fcfs").answer["batches"] == [
        ["long", "short"]
    ]


def test_exhaustive_is_the_optimum_that_annealing_finds(plan: Any) -> None:
    best, found = plan(snapshot(), "--exhaustive").answer, plan(snapshot(), "--seed", "3").answer
    assert best["evaluations"] == 4670
    assert found["objective"] == pytest.approx(best["objective"])
    assert plan(snapshot(), "--seed", str(2**64 - 1)).answer["met"] == best["met"]


def test_every_rule_is_a_policy(plan: Any) -> None:
    best = plan(snapshot()).answer["objective"]
    for rule in RULES:
        answer = plan(snapshot(), "--policy", rule).answer
        assert [len(batch) for batch in answer["batches"]] == [4, 2]
        assert answer["evaluations"] == 1
        assert answer["objective"] <= best * (1 + 1e-12)
    assert plan(snapshot(), "--policy", "fcfs").answer["batches"] == [["a", "b", "c", "d"], ["e", 6]]


def test_early_stop(plan: Any) -> None:
    easy = snapshot([request(name, e2e_ms=1e6) for name in "abc"])
    stopped = plan(easy, "--early-stop").answer
    assert len(RULES) < stopped["evaluations"] < 100
    assert plan(easy).answer["evaluations"] == 6300 + stopped["evaluations"]


def test_no_slo_may_be_left_out_null_or_empty(plan: Any) -> None:
    bare = {"id": "x", "prompt_tokens": 1, "output_tokens": 1}
    answer = plan(snapshot([bare, {**bare, "id": "y", "slo": None}, {**bare, "id": "z", "slo": {}}])).answer
    assert (answer["met"], answer["objective"]) == (0, 0.0)
    assert answer["sum_e2e_ms"] > 0


def test_what_was_waited_already_counts(plan: Any) -> None:
    late = [{**request("a", e2e_ms=20_000), "waited_ms": 15_000}, request("b", e2e_ms=20_000)]
    fresh = [request("a", e2e_ms=20_000), request("b", e2e_ms=20_000)]
    late_answer = plan(snapshot(late), "--policy", "fcfs").answer
    fresh_answer = plan(snapshot(fresh), "--policy", "fcfs").answer
    assert (late_answer["met"], fresh_answer["met"]) == (1, 2)
    assert late_answer["sum_e2e_ms"] == pytest.approx(fresh_answer["sum_e2e_ms"] + 15_000)


WRONG_REQUESTS = [
    ([], "requests: "),
    ({}, "requests: "),
    ([request("a"), request("b"), request("a")], "requests[2].id: 'a' is that of requests[0] too"),
    ([request("")], "requests[0].id: must be a string"),
    ([request(None)], "requests[0].id: must be a string"),
    ([request(True)], "requests[0].id: must be a string"),
    ([request("a", 0)], "requests[0].prompt_tokens: Input should be greater than or equal to 1, got 0"),
    ([request("a"), request("b", 1, -3)], "requests[1].output_tokens: Input should be greater than or equal to 1"),
    ([request("a", 1.5)], "requests[0].prompt_tokens: "),
    ([request("a", "12")], "requests[0].prompt_tokens: Input should be a valid integer, got '12'"),
    ([request("a", True)], "requests[0].prompt_tokens: "),
    ([request("a", 10**30)], "requests[0].prompt_tokens: Input should be less than or equal to 10000000"),
    ([request("a", e2e_ms=0)], "requests[0].slo.e2e_ms: Input should be greater than 0, got 0"),
    ([request("a", ttft_ms=-1)], "requests[0].slo.ttft_ms: "),
    ([request("a", tpot_ms=float("nan"))], "requests[0].slo.tpot_ms: Input should be a finite number, got nan"),
    ([request("a", tpot_ms=float("inf"))], "requests[0].slo.tpot_ms: "),
    ([request("a", tpot_ms="50")], "requests[0].slo.tpot_ms: "),
    ([{**request("a"), "waited_ms": -1}], "requests[0].waited_ms: Input should be greater than or equal to 0, got -1"),
    ([request("a", p99_ms=1)], "requests[0].slo.p99_ms: is unknown"),
    ([{**request("a"), "priority": 1}], "requests[0].priority: is unknown"),
    ([{**request("a"), "two\nlines" + 1000 * "-": 1}], "requests[0].two\\nlines---"),
    ([request("a", 1, 1000 * "9")], "requests[0].output_tokens: Input should be a valid integer, got '999"),
    ([{"id": "a", "prompt_tokens": 1}], "requests[0].output_tokens: is missing"),
    (["a"], "requests[0]: must be an object"),
    ([request(str(i)) for i in range(4097)], "requests: List should have at most 4096 items"),
]


@pytest.mark.parametrize(("requests", "told"), WRONG_REQUESTS)
def test_wrong_requests_are_named(plan: Any, requests: Any, told: str) -> None:
    check_refused(plan(snapshot(requests)), f"stdin: {told}")


WRONG_SNAPSHOTS = [
    (snapshot(max_batch_size=0), "max_batch_size: Input should be greater than or equal to 1, got 0"),
    (snapshot(max_batch_size=4.0), "max_batch_size: "),
    (snapshot(max_batch_size=5000), "max_batch_size: Input should be less than or equal to 1024, got 5000"),
    (snapshot(latency={"prefill": [1, 2, 3], "decode": [1, 2, 3, 4]}), "latency.prefill: List should have at least 4"),
    (snapshot(latency={"prefill": [1, 2, 3, -4], "decode": [1, 2, 3, 4]}), "latency.prefill[3]: "),
    (snapshot(latency={"prefill": [1, 2, 3, 4]}), "latency.decode: is missing"),
    (snapshot(latency=None), "latency: must be an object, "),
    (snapshot(seed=3), "seed: is unknown"),
    ([], "the snapshot: must be an object"),
    ("{", "not JSON: "),
    ("", "not JSON: "),
    ('{"max_batch_size": 1, "max_batch_size": 2}', "the key 'max_batch_size' is there twice"),
    (b"\xff\xfe", "not UTF-8 text"),
    ("[" * 100_000, "nested too deeply"),
    ('{"max_batch_size": ' + "9" * 5000 + "}", ""),
]


@pytest.mark.parametrize(("given", "told"), WRONG_SNAPSHOTS)
def test_wrong_snapshots_are_refused(plan: Any, given: Any, told: str) -> None:
    check_refused(plan(given), f"stdin: {told.rstrip(', ')}")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--policy", "slack-guard"), "--policy: 'slack-guard' is not one of annealing, fcfs, fcfs-feasible, sjf"),
        (("--policy", "sjf", "--exhaustive"), "--exhaustive and --early-stop make no sense with a fixed --policy"),
        (("--policy", "sjf", "--early-stop"), "--exhaustive and --early-stop make no sense with a fixed --policy"),
        (("--early-stop", "--exhaustive"), "--exhaustive tries all plans"),
    ],
)
def test_options_that_make_no_sense(plan: Any, options: tuple[str, ...], told: str) -> None:
    check_refused(plan(snapshot(), *options), told)


def test_exhaustive_has_a_limit(plan: Any) -> None:
    nine = snapshot([request(name) for name in "abcdefghi"])
    check_refused(plan(nine, "--exhaustive"), "--exhaustive takes up to 8 requests, the snapshot has 9")


@pytest.mark.parametrize("seed", ["-1", str(2**64), "1.5"])
def test_seeds_have_bounds(plan: Any, seed: str) -> None:
    ended = plan(snapshot(), "--seed", seed)
    assert (ended.status, ended.stdout) == (2, "")
    assert "Traceback" not in ended.stderr


def test_files_that_cannot_be_read(plan: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    for path, told in ((tmp_path / "none.json", "No such file"), (tmp_path, "Is a directory")):
        monkeypatch.setattr(sys, "argv", ["lmdeploy_slo", "plan", str(path)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        check_refused(Ended(int(ended.value.code or 0), captured.out, captured.err), f"{path}: {told}")


def check_refused(ended: Ended, told: str) -> None:
    """Status 2, nothing on stdout, and one line on stderr that begins with this."""
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"lmdeploy_slo: {told}")
    assert ended.stderr.count("\n") == 1
    assert len(ended.stderr) < 400
