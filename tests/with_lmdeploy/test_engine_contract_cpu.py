"""LMDeploy on the CPU is an engine like every other."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import Engine
from lmdeploy_slo.engine.lmdeploy import Device, LmdeployEngine, LmdeployOptions
from lmdeploy_slo.testing.engine_contract import EngineContract


class TestLmdeployOnCpu(EngineContract):
    @pytest.fixture(autouse=True)
    def _model(self, tiny_model: Path) -> None:
        self.model = tiny_model

    async def make_engine(self) -> Engine:
        options = LmdeployOptions(str(self.model), device=Device.CPU, limits=EngineLimits(max_batch_size=4))
        return LmdeployEngine(options, MonotonicClock())
