"""A fleet keeps every request in one place, and puts none where it must not go."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.errors import ConfigError, EngineUnavailable
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.scheduling.fleet import Fleet, Move
from lmdeploy_slo.scheduling.placement import make_placement, placement_names
from lmdeploy_slo.scheduling.policy import Policy
from lmdeploy_slo.scheduling.rules import RulePolicy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import A100, make_slo, make_spec

CHAT = make_slo(ttft_ms=1000, tpot_ms=50)


def make_fleet(placement: str = "least-work", replicas: int = 2, **limits: Any) -> Fleet:
    fleet = Fleet(make_placement(placement))
    for _ in range(replicas):
        add_replica(fleet, **limits)
    return fleet


FCFS = RulePolicy("fcfs")


def add_replica(
    fleet: Fleet, scale: float = 1.0, queue: int | None = None, policy: Policy | None = FCFS, **limits: Any
) -> int:
    scheduler = Scheduler(
        limits=EngineLimits(**limits),
        model=A100.scaled(scale),
        lengths=TaskLengthPredictor(),
        max_queued_requests=queue,
        numbers=fleet.numbers,
    )
    return fleet.add(scheduler, policy)


def submit(fleet: Fleet, now_s: float = 0.0, **changes: Any) -> tuple[int, int]:
    """(replica, handle) of a new request."""
    spec = make_spec(**changes)
    replica = fleet.place(spec, now_s)
    return replica, fleet.scheduler(replica).add(spec)


def waiting_at(fleet: Fleet, replica: int) -> list[int]:
    return sorted(fleet.scheduler(replica).waiting_order().tolist())


def dispatch(fleet: Fleet, replica: int, now_s: float = 0.0) -> list[int]:
    """Plans for a replica; the handles that went."""
    scheduler = fleet.scheduler(replica)
    plan = RulePolicy("fcfs").plan(scheduler.snapshot(now_s))
    sent = [d.handle for d in scheduler.apply(plan, now_s)]
    fleet.note_plan(replica, plan, now_s)
    return sent


@pytest.mark.parametrize("name", placement_names())
def test_equal_replicas_share_equal_requests(name: str) -> None:
    fleet = make_fleet(name, replicas=3)
    places = [submit(fleet, slo=CHAT)[0] for _ in range(6)]
    assert sorted(places) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name", placement_names())
def test_handles_are_unique_in_the_fleet(name: str) -> None:
    fleet = make_fleet(name, replicas=3)
    assert sorted(submit(fleet)[1] for _ in range(9)) == list(range(1, 10))


def test_round_robin_takes_each_in_turn() -> None:
    fleet = make_fleet("round-robin", replicas=3)
    fleet.close(1)
    assert [submit(fleet)[0] for _ in range(4)] == [0, 2, 0, 2]


def test_least_loaded_counts_requests_and_least_work_their_time() -> None:
    for name, second in (("least-loaded", [1, 0]), ("least-work", [1, 1])):
        fleet = make_fleet(name)
        submit(fleet, prompt_tokens=8000)
        assert [submit(fleet)[0] for _ in range(2)] == second, name


def test_least_work_counts_the_time_of_each_engine() -> None:
    fleet = make_fleet("least-work", replicas=1)
    add_replica(fleet, scale=3.0)
    places = [submit(fleet)[0] for _ in range(8)]
    assert places.count(0) == 6


def test_most_memory_looks_at_what_is_left() -> None:
    fleet = make_fleet("most-memory", replicas=1, kv_tokens=1000)
    add_replica(fleet, kv_tokens=10_000)
    assert [submit(fleet, prompt_tokens=500)[0] for _ in range(3)] == [1, 1, 1]


def test_an_unknown_placement_is_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match="'best' is unknown; choose one of slo, round-robin"):
        make_placement("best")


def test_nothing_is_placed_where_it_is_closed() -> None:
    fleet = make_fleet()
    fleet.close(0)
    assert not fleet.is_open(0)
    assert [submit(fleet)[0] for _ in range(3)] == [1, 1, 1]
    fleet.close(1)
    with pytest.raises(EngineUnavailable, match="no replica is open"):
        fleet.place(make_spec(), 0.0)
    fleet.open(0)
    assert fleet.place(make_spec(), 0.0) == 0


@pytest.mark.parametrize("name", placement_names())
def test_a_full_queue_and_a_small_cache_are_passed_over(name: str) -> None:
    fleet = make_fleet(name, replicas=0)
    small, full, free = add_replica(fleet, kv_tokens=100), add_replica(fleet, queue=1), add_replica(fleet)
    fleet.scheduler(full).add(make_spec())
    assert [submit(fleet, prompt_tokens=200)[0] for _ in range(4)] == [free] * 4
    fleet.close(free)
    assert fleet.place(make_spec(prompt_tokens=200), 0.0) == full  # it would be refused there, and rightly so
    fleet.close(full)
    assert fleet.place(make_spec(prompt_tokens=200), 0.0) == small


@pytest.mark.parametrize("name", placement_names())
def test_what_waits_leaves_a_closed_replica_and_what_runs_stays(name: str) -> None:
    fleet = make_fleet(name, replicas=3, max_batch_size=1)
    first = [handle for replica, handle in (submit(fleet, slo=CHAT) for _ in range(9)) if replica == 0]
    runs = dispatch(fleet, 0)
    fleet.close(0)
    moves = fleet.rebalance(0.1)
    left = [move for move in moves if move.source == 0]
    assert sorted(move.handle for move in left) == sorted(set(first) - set(runs))
    assert all(move.handle in waiting_at(fleet, move.target) for move in left)
    assert not waiting_at(fleet, 0)
    assert fleet.scheduler(0).running == 1
    with pytest.raises(ValueError, match="still holds 1"):
        fleet.remove(0)
    fleet.scheduler(0).finish(runs[0], 10)
    fleet.remove(0)
    assert fleet.replicas() == [1, 2]
    assert add_replica(fleet) == 3


def test_what_waits_stays_where_no_other_is_open() -> None:
    fleet = make_fleet()
    for _ in range(4):
        submit(fleet)
    fleet.close(0)
    fleet.close(1)
    assert fleet.rebalance(0.0) == []
    fleet.open(1)
    assert [(move.source, move.target) for move in fleet.rebalance(0.0)] == [(0, 1), (0, 1)]


def test_a_moved_request_is_planned_with_what_is_believed_there() -> None:
    class Cached:
        """Everything but the last token is in the cache."""

        def predict(self, spec: Any) -> float:
            return spec.prompt_tokens - 1.0

    fleet = make_fleet("least-work")
    fleet.scheduler(1).prefixes = Cached()  # type: ignore[assignment]
    replica, handle = submit(fleet)
    assert replica == 0
    fleet.close(0)
    assert fleet.rebalance(0.0) == [Move(handle, 0, 1)]
    row = fleet.scheduler(1).snapshot(0.0).waiting[0]
    assert (row["handle"], row["prompt_tokens"], row["cached_tokens"]) == (handle, 1.0, 99.0)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(placement_names()), st.data())
def test_every_request_is_in_one_place(name: str, data: st.DataObject) -> None:
    fleet = make_fleet(name, replicas=3, max_batch_size=2, kv_tokens=20_000)
    alive: set[int] = set()
    now_s = 0.0
    for _ in range(data.draw(st.integers(1, 30))):
        now_s += data.draw(st.sampled_from([0.0, 0.02, 0.5]))
        action = data.draw(st.sampled_from(["submit", "submit", "submit", "plan", "toggle", "end", "rebalance"]))
        number = data.draw(st.integers(0, 2))
        scheduler = fleet.scheduler(number)
        if action == "submit" and any(fleet.is_open(r) for r in fleet.replicas()):
            slo = data.draw(st.sampled_from([CHAT, make_slo(), make_slo(e2e_ms=2000)]))
            tokens = data.draw(st.integers(1, 15_000))
            replica, handle = submit(fleet, now_s, slo=slo, prompt_tokens=tokens, arrival_at_s=now_s)
            assert fleet.is_open(replica)
            alive.add(handle)
        elif action == "plan":
            plan = RulePolicy("fcfs").plan(scheduler.snapshot(now_s))
            scheduler.apply(Plan(plan.order, min(plan.send_now, data.draw(st.integers(0, 2)))), now_s)
            fleet.note_plan(number, plan, now_s)
        elif action == "toggle":
            (fleet.close if fleet.is_open(number) else fleet.open)(number)
        elif action == "end":
            for row in scheduler.snapshot(now_s).running[:1]:
                scheduler.finish(int(row["handle"]), 5, now_s)
                alive.remove(int(row["handle"]))
        elif action == "rebalance":
            before = {h: r for r in fleet.replicas() for h in waiting_at(fleet, r)}
            for move in fleet.rebalance(now_s):
                assert before.pop(move.handle) == move.source
                assert fleet.is_open(move.target)
                assert move.handle in waiting_at(fleet, move.target)
            for handle, replica in before.items():
                assert handle in waiting_at(fleet, replica)
                assert fleet.is_open(replica) or not any(fleet.is_open(r) for r in fleet.replicas())
        snapshots = [fleet.scheduler(r).snapshot(now_s) for r in fleet.replicas()]
        held = [int(h) for s in snapshots for rows in (s.waiting, s.running) for h in rows["handle"]]
        assert sorted(held) == sorted(alive)
