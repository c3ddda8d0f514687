"""Why a request waited: what is remembered, what is told of it, and that memory is bounded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import EndStatus, PriorityClass
from lmdeploy_slo.core.slo import Timing
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.runtime.decisions import PLACES_TOLD, SENT_TOLD, DecisionLimits, DecisionLog
from lmdeploy_slo.runtime.explanation import Explanation, RequestState
from lmdeploy_slo.scheduling.outlook import Outlook
from lmdeploy_slo.scheduling.rules import RulePolicy, engine_time_s
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import A100, make_rows, make_slo, make_spec


class Story:
    """A scheduler and its decision log, driven by hand."""

    def __init__(self, slots: int = 1, limits: DecisionLimits | None = None) -> None:
        self.now_s = 0.0
        self.scheduler = Scheduler(limits=EngineLimits(max_batch_size=slots), model=A100, lengths=TaskLengthPredictor())
        self.log = DecisionLog(self.scheduler, limits)
        self.handles: dict[str, int] = {}
        self.timings: dict[str, Timing] = {}

    def arrive(self, request_id: str, **spec: Any) -> None:
        made = make_spec(request_id, **({"arrival_at_s": self.now_s} | spec))
        predicted = Outlook(self.scheduler.snapshot(self.now_s)).in_turn(made, self.scheduler.forecast(made).tokens)
        handle = self.handles[request_id] = self.scheduler.add(made)
        self.timings[request_id] = Timing(made.arrival_at_s)
        self.log.accepted(handle, made, predicted, self.timings[request_id], self.now_s)

    def plan(self, send_now: int | None = None, costs: list[float] | None = None, rule: str = "fcfs") -> list[int]:
        snapshot = self.scheduler.snapshot(self.now_s)
        plan = RulePolicy(rule).plan(snapshot)
        send_now = plan.send_now if send_now is None else send_now
        plan = Plan(plan.order, send_now, costs=None if costs is None else np.array(costs))
        dispatches = self.scheduler.apply(plan, self.now_s)
        self.log.planned(snapshot, plan, dispatches, self.now_s)
        return [dispatch.handle for dispatch in dispatches]

    def end(self, request_id: str, status: EndStatus = EndStatus.FINISHED) -> None:
        handle = self.handles[request_id]
        self.scheduler.drop(handle)
        self.log.ended(handle, status, "stop", slo_met=None, now_s=self.now_s)

    def explain(self, request_id: str) -> Explanation:
        told = self.log.explain(request_id, self.now_s)
        assert told is not None
        return told


def test_what_is_unknown_is_not_explained() -> None:
    assert Story().log.explain("nobody", 0.0) is None


def test_a_wait_is_taken_apart() -> None:
    """A plan comes 0.1 s late, then the engine is full for 1 s, then the policy holds back for 0.4 s."""
    story = Story(slots=1)
    story.arrive("first")
    story.plan()
    story.end("first")
    story.now_s = 1.0
    story.arrive("other")
    story.arrive("ours")
    story.now_s = 1.1
    story.plan()
    story.now_s = 2.1
    story.end("other")
    story.plan(send_now=0)
    story.now_s = 2.5
    assert story.plan() == [story.handles["ours"]]
    story.now_s = 9.0
    told = story.explain("ours")
    assert told.state is RequestState.RUNNING
    assert told.waited_s == pytest.approx(1.5)
    assert (told.planning_s, told.full_s, told.held_s) == pytest.approx((0.1, 1.0, 0.4))


def test_a_waiting_request_is_told_of_now() -> None:
    story = Story(slots=1)
    story.arrive("a")
    story.plan()
    story.now_s = 1.0
    for request_id in "bcd":
        story.arrive(request_id)
    story.now_s = 3.0
    told = story.explain("c")
    assert told.state is RequestState.WAITING
    assert told.waited_s == 2.0
    assert told.arrival_position == 1
    (place,) = told.places
    assert (place.at_s, place.position, place.waiting, place.in_flight, place.sent) == (2.0, 1, 3, 1, 0)
    assert told.sent is None
    assert told.queued.requests == 0


def test_what_went_before_it_and_at_what_price() -> None:
    story = Story(slots=8)
    story.arrive("early", prompt_tokens=1000, priority_class=PriorityClass.BULK)
    story.now_s = 0.5
    story.arrive("ours")
    story.now_s = 0.7
    story.arrive("late", prompt_tokens=10, priority_class=PriorityClass.SYSTEM, slo=make_slo(e2e_ms=60_000))
    story.plan(send_now=1, costs=[0.25, math.nan, 7.0])
    story.now_s = 0.9
    story.plan(send_now=2)
    told = story.explain("ours")
    assert (told.queued.requests, told.queued.overtook, told.queued.prompt_tokens) == (1, 1, 10)
    assert told.queued.cost == 0.25
    (late,) = told.before
    assert (late.at_s, late.arrived_s) == pytest.approx((0.2, 0.2))
    assert late.priority_class is PriorityClass.SYSTEM
    assert (late.rank, late.prompt_tokens, late.cost) == (0, 10, 0.25)
    tokens = story.scheduler.forecast(make_spec()).tokens
    row = make_rows({"prompt_tokens": 10, "output_tokens": tokens})
    assert late.engine_s == pytest.approx(float(engine_time_s(row, A100)[0]))
    assert late.spare_s is not None
    assert 50 < late.spare_s < 60
    assert told.sent is not None
    assert (told.sent.rank, told.sent.cost, told.sent.spare_s) == (0, None, None)  # no costs, no objective
    assert told.complete
    # The one of a lower tier went in the same plan, but after it.
    assert story.explain("early").queued.requests == 2


def test_spare_time_runs_out() -> None:
    story = Story(slots=1)
    story.arrive("runs")
    story.plan()
    story.arrive("ours", slo=make_slo(ttft_ms=1000))
    spare = []
    for at_s in (0.1, 0.6, 1.1):
        story.now_s = at_s
        spare.append(story.explain("ours").places[-1].spare_s)
    first_token_s = A100.prefill_stall_s(100) + A100.c0
    assert spare == pytest.approx([1.0 - first_token_s - at_s for at_s in (0.1, 0.6, 1.1)])


def test_places_are_told_over_time() -> None:
    story = Story(slots=1)
    for request_id in "abcd":
        story.arrive(request_id)
    for request_id in "abc":
        story.now_s += 1.0
        story.plan()
        story.end(request_id)
    story.now_s += 1.0
    story.plan()
    told = story.explain("d")
    assert [(p.at_s, p.position, p.waiting, p.sent) for p in told.places] == [(1, 2, 3, 1), (2, 1, 2, 2), (3, 0, 1, 3)]
    assert (told.queued.requests, told.queued.overtook) == (3, 0)


def test_of_many_places_and_dispatches_some_are_told() -> None:
    story = Story(slots=1000)
    story.arrive("ours", priority_class=PriorityClass.BULK)
    for number in range(300):
        story.now_s += 0.1
        story.arrive(f"r{number}", prompt_tokens=100 + number)
        story.plan(send_now=1)
    told = story.explain("ours")
    assert len(told.places) == PLACES_TOLD
    assert [p.at_s for p in told.places] == sorted(p.at_s for p in told.places)
    assert len(told.before) == SENT_TOLD
    assert [sent.prompt_tokens for sent in told.before] == list(range(380, 400))
    assert told.queued.requests == told.queued.overtook == 300
    assert told.queued.prompt_tokens == sum(range(100, 400))


def test_the_dearest_are_those_of_the_highest_cost() -> None:
    story = Story(slots=1000)
    story.arrive("ours", priority_class=PriorityClass.BULK)
    for number in range(SENT_TOLD + 5):
        story.arrive(f"r{number}", prompt_tokens=1000 - number)
        story.plan(send_now=1, costs=[float(number), 0.0])
    assert [sent.cost for sent in story.explain("ours").before] == [float(n) for n in range(5, SENT_TOLD + 5)]


def test_the_last_requests_are_remembered() -> None:
    story = Story(slots=10, limits=DecisionLimits(requests=2))
    for request_id in "abc":
        story.arrive(request_id)
    story.plan()
    for request_id in "abc":
        story.end(request_id)
    assert story.log.explain("a", 1.0) is None
    assert story.explain("b").status is EndStatus.FINISHED
    assert story.explain("c").state is RequestState.ENDED


def test_of_an_id_that_was_used_again_the_last_is_told() -> None:
    story = Story(slots=10, limits=DecisionLimits(requests=2))
    story.arrive("a", prompt_tokens=1)
    story.end("a", EndStatus.CANCELLED)
    story.arrive("a", prompt_tokens=2)
    for request_id in "bc":
        story.arrive(request_id)
        story.end(request_id)
    assert story.explain("a").spec.prompt_tokens == 2
    assert story.explain("a").state is RequestState.WAITING


def test_forgotten_dispatches_are_admitted() -> None:
    story = Story(slots=1000, limits=DecisionLimits(dispatches=8))
    story.arrive("ours", priority_class=PriorityClass.BULK)
    for number in range(20):
        story.arrive(f"r{number}", prompt_tokens=number + 1)
        story.plan(send_now=1)
    told = story.explain("ours")
    assert not told.complete
    assert told.queued.requests == 20
    assert [sent.prompt_tokens for sent in told.before] == list(range(13, 21))
    assert told.queued.prompt_tokens == sum(range(13, 21))
    for number in range(8):
        story.plan(send_now=1)
        story.arrive(f"s{number}")
        story.plan(send_now=1)
    assert story.explain("ours").sent is None  # its own dispatch is forgotten, too


@given(
    st.lists(st.tuples(st.sampled_from("apse"), st.floats(0.0, 3.0)), max_size=60),
    st.integers(1, 4),
    st.integers(2, 6),
)
def test_memory_is_bounded_and_times_add_up(steps: list[tuple[str, float]], slots: int, orders: int) -> None:
    """Whatever happens: arrivals (a), plans (p), plans that send nothing (s), ends (e)."""
    limits = DecisionLimits(requests=3, dispatches=4, orders=orders, entries=12)
    story = Story(slots, limits)
    alive: list[str] = []
    for number, (step, passed_s) in enumerate(steps):
        story.now_s += passed_s
        if step == "a":
            story.arrive(f"r{number}")
            alive.append(f"r{number}")
        elif step in "ps":
            story.plan(send_now=0 if step == "s" else None)
        elif alive:
            story.end(alive.pop(0))
        log = story.log
        assert len(log.stories._ended) <= 3
        assert len(log.stories._by_id) <= len(alive) + 3
        assert len(log._orders) <= orders
        assert log._entries == sum(len(order.handles) for order in log._orders)
        assert log._entries <= 12 or len(log._orders) == 0
        for request_id in list(log.stories._by_id):
            told = story.explain(request_id)
            assert told.planning_s + told.full_s + told.held_s == pytest.approx(told.waited_s)
            assert min(told.planning_s, told.full_s, told.held_s) >= 0
            assert told.waited_s <= story.now_s - told.spec.arrival_at_s + 1e-9
            assert all(0 <= place.position <= place.waiting for place in told.places)
            assert told.queued.overtook <= told.queued.requests


def test_the_order_of_the_queue_includes_whom_no_plan_knew() -> None:
    story = Story(slots=1)
    for request_id in "ab":
        story.arrive(request_id)
    story.plan(rule="sjf")
    for request_id in "cd":
        story.arrive(request_id)
    handles = [story.handles[request_id] for request_id in "bcd"]
    assert story.scheduler.waiting_order().tolist() == handles
    assert story.scheduler.oldest_arrival_s() == 0.0


def test_nobody_is_oldest_in_an_empty_queue() -> None:
    assert Story().scheduler.oldest_arrival_s() is None
    assert Story().scheduler.waiting_order().tolist() == []
