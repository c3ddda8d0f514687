"""The layers of ARCHITECTURE.md hold: imports point down, and each foreign package is known to one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lmdeploy_slo"

# What each part may import, itself always included.
MAY_IMPORT = {
    "clock": set(),
    "errors": set(),
    "v1": set(),
    "core": {"clock", "errors"},
    "config": {"config_sections", "errors"},
    "config_sections": {"engine", "core"},
    "prediction": {"core", "clock", "errors"},
    "engine": {"prediction", "core", "clock", "errors"},
    "scheduling": {"prediction", "core", "clock", "errors"},
    "runtime": {"engine", "scheduling", "prediction", "core", "clock", "errors"},
    "gateway": {"v1", "runtime", "engine", "scheduling", "prediction", "core", "clock", "errors"},
    "observability": {"runtime", "scheduling", "prediction", "core", "clock", "errors"},
    "client": {"v1", "core", "clock", "errors"},
    "frontend": {"runtime", "engine", "scheduling", "prediction", "core", "clock", "errors"},
    "slo_pipeline": {"app", "config", "frontend", "runtime", "engine", "prediction", "core", "clock", "errors"},
    "lifecycle": {"reload", "app", "config", "observability", "engine"},
    "reload": {"app", "config", "errors"},
    "engines": {"config", "engine", "prediction", "core", "clock", "errors"},
    "app": {
        "config",
        "engines",
        "frontend",
        "gateway",
        "observability",
        "runtime",
        "engine",
        "scheduling",
        "prediction",
        "core",
        "clock",
        "errors",
    },
    "offline": {"v1", "client", "engine", "scheduling", "prediction", "core", "clock", "errors", "config"},
    "testing": {"v1", "runtime", "engine", "scheduling", "prediction", "core", "clock", "errors"},
}
ABOVE_ALL = {"cli", "__init__", "__main__"}

# Foreign package -> the paths below lmdeploy_slo that may import it.
AT_HOME = {
    "asyncio": (
        "cli/",
        "client/",
        "engine/",
        "frontend/",
        "gateway/",
        "lifecycle.py",
        "observability/",
        "offline/",
        "runtime/",
        "slo_pipeline.py",
        "testing/",
    ),
    "grpc": ("cli/", "client/", "gateway/", "offline/", "v1/"),
    "numba": ("scheduling/",),
    "opentelemetry": ("observability/tracing.py",),
    "prometheus_client": ("observability/metrics.py",),
    "lmdeploy": ("engine/", "frontend/", "slo_pipeline.py"),
    "fastapi": ("frontend/",),
    "uvicorn": ("frontend/",),
    "torch": ("engine/",),
    "transformers": ("engine/",),
    "ray": ("engine/ray_replica.py",),
    "tomllib": ("config.py", "gateway/policy_file.py"),
    "pytest": ("testing/",),
}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "_pb2" not in path.name)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("part", sorted({part_of(path) for path in modules()} - ABOVE_ALL))
def test_imports_point_down(part: str) -> None:
    upward = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules()
        if part_of(path) == part
        for name in imports(path)
        if name.startswith("lmdeploy_slo.") and name.split(".")[1] not in {part, "__version__", *MAY_IMPORT[part]}
    }
    assert not upward


@pytest.mark.parametrize("package", sorted(AT_HOME))
def test_foreign_packages_are_known_to_one_place(package: str) -> None:
    strays = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if any(name.split(".")[0] == package for name in imports(path))
    }
    assert {path for path in strays if not path.startswith(AT_HOME[package])} == set()


def test_numba_is_in_kernels_alone() -> None:
    compiled = {path.name for path in modules() if any(name.startswith("numba") for name in imports(path))}
    assert all(name.endswith("_kernel.py") for name in compiled)


def test_modules_say_what_they_are_for() -> None:
    silent = [str(path) for path in modules() if ast.get_docstring(ast.parse(path.read_text("utf-8"))) is None]
    assert silent == []


def test_the_page_names_every_part() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    parts = {part_of(path) for path in modules()} - {"__init__", "__main__"}
    assert {part for part in parts if f"`{part}`" not in page and f"`{part}/" not in page} == set()
