"""The examples that need LMDeploy run as they stand, without a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "with_lmdeploy"
SHOWS = {
    "01_pipeline.py": r"Summarise this\. +SLO met: (True|False), \d+ tokens in \d+ ms\n"
    r"(.|\n)*Write a long story\. +SLO met: None(.|\n)*\nSLO met: (True|False)\n",
    "02_openai_client.py": r"serving on .*HTTP on 127\.0\.0\.1:\d+\)\n(['\"]).+\1\n.+\n",
}


def test_every_example_is_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SHOWS)


@pytest.mark.parametrize("name", SHOWS)
def test_runs_by_itself(name: str) -> None:
    done = subprocess.run([sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(SHOWS[name], done.stdout), done.stdout
