"""Engines that change in silence: forecasts are soon right again, and nobody is served worse than had it been told."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import astuple
from pathlib import Path

import pytest
from hypothesis import given, settings
from test_simulate_cli import call, runs_of
from test_simulator import LIMITS, policy, request, workloads

from lmdeploy_slo.config import ENV_TRACES_DIR
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.offline.experiment import Fleet, Load, Outcome, run_once
from lmdeploy_slo.offline.generated import generate_workload
from lmdeploy_slo.offline.simulation.drift import Drift
from lmdeploy_slo.offline.simulator import SimulatedRequest, Simulator
from lmdeploy_slo.offline.slo_grammar import parse_slo_options
from lmdeploy_slo.offline.traces import TraceRow, read_traces
from lmdeploy_slo.testing.builders import A100

SLOS = parse_slo_options(["code=e2e:2000", "chat=ttft:1000,tpot:50"])
SLOWER = (1.3, 1.3, 1.3, 1.3, 1.3)
CHANGES = [SLOWER, (0.7, 0.7, 0.7, 0.7, 0.7), (1.3, 0.7, 1.3, 0.7, 1.3), (0.7, 1.3, 0.7, 1.3, 0.7)]
AZURE = Path(os.environ.get(ENV_TRACES_DIR, "/nonexistent")) / "azure2023_mixed.csv.gz"


def outcome(rows: list[TraceRow], policy: str, *, seed: int = 0, limits: EngineLimits | None = None, **options: object) -> Outcome:  # fmt: skip  # noqa: E501
    fleet = Fleet(A100, A100, limits or EngineLimits(), plan_evaluations=200, **options)  # type: ignore[arg-type]
    return run_once(rows, Load(SLOS, length_noise=0.3), fleet, policy, seed)


@pytest.fixture(scope="module")
def rows() -> list[TraceRow]:
    return generate_workload(1000)


@pytest.mark.parametrize(
    ("factors", "prefill"), [*((change, 8192) for change in CHANGES), *((change, 512) for change in CHANGES[:2])]
)
def test_forecasts_are_right_again_within_200_requests(
    rows: list[TraceRow], factors: tuple[float, float, float, float, float], prefill: int
) -> None:
    drift = Drift(40.0, factors)
    limits = EngineLimits(64, prefill)
    left = outcome(rows, "swf-feasible", limits=limits, drift=drift)
    assert left.recoveries == (None,)
    assert left.calibrations[0].relative_error > 0.2
    followed = outcome(rows, "swf-feasible", limits=limits, drift=drift, calibrate=True)
    (requests,) = followed.recoveries
    assert requests is not None
    assert requests <= 200
    (statistics,) = followed.calibrations
    assert statistics.relative_error < 0.01
    truth = drift.of(A100)
    passes = [(0, 0, 40, 60_000), (1000, 10**6, 40, 60_000), (500, 250_000, 10, 15_000)]
    for work in passes:
        assert statistics.model.step_s(*work) == pytest.approx(truth.step_s(*work), rel=0.08)


def test_who_is_told_is_not_watched(rows: list[TraceRow]) -> None:
    told = outcome(rows, "fcfs", drift=Drift(40.0, SLOWER, told=True))
    assert (told.calibrations, told.recoveries) == ((), ())


def test_nothing_is_watched_unless_asked_for(rows: list[TraceRow]) -> None:
    assert outcome(rows, "fcfs").calibrations == ()


def test_where_nothing_changes_calibration_changes_nothing(rows: list[TraceRow]) -> None:
    """Believing the truth, it goes on believing it; arrival order does not even look."""
    plain, calibrated = (outcome(rows, "fcfs", calibrate=calibrate) for calibrate in (False, True))
    assert plain.records == calibrated.records
    (statistics,) = calibrated.calibrations
    assert astuple(statistics.model) == pytest.approx(astuple(A100), rel=0.01)
    assert statistics.relative_error < 1e-6
    assert statistics.dropped == 0


def test_the_engine_changes_at_its_time_and_not_before() -> None:
    """Steps of 10.25 ms and a bit; from 0.1 s on each takes twice as long, the one that runs then as it was begun."""
    lone = request("r", 0.0, 10, 30)

    def ends(**options: object) -> list[float | None]:
        records = Simulator(
            policy("fcfs"), model=dataclasses.replace(A100, p1=0, p2=0, d1=0, d2=0), limits=EngineLimits(),
            plan_latency_s=0.0, **options,  # type: ignore[arg-type]
        ).run([lone])  # fmt: skip
        return [records[0].timing.first_token_at_s, records[0].timing.ended_at_s]

    assert ends() == pytest.approx([0.01025, 30 * 0.01025])
    changed = ends(drift=Drift(0.1, (2, 2, 2, 2, 2)))
    assert changed == pytest.approx([0.01025, 10 * 0.01025 + 20 * 0.0205])


@settings(max_examples=40)
@given(workloads(), LIMITS)
def test_jumping_equals_stepping_also_while_it_learns(requests: list[SimulatedRequest], limits: EngineLimits) -> None:
    for name in ("fcfs", "annealing"):
        runs = [
            Simulator(policy(name), model=A100, limits=limits, jump=jump, calibrate=True, drift=Drift(0.7, SLOWER))
            for jump in (True, False)
        ]
        jumped, stepped = (run.run(requests) for run in runs)
        assert jumped == stepped
        first, second = (run.instances[0].calibration for run in runs)
        assert first is not None
        assert second is not None
        assert first.statistics() == second.statistics()
        assert first.statistics().failures == 0


@pytest.mark.parametrize(
    ("at_s", "factors"),
    [(-1.0, SLOWER), (float("nan"), SLOWER), (0.0, (1.0,)), (0.0, (1, 1, 1, 1, 0)), (0.0, (1, 1, 1, 1, float("inf")))],
)
def test_no_drift_out_of_range(at_s: float, factors: tuple[float, ...]) -> None:
    with pytest.raises(ValueError):
        Drift(at_s, factors)  # type: ignore[arg-type]


# -- prefix hits ------------------------------------------------------------------------------------------------------


def conversations() -> list[TraceRow]:
    """20 conversations of 6 turns, each with the blocks of the one before and two more, at 512 tokens a block."""
    turns = [
        (5.0 * turn + 0.2 * talk, tuple(1000 * talk + block for block in range(2 * turn + 2)))
        for turn in range(6)
        for talk in range(20)
    ]
    return [
        TraceRow(index, at_s, 512 * len(blocks), 40, "chat", blocks)
        for index, (at_s, blocks) in enumerate(sorted(turns))
    ]


def test_turns_are_planned_with_what_the_cache_will_hold() -> None:
    """The policy is shown prompts without what is cached; after a few turns nearly exactly."""
    shown: dict[int, tuple[float, float]] = {}

    class Watched:
        name, wants_ticks = "watched", False

        def __init__(self) -> None:
            self.inner = policy("fcfs")

        def plan(self, snapshot):  # type: ignore[no-untyped-def]
            for row in snapshot.waiting:
                shown[int(row["handle"])] = (float(row["prompt_tokens"]), float(row["cached_tokens"]))
            return self.inner.plan(snapshot)

        def warm_up(self) -> None:
            return None

    requests = [
        SimulatedRequest(
            dataclasses.replace(
                request(str(row.index), row.arrival_s, row.input_tokens, 40).spec,
                conversation_id=str((row.hash_ids or (0,))[0]),
            ),
            40,
            prefix_blocks=row.hash_ids or (),
        )
        for row in conversations()
    ]
    simulator = Simulator(Watched(), model=A100, limits=EngineLimits(), calibrate=True, prefix_cache_tokens=10**6)
    simulator.run(requests)
    assert simulator.prefix_error_tokens is not None
    assert simulator.prefix_error_tokens < 200
    prompts = [row.input_tokens for row in conversations()]
    assert all(sum(shown[n + 1]) == pytest.approx(prompt) for n, prompt in enumerate(prompts))
    assert all(shown[n][1] == 0 for n in range(1, 21))  # first turns
    for number in range(61, 121):
        before = prompts[number - 1] - 1024  # of the last turn, all of which is cached
        assert shown[number][1] == pytest.approx(before, rel=0.12)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path: Path) -> str:
    lines = ["arrival_s,input_tokens,output_tokens,task_class"]
    lines += [f"{row.arrival_s},{row.input_tokens},{row.output_tokens},{row.task}" for row in generate_workload(500)]
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_the_command_tells_how_soon(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, trace: str
) -> None:
    drift = ("--drift-at", "20", "--drift-scale", "1.3")
    files = [tmp_path / f"{name}.json" for name in ("left", "followed", "told", "again")]
    options = [(), ("--calibrate",), ("--drift-told",), ("--calibrate",)]
    for file, option in zip(files, options, strict=True):
        arguments = ("simulate", trace, "--policy", "swf-feasible", *drift, *option, "--json", str(file))
        assert call(monkeypatch, *arguments, "--slo", "default=e2e:4000") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "swf-feasible x1: forecasts of them are 30.00% off, not back within 5 %" in out
    assert "steps took 1.3 times what the profile says" in out
    assert "back within 5 % after" in out
    assert files[1].read_bytes() == files[3].read_bytes()
    left, followed, told = (runs_of(file)[0]["slo_attainment"] for file in files[:3])
    assert followed == pytest.approx(told, abs=0.02)
    assert json.dumps(left)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--drift-at", "1", "--drift-scale", "0"), "--drift-scale"),
        (("--drift-at", "1", "--drift-scale", "1,2"), "--drift-scale"),
        (("--drift-at", "1", "--drift-scale", "fast"), "--drift-scale"),
        (("--drift-at", "1", "--drift-scale", "nan"), "--drift-scale"),
        (("--drift-told",), "--drift-told"),
    ],
)
def test_what_the_command_refuses(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trace: str,
    arguments: tuple[str, ...],
    why: str,
) -> None:
    assert call(monkeypatch, "simulate", trace, *arguments) != 0
    assert why in capsys.readouterr().err


# -- the recorded hour ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not AZURE.exists(), reason=f"{ENV_TRACES_DIR} names no folder with {AZURE.name}")
@pytest.mark.parametrize("factors", [SLOWER, CHANGES[3]])
def test_attainment_is_within_2_points_of_knowing_the_truth(
    factors: tuple[float, float, float, float, float],
) -> None:
    rows = read_traces([AZURE])[:2000]
    runs = [
        outcome(rows, "annealing", drift=Drift(60.0, factors, told=not calibrate), calibrate=calibrate)
        for calibrate in (True, False)
    ]
    assert runs[0].recoveries[0] is not None
    assert runs[0].recoveries[0] <= 200
    followed, told = (run.run["slo_attainment"] for run in runs)
    assert followed == pytest.approx(told, abs=0.02)
