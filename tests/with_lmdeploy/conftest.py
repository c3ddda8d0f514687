"""Tests against the real LMDeploy, on the CPU: `make test-lmdeploy`. Without LMDeploy they are skipped.

Modules of this directory import lmdeploy, torch and transformers only inside tests and fixtures.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lmdeploy_slo.engine.cpu_standin.batch import Pace

HERE = Path(__file__).parent


def _has_lmdeploy() -> bool:
    spec = importlib.util.find_spec("lmdeploy")
    return spec is not None and spec.origin is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not _has_lmdeploy():
        skip = pytest.mark.skip(reason="LMDeploy is not installed here: `make test-lmdeploy` runs this")
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 checkpoint of 0.2 MB."""
    from lmdeploy_slo.engine.tiny_model import write_tiny_model

    directory = tmp_path_factory.mktemp("tiny") / "qwen2"
    write_tiny_model(directory)
    return directory


@pytest.fixture
def pace() -> Iterator[Pace]:
    """The pace of the stand-in, which all engines of a process share; as fast as it goes when the test ends."""
    from lmdeploy_slo.engine.cpu_standin.native import PACE

    yield PACE
    PACE.min_step_s = 0.0
    PACE.error = None
    PACE.release()
