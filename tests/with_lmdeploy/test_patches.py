"""The patches on the LMDeploy that is installed: they fit, they do what they say, and nothing else does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lmdeploy_slo.engine.patching.export import patched_sources
from lmdeploy_slo.engine.patching.installed import inspect_installation
from lmdeploy_slo.engine.patching.series import load_series, patch_directory, sha256

EFFECTS = Path(__file__).parent / "effects.py"
NAMES = [patch.name for patch in load_series().patches]

# Effects that another patch carries: without it they are gone as well.
NEEDED_BY = {
    "0001-priority-field": {"0006-priority-over-http"},
    "0002-ranked-handles": {"0003-abort-while-waiting", "0005-pipeline-lets-requests-be-ranked"},
}


def effects(model: Path, *choice: str) -> dict[str, bool]:
    """What `effects.py` sees in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(EFFECTS), str(model), *choice], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    return seen


def test_every_patch_fits_the_installed_lmdeploy() -> None:
    series = load_series()
    installation = inspect_installation(series)
    assert installation.problem(series) is None
    sources = patched_sources(series, installation)
    assert {path: sha256(text.encode()) for path, text in sources.items()} == {
        path: pin.patched for path, pin in series.pins.items()
    }


@pytest.mark.parametrize("tool", [["git", "apply", "--unidiff-zero"], ["patch", "-p1", "--quiet", "-i"]])
def test_the_files_apply_to_a_source_tree(tool: list[str], tmp_path: Path) -> None:
    if shutil.which(tool[0]) is None:
        pytest.skip(f"{tool[0]} is not installed here")
    series = load_series()
    installation = inspect_installation(series)
    for path in series.pins:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(installation.root / path, tmp_path / path)
    for patch in series.patches:
        subprocess.run([*tool, str(patch_directory() / f"{patch.name}.patch")], cwd=tmp_path, check=True)
    for path, pin in series.pins.items():
        assert sha256((tmp_path / path).read_bytes()) == pin.patched


def test_with_all_patches_every_effect_is_there(tiny_model: Path) -> None:
    seen = effects(tiny_model, "all")
    assert all(seen.values()), seen
    assert {name.partition(":")[0] for name in seen} == set(NAMES)


def test_without_patches_no_effect_is_there(tiny_model: Path) -> None:
    seen = effects(tiny_model, "released")
    assert not any(seen.values()), seen


@pytest.mark.parametrize("name", NAMES)
def test_without_a_patch_its_effect_is_gone_and_no_other(tiny_model: Path, name: str) -> None:
    seen = effects(tiny_model, name)
    gone = {name, *NEEDED_BY.get(name, ())}
    assert {effect: there for effect, there in seen.items() if there == (effect.partition(":")[0] in gone)} == {}
