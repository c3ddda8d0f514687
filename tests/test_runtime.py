"""How requests come, run to their end, or are refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from runtime_bench import ONE_AT_A_TIME, Bench, outcome, virtual
from scripted_engine import ScriptedEngine, make_runtime, turns

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.request import EndStatus, FinishReason
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineUnavailable,
    QueueFull,
    RequestIdInUse,
    Unattainable,
)
from lmdeploy_slo.runtime.runtime import RuntimeOptions
from lmdeploy_slo.runtime.stream import Completion
from lmdeploy_slo.testing.builders import make_slo
from lmdeploy_slo.testing.virtual_time import run_virtual

# -- a request runs to its end ------------------------------------------------


@virtual()
async def test_a_request_streams_its_tokens_and_tells_how_it_went(bench: Bench) -> None:
    bench.clock.advance(5.0)
    stream = bench.submit(slo=make_slo(ttft_ms=1000, e2e_ms=3500), prompt_tokens=7)
    bench.clock.advance(0.25)
    await bench.engine.has("r")
    bench.clock.advance(0.75)
    bench.engine.emit("r", 65, cached_tokens=3)
    bench.clock.advance(1.0)
    bench.engine.emit("r", 66)
    bench.clock.advance(1.0)
    bench.engine.emit("r", 67, end=FinishReason.LENGTH)

    deltas = [delta async for delta in stream]

    assert [(list(d.token_ids), d.text, d.completion is not None) for d in deltas] == [
        ([65], "A", False),
        ([66], "B", False),
        ([67], "C", True),
    ]
    completion = deltas[-1].completion
    assert completion is not None
    assert completion.request_id == "r"
    assert completion.finish_reason is FinishReason.LENGTH
    assert (completion.prompt_tokens, completion.cached_tokens, completion.timing.output_tokens) == (7, 3, 3)
    assert completion.timing.queue_s == pytest.approx(0.25)
    assert completion.timing.ttft_s == pytest.approx(1.0)
    assert completion.timing.tpot_s == pytest.approx(1.0)
    assert completion.timing.e2e_s == pytest.approx(3.0)
    assert completion.slo_met is True
    assert completion.rank == 0
    assert completion.instance == "scripted-0"
    assert bench.counts() == {EndStatus.FINISHED: 1}
    assert (bench.runtime.load().with_slo, bench.runtime.load().slo_met) == (1, 1)


@virtual()
async def test_the_end_of_a_request_is_its_last_token_not_the_event_that_tells_of_it(bench: Bench) -> None:
    (stream,) = await bench.running("r")
    bench.clock.advance(1.0)
    bench.engine.emit("r", 65)
    bench.clock.advance(1.0)
    bench.engine.emit("r", 66)
    bench.clock.advance(9.0)
    bench.engine.emit("r", end=FinishReason.STOP)

    completion = await outcome(stream)

    assert isinstance(completion, Completion)
    assert completion.timing.e2e_s == pytest.approx(2.0)


@virtual()
async def test_a_missed_objective_is_told_and_counted(bench: Bench) -> None:
    stream = bench.submit(slo=make_slo(ttft_ms=500))
    await bench.engine.has("r")
    bench.clock.advance(0.6)
    bench.engine.emit("r", 65, end=FinishReason.STOP)

    completion = await outcome(stream)

    assert isinstance(completion, Completion)
    assert completion.slo_met is False
    assert (bench.runtime.load().with_slo, bench.runtime.load().slo_met) == (1, 0)


@virtual(ONE_AT_A_TIME)
async def test_the_next_one_waits_for_a_slot_and_gets_it_at_once(bench: Bench) -> None:
    first, second = bench.submit("first"), bench.submit("second")
    await bench.engine.has("first")
    await turns()
    assert bench.engine.submitted == ["first"]

    bench.engine.step("first")
    await turns()

    assert bench.engine.submitted == ["first", "second"]
    bench.engine.step("second")
    assert isinstance(await outcome(first), Completion)
    assert isinstance(await outcome(second), Completion)


@virtual()
async def test_the_rank_of_a_request_is_its_place_in_the_plan(bench: Bench) -> None:
    streams = [bench.submit(str(i)) for i in range(3)]
    await bench.engine.has("0", "1", "2")

    assert bench.engine.ranks == {"0": 0, "1": 1, "2": 2}
    bench.engine.step("0", "1", "2")
    completions = [await outcome(stream) for stream in streams]
    assert [c.rank for c in completions if isinstance(c, Completion)] == [0, 1, 2]


@virtual()
async def test_a_whole_answer_is_one_delta(bench: Bench) -> None:
    (stream,) = await bench.running("r")
    result = asyncio.ensure_future(stream.result())
    for token in (65, 66, 67):
        await turns()
        bench.engine.emit("r", token)
    bench.engine.emit("r", 68, end=FinishReason.STOP)

    delta = await result

    assert (list(delta.token_ids), delta.text) == ([65, 66, 67, 68], "ABCD")
    assert delta.completion is not None


@virtual()
async def test_a_cache_that_the_engine_knows_only_once_it_is_up_bounds_the_plans(bench: Bench) -> None:
    runtime = make_runtime(ScriptedEngine(bench.clock), bench.clock)
    assert runtime.scheduler.limits.kv_tokens is None
    runtime.engine.info = replace(bench.engine.info, limits=EngineLimits(kv_tokens=4096))  # type: ignore[misc]
    await runtime.start()
    assert runtime.scheduler.limits == EngineLimits(kv_tokens=4096)
    assert runtime.scheduler.snapshot(0.0).limits.kv_tokens == 4096
    await runtime.close()


# -- refusals -----------------------------------------------------------------


@virtual(ONE_AT_A_TIME, max_queued_requests=1)
async def test_a_full_queue_refuses_with_a_time_to_try_again(bench: Bench) -> None:
    await bench.running("running")
    bench.submit("waiting")

    with pytest.raises(QueueFull) as refusal:
        bench.submit("one-too-many", slo=make_slo(e2e_ms=1))

    assert refusal.value.retry_after_s is not None
    assert refusal.value.retry_after_s > 0
    assert bench.counts() == {EndStatus.REJECTED: 1}
    assert (bench.runtime.load().with_slo, bench.runtime.load().slo_met) == (1, 0)


@virtual(ONE_AT_A_TIME)
async def test_an_id_is_in_use_until_its_request_has_ended(bench: Bench) -> None:
    await bench.running("a")
    waiting = bench.submit("b")
    for request_id in ("a", "b"):
        with pytest.raises(RequestIdInUse):
            bench.submit(request_id)

    bench.runtime.abort("b")
    again = bench.submit("b")

    assert isinstance(await outcome(waiting), Cancelled)
    bench.engine.step("a")
    await turns()
    bench.engine.step("b")
    assert isinstance(await outcome(again), Completion)


@virtual()
async def test_an_id_stays_in_use_while_the_engine_still_holds_it(bench: Bench) -> None:
    await bench.running("r")
    bench.engine.confirms_late = True
    bench.runtime.abort("r")
    with pytest.raises(RequestIdInUse):
        bench.submit("r")

    bench.engine.emit("r", end=FinishReason.ABORT, text="")

    again = bench.submit("r")
    await bench.engine.has("r")
    bench.engine.step("r")
    assert isinstance(await outcome(again), Completion)


@virtual()
async def test_a_deadline_that_has_passed_is_refused(bench: Bench) -> None:
    bench.clock.advance(1.0)
    with pytest.raises(DeadlineExceeded):
        bench.submit(deadline_at_s=1.0)
    assert bench.counts() == {EndStatus.TIMED_OUT: 1}


@virtual(shed=True)
async def test_a_sheddable_request_that_cannot_meet_its_slo_is_refused(bench: Bench) -> None:
    bench.runtime.scheduler.model = bench.runtime.scheduler.model.__class__(0.1, 0, 0, 0, 0)
    unattainable = make_slo(e2e_ms=50)
    with pytest.raises(Unattainable, match="e2e is expected to be"):
        bench.submit("sheddable", slo=unattainable, sheddable=True)
    bench.submit("kept", slo=unattainable)
    bench.submit("easy", slo=make_slo(ttft_ms=1000), sheddable=True)
    await bench.engine.has("kept", "easy")


@virtual()
async def test_without_shedding_sheddable_requests_are_kept(bench: Bench) -> None:
    bench.runtime.scheduler.model = bench.runtime.scheduler.model.__class__(0.1, 0, 0, 0, 0)
    bench.submit(slo=make_slo(e2e_ms=50), sheddable=True)
    await bench.engine.has("r")


def test_before_the_start_nothing_is_taken() -> None:
    async def main(clock: VirtualClock) -> None:
        bench = Bench(clock, EngineLimits())
        assert not bench.runtime.serving
        with pytest.raises(EngineUnavailable):
            bench.submit()
        await bench.runtime.close()

    run_virtual(main)


# -- options ------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"flush_interval_s": -1.0}, {"flush_interval_s": 60.0}, {"plan_gap_s": 1.5}])
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RuntimeOptions(**wrong)  # type: ignore[arg-type]


@virtual(instance="gpu-7")
async def test_the_instance_has_a_name(bench: Bench) -> None:
    (stream,) = await bench.running("r")
    bench.engine.step("r")
    completion = await outcome(stream)
    assert isinstance(completion, Completion)
    assert completion.instance == "gpu-7"
