"""`lmdeploy_slo scale`: what it waits for, and what it says of a server that cannot."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

from serve_process import serve

from lmdeploy_slo.cli.scale import reached
from lmdeploy_slo.client import Load, ReplicaLoad, StepForecasts
from lmdeploy_slo.clock import VirtualClock

STEPS = StepForecasts(0.0, 1.0, False, 0)


def seen(*engines: tuple[str, bool, bool]) -> Load:
    """(name, up, draining) of each."""
    values: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(Load)), 0)
    replicas = tuple(ReplicaLoad(name, up, draining, 0, 0, 8, 0, None, 0, 0, STEPS) for name, up, draining in engines)
    return Load(**(values | {"replicas": replicas}))


def test_it_waits_until_all_are_up_and_the_named_are_gone() -> None:
    clock = VirtualClock()
    pictures = [
        seen(("a", True, False)),
        seen(("a", True, True), ("b", False, False)),
        seen(("a", True, False), ("b", True, False)),
        seen(("b", True, False), ("c", True, True)),
        seen(("b", True, False), ("c", True, False)),
    ]
    look = iter(pictures)

    def sleep(duration_s: float) -> None:
        clock.advance(duration_s)

    assert reached(lambda: next(look), 2, 60.0, gone=["a"], sleep=sleep, clock=clock)
    assert next(look, None) is None


def test_it_waits_no_longer_than_it_is_told() -> None:
    clock = VirtualClock()
    assert not reached(lambda: seen(("a", True, False)), 2, 10.0, sleep=clock.advance, clock=clock)
    assert 10.0 <= clock.now_s() < 11.0


def test_a_server_with_one_engine_of_its_own_says_why_not(tmp_path: Path) -> None:
    with serve(tmp_path) as (target, _):
        command = [sys.executable, "-m", "lmdeploy_slo", "scale", "2", "--target", target]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "own process" in done.stderr
