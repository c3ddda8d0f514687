"""The profiler finds coefficients that are hidden from it, goes on where it was stopped, and keeps to its budget."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from profiled import ENDLESS, SMALL, Run, disturbed, far_corner_errors, profiled

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.errors import ConfigError, EngineError, SloError
from lmdeploy_slo.offline.profiler.artifact import Measured, Notes, make_profile
from lmdeploy_slo.offline.profiler.engine_target import EngineTarget, engine_target
from lmdeploy_slo.offline.profiler.grid import GridLimits
from lmdeploy_slo.offline.profiler.precision import half_widths, repeats_missing
from lmdeploy_slo.offline.profiler.profiler import Effort, Progress
from lmdeploy_slo.offline.profiler.state import ProfilerState, load_state
from lmdeploy_slo.offline.profiler.target import Call, TargetInfo
from lmdeploy_slo.prediction.profiles import load_profile, profile_names
from lmdeploy_slo.testing.builders import A100
from lmdeploy_slo.testing.virtual_time import run_virtual

NOTES = Notes(name="mine", date="2025-01-31", source="a test", gpu="none")
BIG = EngineLimits(max_batch_size=256, max_prefill_tokens=8192)


class Forwarding:
    """A target that is the one it has, but for what a test changes."""

    def __init__(self, target: EngineTarget) -> None:
        self.inner = target

    @property
    def info(self) -> TargetInfo:
        return self.inner.info

    def send(self, prompt: Sequence[int], output_tokens: int, *, watched: bool = True) -> Call:
        return self.inner.send(prompt, output_tokens, watched=watched)

    async def in_flight(self) -> tuple[int, int]:
        return await self.inner.in_flight()


class Silent(Forwarding):
    """Tells of tokens as a gateway does: how many there are is told at the end."""

    class _Call:
        generated = None

        def __init__(self, call: Call) -> None:
            self._call = call

        def __getattr__(self, name: str) -> Any:
            return getattr(self._call, name)

    def send(self, prompt: Sequence[int], output_tokens: int, *, watched: bool = True) -> Call:
        call: Any = Silent._Call(super().send(prompt, output_tokens, watched=watched))
        return call  # type: ignore[no-any-return]


def made(run: Run) -> Measured:
    assert run.finished
    info = TargetInfo("emulated", "emulated", True, BIG, None, None, versions={"lmdeploy": "0.18.0"})
    return make_profile(run.state, run.profiler.points, info, NOTES)


@functools.cache
def big_run(name: str) -> Run:
    """Of a shipped profile, with the limits of `serve`."""
    return profiled(load_profile(name).step_model, BIG, session=None)


# -- what it finds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [BIG, EngineLimits(64, 2048, 100_000)], ids=["big", "little memory"])
@pytest.mark.parametrize("name", profile_names())
def test_hidden_coefficients_are_found(name: str, limits: EngineLimits) -> None:
    truth = load_profile(name).step_model
    run = big_run(name) if limits is BIG else profiled(truth, limits, session=4096)
    assert run.finished
    assert run.state.given_up == run.state.spoiled == {}
    assert far_corner_errors(run.profiler.model, truth, run).max() < 0.03


async def static_batch(
    clock: VirtualClock, model: StepModel, batch: int, prompt: int, output: int
) -> tuple[float, float]:
    """(TTFT of the last, TPOT after that) of a batch that arrives at once, as the engine does it."""
    engine = EmulatedEngine(model, BIG, clock)
    async with engine_target(engine, clock) as target:
        calls = [target.send([300] * prompt, output) for _ in range(batch)]
        answers = [await call.answer() for call in calls]
    last = answers[-1]
    return last.ttft_s, last.decode_s / (output - 1)


@pytest.mark.parametrize("name", profile_names())
def test_predictions_hold_on_batches_that_were_not_measured(name: str) -> None:
    truth = load_profile(name).step_model
    profile = made(big_run(name)).profile
    ttft_off, tpot_off = [], []
    for model in (profile.ranged_step_model(), profile.ranged_bilinear_model()):
        for batch, prompt, output in ((1, 90, 40), (1, 3000, 100), (3, 700, 60), (12, 500, 200), (40, 200, 90)):
            ttft_s, tpot_s = run_virtual(lambda clock, b=batch, p=prompt, o=output: static_batch(clock, truth, b, p, o))
            ttft_off.append(abs(model.prefill_s(batch, prompt) / ttft_s - 1))
            tpot_off.append(abs(model.decode_s(batch, prompt, output - 1) / (output - 1) / tpot_s - 1))
        assert statistics.median(ttft_off) < 0.05
        assert statistics.median(tpot_off) < 0.05
        ttft_off.clear()
        tpot_off.clear()
    assert profile.errors is not None
    assert profile.errors.held_out["all"].median < 0.01


@pytest.mark.parametrize("name", ["a100-qwen2.5-7b", "h200-llama3.1-8b"])
def test_a_gateway_that_counts_no_tokens_is_measured_as_well(name: str) -> None:
    truth = load_profile(name).step_model
    run = profiled(truth, BIG, session=None, wrap=Silent)
    assert far_corner_errors(run.profiler.model, truth, run).max() < 0.03


def test_noise_costs_repeats_and_little_else() -> None:
    """Each pass has noise of 3 %, and one in 250 takes four times as long."""
    run = profiled(disturbed(A100), EngineLimits(64, 2048, 100_000), session=4096)
    quiet = profiled(A100, EngineLimits(64, 2048, 100_000), session=4096)
    assert len(run.state.observations) > len(quiet.state.observations)
    assert far_corner_errors(run.profiler.model, A100, run).max() < 0.03
    widths = half_widths(run.state.of_points(), run.profiler.model)
    repeats = run.state.of_points()
    for point in run.profiler.points:
        if not point.held_out:
            assert widths[point.name] <= ENDLESS.precision or len(repeats[point.name]) >= 30


def test_the_profile_says_what_it_rests_on() -> None:
    found = made(profiled(A100))
    profile = found.profile
    assert (profile.name, profile.date, profile.gpu, profile.lmdeploy_version) == (
        "mine",
        "2025-01-31",
        "none",
        "0.18.0",
    )
    assert profile.max_prefill_tokens == 512
    assert profile.fitted_range.batch_size == (1, 8)
    assert profile.fitted_range.prefill_tokens == (16, 512)
    assert profile.errors is not None and profile.samples is not None
    assert set(profile.errors.step) == {"prefill", "decode", "mixed", "all"}
    assert set(profile.errors.bilinear) == {"prefill", "decode", "all"}
    assert set(profile.errors.held_out) == {"prefill", "decode", "mixed", "all"}
    assert profile.samples.count == len(found.fitted.kept) + len(found.held_out)
    assert profile.samples.digest.startswith("sha256:")


# -- budget, stopping, going on -------------------------------------------------------------------------------------


def test_the_budget_is_kept_and_what_was_left_out_is_told() -> None:
    run = profiled(A100, BIG, session=None, effort=Effort(budget_s=60))
    assert run.finished
    assert 30 < run.state.elapsed_s < 66
    assert set(run.state.given_up.values()) == {"the budget did not suffice"}
    assert "decode 256 x 7785" in run.state.given_up
    assert far_corner_errors(run.profiler.model, A100, run).max() < 0.03


def test_nothing_is_measured_without_time() -> None:
    run = profiled(A100, effort=Effort(budget_s=1e-6))
    assert run.finished
    info = TargetInfo("emulated", "emulated", True, SMALL, None, None)
    with pytest.raises(SloError, match="nothing of prompts and decoding"):
        make_profile(run.state, run.profiler.points, info, NOTES)


def test_progress_counts_up_and_foresees_the_end() -> None:
    seen: list[Progress] = []
    run = profiled(A100, on_progress=lambda progress, stop: seen.append(progress))
    settled = [progress.settled for progress in seen]
    assert settled == sorted(settled)
    assert settled[0] == 0
    assert {progress.points for progress in seen} == {len(run.profiler.points)}
    halfway = next(progress for progress in seen if progress.settled >= len(run.profiler.points) // 2)
    assert halfway.elapsed_s + halfway.remaining_s == pytest.approx(run.state.elapsed_s, rel=0.25)


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "mine.samples.json"

    def stop_at(settled: int) -> Any:
        return lambda progress, stop: stop.set() if progress.settled >= settled else None

    whole = profiled(A100)
    state = ProfilerState(whole.state.target, whole.state.limits, path)
    first = profiled(A100, state=state, on_progress=stop_at(10))
    assert not first.finished
    again = load_state(path, whole.state.target, whole.state.limits)
    assert again.observations == first.state.observations
    assert 0 < again.elapsed_s < whole.state.elapsed_s
    rest = profiled(A100, state=again)
    assert rest.finished
    assert len(rest.state.observations) == len(whole.state.observations)
    assert {len(own) for own in rest.state.of_points().values()} == {3}
    assert far_corner_errors(rest.profiler.model, A100, rest).max() < 0.03
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    measured_s = rest.state.elapsed_s
    once_more = profiled(A100, state=load_state(path, whole.state.target, whole.state.limits))
    assert once_more.finished
    assert once_more.state.elapsed_s == pytest.approx(measured_s, abs=1e-3), "there was nothing left to measure"


def test_a_cancelled_run_leaves_nothing_running() -> None:
    async def main(clock: VirtualClock) -> None:
        engine = EmulatedEngine(A100, SMALL, clock, max_session_tokens=1024)
        async with engine_target(engine, clock) as target:
            from lmdeploy_slo.offline.profiler.profiler import Profiler, limits_of
            from lmdeploy_slo.offline.profiler.state import identity_of

            state = ProfilerState(identity_of(target.info), limits_of(target.info))
            task = asyncio.ensure_future(Profiler(target, state, clock).run())
            await asyncio.sleep(3.0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert state.observations
            assert await target.in_flight() == (0, 0)

    run_virtual(main)


# -- what may go wrong ----------------------------------------------------------------------------------------------


def test_an_engine_that_others_use_is_refused() -> None:
    class Shared(Forwarding):
        async def in_flight(self) -> tuple[int, int]:
            running, waiting = await self.inner.in_flight()
            return running + 2, waiting + 1

    with pytest.raises(SloError, match="2 requests run in it, 1 wait; measure one that nobody uses"):
        profiled(A100, wrap=Shared)


def test_what_a_gateway_holds_back_is_given_up() -> None:
    class Holding(Forwarding):
        @property
        def info(self) -> TargetInfo:
            told = self.inner.info
            return TargetInfo(told.engine, told.model, True, told.limits, 1024, 1000, policy="annealing")

        async def in_flight(self) -> tuple[int, int]:
            running, _ = await self.inner.in_flight()
            return min(running, 2), max(0, running - 2)

    run = profiled(A100, wrap=Holding)
    assert run.finished
    assert "decode 8 x 284" in run.state.given_up
    assert set(run.state.given_up.values()) == {"the sequences did not all decode at the same time in 9 shots"}


def test_an_engine_that_hangs_is_told_of() -> None:
    class Hanging(Forwarding):
        sent = 0

        @property
        def info(self) -> TargetInfo:
            told = self.inner.info
            return TargetInfo(told.engine, told.model, True, told.limits, 1024, 1000, policy="annealing")

        def send(self, prompt: Sequence[int], output_tokens: int, *, watched: bool = True) -> Call:
            self.sent += 1
            if self.sent == 30:
                self.inner._engine.stall()  # type: ignore[attr-defined]
            return super().send(prompt, output_tokens, watched=watched)

    with pytest.raises(SloError, match=r"nothing came within 6\d s; its policy annealing may hold requests back"):
        profiled(A100, wrap=Hanging)


def test_what_the_engine_refuses_is_passed_on() -> None:
    class Failing(Forwarding):
        def send(self, prompt: Sequence[int], output_tokens: int, *, watched: bool = True) -> Call:
            if not watched:
                raise EngineError("out of order")
            return super().send(prompt, output_tokens, watched=watched)

    with pytest.raises(EngineError, match="out of order"):
        profiled(A100, wrap=Failing)


def test_prompts_that_never_share_a_pass_are_given_up() -> None:
    """A gateway that sends one prompt at a time: what is to be computed together comes apart."""

    class OneByOne(Forwarding):
        def __init__(self, target: EngineTarget) -> None:
            super().__init__(target)
            self.number = 0

        def send(self, prompt: Sequence[int], output_tokens: int, *, watched: bool = True) -> Call:
            call = super().send(prompt, output_tokens, watched=watched)
            return call if output_tokens > 1 else Late(call, self)  # type: ignore[return-value]

    class Late:
        def __init__(self, call: Call, target: OneByOne) -> None:
            target.number += 1
            self._call, self._late_s = call, 0.05 * target.number

        def __getattr__(self, name: str) -> Any:
            return getattr(self._call, name)

        async def first_token_at_s(self) -> float:
            return await self._call.first_token_at_s() + self._late_s

    run = profiled(A100, wrap=OneByOne)
    assert run.finished
    assert {point.split()[0]: why for point, why in run.state.given_up.items()} == {
        "prefill": "the prompts were not computed in one pass in 9 shots",
        "mixed": "messages were late in 9 shots",
    }
    assert far_corner_errors(run.profiler.model, A100, run).max() < 0.03


# -- the state file -------------------------------------------------------------------------------------------------

LIMITS = GridLimits(8, 512, 1024)


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    state = profiled(A100, state=ProfilerState({"engine": "x"}, LIMITS, path)).state
    assert state.digest == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_state(path, {"engine": "x"}, LIMITS).digest == state.digest


def test_without_a_file_it_begins(tmp_path: Path) -> None:
    state = load_state(tmp_path / "absent.json", {"engine": "x"}, LIMITS)
    assert (state.observations, state.elapsed_s) == ([], 0.0)
    state.save()
    assert load_state(tmp_path / "absent.json", {"engine": "x"}, LIMITS).observations == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda known: known.update(format="2.0"), "its format is '2.0'"),
        (lambda known: known.update(elapsed_s=-1), "not what a profiler has written"),
        (lambda known: known.update(more=1), "not what a profiler has written"),
        (lambda known: known["observations"].append({"steps": 0, "seconds": 1.0}), "not what a profiler has written"),
        (lambda known: known["target"].update(engine="y"), "is of another target: engine 'y' rather than 'x'"),
        (
            lambda known: known["limits"].update(max_batch_size=9),
            "is of another limits: max_batch_size 9 rather than 8",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "state.json"
    ProfilerState({"engine": "x"}, LIMITS, path).save()
    known = json.loads(path.read_text())
    change(known)
    path.write_text(json.dumps(known))
    with pytest.raises(ConfigError, match=message) as caught:
        load_state(path, {"engine": "x"}, LIMITS)
    assert "--fresh measures anew" in str(caught.value)


def test_a_state_that_is_no_json_or_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="not what a profiler has written"):
        load_state(path, {}, LIMITS)
    with pytest.raises(ConfigError, match="cannot be written"):
        ProfilerState({}, LIMITS, tmp_path / "absent" / "state.json").save()


# -- small things ---------------------------------------------------------------------------------------------------


def test_repeats_until_it_is_tight() -> None:
    run = profiled(A100)
    repeats = run.state.of_points()["decode 8 x 32"]
    assert repeats_missing(repeats[:1], A100, 0.02) == 2
    assert repeats_missing(repeats, A100, 0.02) == 0
    assert repeats_missing(10 * repeats, A100, 0.0) == 0, "what so many do not settle, more will not"


@pytest.mark.parametrize("bad", [{"budget_s": 0.0}, {"budget_s": float("inf")}, {"precision": 0.0}, {"precision": 1.0}])
def test_an_effort_out_of_range(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Effort(**bad)
