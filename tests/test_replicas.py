"""Several engines under one runtime: who goes where, and what happens to those whose engine is gone. Virtual time."""

from __future__ import annotations

import asyncio

import pytest
from replica_bench import SUPERVISION, Bench, bench, outcome, whole
from scripted_engine import turns

from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.errors import EngineUnavailable, QueueTimeout


@bench()
async def test_requests_are_spread_and_say_where_they_were(bench: Bench) -> None:
    streams = [bench.submit(f"r{i}") for i in range(4)]
    await turns()
    assert [len(bench.engine(n).requests) for n in (0, 1)] == [2, 2]
    for n in (0, 1):
        bench.engine(n).step(*bench.engine(n).requests)
    told = [(await whole(stream)).completion for stream in streams]
    assert sorted(completion.instance for completion in told if completion) == ["scripted-0"] * 2 + ["scripted-1"] * 2
    load = bench.runtime.load()
    assert [(one.name, one.up, one.in_flight) for one in load.replicas] == [
        ("scripted-0", True, 0),
        ("scripted-1", True, 0),
    ]
    assert load.max_in_flight == 4


@bench()
async def test_who_has_shown_nothing_starts_over_elsewhere(bench: Bench) -> None:
    stream, other = bench.submit("r"), bench.submit("s")
    await turns()
    lost = bench.where("r")
    bench.engine(lost).crash()
    await turns()
    assert set(bench.engine(1 - lost).requests) == {"r", "s"}
    assert bench.engine(1 - lost).requests["r"].prompt_token_ids == [1, 2, 3]
    bench.engine(1 - lost).step("r", "s")
    completion = (await whole(stream)).completion
    assert completion is not None
    assert completion.instance == f"scripted-{1 - lost}"
    await whole(other)
    load = bench.runtime.load()
    assert (load.retried, load.resumed, load.serving) == (1, 0, True)
    told = bench.runtime.journal.explain("r")
    assert told is not None
    assert told.moves == 1


@bench()
async def test_who_has_shown_tokens_goes_on_where_it_was(bench: Bench) -> None:
    """Without a gap and without a repeat."""
    stream = bench.submit("r", max_new_tokens=16)
    await turns()
    lost = bench.where("r")
    bench.engine(lost).emit("r", 65, cached_tokens=2)
    await asyncio.sleep(1.0)
    bench.engine(lost).emit("r", 66, 67)
    bench.engine(lost).crash()
    await turns()
    goes_on = bench.engine(1 - lost).requests["r"]
    assert list(goes_on.prompt_token_ids) == [1, 2, 3, 65, 66, 67]
    assert (goes_on.generated_tokens, goes_on.stopping.max_new_tokens) == (3, 13)
    await asyncio.sleep(1.0)
    bench.engine(1 - lost).emit("r", 68, cached_tokens=6)
    bench.engine(1 - lost).step("r")
    told = await whole(stream)
    assert list(told.token_ids) == [65, 66, 67, 68, 97]
    assert told.text == "ABCDa"
    completion = told.completion
    assert completion is not None
    timing = completion.timing
    assert (completion.prompt_tokens, completion.cached_tokens, timing.output_tokens) == (3, 2, 5)
    assert (timing.ttft_s, timing.e2e_s, timing.queue_s) == (0.0, 2.0, 0.0)
    load = bench.runtime.load()
    assert (load.retried, load.resumed, load.ended[EndStatus.FINISHED]) == (0, 1, 1)
    assert sum(one.in_flight + one.waiting for one in load.replicas) == 0


@bench()
async def test_it_goes_on_once(bench: Bench) -> None:
    stream = bench.submit("r")
    await turns()
    for number in (bench.where("r"), 1 - bench.where("r")):
        bench.engine(number).emit("r", 65)
        bench.engine(number).crash()
        await turns()
    assert isinstance(await outcome(stream), EngineUnavailable)


@bench(retries=0)
async def test_it_may_be_forbidden(bench: Bench) -> None:
    stream = bench.submit("r")
    await turns()
    bench.engine(bench.where("r")).crash()
    assert isinstance(await outcome(stream), EngineUnavailable)


@bench()
async def test_who_goes_on_goes_before_those_that_wait(bench: Bench) -> None:
    streams = {name: bench.submit(name) for name in ("a", "b", "c", "d", "e", "f")}
    await turns()
    lost = bench.where("a")
    bench.engine(lost).step()
    bench.engine(lost).crash()
    await turns()
    kept = bench.engine(1 - lost)
    assert "a" not in kept.requests, "its slots are taken"
    finishing = list(kept.requests)
    kept.step(*finishing)
    await turns()
    assert "a" in kept.requests
    while kept.requests:
        kept.step(*kept.requests)
        await turns()
    for stream in streams.values():
        await whole(stream)


@bench()
async def test_where_no_engine_is_left_they_wait_and_then_go_on(bench: Bench) -> None:
    stream = bench.submit("r")
    await turns()
    number = bench.where("r")
    bench.engine(number).emit("r", 65)
    bench.engine(1 - number).crash()
    bench.engine(1 - number).send()
    bench.runtime.replicas[1 - number].engine._fell("gone")  # type: ignore[attr-defined]
    bench.engine(number).crash()
    await turns()
    assert not bench.runtime.serving
    with pytest.raises(EngineUnavailable):
        bench.submit("late")
    await asyncio.sleep(SUPERVISION.backoff_s + 0.1)
    back = bench.where("r")
    bench.engine(back).step("r")
    assert list((await whole(stream)).token_ids) == [65, 97]


@bench()
async def test_an_engine_that_is_back_takes_requests_again(bench: Bench) -> None:
    bench.submit("r")
    await turns()
    lost = bench.where("r")
    bench.engine(lost).crash()
    await turns()
    assert not bench.fleet.is_open(lost)
    await asyncio.sleep(SUPERVISION.backoff_s + 0.1)
    assert bench.fleet.is_open(lost)
    streams = [bench.submit(f"s{i}") for i in range(3)]
    await turns()
    assert len(bench.engine(lost).requests) == 2
    assert bench.runtime.load().engine_restarts == 1
    bench.runtime.abort("r")
    for stream in streams:
        stream.cancel()


@bench(hold_s=2.0)
async def test_when_all_are_lost_all_end(bench: Bench) -> None:
    streams = [bench.submit(f"r{i}") for i in range(6)]
    await turns()
    for had in bench.engines:
        had[-1].crash()
    for replica in bench.runtime.replicas.values():
        replica.engine.failures = SUPERVISION.restarts  # type: ignore[attr-defined]
        replica.engine._change(replica.engine.state.LOST, "gone")  # type: ignore[attr-defined]
    told = [await outcome(stream) for stream in streams]
    assert all(isinstance(error, EngineUnavailable) for error in told)
    assert bench.runtime.lost.is_set()


@bench()
async def test_the_queue_timeout_goes_on_counting(bench: Bench) -> None:
    stream = bench.submit("r", queue_timeout_s=3.0)
    await turns()
    for had in bench.engines:
        had[-1].crash()
        had[-1].send()
    for replica in bench.runtime.replicas.values():
        replica.engine._fell("gone")  # type: ignore[attr-defined]
    assert isinstance(await outcome(stream), QueueTimeout)
    assert bench.clock.now_s() == pytest.approx(3.0)
