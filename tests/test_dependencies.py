"""docs/dependencies.md lists what is needed at run time, each under a licence that leaves users free."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from dependency_page import EXTRAS, PAGE, ROOT, WHAT_FOR, is_permissive, runtime_packages, tomllib
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

LOCK = ROOT / "requirements-dev.lock"


def project() -> dict[str, object]:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return dict(document["project"])


def test_the_page_has_every_package_with_its_licence() -> None:
    page = PAGE.read_text(encoding="utf-8")
    try:
        packages = runtime_packages()
    except LookupError as missing:
        pytest.skip(f"only in a complete environment: {missing}")
    listed = dict(re.findall(r"^\| ([a-z0-9-]+) \| ([^|]+) \| [^|]+ \|$", page, re.MULTILINE))
    assert set(packages) <= set(listed)
    for name in packages:
        assert is_permissive(listed[name]), f"{name}: {listed[name]}"


def test_it_is_said_what_each_direct_one_is_for() -> None:
    direct = {canonicalize_name(Requirement(text).name) for text in project()["dependencies"]}  # type: ignore[attr-defined]
    assert direct == set(WHAT_FOR)
    extras = set(project()["optional-dependencies"])  # type: ignore[call-overload]
    assert {extra for extra, *_ in EXTRAS} == extras - {"dev"}


@pytest.mark.parametrize("licence", ["GPL-3.0-or-later", "AGPL-3.0-only", "MIT AND LGPL-2.1-only", "Proprietary"])
def test_other_licences_are_noticed(licence: str) -> None:
    assert not is_permissive(licence)
    assert is_permissive("MIT OR Apache-2.0 WITH LLVM-exception")


def locked() -> dict[str, set[str]]:
    pins = re.findall(r"^([a-zA-Z0-9._-]+)(?:\[[^\]]*\])?==([^\s;]+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    versions: dict[str, set[str]] = {}
    for name, version in pins:
        versions.setdefault(canonicalize_name(name), set()).add(version)
    return versions


def test_the_lock_has_what_the_project_asks_for() -> None:
    versions = locked()
    asked = [*project()["dependencies"], *project()["optional-dependencies"]["dev"]]  # type: ignore[misc,call-overload]
    for text in asked:
        requirement = Requirement(text)
        pinned = versions.get(canonicalize_name(requirement.name), set())
        assert pinned, f"{requirement.name} is not locked: make lock"
        assert any(version in SpecifierSet(str(requirement.specifier)) for version in pinned), requirement.name


def test_every_locked_file_has_its_hash() -> None:
    text = LOCK.read_text(encoding="utf-8")
    blocks = re.split(r"\n(?=[a-zA-Z0-9])", text)[1:]
    assert len(blocks) > 40
    assert all("--hash=sha256:" in block for block in blocks)
    assert "://" not in text
    assert str(Path.home()) not in text
