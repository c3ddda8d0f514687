"""Every example runs as it stands, and says what it is meant to show."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serve_process import serve

EXAMPLES = Path(__file__).parent.parent / "examples"
SHOWS = {
    "01_hello.py": r"took \d+ ms, SLO met: (True|False)",
    "02_stream_with_slo.py": r"first token after \d+ ms, then one every [\d.]+ ms\npredicted \d+ ms and [\d.]+ ms",
    "03_async_many_clients.py": r"chat: \d+ of 30 met their SLO\nbatch: \d+ of 30 .*\nthe server finished \d+ requests",
    "04_predict_before_sending.py": r"400 tokens would take \d+ ms: no, .*\n(.*\n)*it took \d+ ms, SLO met: ",
    "05_compare_policies.py": r"fcfs +\d+ of 40 +\d+ ms\nannealing +\d+ of 40 +\d+ ms",
    "06_errors.py": r"wrong field: sampling.temperature .*\nwrong field: slo.e2e_ms .*\ntoo late: .*\nno place: .*\n"
    r"aborted: .*\nat last: 8 tokens",
    "07_embedded_server.py": r"127.0.0.1:\d+ serves emulated with annealing\n.+\nheld to .*ttft_ms=1000",
}
"""Example -> what its output must match somewhere. No figures: they are the machine's."""


def run(name: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, name, *arguments], cwd=EXAMPLES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_every_example_is_here() -> None:
    assert {path.name for path in EXAMPLES.glob("[0-9]*.py")} == set(SHOWS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWS)
def test_runs_by_itself(name: str) -> None:
    output = run(name)
    assert re.search(SHOWS[name], output), output


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(tmp_path_factory.mktemp("serve"), "--policy", "fcfs") as (address, _):
        yield address


@pytest.mark.parametrize("name", ["01_hello.py", "02_stream_with_slo.py", "03_async_many_clients.py"])
def test_runs_against_a_server_that_is_there(name: str, address: str) -> None:
    output = run(name, "--target", address)
    assert re.search(SHOWS[name], output), output
