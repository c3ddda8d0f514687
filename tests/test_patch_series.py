"""Reading, applying and pinning patches, on a made-up package; LMDeploy itself is not needed."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lmdeploy_slo.engine.patching.export import context_diff, export_tree, patched_sources
from lmdeploy_slo.engine.patching.installed import FileState, inspect_installation
from lmdeploy_slo.engine.patching.loader import PatchFinder, install
from lmdeploy_slo.engine.patching.series import REQUIRED_HEADER, Series, load_series, parse_patch, sha256
from lmdeploy_slo.errors import ConfigError, MissingExtra

HEADER = "Subject: a\nReason: b\n  goes on\nUpstream: c\nDrop when: d\nLost without: e\n\n"
RELEASED = "def one():\n    return 1\n\n\ndef two():\n    return 2\n"
FIRST = "--- a/toy/m.py\n+++ b/toy/m.py\n@@ -1,0 +2,2 @@\n+    # first\n+    x = 1\n@@ -6,0 +9 @@\n+# end\n"
SECOND = "--- a/toy/m.py\n+++ b/toy/m.py\n@@ -3,0 +4 @@\n+    # second\n"
PATCHED = "def one():\n    # first\n    x = 1\n    # second\n    return 1\n\n\ndef two():\n    return 2\n# end\n"


@pytest.fixture
def series(tmp_path: Path) -> Series:
    """Two patches of one file; the second counts lines from after the first."""
    directory = tmp_path / "patches"
    directory.mkdir()
    (directory / "1-first.patch").write_text(HEADER + FIRST)
    (directory / "2-second.patch").write_text(HEADER + SECOND)
    files = {"toy/m.py": {"released": sha256(RELEASED.encode()), "patched": sha256(PATCHED.encode())}}
    manifest = {
        "package": "toy",
        "version": "1.0",
        "patches": ["1-first.patch", "2-second.patch"],
        "files": files,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return load_series(directory)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree of the made-up package, as released."""
    root = tmp_path / "tree"
    (root / "toy").mkdir(parents=True)
    (root / "toy" / "__init__.py").write_text("")
    (root / "toy" / "version.py").write_text("__version__ = '1.0'\n")
    (root / "toy" / "m.py").write_text(RELEASED)
    return root


def test_the_whole_series_and_a_part_of_it(series: Series) -> None:
    assert series.apply("toy/m.py", RELEASED) == PATCHED
    assert series.apply("toy/m.py", RELEASED, without=["1-first", "2-second"]) == RELEASED
    assert "# first" not in series.apply("toy/m.py", RELEASED, without=["1-first"])
    assert "# second" in series.apply("toy/m.py", RELEASED, without=["1-first"])
    assert series.patches[0].header["Reason"] == "b goes on"
    with pytest.raises(ConfigError, match=r"no patch 'third'; there are 1-first, 2-second"):
        series.check_names(["third"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (HEADER + "+++ b/m.py\n@@ -1 +1 @@\n-a\n+b\n", "only inserts"),
        (HEADER + "+++ b/m.py\n@@ -1,0 +2,2 @@\n+a\n b\n", "only inserted lines"),
        (HEADER + "+++ b/m.py\n@@ -1,0 +2,2 @@\n+a\n", "lacks 1 lines"),
        (HEADER + "@@ -1,0 +2 @@\n+a\n", "only inserts"),
        ("Subject: a\n+++ b/m.py\n@@ -1,0 +2 @@\n+a\n", "Drop when"),
        (HEADER, "incomplete"),
    ],
)
def test_anything_but_insertions_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_patch("p", text)


def test_an_installation_as_released_fits(series: Series, tree: Path) -> None:
    installation = inspect_installation(series, tree)
    assert (installation.version, installation.files[0].state) == ("1.0", FileState.RELEASED)
    assert installation.problem(series) is None
    assert patched_sources(series, installation) == {"toy/m.py": PATCHED}
    assert "+    # first" in context_diff(series, installation)


def test_a_modified_file_is_named_with_both_hashes(series: Series, tree: Path) -> None:
    (tree / "toy" / "m.py").write_text(RELEASED + "# mine\n")
    problem = inspect_installation(series, tree).problem(series)
    assert problem is not None
    for part in (str(tree / "toy" / "m.py"), sha256((RELEASED + "# mine\n").encode()), sha256(RELEASED.encode())):
        assert part in problem
    assert "--unpatched" in problem


def test_a_missing_file_another_version_and_no_package_are_told_apart(series: Series, tree: Path) -> None:
    (tree / "toy" / "m.py").unlink()
    missing = inspect_installation(series, tree).problem(series)
    assert missing is not None
    assert "missing" in missing
    (tree / "toy" / "version.py").write_text('__version__ = "2.0"\n')
    other = inspect_installation(series, tree).problem(series)
    assert other is not None
    assert "1.0, installed is 2.0" in other
    with pytest.raises(MissingExtra, match="turbomind"):
        inspect_installation(series)


def test_a_tree_that_is_patched_already_fits_and_is_left_alone(series: Series, tree: Path) -> None:
    (tree / "toy" / "m.py").write_text(PATCHED)
    installation = inspect_installation(series, tree)
    assert installation.patched_on_disk
    assert installation.problem(series) is None
    with pytest.raises(ConfigError, match="patched already"):
        export_tree(series, installation, tree.parent / "out", whole_root=True)


def test_an_exported_tree_is_the_patched_one(series: Series, tree: Path, tmp_path: Path) -> None:
    (tree / "setup.py").write_text("")
    (tree / ".git").mkdir()
    installation = inspect_installation(series, tree)
    assert export_tree(series, installation, tmp_path / "whole", whole_root=True) == 1
    assert (tmp_path / "whole" / "toy" / "m.py").read_text() == PATCHED
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {"toy", "setup.py"}
    export_tree(series, installation, tmp_path / "package", whole_root=False)
    assert [path.name for path in (tmp_path / "package").iterdir()] == ["toy"]
    with pytest.raises(ConfigError, match="not empty"):
        export_tree(series, installation, tmp_path / "whole", whole_root=True)


def test_git_and_patch_apply_the_series_too(series: Series, tree: Path, tmp_path: Path) -> None:
    by_patch = tmp_path / "by-patch"
    shutil.copytree(tree, by_patch)
    for patch in series.patches:
        file = tmp_path / "patches" / f"{patch.name}.patch"
        subprocess.run(["git", "apply", "--unidiff-zero", str(file)], cwd=tree, check=True)
        if shutil.which("patch"):
            subprocess.run(["patch", "-p1", "--quiet", "-i", str(file)], cwd=by_patch, check=True)
            assert (by_patch / "toy" / "m.py").read_text() == (tree / "toy" / "m.py").read_text()
    assert (tree / "toy" / "m.py").read_text() == PATCHED


def test_an_import_gets_the_patched_text_and_tracebacks_show_it(series: Series, tree: Path) -> None:
    script = """
import sys, traceback
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from lmdeploy_slo.engine.patching import loader, series
chosen = series.load_series(Path(sys.argv[1]))
assert loader.install(chosen) and loader.install(chosen)
import toy.m
import inspect
print(inspect.getsource(toy.m.one))
try:
    loader.install(chosen, without=["1-first"])
except Exception as error:
    print(type(error).__name__, error)
"""
    patches = tree.parent / "patches"
    done = subprocess.run(
        [sys.executable, "-c", script, str(patches), str(tree)], capture_output=True, text=True, check=True
    )
    assert "# first\n    x = 1\n    # second\n" in done.stdout
    assert "ConfigError patches: installed already, with another choice of patches" in done.stdout
    assert not list(tree.rglob("m.*.pyc"))


def test_too_late_is_an_error(series: Series, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tree))
    importlib.import_module("toy.m")
    try:
        with pytest.raises(ConfigError, match=r"toy\.m was imported before"):
            install(series)
    finally:
        for name in ("toy", "toy.m"):
            del sys.modules[name]
    assert not any(isinstance(finder, PatchFinder) for finder in sys.meta_path)


def test_the_shipped_series_is_complete_and_in_order() -> None:
    series = load_series()
    assert (series.package, series.version) == ("lmdeploy", "0.18.0")
    names = [patch.name for patch in series.patches]
    assert names == sorted(names)
    assert all(patch.header[key] for patch in series.patches for key in REQUIRED_HEADER)
    assert all(pin.released != pin.patched for pin in series.pins.values())
