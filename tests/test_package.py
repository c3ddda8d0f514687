"""What `pip install` gives, away from the checkout: package data, commands, and no heavy import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROFILES = ROOT / "lmdeploy_slo/prediction/profiles"
HEAVY = {"lmdeploy", "torch", "transformers", "ray", "matplotlib", "opentelemetry"}
# What needs an extra, or pytest, and is imported only where that is there.
NOT_BASE = (
    "lmdeploy_slo.__main__",
    "lmdeploy_slo.engine.cpu_standin",
    "lmdeploy_slo.engine.lmdeploy",
    "lmdeploy_slo.engine.ray",
    "lmdeploy_slo.engine.transformers",
    "lmdeploy_slo.observability.tracing",
    "lmdeploy_slo.offline.html_page",
    "lmdeploy_slo.offline.html_report",
    "lmdeploy_slo.offline.plots",
    "lmdeploy_slo.offline.profiler.page",
    "lmdeploy_slo.testing.engine_contract",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)], cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel; dependencies are those of the running one."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(home, with_pip=True)
    executable = home / "bin" / "python"
    run([str(executable), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], cwd=home)
    (site,) = home.glob("lib/python*/site-packages")
    # A directory added like this has none of its own .pth files read: the checkout stays out.
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return executable


def run(command: list[str], cwd: Path, stdin: str = "") -> str:
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LMDEPLOY_SLO_"))}
    done = subprocess.run(command, cwd=cwd, env=environ, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_dependencies_are_light(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    base = {r.name for r in required if r.marker is None or "extra" not in str(r.marker)}
    assert {"numpy", "numba", "grpcio", "protobuf", "pydantic"} <= base
    assert not base & HEAVY
    turbomind = {r.name: str(r.specifier) for r in required if 'extra == "turbomind"' in str(r.marker)}
    assert turbomind == {"lmdeploy": "==0.18.0", "torch": ""}
    assert set(metadata.get_all("Provides-Extra", [])) >= {"turbomind", "ray", "report", "otel", "dev"}


def test_data_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "lmdeploy_slo/py.typed" in names
    assert "lmdeploy_slo/v1/inference_pb2.pyi" in names
    assert {f"lmdeploy_slo/prediction/profiles/{path.name}" for path in PROFILES.iterdir()} <= names
    patches = {f"lmdeploy_slo/_patches/{p.relative_to(ROOT / 'patches')}" for p in (ROOT / "patches").rglob("*.*")}
    assert patches <= names


def test_imports_come_from_the_wheel_and_are_light(python: Path, tmp_path: Path) -> None:
    """Every module of the base install can be imported where none of the heavy packages is."""
    script = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({sorted(HEAVY)!r}))  # importing one of them raises
import lmdeploy_slo
print(lmdeploy_slo.__file__)
for module in pkgutil.walk_packages(lmdeploy_slo.__path__, "lmdeploy_slo."):
    if not module.name.startswith({NOT_BASE!r}):
        importlib.import_module(module.name)
"""
    origin = Path(run([str(python), "-c", script], cwd=tmp_path).strip())
    assert origin.is_relative_to(python.parents[1])


def test_profiles_load(python: Path, tmp_path: Path) -> None:
    script = """
from lmdeploy_slo.prediction.profiles import load_profile, profile_names
for name in profile_names():
    print(name, load_profile(name).step_model.c0 > 0)
"""
    lines = run([str(python), "-c", script], cwd=tmp_path).splitlines()
    assert lines == [f"{p.stem} True" for p in sorted(PROFILES.glob("*.json"))]


def test_help_lists_the_commands(python: Path, tmp_path: Path) -> None:
    by_module = run([str(python), "-m", "lmdeploy_slo", "--help"], cwd=tmp_path)
    by_script = run([str(python.with_name("lmdeploy_slo")), "--help"], cwd=tmp_path)
    for text in (by_module, by_script):
        assert all(command in text for command in ("serve", "generate", "replay", "plan", "demo"))


def test_effective_configuration(python: Path, tmp_path: Path) -> None:
    printed = run([str(python), "-m", "lmdeploy_slo", "serve", "--print-config"], cwd=tmp_path)
    assert 'kind = "emulated"' in printed
    assert 'policy = "annealing"' in printed


def test_plan(python: Path, tmp_path: Path) -> None:
    snapshot = {
        "max_batch_size": 2,
        "latency": {"prefill": [0.1, 5.7, 0.01, 43.67], "decode": [0.0002, 0.275, 0.00088, 15.85]},
        "requests": [
            {"id": "long", "prompt_tokens": 500, "output_tokens": 400, "slo": {"e2e_ms": 60000}},
            {"id": "short", "prompt_tokens": 50, "output_tokens": 10, "slo": {"e2e_ms": 500}},
            {"id": "free", "prompt_tokens": 10, "output_tokens": 5, "slo": None},
        ],
    }
    (tmp_path / "snapshot.json").write_text(json.dumps(snapshot))
    plan = json.loads(run([str(python), "-m", "lmdeploy_slo", "plan", "snapshot.json"], cwd=tmp_path))
    assert sorted(request for batch in plan["batches"] for request in batch) == ["free", "long", "short"]
    assert all(len(batch) <= 2 for batch in plan["batches"])
    assert plan["met"] == 2
