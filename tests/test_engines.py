"""What the configuration says of engines is what they are, in this process and on Ray."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from lmdeploy_slo.clock import MonotonicClock, VirtualClock
from lmdeploy_slo.config import Config, load
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.engine.remote import RemoteEngine
from lmdeploy_slo.engines import Engines, build_engine, engine_maker, replica_resources

PROFILES = "h200-qwen2.5-7b,a100-qwen2.5-7b"


def config_of(**flags: Any) -> Config:
    return load(environ={}, flags={f"engine.{key}": value for key, value in flags.items()})


def test_one_engine_is_in_this_process_and_several_are_on_ray() -> None:
    assert isinstance(Engines(config_of(), VirtualClock()).build(), EmulatedEngine)
    assert isinstance(Engines(config_of(replicas=2), VirtualClock()).build(1), RemoteEngine)
    assert isinstance(Engines(config_of(ray_address="auto"), VirtualClock()).build(), RemoteEngine)


def test_replicas_have_profiles_of_their_own_in_turn() -> None:
    engines = Engines(config_of(replicas=3, replica_profiles=PROFILES), VirtualClock())
    told = [engines.build(number).info.details["profile"] for number in range(3)]
    assert told == ["h200-qwen2.5-7b", "a100-qwen2.5-7b", "h200-qwen2.5-7b"]


def test_the_prefill_limit_is_that_of_the_replicas_profile() -> None:
    config = config_of(replicas=2, replica_profiles=PROFILES, prefill_for_tpot_ms=50.0)
    fast, slow = (build_engine(config, VirtualClock(), number).info.limits.max_prefill_tokens for number in (0, 1))
    assert fast > slow


def test_what_makes_an_engine_can_be_sent_elsewhere() -> None:
    config = config_of(max_batch_size=7, kv_tokens=5000)
    engine = pickle.loads(pickle.dumps(engine_maker(config)))(clock=MonotonicClock())
    assert engine.info == build_engine(config, MonotonicClock()).info


@pytest.mark.parametrize(
    ("flags", "with_gpus", "without"),
    [
        ({}, {"CPU": 1}, {"CPU": 1}),
        ({"model": "m"}, {"CPU": 1, "GPU": 1}, {"CPU": 1}),
        ({"model": "m", "turbomind.tp": 2}, {"CPU": 1, "GPU": 2}, {"CPU": 1}),
        ({"model": "m", "turbomind.tp": 2, "device": "cuda"}, {"CPU": 1, "GPU": 2}, {"CPU": 1, "GPU": 2}),
        ({"model": "m", "device": "cpu", "replica_resources": "CPU=4"}, {"CPU": 4}, {"CPU": 4}),
        ({"model": "m", "replica_resources": "GPU=8,h200=1"}, {"CPU": 1, "GPU": 8, "h200": 1}, None),
    ],
)
def test_a_replica_takes_the_gpus_its_model_is_spread_over(flags: Any, with_gpus: Any, without: Any) -> None:
    resources = replica_resources(config_of(replicas=2, **flags))
    assert resources.wanted({"CPU": 64, "GPU": 8, "h200": 8}) == with_gpus
    assert resources.wanted({"CPU": 64}) == (with_gpus if without is None else without)
