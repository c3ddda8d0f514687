"""The commands of `profile`: what they print, write and refuse."""

from __future__ import annotations

import hashlib
import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from profiled import profiled

from lmdeploy_slo.cli import profile_run
from lmdeploy_slo.cli.main import main
from lmdeploy_slo.offline.profiler.artifact import Notes, make_profile
from lmdeploy_slo.offline.profiler.profiler import Profiler
from lmdeploy_slo.offline.profiler.target import TargetInfo
from lmdeploy_slo.prediction.profiles import load_profile, profile_names, save_profile
from lmdeploy_slo.testing.builders import A100

TABLE = """batch,prompt_tokens,output_tokens,ftl_ave_s,tok_p50_s
1,128,128,0.022,0.010
1,2048,128,0.139,0.0105
16,128,128,0.1,0.0113
16,2048,128,2.9,0.020
64,128,2048,0.5,0.032
64,2048,2048,39.1,0.047
"""
FAST = {"c0": 1.0, "p1": 0.001, "p2": 0.0, "d1": 0.05, "d2": 0.0}


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The status the process would end with."""
    monkeypatch.setattr(sys, "argv", ["lmdeploy_slo", "profile", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.fixture
def fast(tmp_path: Path) -> tuple[str, ...]:
    """Options of an engine that is measured in a second or two."""
    path = tmp_path / "fast.json"
    path.write_text(json.dumps({"format": "2.0", "name": "fast", "step_ms": FAST}))
    limits = ("--max-batch-size", "2", "--max-prefill-tokens", "64", "--max-session-tokens", "160")
    return "--engine", "emulated", "--profile", str(path), *limits, "--precision", "50", "--budget-s", "20"


def test_list_names_every_shipped_profile_and_its_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "list") == 0
    told = capsys.readouterr().out
    for name in profile_names():
        assert name in told
        assert load_profile(name).source.split()[0] in told


@pytest.mark.parametrize("name", profile_names())
def test_show_tells_what_a_profile_rests_on(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "show", name) == 0
    told = capsys.readouterr().out
    assert "sequences decoding" in told
    assert "bilinear decode" in told
    assert "MAPE" in told
    if name == "a100-llama2-7b-turbomind":
        assert "(51" in told, "a batch of 256 was never measured"


def test_show_of_an_old_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"format": 1, "name": "old", "step_ms": FAST}))
    assert call(monkeypatch, "show", str(path)) == 0
    told = capsys.readouterr().out
    assert "How far the model is off is not known." in told
    assert "not known" in told
    assert call(monkeypatch, "show", str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["format"] == "2.0"
    assert call(monkeypatch, "show", "unknown") == 2


def test_run_measures_writes_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, fast: tuple[str, ...]
) -> None:
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    out, samples, page = (tmp_path / name for name in ("mine.json", "mine.samples.json", "mine.html"))
    assert call(monkeypatch, "run", *fast, "--gpu", "none", "--dtype", "fp16", "-o", str(out)) == 0
    told = capsys.readouterr().out
    assert "this is a profile of the emulation" in told
    found = load_profile(str(out))
    assert (found.name, found.engine, found.gpu, found.dtype) == ("mine", "emulated", "none", "fp16")
    assert found.tensor_parallel == 1
    assert found.date is not None and found.source.startswith("measured by lmdeploy_slo")
    assert found.samples is not None
    assert found.samples.digest == "sha256:" + hashlib.sha256(samples.read_bytes()).hexdigest()
    assert found.fitted_range.batch_size == (1, 2)
    check_page(page)

    before = samples.read_bytes()
    out.unlink()
    assert call(monkeypatch, "run", *fast, "--no-page", "-o", str(out)) == 0
    assert "going on from" in capsys.readouterr().err
    assert samples.read_bytes() == before, "there was nothing left to measure"
    assert load_profile(str(out)).step_ms == found.step_ms

    wider = ("--max-session-tokens", "164")
    assert call(monkeypatch, "run", *fast, *wider, "--no-page", "-o", str(out)) == 2
    assert "is of another" in capsys.readouterr().err


def test_batches_that_do_not_fit_are_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, fast: tuple[str, ...]
) -> None:
    short = ("--max-session-tokens", "48", "--no-page", "-o", str(tmp_path / "mine.json"))
    assert call(monkeypatch, "run", *fast, *short) == 0
    assert "batches of more than 1 were not measured, the engine takes 2" in capsys.readouterr().out.replace("\n", " ")


def test_an_interrupted_run_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, fast: tuple[str, ...]
) -> None:
    async def stopped(self: Profiler, stop: Any = None) -> bool:
        return False

    monkeypatch.setattr(Profiler, "run", stopped)
    out = tmp_path / "mine.json"
    assert call(monkeypatch, "run", *fast, "-o", str(out)) == 130
    told = capsys.readouterr().out.replace("\n", "")
    assert "interrupted: the same command goes on from" in told
    assert not out.exists()


def test_fresh_forgets_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, fast: tuple[str, ...]
) -> None:
    samples = tmp_path / "mine.samples.json"
    samples.write_text("broken")
    out = str(tmp_path / "mine.json")
    assert call(monkeypatch, "run", *fast, "--no-page", "-o", out) == 2
    assert "--fresh measures anew" in capsys.readouterr().err
    assert call(monkeypatch, "run", *fast, "--no-page", "--fresh", "-o", out) == 0
    assert json.loads(samples.read_text())["observations"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either --target HOST:PORT or --engine"),
        (("--target", "a:1", "--engine", "emulated"), "either --target HOST:PORT or --engine"),
        (("--target", "a:1", "--kv-tokens", "5", "--model", "m"), "--model, --kv-tokens: of an engine that is started"),
        (("--engine", "emulated", "--profile", "absent"), "profile 'absent' is unknown"),
        (("--engine", "lmdeploy"), "the engine lmdeploy needs a model"),
        (("--engine", "emulated", "-o", "x.txt"), "a profile is a .json file"),
    ],
)
def test_what_run_refuses(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "run", "-o", "mine.json", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_page_without_matplotlib_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, fast: tuple[str, ...]
) -> None:
    monkeypatch.setattr(profile_run.importlib.util, "find_spec", lambda name: None)
    out, page = str(tmp_path / "mine.json"), str(tmp_path / "page.html")
    assert call(monkeypatch, "run", *fast, "--page", page, "-o", out) == 2
    assert "pip install 'lmdeploy-slo[report]'" in capsys.readouterr().err


def test_a_gateway_with_another_policy_is_warned_of() -> None:
    info = TargetInfo("emulated", "m", True, profiled(A100).profiler._state.limits, None, None, policy="annealing")  # type: ignore[arg-type]
    (line,) = profile_run._warnings(info, profiled(A100, effort=profile_run.Effort(budget_s=1e-6)).state)
    assert "serve with --policy fcfs while it is measured" in line


def test_fit_table_reads_a_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table, out = tmp_path / "table.csv", tmp_path / "mine.json"
    table.write_text(TABLE)
    noted = ("--gpu", "A100", "--lmdeploy-version", "0.2.0")
    assert call(monkeypatch, "fit-table", str(table), "--kv-tokens", "120000", *noted, "-o", str(out)) == 0
    found = load_profile(str(out))
    assert (found.gpu, found.lmdeploy_version) == ("A100", "0.2.0")
    assert "1 left out that the KV cache cannot hold" in found.source
    assert found.errors is not None and found.samples is not None
    assert found.errors.step["decode"].count == 5
    assert found.errors.step["decode"].mape < 0.1
    assert found.samples.digest == "sha256:" + hashlib.sha256(table.read_bytes()).hexdigest()
    assert "MAPE" in capsys.readouterr().out
    assert call(monkeypatch, "fit-table", str(tmp_path / "absent.csv"), "-o", str(out)) == 1


# -- the page -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Ids, what is referred to, and links that lead out."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.inside: set[str] = set()
        self.outside: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id" and value:
                self.ids.append(value)
            elif name in ("href", "xlink:href", "src") and value:
                if value.startswith("#"):
                    self.inside.add(value[1:])
                elif not value.startswith("data:"):
                    self.outside.append(value)


def check_page(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.ids) == len(set(page.ids))
    assert page.inside <= set(page.ids)
    assert page.outside == []
    assert "script" not in page.tags
    return page


def test_the_page_has_every_point_and_is_the_same_for_the_same_samples(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    from lmdeploy_slo.offline.profiler.page import write_page

    run = profiled(A100)
    info = TargetInfo("emulated", "emulated", True, run.state.limits, None, None)  # type: ignore[arg-type]
    run.state.given_up["decode 99 x 99"] = "no reason"
    found = make_profile(run.state, run.profiler.points, info, Notes("mine & yours", "2025-01-31", "a test"))
    save_profile(found.profile, tmp_path / "mine.json")
    for name in ("a.html", "b.html"):
        write_page(tmp_path / name, found, run.state, run.profiler.points, "the command", {"engine": "emulated"})
    text = (tmp_path / "a.html").read_text()
    assert text == (tmp_path / "b.html").read_text()
    check_page(tmp_path / "a.html")
    assert "mine &amp; yours" in text
    for point in run.profiler.points:
        assert point.name in text
    assert text.count("<svg") == 4
    for heading in ("Measured against fitted", "What is left over", "Coefficients", "Errors", "Points"):
        assert f"<h2>{heading}</h2>" in text
