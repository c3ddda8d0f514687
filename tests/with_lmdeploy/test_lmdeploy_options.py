"""An LMDeploy engine's settings, and how it ends when it fails, stalls or cannot start."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import EngineRequest, Stopping
from lmdeploy_slo.engine.lmdeploy import Device, LmdeployEngine, LmdeployOptions
from lmdeploy_slo.errors import ConfigError, EngineUnavailable
from lmdeploy_slo.testing.event_log import EventLog


def options(model: Path, **changes: Any) -> LmdeployOptions:
    return replace(LmdeployOptions(str(model), device=Device.CPU, limits=EngineLimits(max_batch_size=2)), **changes)


async def test_every_setting_of_turbomind_goes_through_by_name(tiny_model: Path) -> None:
    from lmdeploy_slo.engine.lmdeploy_options import turbomind_config

    config = turbomind_config(
        options(
            tiny_model,
            limits=EngineLimits(max_batch_size=3, max_prefill_tokens=100, kv_tokens=6400),
            max_session_tokens=500,
            turbomind={"tp": "2", "quant_policy": 8, "devices": [0, 1], "num_tokens_per_iter": 256},
        )
    )
    assert (config.max_batch_size, config.max_prefill_token_num, config.session_len) == (3, 100, 500)
    assert (config.cache_max_entry_count, config.tp, int(config.quant_policy), config.devices) == (100, 2, 8, [0, 1])
    for wrong, why in (
        ({"tpp": 2}, r"turbomind\.tpp: no such field"),
        ({"tp": "many"}, "LMDeploy refuses"),
        ({"quant_policy": 3}, "LMDeploy refuses"),
    ):
        with pytest.raises(ConfigError, match=why):
            turbomind_config(options(tiny_model, turbomind=wrong))
    with pytest.raises(ConfigError, match="set max_batch_size instead"):
        options(tiny_model, turbomind={"max_batch_size": 2})


async def test_a_failing_engine_ends_every_request_and_takes_no_more(tiny_model: Path, pace: Any) -> None:
    log = EventLog()
    engine = LmdeployEngine(options(tiny_model), MonotonicClock())
    await engine.start(log.sink)
    pace.hold()
    for name in "abc":
        engine.submit(EngineRequest(name, [5], Stopping(max_new_tokens=9)), 0)
    await _turns()
    pace.fail(RuntimeError("told to"))
    pace.release()
    await log.ended(*"abc")
    assert all(isinstance(log.error(name), EngineUnavailable) for name in "abc")
    with pytest.raises(EngineUnavailable):
        engine.submit(EngineRequest("d", [5], Stopping(max_new_tokens=9)), 0)
    await engine.close()


async def test_an_engine_without_progress_is_given_up(tiny_model: Path, pace: Any) -> None:
    log = EventLog()
    engine = LmdeployEngine(options(tiny_model, stall_timeout_s=1e-6), MonotonicClock())
    await engine.start(log.sink)
    assert await engine.check_health() is None
    pace.hold()
    engine.submit(EngineRequest("a", [5], Stopping(max_new_tokens=9)), 0)
    await _turns()
    await engine.check_health()  # the first look with a request in it starts LMDeploy's own watch
    assert "LMDeploy is unhealthy" in (await engine.check_health() or "")
    assert isinstance(log.error("a"), EngineUnavailable)
    pace.release()
    await engine.close()


async def test_a_model_that_is_none_cannot_be_started(tmp_path: Path) -> None:
    engine = LmdeployEngine(options(tmp_path), MonotonicClock())
    with pytest.raises(EngineUnavailable, match="could not load"):
        await engine.start(EventLog().sink)
    with pytest.raises(EngineUnavailable):
        engine.submit(EngineRequest("a", [5], Stopping(max_new_tokens=9)), 0)
    await engine.close()


async def test_without_a_gpu_the_stand_in_is_chosen_with_a_notice(caplog: pytest.LogCaptureFixture) -> None:
    import torch

    from lmdeploy_slo.engine.lmdeploy_options import choose_device

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with caplog.at_level(logging.WARNING):
        assert choose_device(Device.AUTO) is Device.CPU
    assert "CPU stand-in" in caplog.text
    with pytest.raises(ConfigError, match="no CUDA device"):
        choose_device(Device.CUDA)


async def _turns(count: int = 20) -> None:
    """Lets what is due on the loop happen."""
    for _ in range(count):
        await asyncio.sleep(0)
