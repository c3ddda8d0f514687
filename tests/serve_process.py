"""A real server in a process of its own: the emulated engine, as fast as the machine allows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READY = re.compile(r"lmdeploy_slo: serving on (\S+:\d+) ")


@contextmanager
def serve(folder: Path, *flags: str, step_ms: float = 1.0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(address, process) of `lmdeploy_slo serve` with steps of `step_ms`; killed at the end if it still runs."""
    profile = folder / "profile.json"
    step = {"c0": step_ms, "p1": 0.0, "p2": 0.0, "d1": 0.0, "d2": 0.0}
    profile.write_text(json.dumps({"format": 1, "name": "fast", "step_ms": step}))
    command = [sys.executable, "-m", "lmdeploy_slo", "serve", "--port", "0", "--profile", str(profile), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            ready = READY.match(line := process.stdout.readline())
            assert ready, f"no ready line but {line!r}"
            yield ready[1], process
        finally:
            process.kill()
