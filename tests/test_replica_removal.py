"""Engines that come and go under one runtime, and failures that meet it. Virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from replica_bench import SUPERVISION, Bench, bench, whole
from scripted_engine import turns

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.errors import EngineUnavailable
from lmdeploy_slo.runtime.stream import RequestStream
from lmdeploy_slo.testing.virtual_time import run_virtual

# -- adding and taking away ---------------------------------------------------


@bench(count=1)
async def test_an_engine_is_added_while_serving(bench: Bench) -> None:
    streams = [bench.submit(f"r{i}") for i in range(4)]
    await turns()
    replica = bench.add()
    assert not replica.up
    await replica.start()
    bench.runtime.changed(replica)
    more = [bench.submit(f"s{i}") for i in range(2)]
    await turns()
    assert len(bench.engine(1).requests) == 2
    for stream in [*streams, *more]:
        stream.cancel()


@bench()
async def test_an_engine_is_taken_away_when_its_requests_have_ended(bench: Bench) -> None:
    streams = [bench.submit(f"r{i}") for i in range(6)]
    await turns()
    replica = bench.runtime.replicas[1]
    running = dict(bench.engine(1).requests)
    leaving = asyncio.ensure_future(bench.runtime.remove(replica, 100.0))
    await turns()
    assert replica.load().draining
    assert replica.load().waiting == 0, "who waited waits elsewhere"
    bench.engine(1).step(*running)
    await leaving
    assert list(bench.runtime.replicas) == [0]
    while bench.engine(0).requests:
        bench.engine(0).step(*bench.engine(0).requests)
        await turns()
    for stream in streams:
        await whole(stream)
    assert bench.runtime.journal.explain("r0") is not None


@bench()
async def test_what_does_not_end_in_time_goes_on_elsewhere(bench: Bench) -> None:
    stream = bench.submit("r")
    await turns()
    number = bench.where("r")
    bench.engine(number).emit("r", 65)
    await bench.runtime.remove(bench.runtime.replicas[number], 3.0)
    await turns()
    assert bench.clock.now_s() == 3.0
    other = bench.engine(1 - number)
    assert list(other.requests["r"].prompt_token_ids) == [1, 2, 3, 65]
    other.step("r")
    assert list((await whole(stream)).token_ids) == [65, 97]


@bench()
async def test_the_last_engine_stays(bench: Bench) -> None:
    await bench.runtime.remove(bench.runtime.replicas[0], 1.0)
    with pytest.raises(ValueError, match="only engine"):
        await bench.runtime.remove(bench.runtime.replicas[1], 1.0)
    stream = bench.submit("r")
    await turns()
    bench.engine(1).step("r")
    completion = (await whole(stream)).completion
    assert completion is not None
    assert completion.instance == "scripted-1"


# -- failures that meet -------------------------------------------------------


async def other_falls_while_leaving(bench: Bench) -> tuple[RequestStream, int, asyncio.Future[None]]:
    """(the answer to "r", the number of its engine, the removal of that engine); of two open ones the other is gone."""
    stream = bench.submit("r")
    await turns()
    number = bench.where("r")
    leaving = asyncio.ensure_future(bench.runtime.remove(bench.runtime.replicas[number], 60.0))
    await turns()
    bench.runtime.replicas[1 - number].engine._fell("gone")  # type: ignore[attr-defined]
    return stream, number, leaving


@bench()
async def test_the_other_one_dies_while_one_is_taken_away(bench: Bench) -> None:
    """The one that was to go is needed, and stays."""
    stream, number, leaving = await other_falls_while_leaving(bench)
    with pytest.raises(ValueError, match="only engine"):
        await leaving
    assert bench.runtime.serving
    assert bench.fleet.is_open(number)
    second = bench.submit("s")
    await turns()
    bench.engine(number).step("r", "s")
    for told in (stream, second):
        await whole(told)


@bench()
async def test_who_is_told_to_stay_keeps_its_requests(bench: Bench) -> None:
    """Also where a third one is there by the time it hears of it: nothing is sent to it a second time."""
    third = bench.add()
    await third.start()
    stream, number, leaving = await other_falls_while_leaving(bench)
    bench.runtime.changed(third)
    with pytest.raises(ValueError, match="only engine"):
        await leaving
    assert bench.where("r") == number
    bench.engine(number).step("r")
    await whole(stream)


@bench()
async def test_both_die_while_one_is_taken_away(bench: Bench) -> None:
    stream, number, leaving = await other_falls_while_leaving(bench)
    bench.engine(number).crash()
    with pytest.raises(ValueError, match="only engine"):
        await leaving
    assert set(bench.runtime.replicas) == {0, 1}
    await asyncio.sleep(SUPERVISION.backoff_s + 0.1)
    assert all(replica.up for replica in bench.runtime.replicas.values())
    bench.engine(bench.where("r")).step("r")
    await whole(stream)


@bench()
async def test_tokens_that_come_with_a_failure_are_shown(bench: Bench) -> None:
    stream = bench.submit("r")
    await turns()
    number = bench.where("r")
    bench.engine(number).emit("r", 65, 66, error=EngineUnavailable("gone"))
    await turns()
    bench.engine(1 - number).step("r")
    told = await whole(stream)
    assert list(told.token_ids) == [65, 66, 97]
    assert told.text == "ABa"


@bench()
async def test_being_moved_is_no_failure(bench: Bench) -> None:
    """Who was moved for an engine to be taken away may still survive the death of the next one."""
    stream = bench.submit("r")
    replica = bench.add()
    await replica.start()
    bench.runtime.changed(replica)
    await turns()
    first = bench.where("r")
    bench.engine(first).emit("r", 65)
    await bench.runtime.remove(bench.runtime.replicas[first], 0.0)
    second = bench.where("r")
    bench.engine(second).emit("r", 66)
    bench.engine(second).crash()
    await turns()
    bench.engine(bench.where("r")).step("r")
    assert list((await whole(stream)).token_ids) == [65, 66, 97]
    assert bench.runtime.load().output_tokens == 3


def test_an_engine_that_dies_while_another_one_starts_is_not_opened() -> None:
    async def main(clock: VirtualClock) -> None:
        bench = Bench(clock)
        slow = bench.engine(1).start

        async def start(sink: Any) -> None:
            await asyncio.sleep(3.0)
            await slow(sink)

        bench.engine(1).start = start  # type: ignore[method-assign]
        starting = asyncio.ensure_future(bench.runtime.start())
        await asyncio.sleep(1.0)
        bench.runtime.replicas[0].engine._fell("gone")  # type: ignore[attr-defined]
        await starting
        assert [bench.fleet.is_open(number) for number in (0, 1)] == [False, True]
        await bench.runtime.close()

    run_virtual(main)


def test_a_start_that_fails_leaves_nothing_running() -> None:
    async def main(clock: VirtualClock) -> None:
        bench = Bench(clock)

        async def fails(sink: Any) -> None:
            raise EngineUnavailable("no place for it")

        async def hangs(sink: Any) -> None:
            await asyncio.Event().wait()

        bench.engine(0).start = hangs  # type: ignore[method-assign]
        bench.engine(1).start = fails  # type: ignore[method-assign]
        with pytest.raises(EngineUnavailable, match="no place"):
            await bench.runtime.start()
        await bench.runtime.close()
        assert len(asyncio.all_tasks()) == 1

    run_virtual(main)
