"""Several engines under one runtime: who goes where, and what happens to those whose engine is gone. Virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import InlineExecutor, ScriptedEngine, turns

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import EngineRequest, Stopping
from lmdeploy_slo.engine.supervised import SupervisedEngine, Supervision
from lmdeploy_slo.engine.synthetic_text import TEXTS, TOKEN_IDS, synthesize
from lmdeploy_slo.errors import EngineUnavailable, QueueTimeout, RequestError
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.runtime.live import RuntimeOptions
from lmdeploy_slo.runtime.replica import Replica
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.runtime.stream import Delta, RequestStream
from lmdeploy_slo.scheduling.fleet import Fleet
from lmdeploy_slo.scheduling.placement import make_placement
from lmdeploy_slo.scheduling.rules import RulePolicy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import NO_TIME, make_spec
from lmdeploy_slo.testing.virtual_time import run_virtual

SUPERVISION = Supervision(stall_timeout_s=10.0, restarts=1, backoff_s=5.0)
LIMITS = EngineLimits(max_batch_size=2)


class Bench:
    """A runtime on `count` scripted engines, two slots each; `engines[n]`: those replica n has had, oldest first."""

    def __init__(self, clock: VirtualClock, count: int = 2, **options: Any) -> None:
        self.clock = clock
        self.fleet = Fleet(make_placement("least-loaded"))
        self.engines: list[list[ScriptedEngine]] = []
        self.lengths = TaskLengthPredictor()
        options = {"flush_interval_s": 0.0, "plan_gap_s": 0.0} | options
        parts = self.parts()
        self.runtime = Runtime(*parts, clock, RuntimeOptions(**options), executor=InlineExecutor(), fleet=self.fleet)
        for _ in range(count - 1):
            self.add()

    def parts(self) -> tuple[SupervisedEngine, Scheduler, RulePolicy]:
        had: list[ScriptedEngine] = []
        self.engines.append(had)

        def build() -> ScriptedEngine:
            had.append(ScriptedEngine(self.clock, limits=LIMITS))
            return had[-1]

        scheduler = Scheduler(limits=LIMITS, model=NO_TIME, lengths=self.lengths, numbers=self.fleet.numbers)
        return SupervisedEngine(build, self.clock, SUPERVISION), scheduler, RulePolicy("fcfs")

    def add(self) -> Replica:
        return self.runtime.add(*self.parts())

    def engine(self, number: int) -> ScriptedEngine:
        return self.engines[number][-1]

    def where(self, request_id: str) -> int:
        (number,) = [n for n, had in enumerate(self.engines) if request_id in had[-1].requests]
        return number

    def submit(self, request_id: str, **spec: Any) -> RequestStream:
        spec = {"arrival_at_s": self.clock.now_s(), "prompt_tokens": 3} | spec
        stopping = Stopping(max_new_tokens=spec.get("max_new_tokens", 16))
        request = EngineRequest(request_id, prompt_token_ids=[1, 2, 3], stopping=stopping)
        return self.runtime.submit(make_spec(request_id, **spec), request)


def bench(count: int = 2, **options: Any) -> Callable[[Callable[[Bench], Awaitable[None]]], Any]:
    def decorate(test: Callable[[Bench], Awaitable[None]]) -> Callable[[], None]:
        def run() -> None:
            async def main(clock: VirtualClock) -> None:
                bench = Bench(clock, count, **options)
                await bench.runtime.start()
                await test(bench)
                await bench.runtime.close()
                assert not bench.runtime._live and not bench.runtime._by_handle

            run_virtual(main)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


async def outcome(stream: RequestStream) -> Delta | RequestError:
    try:
        return await stream.result()
    except RequestError as error:
        return error


async def whole(stream: RequestStream) -> Delta:
    told = await outcome(stream)
    assert isinstance(told, Delta), told
    assert told.completion is not None
    return told


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


# -- the emulated engine goes on ----------------------------------------------


@given(st.integers(1, 40), st.integers(0, 39), st.integers(0, 5), st.booleans())
def test_synthetic_output_goes_on_where_it_ended(tokens: int, done: int, prompt: int, dictated: bool) -> None:
    request = EngineRequest(
        "r",
        prompt_token_ids=[7 + prompt, 8],
        stopping=Stopping(max_new_tokens=tokens, ignore_eos=not dictated),
        emulated_output_tokens=tokens if dictated else None,
    )
    answer = synthesize(request, max_tokens=1000, seed=1)
    ids = [TOKEN_IDS[(answer.start + k) % len(TEXTS)][0] for k in range(answer.tokens)]
    done = min(done, tokens - 1)
    if not done:
        return
    rest = EngineRequest(
        "r",
        prompt_token_ids=[7 + prompt, 8, *ids[:done]],
        generated_tokens=done,
        stopping=Stopping(max_new_tokens=tokens - done, ignore_eos=not dictated),
        emulated_output_tokens=tokens - done if dictated else None,
    )
    told = synthesize(rest, max_tokens=1000 - done, seed=1)
    assert [TOKEN_IDS[(told.start + k) % len(TEXTS)][0] for k in range(told.tokens)] == ids[done:]
    assert told.end is answer.end


# -- failures that meet -------------------------------------------------------


@bench()
async def test_the_other_one_dies_while_one_is_taken_away(bench: Bench) -> None:
    """The one that was to go is needed, and stays."""
    stream = bench.submit("r")
    await turns()
    number = bench.where("r")
    leaving = asyncio.ensure_future(bench.runtime.remove(bench.runtime.replicas[number], 60.0))
    await turns()
    bench.runtime.replicas[1 - number].engine._fell("gone")  # type: ignore[attr-defined]
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
async def test_both_die_while_one_is_taken_away(bench: Bench) -> None:
    stream = bench.submit("r")
    await turns()
    number = bench.where("r")
    leaving = asyncio.ensure_future(bench.runtime.remove(bench.runtime.replicas[number], 60.0))
    await turns()
    bench.runtime.replicas[1 - number].engine._fell("gone")  # type: ignore[attr-defined]
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
