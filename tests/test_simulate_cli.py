"""`lmdeploy_slo simulate`: the files it leaves, their bytes, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmdeploy_slo.cli.main import main
from lmdeploy_slo.offline.results import REQUEST_COLUMNS
from lmdeploy_slo.offline.traces import read_traces
from lmdeploy_slo.offline.workload import draw_hints

SLOS = ("--slo", "code=e2e:2000", "--slo", "default=ttft:500,tpot:50")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The status the process would end with."""
    monkeypatch.setattr(sys, "argv", ["lmdeploy_slo", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    lines = ["arrival_s,input_tokens,output_tokens,task_class"]
    lines += [
        f"{n * 0.07:.3f},{200 + 37 * (n % 11) ** 2},{1 + n * 13 % 97},{['code', 'chat'][n % 2]}" for n in range(80)
    ]
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def runs_of(path: Path) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"]
    return runs


def test_one_entry_and_one_request_file_per_policy_and_speedup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, trace: str
) -> None:
    out, requests = tmp_path / "out.json", tmp_path / "requests.csv"
    arguments = (
        "--policy",
        "fcfs,slack-guard",
        "--speedup",
        "1,2.5",
        "--json",
        str(out),
        "--requests-out",
        str(requests),
    )
    assert call(monkeypatch, "simulate", trace, *SLOS, *arguments) == 0
    runs = runs_of(out)
    assert [(run["policy"], run["speedup"]) for run in runs] == [
        ("fcfs", 1.0),
        ("slack-guard", 1.0),
        ("fcfs", 2.5),
        ("slack-guard", 2.5),
    ]
    assert all(run["offered"] == run["with_slo"] == run["finished"] == 80 for run in runs)
    assert {file.name for file in tmp_path.glob("requests*")} == {
        "requests.fcfs.x1.csv",
        "requests.fcfs.x2.5.csv",
        "requests.slack-guard.x1.csv",
        "requests.slack-guard.x2.5.csv",
    }
    with (tmp_path / "requests.fcfs.x2.5.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == REQUEST_COLUMNS
    assert lines[1]["arrival_ms"] == "28.000"
    table = capsys.readouterr().out
    assert "slack-guard x2.5: simulated in" in table
    assert "SLO attainment" in table


@pytest.mark.parametrize("policy", ["fcfs", "annealing"])
def test_the_same_seed_gives_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trace: str, policy: str
) -> None:
    files = []
    for name in ("a", "b"):
        out, requests = tmp_path / f"{name}.json", tmp_path / f"{name}.csv"
        arguments = (
            "--policy",
            policy,
            "--speedup",
            "3",
            "--length-noise",
            "0.4",
            "--seed",
            "7",
            "--plan-evaluations",
            "80",
        )
        assert (
            call(monkeypatch, "simulate", trace, *SLOS, *arguments, "--json", str(out), "--requests-out", str(requests))
            == 0
        )
        files.append(out.read_bytes() + requests.read_bytes())
    assert files[0] == files[1]


def test_hints_are_those_of_the_replayer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trace: str) -> None:
    requests = tmp_path / "requests.csv"
    noise = ("--length-noise", "0.4", "--length-bias", "2", "--seed", "3")
    at_their_word = ("--policy", "fcfs", "--length-predictor", "gaussian", "--requests-out", str(requests))
    assert call(monkeypatch, "simulate", trace, *noise, *at_their_word) == 0
    rows = read_traces([trace])
    hints, longest = draw_hints(rows, sigma=0.4, bias=2.0, seed=3), max(row.output_tokens for row in rows)
    with requests.open(newline="") as file:
        predicted = [float(line["predicted_output_tokens"]) for line in csv.DictReader(file)]
    assert predicted == [min(hint, longest) for hint in hints]


def test_without_noise_the_lengths_are_learnt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trace: str) -> None:
    requests = tmp_path / "requests.csv"
    assert call(monkeypatch, "simulate", trace, "--policy", "fcfs", "--requests-out", str(requests)) == 0
    with requests.open(newline="") as file:
        predicted = [float(line["predicted_output_tokens"]) for line in csv.DictReader(file)]
    assert predicted[0] == max(row.output_tokens for row in read_traces([trace]))  # the prior is cut at the longest
    assert len(set(predicted)) > 5


def test_lengths_may_be_foretold_as_in_the_paper(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    foretold = {}
    for name in ("learned", "gaussian"):
        file = tmp_path / f"{name}.csv"
        options = ("--policy", "fcfs", "--length-predictor", name, "--requests-out", str(file))
        assert call(monkeypatch, "simulate", trace, *options) == 0
        with file.open(newline="") as lines:
            foretold[name] = [line["predicted_output_tokens"] for line in csv.DictReader(lines)]
    assert foretold["learned"] != foretold["gaussian"]
    assert call(monkeypatch, "simulate", trace, "--length-predictor", "guess") != 0
    assert "choose one of learned, gaussian" in capsys.readouterr().err


def test_what_the_planner_believes_changes_its_plans_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trace: str
) -> None:
    def run(policy: str, *more: str) -> dict[str, Any]:
        out = tmp_path / "out.json"
        assert (
            call(monkeypatch, "simulate", trace, *SLOS, "--policy", policy, "--speedup", "4", *more, "--json", str(out))
            == 0
        )
        return runs_of(out)[0]

    slow = ("--planner-scale", "3")
    assert run("fcfs") == run("fcfs", *slow) == run("fcfs", "--planner-profile", "a100-llama2-7b-turbomind")
    assert run("slack-guard") != run("slack-guard", *slow)
    assert run("fcfs") != run("fcfs", "--profile", "h200-qwen2.5-7b")


def test_more_instances_and_kv_memory_help(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trace: str) -> None:
    def mean_e2e_ms(*more: str) -> float:
        out = tmp_path / "out.json"
        assert (
            call(monkeypatch, "simulate", trace, "--policy", "fcfs", "--speedup", "20", *more, "--json", str(out)) == 0
        )
        return float(runs_of(out)[0]["e2e_ms"]["mean"])

    assert mean_e2e_ms("--instances", "4") < mean_e2e_ms() < mean_e2e_ms("--kv-tokens", "9000")


def test_a_fleet_of_different_engines_is_named_by_profiles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, trace: str
) -> None:
    def run(*more: str) -> dict[str, Any]:
        out = tmp_path / "out.json"
        assert call(monkeypatch, "simulate", trace, *SLOS, "--speedup", "8", *more, "--json", str(out)) == 0
        return runs_of(out)[0]

    mixed = run("--profile", "a100-qwen2.5-7b,h200-qwen2.5-7b*2@90000", "--placement", "least-work")
    assert mixed["placement"] == "least-work"
    assert [one["profile"] for one in mixed["by_instance"]] == ["a100-qwen2.5-7b", *["h200-qwen2.5-7b"] * 2]
    assert sum(one["requests"] for one in mixed["by_instance"]) == 80
    assert sum(one["met"] for one in mixed["by_instance"]) == mixed["met"]
    told = capsys.readouterr().out
    assert "1 instances of a100-qwen2.5-7b" in told
    assert "2 instances of h200-qwen2.5-7b" in told
    repeated = run("--profile", "a100-qwen2.5-7b,h200-qwen2.5-7b", "--instances", "3")
    assert [one["profile"][:4] for one in repeated["by_instance"]] == ["a100", "h200", "a100"]
    assert "by_instance" not in run()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--profile", "a100-qwen2.5-7b*0"), "NAME*N@KV is expected"),
        (("--profile", "a100-qwen2.5-7b*two"), "NAME*N@KV is expected"),
        (("--profile", "a100-qwen2.5-7b,"), "NAME*N@KV is expected"),
        (("--profile", "a100-qwen2.5-7b*3", "--planner-profile", "h200-qwen2.5-7b*2"), "names 2 engines, --profile 3"),
        (("--placement", "nearest"), "placement: 'nearest' is unknown; choose one of slo, round-robin"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trace: str,
    arguments: tuple[str, ...],
    text: str,
) -> None:
    assert call(monkeypatch, "simulate", trace, *arguments) != 0
    assert text in " ".join(capsys.readouterr().err.split())


def test_prefix_cache_hits_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 1000 * n, "input_length": 1024, "output_length": 2, "hash_ids": [1, 10 + n]} for n in range(4)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert call(monkeypatch, "simulate", str(trace), "--policy", "fcfs", "--prefix-cache-tokens", "100000") == 0
    assert "37.5% of prompt tokens cached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "fcfs,best"), "--policy: 'best' is unknown"),
        (("--policy", "fcfs,fcfs"), "--policy: fcfs is named twice"),
        (("--speedup", "1,fast"), "--speedup: cannot read 'fast'"),
        (("--speedup", "0"), "--speedup: must be a positive number"),
        (("--slo", "chta=ttft:500"), "--slo chta=...: no request of the trace has this task"),
        (("--planner-scale", "0"), "--planner-scale: must be a positive number"),
        (("--profile", "a100"), "profile 'a100' is unknown"),
        (("--json", "/nowhere/out.json"), "cannot be written"),
    ],
)
def test_mistakes_are_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trace: str,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert call(monkeypatch, "simulate", trace, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_report_without_matplotlib_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, trace: str
) -> None:
    for module in ("lmdeploy_slo.offline.html_report", "lmdeploy_slo.offline.plots"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it raises
    assert call(monkeypatch, "simulate", trace, "--policy", "fcfs", "--report", str(tmp_path / "report")) == 2
    captured = capsys.readouterr()
    assert "pip install 'lmdeploy-slo[report]'" in captured.err
    assert captured.out == ""


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_process(tmp_path: Path, trace: str) -> None:
    files = []
    for number, hash_seed in enumerate(("0", "1")):
        out, requests = tmp_path / f"{number}.json", tmp_path / f"{number}.csv"
        command = [sys.executable, "-m", "lmdeploy_slo", "simulate", trace, *SLOS, "--policy", "annealing,slack-guard"]
        outputs = ["--instances", "2", "--speedup", "8", "--json", str(out), "--requests-out", str(requests)]
        environ = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run([*command, *outputs], check=True, capture_output=True, env=environ)
        files.append([path.read_bytes() for path in (out, *sorted(tmp_path.glob(f"{number}.*.csv")))])
    assert len(files[0]) == 3
    assert files[0] == files[1]
