"""What the runtime learns of the engine it drives: its speed, its prefix cache, and that a restart forgets neither."""

from __future__ import annotations

import asyncio
import random
from dataclasses import astuple
from pathlib import Path

import pytest
from scripted_engine import InlineExecutor, ScriptedEngine, turns

from lmdeploy_slo import app
from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.config import load
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.engine.faults import Faults
from lmdeploy_slo.errors import ConfigError, RequestError
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.prediction.prefix import PrefixPredictor
from lmdeploy_slo.runtime.runtime import Runtime, RuntimeOptions
from lmdeploy_slo.scheduling.rules import RulePolicy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import A100, make_request, make_spec
from lmdeploy_slo.testing.virtual_time import run_virtual


def make_runtime(engine: EmulatedEngine | ScriptedEngine, clock: VirtualClock, *, calibrate: bool = True) -> Runtime:
    scheduler = Scheduler(
        limits=engine.info.limits, model=A100, lengths=TaskLengthPredictor(), prefixes=PrefixPredictor()
    )
    options = RuntimeOptions(flush_interval_s=0.0, plan_gap_s=0.0, calibrate=calibrate)
    return Runtime(engine, scheduler, RulePolicy("fcfs"), clock, options, executor=InlineExecutor())


def serve_load(
    requests: int, slow_factor: float, *, prefill: int = 8192, calibrate: bool = True, aborts: bool = True
) -> tuple[Runtime, int | None]:
    """The emulated engine under load, all steps `slow_factor` times as long from the middle on; the runtime, and how
    many requests ended from then until forecasts were within 5 % and stayed there."""

    async def main(clock: VirtualClock) -> tuple[Runtime, int | None]:
        engine = EmulatedEngine(A100, EngineLimits(64, prefill), clock)
        runtime = make_runtime(engine, clock, calibrate=calibrate)
        await runtime.start()
        draw, errors = random.Random(0), []

        async def one(name: str) -> None:
            prompt, output = draw.randint(10, 3000), draw.randint(1, 200)
            spec = make_spec(name, arrival_at_s=clock.now_s(), prompt_tokens=prompt)
            stream = runtime.submit(spec, make_request(name, prompt_tokens=prompt, output_tokens=output))
            try:
                async for _ in stream:
                    pass
            except RequestError:
                pass  # aborted
            errors.append(runtime.calibration.statistics().relative_error)

        tasks, changed_at = [], 0
        for number in range(requests):
            if number == requests // 2:
                engine.inject(Faults(slow_factor=slow_factor))
                changed_at = len(errors)
            tasks.append(asyncio.create_task(one(str(number))))
            await asyncio.sleep(draw.expovariate(6))
            if aborts and number % 23 == 22:
                runtime.abort(str(number - 3))
        await asyncio.gather(*tasks)
        await runtime.close()
        since = errors[changed_at:]
        wrong = [number for number, error in enumerate(since) if error >= 0.05]
        recovered = wrong[-1] + 1 if wrong else 0
        return runtime, recovered if recovered < len(since) else None

    return run_virtual(main)


@pytest.mark.parametrize("slow_factor", [1.3, 0.7])
@pytest.mark.parametrize("prefill", [512, 8192])
def test_an_engine_that_changes_under_load_is_followed(slow_factor: float, prefill: int) -> None:
    runtime, requests = serve_load(300, slow_factor, prefill=prefill)
    assert requests is not None
    assert requests <= 150
    statistics = runtime.calibration.statistics()
    assert statistics.relative_error < 0.01
    assert statistics.slowness == pytest.approx(slow_factor, rel=0.02)
    assert statistics.failures == 0
    assert statistics.dropped < 0.05 * statistics.windows
    truth = A100.scaled(slow_factor)
    model = runtime.scheduler.model
    assert model == runtime.calibration.model
    assert (model.c0, model.p1) == pytest.approx((truth.c0, truth.p1), rel=0.02)


def test_it_only_watches_where_it_is_not_to_calibrate() -> None:
    runtime, requests = serve_load(120, 1.3, calibrate=False)
    assert requests is None
    statistics = runtime.calibration.statistics()
    assert statistics.relative_error == pytest.approx(0.3, abs=0.03)
    assert (statistics.learning, statistics.updates) == (False, 0)
    assert runtime.scheduler.model == A100


def test_an_engine_that_is_as_believed_stays_so() -> None:
    """Every window is exact: nothing that the runtime does adds or loses a step, a token or a prompt."""
    runtime, _ = serve_load(120, 1.0, aborts=False)
    statistics = runtime.calibration.statistics()
    assert statistics.relative_error < 1e-3
    assert statistics.dropped == 0
    assert astuple(runtime.scheduler.model) == pytest.approx(astuple(A100), rel=0.01)


# -- what an engine says ----------------------------------------------------------------------------------------------


def test_an_end_of_sequence_is_a_step_like_any_other() -> None:
    """LMDeploy's last event has no token where the model ended the text; its step was computed all the same."""

    async def main(clock: VirtualClock) -> Runtime:
        engine = ScriptedEngine(clock, limits=EngineLimits(4))
        runtime = make_runtime(engine, clock)
        await runtime.start()
        contexts = {}
        for name in ("a", "b"):
            runtime.submit(make_spec(name, prompt_tokens=500), make_request(name, prompt_tokens=500))
            contexts[name] = 500
        await engine.has("a", "b")
        clock.advance(A100.step_s(1000, 2 * 500**2, 0, 0))
        engine.step()
        for step in range(40):
            clock.advance(A100.step_s(0, 0, len(contexts), sum(contexts.values())))
            contexts = {name: context + 1 for name, context in contexts.items()}
            if step == 20:
                del contexts["a"]
                del engine.requests["a"]
                engine.send(*(_event("a", end=FinishReason.STOP), _event("b", 97)))
            else:
                engine.step()
        await turns()
        await runtime.close()
        return runtime

    statistics = run_virtual(main).calibration.statistics()
    assert statistics.windows > 4
    assert statistics.dropped == 0
    assert statistics.relative_error < 1e-9


def _event(name: str, *token_ids: int, end: FinishReason | None = None):  # type: ignore[no-untyped-def]
    from lmdeploy_slo.engine.base import EngineEvent

    return EngineEvent(name, token_ids, "a" * len(token_ids), end=end)


def test_cached_tokens_that_the_engine_reports_are_planned_with() -> None:
    async def main(clock: VirtualClock) -> None:
        engine = ScriptedEngine(clock, limits=EngineLimits(1))
        runtime = make_runtime(engine, clock)
        await runtime.start()
        held = make_spec("held", prompt_tokens=10)
        for turn in range(8):
            name, prompt = f"t{turn}", 1000 + 500 * turn
            spec = make_spec(name, arrival_at_s=clock.now_s(), prompt_tokens=prompt, conversation_id="c")
            runtime.submit(spec, make_request(name, prompt_tokens=10))
            await engine.has(name)
            clock.advance(1.0)
            engine.emit(name, 65, cached_tokens=prompt - 400 if turn else 0)
            engine.emit(name, 66, end=FinishReason.LENGTH)
            await turns()
        runtime.submit(held, make_request("held", prompt_tokens=10))
        await engine.has("held")
        plain, turn_of = (
            make_spec(name, arrival_at_s=clock.now_s(), prompt_tokens=5000, conversation_id=conversation)
            for name, conversation in (("new", ""), ("next", "c"))
        )
        assert runtime.scheduler.expected_cached_tokens(turn_of) == pytest.approx(4502, rel=0.1)
        assert runtime.predict(turn_of).ttft_s < runtime.predict(plain).ttft_s - 0.15
        runtime.submit(turn_of, make_request("next", prompt_tokens=10))
        row = runtime.scheduler.snapshot(clock.now_s()).waiting[0]
        assert row["cached_tokens"] == pytest.approx(4502, rel=0.1)
        assert row["prompt_tokens"] + row["cached_tokens"] == 5000
        await runtime.close()

    run_virtual(main)


def test_learning_that_fails_harms_no_request(caplog: pytest.LogCaptureFixture) -> None:
    async def main(clock: VirtualClock) -> list[str]:
        engine = ScriptedEngine(clock, limits=EngineLimits(4))
        runtime = make_runtime(engine, clock)

        def fail(handle: int) -> int:
            raise RuntimeError("a defect")

        runtime.calibration._observer._progress = fail
        await runtime.start()
        stream = runtime.submit(make_spec("a"), make_request("a"))
        await engine.has("a")
        for _ in range(5):
            clock.advance(0.1)
            engine.step()
        clock.advance(0.1)
        engine.step("a")
        texts = [delta.text async for delta in stream]
        await runtime.close()
        assert runtime.calibration.statistics().failures > 0
        return texts

    assert run_virtual(main) == ["a"] * 6
    assert "calibration failed" in caplog.text


# -- a restart --------------------------------------------------------------------------------------------------------


async def test_a_server_goes_on_with_what_it_learnt(tmp_path: Path) -> None:
    flags = {"server.port": 0, "server.state_dir": str(tmp_path), "scheduler.policy": "fcfs"}
    config = load(environ={}, flags=flags)
    learnt: StepModel
    async with app.serving(config) as server:
        calibration = server.runtime.calibration
        for _ in range(30):
            calibration._estimator.update(_twice_as_slow())
        learnt = calibration.model
        assert learnt.c0 > 1.2 * calibration.statistics().profile.c0
    async with app.serving(config) as server:
        assert server.runtime.calibration.model == learnt
        assert server.runtime.scheduler.model == learnt
    cut_short(tmp_path)
    async with app.serving(config) as server:
        assert server.runtime.scheduler.model == server.runtime.calibration.statistics().profile
    assert suffixes(tmp_path) == [".json", ".set-aside"]


def suffixes(folder: Path) -> list[str]:
    return sorted(file.suffix for file in folder.iterdir())


def cut_short(folder: Path) -> None:
    (file,) = folder.glob("*.json")
    file.write_text(file.read_text()[:-40])


def _twice_as_slow():  # type: ignore[no-untyped-def]
    from lmdeploy_slo.prediction.calibration_estimator import Work

    return Work(2 * 8 * A100.step_s(0, 0, 10, 10_000), 8, 0, 0, 80, 80_000)


async def test_without_calibration_what_was_learnt_waits(tmp_path: Path) -> None:
    flags = {"server.port": 0, "server.state_dir": str(tmp_path), "scheduler.policy": "fcfs"}
    async with app.serving(load(environ={}, flags=flags)) as server:
        for _ in range(30):
            server.runtime.calibration._estimator.update(_twice_as_slow())
        learnt = server.runtime.calibration.model
    async with app.serving(load(environ={}, flags={**flags, "scheduler.calibrate": False})) as server:
        assert server.runtime.scheduler.model == server.runtime.calibration.statistics().profile
        assert server.runtime.scheduler.prefixes is None
    async with app.serving(load(environ={}, flags=flags)) as server:
        assert server.runtime.calibration.model == learnt


async def test_a_folder_that_cannot_be_used_is_refused_before_serving(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = load(environ={}, flags={"server.port": 0, "server.state_dir": str(tmp_path / "file")})
    with pytest.raises(ConfigError, match="state_dir"):
        async with app.serving(config):
            pass
