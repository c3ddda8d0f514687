"""The committed gRPC code is what `make proto` makes of the .proto file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GENERATED = ["inference_pb2.py", "inference_pb2.pyi", "inference_pb2_grpc.py"]


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("proto")
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iproto"]
    command += [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    run = subprocess.run(
        [*command, "proto/lmdeploy_slo/v1/inference.proto"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return out / "lmdeploy_slo" / "v1"


@pytest.mark.parametrize("name", GENERATED)
def test_committed_code_is_up_to_date(regenerated: Path, name: str) -> None:
    committed = (ROOT / "lmdeploy_slo" / "v1" / name).read_text()
    assert committed == (regenerated / name).read_text(), f"{name} is not what the .proto gives: run `make proto`"


def test_every_rpc_is_described() -> None:
    lines = (ROOT / "proto/lmdeploy_slo/v1/inference.proto").read_text().splitlines()
    rpcs = [number for number, line in enumerate(lines) if line.strip().startswith("rpc ")]
    assert len(rpcs) == 9
    assert all(lines[number - 1].strip().startswith("//") for number in rpcs)
