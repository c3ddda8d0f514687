"""What passes through the journal of a runtime: counts, the last minute, and those who watch."""

from __future__ import annotations

import asyncio

import pytest
from runtime_bench import Bench, outcome, virtual
from scripted_engine import turns

from lmdeploy_slo.core.request import ClientId, EndStatus, FinishReason
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import EngineEvent
from lmdeploy_slo.errors import EngineError, InvalidRequest, QueueFull, RequestError, RequestIdInUse
from lmdeploy_slo.runtime.last_minute import SLOTS, LastMinute, TaskCounts, TaskNames
from lmdeploy_slo.runtime.observer import AppliedPlan, EndedRequest, Refusal
from lmdeploy_slo.testing.builders import make_slo


class Notes:
    """An observer that keeps everything."""

    def __init__(self) -> None:
        self.ended: list[EndedRequest] = []
        self.refused: list[Refusal] = []
        self.plans: list[AppliedPlan] = []

    def on_end(self, ended: EndedRequest) -> None:
        self.ended.append(ended)

    def on_refusal(self, refusal: Refusal) -> None:
        self.refused.append(refusal)

    def on_plan(self, applied: AppliedPlan) -> None:
        self.plans.append(applied)


class Broken:
    """An observer that fails always."""

    def on_end(self, ended: EndedRequest) -> None:
        raise RuntimeError("end")

    def on_refusal(self, refusal: Refusal) -> None:
        raise RuntimeError("refusal")

    def on_plan(self, applied: AppliedPlan) -> None:
        raise RuntimeError("plan")


@virtual()
async def test_every_way_to_end_is_told_once(bench: Bench) -> None:
    notes, journal = Notes(), bench.runtime.journal
    journal.watch(notes)
    streams = await bench.running("finishes", "fails", "is-aborted", "leaves")
    bench.engine.step("finishes")
    bench.engine.fail("fails")
    bench.runtime.abort("is-aborted")
    streams[3].cancel()
    await asyncio.gather(*(outcome(stream) for stream in streams))
    told = {ended.spec.request_id: (ended.status, ended.reason) for ended in notes.ended}
    assert told == {
        "finishes": (EndStatus.FINISHED, "stop"),
        "fails": (EndStatus.FAILED, "ENGINE_ERROR"),
        "is-aborted": (EndStatus.CANCELLED, "CANCELLED"),
        "leaves": (EndStatus.CANCELLED, "CANCELLED"),
    }
    assert len(notes.ended) == 4
    assert all(ended.timing.ended_at_s is not None and ended.rank is not None for ended in notes.ended)
    assert [ended.timing.output_tokens for ended in notes.ended] == [1, 1, 1, 1]
    assert bench.runtime.load().output_tokens == 4


@virtual(EngineLimits(max_batch_size=1), max_queued_requests=1)
async def test_refusals_are_told_with_their_reason(bench: Bench) -> None:
    notes, journal = Notes(), bench.runtime.journal
    journal.watch(notes)
    slo = make_slo(e2e_ms=1)
    await bench.running("runs")
    bench.submit("waits")
    with pytest.raises(QueueFull):
        bench.submit("too-many", slo=slo, task_type="chat")
    with pytest.raises(RequestIdInUse):
        bench.submit("waits", slo=slo)
    journal.refused(InvalidRequest([]), malformed=True)
    told = [(r.reason, r.request_id, r.task, r.counted, r.with_slo) for r in notes.refused]
    assert told == [
        ("QUEUE_FULL", "too-many", "chat", True, True),
        ("REQUEST_ID_IN_USE", "waits", "none", False, False),
        ("INVALID_REQUEST", "", "none", False, False),
    ]
    load = bench.runtime.load()
    assert load.refused == {"QUEUE_FULL": 1, "REQUEST_ID_IN_USE": 1, "INVALID_REQUEST": 1}
    assert (load.with_slo, load.slo_met) == (1, 0)
    assert load.last_minute == {"chat": TaskCounts(requests=1, with_slo=1, unfinished=1)}


@virtual()
async def test_plans_are_told_with_whom_they_sent(bench: Bench) -> None:
    notes = Notes()
    bench.runtime.journal.watch(notes)
    await bench.running("a")
    await bench.running("b", "c")
    assert [len(applied.dispatches) for applied in notes.plans] == [1, 2]
    assert not any(applied.failed for applied in notes.plans)
    assert bench.runtime.load().last_plan is notes.plans[-1]


@virtual(defects=1)
async def test_an_observer_that_fails_harms_nobody(bench: Bench) -> None:
    """It is logged once, with its traceback; others are told as ever."""
    notes, journal = Notes(), bench.runtime.journal
    for observer in (Broken(), notes):
        journal.watch(observer)
    (stream,) = await bench.running("r")
    with pytest.raises(RequestIdInUse):
        bench.submit("r")
    bench.engine.step("r")
    assert not isinstance(await outcome(stream), RequestError)
    assert (len(notes.ended), len(notes.refused), len(notes.plans)) == (1, 1, 1)


@virtual()
async def test_who_stops_watching_is_told_no_more(bench: Bench) -> None:
    notes, journal = Notes(), bench.runtime.journal
    journal.watch(notes)
    journal.unwatch(notes)
    (stream,) = await bench.running("r")
    bench.engine.step("r")
    await outcome(stream)
    assert notes.ended == []
    assert notes.plans == []


@virtual()
async def test_the_last_minute_by_task(bench: Bench) -> None:
    """Objectives missed are counted one by one; after a minute they are forgotten."""
    slo = make_slo(ttft_ms=1000, tpot_ms=10_000, e2e_ms=3000)
    bench.submit("meets", task_type="chat", slo=slo)
    bench.submit("late", task_type="chat", slo=slo, prompt_tokens=7)
    bench.submit("fails", task_type="code", slo=slo)
    bench.submit("free")
    await bench.engine.has("meets", "late", "fails", "free")
    bench.clock.advance(0.5)
    bench.engine.emit("meets", 1)
    bench.engine.emit("meets", 1, end=FinishReason.STOP)
    bench.clock.advance(4.5)
    bench.engine.emit("late", 1, 2)
    bench.engine.emit("late", 3, end=FinishReason.LENGTH)
    bench.engine.emit("fails", error=EngineError("out of memory"), text="")
    bench.engine.emit("free", 1, end=FinishReason.STOP)
    minute = bench.runtime.load().last_minute
    assert list(minute) == ["chat", "code", "none"]
    chat = minute["chat"]
    assert (chat.requests, chat.finished, chat.with_slo, chat.slo_met) == (2, 2, 2, 1)
    assert (chat.broke_ttft, chat.broke_tpot, chat.broke_e2e, chat.unfinished) == (1, 0, 1, 0)
    assert (chat.prompt_tokens, chat.output_tokens) == (107, 5)
    assert (chat.ttft_s, chat.with_tpot, chat.tpot_s) == (5.5, 2, 0.0)
    assert (minute["code"].with_slo, minute["code"].slo_met, minute["code"].unfinished) == (1, 0, 1)
    assert (minute["none"].requests, minute["none"].with_slo) == (1, 0)
    bench.clock.advance(61)
    assert bench.runtime.load().last_minute == {}


def test_the_last_minute_is_between_55_and_60_seconds() -> None:
    for arrived_s in (0.0, 2.5, 4.999):
        minute = LastMinute()
        minute.counts("chat", arrived_s).requests += 1
        assert minute.sums(arrived_s + 55.0)["chat"].requests == 1
        assert minute.sums(arrived_s + 60.0) == {}


def test_the_last_minute_is_bounded() -> None:
    minute = LastMinute()
    for second in range(10_000):
        minute.counts("chat", float(second)).requests += 1
    assert len(minute._slots) == SLOTS
    assert minute.sums(9_999.0)["chat"].requests == 60


def test_task_names_are_bounded() -> None:
    names = TaskNames(limit=3, known=("chat", "code"))
    assert [names.of(name) for name in ("", "x", "y", "chat", "x", "code")] == [
        "none",
        "x",
        "other",
        "chat",
        "x",
        "code",
    ]
    assert TaskNames(limit=1, known=("a", "b")).of("b") == "b"


@virtual()
async def test_the_load_tells_of_the_oldest_wait_and_of_tokens(bench: Bench) -> None:
    load = bench.runtime.load()
    assert (load.oldest_wait_s, load.last_plan, load.price_s) == (None, None, None)
    await bench.running("r")
    bench.engine.send(EngineEvent("r", (1, 2, 3), "abc"))
    assert bench.runtime.load().output_tokens == 3
    bench.engine.step("r")
    await turns()
    assert bench.runtime.load().output_tokens == 4


@virtual(EngineLimits(max_batch_size=1))
async def test_the_oldest_wait(bench: Bench) -> None:
    await bench.running("runs")
    bench.submit("a")
    bench.clock.advance(2.0)
    bench.submit("b")
    bench.clock.advance(1.0)
    load = bench.runtime.load()
    assert load.oldest_wait_s == 3.0
    assert load.max_in_flight == 1


@virtual(EngineLimits(max_batch_size=1))
async def test_a_request_is_explained_while_it_waits_and_after(bench: Bench) -> None:
    await bench.running("first")
    stream = bench.submit("ours")
    await turns()
    bench.clock.advance(1.5)
    waiting = bench.runtime.journal.explain("ours")
    assert waiting is not None
    assert waiting.state.value == "waiting"
    bench.engine.step("first")
    await bench.engine.has("ours")
    bench.engine.step("ours")
    await outcome(stream)
    told = bench.runtime.journal.explain("ours")
    assert told is not None
    assert (told.state.value, told.reason, told.waited_s) == ("ended", "stop", 1.5)
    assert told.timing.queue_s == told.waited_s
    assert told.full_s + told.held_s + told.planning_s == pytest.approx(1.5)


@virtual()
async def test_explanations_can_be_kept_to_their_client(bench: Bench) -> None:
    bench.submit("ours", client=ClientId("me", "user"))
    assert bench.runtime.journal.explain("ours", of="me") is not None
    assert bench.runtime.journal.explain("ours", of="you") is None
