"""One tiny checkpoint and one pace for all tests; the stand-in is shared by the engines of a process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lmdeploy_slo.engine.cpu_standin.batch import Pace


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 checkpoint of 0.2 MB."""
    from lmdeploy_slo.engine.tiny_model import write_tiny_model

    directory = tmp_path_factory.mktemp("tiny") / "qwen2"
    write_tiny_model(directory)
    return directory


@pytest.fixture
def pace() -> Iterator[Pace]:
    """The pace of the stand-in, as fast as it goes when the test ends."""
    from lmdeploy_slo.engine.cpu_standin.native import PACE

    yield PACE
    PACE.min_step_s = 0.0
    PACE.error = None
    PACE.release()
