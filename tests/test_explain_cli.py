"""`lmdeploy_slo explain`: the timeline as it reads, and the command against a real server."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from serve_process import serve

from lmdeploy_slo.cli.explain import sent_table, story, to_json
from lmdeploy_slo.client import (
    Client,
    Explanation,
    Objectives,
    Prediction,
    PriorityClass,
    QueuePlace,
    RequestState,
    SentBefore,
    SentRequest,
    Timing,
    WaitTime,
)

NOTHING = Timing(None, None, None, None)
DONE = Timing(3000.0, 3100.0, 20.0, 5100.0)
SENT = SentRequest(3000.0, 0.0, 2, PriorityClass.DEFAULT, 100, 200.0, 90.0, -400.0, 0.25)
OTHER = SentRequest(1000.0, -50.0, 0, PriorityClass.SYSTEM, 4000, 50.5, 210.0, None, 1.5)


def explained(**changes: Any) -> Explanation:
    """A request that waited for three seconds, and ended."""
    values: dict[str, Any] = {
        "request_id": "r1",
        "state": RequestState.ENDED,
        "reason": "stop",
        "task_type": "chat",
        "priority_class": PriorityClass.DEFAULT,
        "prompt_tokens": 100,
        "output_tokens": 101,
        "slo": Objectives(ttft_ms=2000.0),
        "slo_met": False,
        "predicted": Prediction(200.0, 500.0, 600.0, 20.0, 4000.0),
        "timing": DONE,
        "arrival_position": 4,
        "wait": WaitTime(3000.0, 5.0, 2000.0, 995.0),
        "places": (),
        "sent_before": SentBefore(12, 7, 5000, 1234.0, 2.5),
        "dearest": (OTHER,),
        "sent": SENT,
        "complete": True,
    }
    return Explanation(**(values | changes))


def place(at_ms: float, position: int, spare_ms: float | None = None) -> QueuePlace:
    return QueuePlace(at_ms, position, 40, 24, 3, spare_ms)


def test_the_timeline_of_a_request_that_missed() -> None:
    lines = list(story(explained(places=(place(50, 3, 900.0), place(2500, 0, -100.0)))))
    assert lines == [
        "r1 (chat, default): ended (stop), SLO missed",
        "    TTFT within 2,000 ms, 600 expected, was 3,100 ms: missed",
        "",
        "         0 ms  arrived with 100 prompt tokens, behind 4, a wait of 500 ms expected",
        "        50 ms  place 4 of 40, 24 in the engine, 3 sent; 900 ms to spare",
        "     2,500 ms  place 1 of 40, 24 in the engine, 3 sent; too late for its SLO by then",
        "     3,000 ms  sent to the engine, place 3 of its plan, -400 ms to spare",
        "     3,100 ms  first token",
        "     5,100 ms  ended: stop, 101 tokens (~200 expected)",
        "",
        "It waited 3,000 ms: 2,000 ms with the engine full, 995 ms held back with free places in the engine, "
        "5 ms until the first plan.",
        "12 requests were sent before it, 7 of which arrived after it: 5,000 prompt tokens, 1,234 ms of engine time, "
        "at a cost of 2.50 requests met.",
    ]


def test_a_request_that_still_waits() -> None:
    told = explained(
        state=RequestState.WAITING, reason="", output_tokens=None, slo_met=None, timing=NOTHING, sent=None,
        sent_before=SentBefore(0, 0, 0, 0.0, None), dearest=(), task_type="", slo=Objectives(),
    )  # fmt: skip
    lines = list(story(told))
    assert lines[:2] == ["r1 (default): waiting", "    no objectives"]
    assert lines[-2].startswith("It has waited 3,000 ms")
    assert lines[-1] == "Nothing was sent before it."
    assert not any("first token" in line or "ended" in line for line in lines)


def test_forgotten_sums_are_told() -> None:
    assert list(story(explained(complete=False)))[-1].startswith("Some of them are forgotten")


def test_of_many_places_some_are_shown_and_the_turn_always() -> None:
    """Nothing is said twice; the first, the last, and the one where it became too late are there."""
    places = tuple(place(10.0 * n, n % 7, 1000.0 - 17.0 * n) for n in range(100))
    shown = [line for line in story(explained(places=places)) if "place" in line and "sent;" in line]
    assert 10 <= len(shown) <= 20
    assert " 0 ms  place 1 of 40" in shown[0]
    assert " 990 ms" in shown[-1]
    assert sum("590 ms" in line and "too late" in line for line in shown) == 1
    still = tuple(place(10.0 * n, 5) for n in range(100))
    shown = [line for line in story(explained(places=still)) if "place 6" in line]
    assert [line.split(" ms")[0].strip() for line in shown] == ["0", "990"]


def test_what_went_before_it() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(sent_table((OTHER, SENT), "title"))
    (row,) = [line for line in console.export_text().splitlines() if "system" in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "1,000", "-50", "system", "4,000", "~50", "210.0", "-", "1.500",
    ]  # fmt: skip


def test_json_has_names_for_classes() -> None:
    values = json.loads(json.dumps(to_json(explained())))
    assert (values["priority_class"], values["sent"]["priority_class"]) == ("default", "default")
    assert values["dearest"][0]["priority_class"] == "system"
    assert values["state"] == "ended"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lmdeploy_slo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=Path(__file__).parent)


def test_explain_of_a_real_server(tmp_path: Path) -> None:
    """As text and as JSON; unknown ids are told in one line."""
    with serve(tmp_path, "--policy", "fcfs") as (address, _):
        with Client(address) as client:
            client.generate("Hello", max_new_tokens=5, request_id="ours", task_type="chat", ttft_ms=60_000)
            told = client.explain("ours")
        assert (told.reason, told.output_tokens, told.slo_met, told.complete) == ("length", 5, True, True)
        done = run("explain", "ours", "--target", address)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("ours (chat, default): ended (length), SLO met\n")
        assert "sent to the engine" in done.stdout
        as_json = run("explain", "ours", "--target", address, "--json")
        values = json.loads(as_json.stdout)
        assert (values["request_id"], values["state"], values["priority_class"]) == ("ours", "ended", "default")
        assert values["wait"]["total_ms"] == told.wait.total_ms
        unknown = run("explain", "nobody", "--target", address)
        assert (unknown.returncode, unknown.stdout) == (1, "")
        assert unknown.stderr == "lmdeploy_slo: REQUEST_NOT_FOUND: nothing is remembered of a request 'nobody'\n"
