"""Servers that another gRPC implementation talks to: `make test-interop`. Without grpclib the tests are skipped.

The server is a process of its own in .venv; of this package only the generated messages are used here.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
READY = re.compile(r"lmdeploy_slo: serving on 127\.0\.0\.1:(\d+) ")
PYTHON = ROOT / ".venv/bin/python"


@pytest.fixture(scope="session")
def pb() -> ModuleType:
    """The messages, from their file: the package itself needs grpcio."""
    spec = importlib.util.spec_from_file_location("inference_pb2", ROOT / "lmdeploy_slo/v1/inference_pb2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["inference_pb2"] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[int]:
    """The port of a server with an emulated engine and steps of 1 ms."""
    profile = folder / "profile.json"
    step = {"c0": 1.0, "p1": 0.0, "p2": 0.0, "d1": 0.0, "d2": 0.0}
    profile.write_text(json.dumps({"format": 1, "name": "fast", "step_ms": step}))
    command = [str(PYTHON), "-m", "lmdeploy_slo", "serve", "--port", "0", "--profile", str(profile), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            ready = READY.match(line := process.stdout.readline())
            assert ready, f"no ready line but {line!r}"
            yield int(ready[1])
        finally:
            process.kill()


@pytest.fixture(scope="session")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    flags = ("--max-queued-requests", "4", "--max-batch-size", "2", "--max-session-tokens", "200000")
    with serving(tmp_path_factory.mktemp("server"), *flags) as bound:
        yield bound
