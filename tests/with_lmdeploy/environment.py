"""What the tests of this directory need: LMDeploy, patched, over the CPU stand-in, and a tiny checkpoint."""

from __future__ import annotations

import importlib.util

import pytest


def need_lmdeploy() -> None:
    """Skips the calling module where LMDeploy is not installed; nothing is imported."""
    spec = importlib.util.find_spec("lmdeploy")
    if spec is None or spec.origin is None:
        pytest.skip("LMDeploy is not installed here: `make test-lmdeploy` runs this", allow_module_level=True)
