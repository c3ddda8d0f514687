"""The page of `simulate --report`: whole in itself, the same for the same runs, and clean in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lmdeploy_slo.cli.main import main
from lmdeploy_slo.core.metrics import RequestRecord, summarize
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.core.slo import NO_SLO, Slo, Timing
from lmdeploy_slo.errors import ConfigError

pytest.importorskip("matplotlib", reason="the extra report is not installed")
from lmdeploy_slo.offline import plots
from lmdeploy_slo.offline.html_report import Report, check_folder, write_report
from lmdeploy_slo.offline.plots import Case

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "link", "input", "br", "img"}

SLOS = ("--slo", "code=e2e:2000", "--slo", "chat=ttft:500,tpot:50")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The status the process would end with."""
    monkeypatch.setattr(sys, "argv", ["lmdeploy_slo", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = ["arrival_s,input_tokens,output_tokens,task_class"]
    lines += [
        f"{n * 0.05:.3f},{200 + 37 * (n % 11) ** 2},{1 + n * 13 % 97},{['code', 'chat'][n % 2]}" for n in range(90)
    ]
    path = tmp_path_factory.mktemp("trace") / "trace.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def report(trace: Path) -> Path:
    """The folder of a report of two policies at two loads."""
    folder = trace.parent / "report"
    with pytest.MonkeyPatch.context() as monkeypatch:
        arguments = ("--policy", "fcfs,slack-guard", "--speedup", "1,3", *SLOS, "--report", str(folder))
        assert call(monkeypatch, "simulate", str(trace), *arguments) == 0
    return folder


class Page(HTMLParser):
    """Ids, references and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: Counter[str] = Counter()
        self.references: set[str] = set()
        self.links: list[str] = []
        self.tags: Counter[str] = Counter()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        self._note(attributes)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self._note(attributes)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _note(self, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id":
                self.ids[value or ""] += 1
            elif name in ("href", "xlink:href", "src", "for"):
                (self.references.add(value[1:]) if value and value.startswith("#") else self.links.append(value or ""))
            self.references |= set(re.findall(r"url\(#([^)]+)\)", value or ""))


def test_the_page_is_whole_and_needs_nothing_from_outside(report: Path) -> None:
    text = (report / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert [name for name, count in page.ids.items() if count > 1] == []
    assert page.references <= set(page.ids)
    assert [link for link in page.links if link != "data:," and link not in page.ids] == []
    assert page.tags["script"] == 0
    assert page.tags["svg"] == 2 + 3 * 2  # of the whole grid, and of each load
    assert "http" not in text.replace("http://www.w3.org/", "")


def test_the_page_tells_the_figures_and_how_to_get_them_again(report: Path, trace: Path) -> None:
    text = (report / "index.html").read_text(encoding="utf-8")
    for expected in ("slack-guard", "SLO attainment", "x3", "seed", "2 ms", "a100-qwen2.5-7b", "code=e2e:2000"):
        assert expected in text
    assert f"lmdeploy_slo simulate {trace} --policy fcfs,slack-guard --speedup 1,3" in text


def test_every_plot_is_a_png_as_well(report: Path) -> None:
    names = {path.stem for path in report.glob("*.png")}
    assert names == {"attainment", "frontier"} | {
        f"{plot}-{load}" for plot in ("latency", "load", "gantt") for load in ("x1", "x3")
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in report.glob("*.png"))


def test_the_same_runs_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trace: Path) -> None:
    monkeypatch.chdir(tmp_path)
    pages = []
    for _ in range(2):
        assert call(monkeypatch, "simulate", str(trace), "--policy", "fcfs", *SLOS, "--report", "report") == 0
        pages.append({path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()})
        shutil.rmtree(tmp_path / "report")
    assert pages[0] == pages[1]


def ended(name: str, status: EndStatus, slo: Slo = NO_SLO) -> RequestRecord:
    return RequestRecord(name, "", 10, slo, Timing(float(name), ended_at_s=float(name) + 0.5), status)


@pytest.mark.parametrize("slo", [NO_SLO, Slo(ttft_s=1.0)])
def test_runs_in_which_nothing_finished_can_be_looked_at(tmp_path: Path, slo: Slo) -> None:
    records = [ended(str(n), EndStatus.REJECTED if n else EndStatus.FAILED, slo) for n in range(3)]
    case = Case("fcfs", 1.0, summarize(records, policy="fcfs", speedup=1.0, seed=0), records)
    page = write_report(tmp_path / "report", Report("title <&>", "sub", [case], {"a": "<b>"}, "again --x '<'"))
    text = page.read_text(encoding="utf-8")
    assert "title &lt;&amp;&gt;" in text
    assert Page(text).open == []


def test_policies_keep_their_colours_and_differ() -> None:
    names = ["annealing", *(f"p{n}" for n in range(8))]
    colours = plots.colours(names)
    assert len(set(colours.values())) == len(names)
    assert plots.colours(["x", "annealing"])["annealing"] == colours["annealing"]
    assert len(plots.colours([f"p{n}" for n in range(30)])) == 30


def test_a_folder_that_cannot_be_written_is_told_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        check_folder(tmp_path / "file" / "report")


# -- in a browser ---------------------------------------------------------------------------------------------------


def console_messages(page: Path, profile: Path) -> list[str]:
    """What the browser writes to its console on the page; a picture of it lies beside the page afterwards."""
    assert CHROMIUM is not None
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={profile}", "--enable-logging=stderr", "--window-size=1300,3000"),
        *(f"--screenshot={page.with_suffix('.shot.png')}", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_browser_has_nothing_to_complain_about(report: Path, tmp_path: Path) -> None:
    import matplotlib.image

    broken = tmp_path / "broken.html"
    broken.write_text("<!DOCTYPE html><title>x</title><script>nowhere()</script>")
    assert any("nowhere" in line for line in console_messages(broken, tmp_path / "profile"))  # it would be seen
    page = report / "index.html"
    assert console_messages(page, tmp_path / "profile") == []
    picture = matplotlib.image.imread(page.with_suffix(".shot.png"))
    assert picture.shape[:2] == (3000, 1300)
    for band in range(0, 2400, 400):  # something is drawn everywhere
        assert picture[band : band + 400].std() > 0.02
