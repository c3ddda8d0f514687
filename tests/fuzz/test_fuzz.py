"""A short run of every target, always the same; `make fuzz` is the long one. And inputs that once broke something."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from outcome import Broken, Target
from runner import Hang, Run, run_one, share
from targets import TARGETS

from lmdeploy_slo.v1 import inference_pb2 as pb

INPUTS = 400
TINY_MS = 5e-324  # 0 in seconds
DEEP = b"[" * 100_000

_CALL = b"\x00\n\n"
_STATUS = pb.GenerateRequest(text="a", stopping=pb.StoppingParams(stop=[""] * 400)).SerializeToString()
FOUND: tuple[tuple[str, bytes], ...] = (
    ("validation", pb.GenerateRequest(text="a", slo=pb.Slo(tpot_ms=TINY_MS)).SerializeToString()),
    ("calls", _CALL + pb.GenerateRequest(text="a", queue_timeout_ms=TINY_MS).SerializeToString()),
    ("calls", _CALL + pb.GenerateRequest(text="a", model="ü" * 4000).SerializeToString()),
    ("calls", _CALL + _STATUS),
    ("calls", b"\x00x-request-id: " + b"r" * 3000 + b"\n\n" + _STATUS),
    ("traces", b'{"timestamp": ' + DEEP),
    ("conversations", b'[{"conversations": ' + DEEP),
    ("timelines", b'{"queued": 1, "prompt_tokens": 7, "first_token": 2}\n{"a": ' + DEEP),
    ("timelines", b'{"queued": 1, "prompt_tokens": 7, "first_token": ' + b"9" * 400 + b"}"),
    ("benchmark tables", b"batch,prompt_tokens,output_tokens,tok_p50_s,ftl_ave_s\n1,128,64,0.01,0\n"),
    ("benchmark tables", b"batch,prompt_tokens,output_tokens,tok_p50_s\n1e308,128,1e308,0.01\n"),
    ("profiles", b'{"format": 1, "name": "\\ud800", "step_ms": {"c0": 4, "p1": 0, "p2": 0, "d1": 0, "d2": 0}}'),
    ("configuration", b"[server]\nport = " + DEEP),
    ("configuration", b"[tasks.chat]\nttft_ms = 5e-324"),
    ("configuration", b'[engine]\nmodel = "m"\n[engine.turbomind]\ntp = inf'),
    ("client policies", b"[default]\nclasses = " + DEEP),
    ("client policies", b"[default]\ntightest_slo = { ttft_ms = 5e-324 }"),
    ("plan snapshots", TARGETS["plan snapshots"].examples[0].replace(b"3000", b"5e-324")),
    ("slo options", b"chat=tpot:5e-324"),
    ("server state", TARGETS["server state"].examples[0].replace(b'"parts": {', b'"parts": {"other": 1e999, ')),
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Warnings of thousands of inputs help nobody."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_comes_in_the_promise_is_kept(name: str) -> None:
    target = TARGETS[name]
    outcomes = {run_one(target, 0, number) for number in range(INPUTS // target.cost)}
    assert len(outcomes) > 1, "every input came to the same: the target looks at nothing"


@pytest.mark.parametrize("number", range(len(FOUND)))
def test_what_once_broke_something_does_not(number: int) -> None:
    name, data = FOUND[number]
    TARGETS[name].take(data)


@pytest.mark.parametrize("name", TARGETS)
def test_the_examples_are_taken(name: str) -> None:
    taken = {TARGETS[name].take(example) for example in TARGETS[name].examples}
    assert taken - {"refused", "no message", "0 parts"}


def test_an_input_depends_on_its_number_alone(tmp_path: Path) -> None:
    """So a run can be interrupted, and what failed is had again."""
    seen: list[str] = []
    target = Target("t", lambda draw: draw.randbytes(4), lambda data: seen.append(data.hex()) or "x", [b""])  # type: ignore[func-returns-value]
    whole = Run(7, tmp_path / "whole.json")
    whole.go_on(target, 0, 10)
    for first, count in ((0, 4), (4, 6)):
        part = Run(7, tmp_path / "parts.json")
        assert part.done["t"] == first
        part.go_on(target, first, count)
        part.save()
    assert seen[:10] == seen[10:] and len(set(seen)) == 10


def test_what_breaks_is_kept_and_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def take(data: bytes) -> str:
        raise (Broken("no") if data == b"broken" else Hang("late"))

    run = Run(1, tmp_path / "progress.json")
    run.go_on(Target("t", lambda draw: b"broken", take, [b""]), 0, 3)
    assert run.broken.total() == 3
    assert [kept.read_bytes() for kept in tmp_path.glob("broken-*")] == [b"broken"]
    assert capsys.readouterr().out.count("--only 't' --from 0 --inputs 1") == 1


def test_dear_targets_get_fewer_inputs() -> None:
    cheap, dear = TARGETS["validation"], TARGETS["calls"]
    shares = share(1_000, [cheap, dear])
    assert shares["validation"] > 2 * shares["calls"] > 0
    assert sum(share(1_000_000, list(TARGETS.values())).values()) >= 1_000_000
