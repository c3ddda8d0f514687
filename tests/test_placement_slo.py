"""Where `slo` sends requests: its kernels against their plain twins, and what it promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_annealing import engine_time_s
from plain_placement import PlainSite, pace_of, plain_best
from test_annealing import MODEL, NOW_S, SPREAD, draw_rows
from test_fleet import CHAT, add_replica, make_fleet, submit, waiting_at

from lmdeploy_slo.core.plan import Plan, PlanQuality
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.scheduling import placement_kernel as kernel
from lmdeploy_slo.scheduling import placement_slo
from lmdeploy_slo.scheduling.annealing import TIER_WORTH
from lmdeploy_slo.scheduling.fleet import Fleet, Move
from lmdeploy_slo.scheduling.policy import SearchBudget, make_policy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import make_slo, make_spec

CODE = make_slo(e2e_ms=2000)
COEFFICIENTS = (MODEL.c0, MODEL.p1, MODEL.p2, MODEL.d1, MODEL.d2)
seeds = st.integers(0, 2**32 - 1)


# -- the kernels against their plain twins --------------------------------------------------------------------------


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_what_a_request_adds_equals_the_plain_twin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sites = kernel.make_sites(2, 3 * 30)
    scratch, admit = kernel.make_scratch()
    slots, kv_tokens = int(rng.choice([12, 40])), float(rng.choice([20_000, np.inf]))
    prices_s = rng.choice([0.0, 0.6, 4.0], 2)
    asks = draw_rows(rng, 2, running=False)
    worth = TIER_WORTH[asks["tier"][:1]]
    wanted = []
    for r in range(2):
        running, new = draw_rows(rng, 12, running=True), draw_rows(rng, 3, running=False)
        worths = 2.0 * TIER_WORTH[running["tier"]]
        kernel.look_at_site(sites, r, running, worths, NOW_S, COEFFICIENTS, 0.4, 0.9, 0.6, slots, kv_tokens, SPREAD)
        kernel.promise(sites, r, new, TIER_WORTH[new["tier"]], NOW_S, prices_s[r], 0.1, 128.0, SPREAD, admit, scratch)
        pace = pace_of(running, MODEL, 0.4, 0.9, 0.6)
        plain = PlainSite(running, worths, NOW_S, pace, SPREAD, int(sites.spans[r]), prices_s[r], 128.0)
        promised, promised_worth = plain.promised(new, TIER_WORTH[new["tier"]].tolist(), 0.1)
        assert sites.promised[r] == len(promised)
        wanted.append(plain.gain(asks[r], worth[0], promised, promised_worth, slots, kv_tokens))
    gains, engine_s = np.empty(2), np.empty(2)
    kernel.weigh(sites, np.arange(2), asks, worth, NOW_S, prices_s, 128.0, SPREAD, admit, scratch, gains, engine_s)
    assert gains.tolist() == pytest.approx(wanted, abs=1e-8)
    assert engine_s.tolist() == pytest.approx([engine_time_s(ask, MODEL, 128.0) for ask in asks])


@given(st.lists(st.tuples(st.sampled_from([-1e9, -0.5, 0.1, 0.11, 0.5, 0.52, 0.9]), st.floats(0.01, 9)), min_size=1))
def test_the_best_replica_equals_the_plain_twin(sites: list[tuple[float, float]]) -> None:
    gains, work_s = np.array([gain for gain, _ in sites]), np.array([work for _, work in sites])
    engine_s = np.round(work_s / 3, 1) + 0.1
    best = kernel.best_site(gains, engine_s, work_s, 0.1, 0.05)
    assert best == plain_best(gains.tolist(), engine_s.tolist(), work_s.tolist(), 0.1, 0.05)


# -- what it promises -----------------------------------------------------------------------------------------------


def run_there(fleet: Fleet, replica: int, count: int, generated: int = 10, now_s: float = 0.0, **changes: Any) -> None:
    """So many requests run at a replica; they had their first token 49 ms a token ago."""
    scheduler = fleet.scheduler(replica)
    for _ in range(count):
        first_at_s = now_s - 0.049 * (generated - 1)
        spec = make_spec(arrival_at_s=first_at_s - 0.1, **changes)
        handle = scheduler.add(spec)
        scheduler.apply(Plan(np.array([handle]), 1), now_s)
        scheduler.on_tokens(handle, 1, first_at_s)
        scheduler.on_tokens(handle, generated - 1, now_s)


def note(fleet: Fleet, replica: int, now_s: float = 0.0, **quality: float) -> None:
    """A plan that sends nobody."""
    order = fleet.scheduler(replica).snapshot(now_s).waiting["handle"]
    fleet.note_plan(replica, Plan(order, 0, quality=PlanQuality(**quality)), now_s)


def test_nobody_is_sent_where_it_would_break_what_runs() -> None:
    """The first replica has less work, and no slack for a long prompt."""
    fleet = make_fleet("slo")
    run_there(fleet, 0, 2, slo=CHAT, expected_output_tokens=20)
    run_there(fleet, 1, 8, slo=make_slo(), expected_output_tokens=20)
    assert submit(fleet, slo=CHAT, prompt_tokens=4000)[0] == 1
    fleet = make_fleet("least-work")
    run_there(fleet, 0, 2, slo=CHAT, expected_output_tokens=20)
    run_there(fleet, 1, 8, slo=make_slo(), expected_output_tokens=20)
    assert submit(fleet, slo=CHAT, prompt_tokens=4000)[0] == 0


def test_a_tight_objective_goes_to_the_fast_engine() -> None:
    fleet = make_fleet("slo", replicas=0)
    _, fast = add_replica(fleet, policy=None), add_replica(fleet, scale=0.3, policy=None)
    for _ in range(12):
        fleet.scheduler(fast).add(make_spec(slo=make_slo(), prompt_tokens=2000, expected_output_tokens=200))
    note(fleet, fast)
    assert submit(fleet, slo=make_slo(e2e_ms=1000), expected_output_tokens=150)[0] == fast
    assert submit(fleet, slo=make_slo(e2e_ms=9000), expected_output_tokens=150)[0] == 0


class Cached:
    """All but the last token of every prompt is in the cache."""

    def predict(self, spec: Any) -> float:
        return spec.prompt_tokens - 1.0


def test_a_cached_prompt_goes_where_it_is_cached_if_that_pays() -> None:
    fleet = make_fleet("slo", replicas=3)
    fleet.scheduler(1).prefixes = Cached()  # type: ignore[assignment]
    run_there(fleet, 1, 3, slo=make_slo(), expected_output_tokens=50)
    assert submit(fleet, slo=CHAT, prompt_tokens=4000)[0] == 1
    assert submit(fleet, slo=CHAT, prompt_tokens=4)[0] != 1  # next to nothing to gain, and more work there


def test_memory_and_slots_are_looked_at() -> None:
    fleet = make_fleet("slo", replicas=0)
    small, large = add_replica(fleet, kv_tokens=3000), add_replica(fleet)
    run_there(fleet, large, 30, slo=make_slo())
    assert submit(fleet, slo=CHAT, prompt_tokens=2950, expected_output_tokens=100)[0] == large
    assert submit(fleet, slo=CHAT, prompt_tokens=2000, expected_output_tokens=100)[0] == small
    fleet = make_fleet("slo", replicas=0)
    narrow, wide = add_replica(fleet, max_batch_size=2), add_replica(fleet)
    run_there(fleet, narrow, 2, slo=make_slo(), expected_output_tokens=12)
    run_there(fleet, wide, 30, slo=make_slo())
    assert submit(fleet, slo=CHAT)[0] == wide


def test_the_price_of_engine_time_counts() -> None:
    fleet = make_fleet("slo")
    note(fleet, 0, price_s=20.0)
    run_there(fleet, 1, 4, slo=make_slo())
    assert submit(fleet, slo=CODE, prompt_tokens=500, expected_output_tokens=10)[0] == 1


def test_choosing_changes_nothing() -> None:
    fleet = make_fleet("slo", replicas=4)
    specs = [make_spec(slo=slo, prompt_tokens=tokens) for slo in (CHAT, CODE, make_slo()) for tokens in (50, 3000)]
    first = [fleet.place(spec, 0.0) for spec in specs]
    assert [fleet.place(spec, 0.0) for spec in specs] == first


def test_requests_of_one_instant_are_spread() -> None:
    """Each is seen by the next, though no plan has seen it yet."""
    fleet = make_fleet("slo", replicas=8)
    places = [submit(fleet, slo=CHAT, prompt_tokens=4000)[0] for _ in range(8)]
    assert sorted(places) == list(range(8))


def test_who_was_left_waiting_moves_to_where_there_is_room() -> None:
    fleet = make_fleet("slo")
    fleet.close(1)
    handles = [submit(fleet, slo=CHAT, prompt_tokens=tokens)[1] for tokens in (3000, 500)]
    fleet.open(1)
    assert fleet.rebalance(0.1) == []  # no plan has seen them
    note(fleet, 0, now_s=0.1)
    moves = fleet.rebalance(0.2)
    assert sorted(move.handle for move in moves) == sorted(handles)
    assert all((move.source, move.target) == (0, 1) for move in moves)
    assert waiting_at(fleet, 1) == sorted(handles)
    assert fleet.rebalance(0.2) == []


def test_nobody_moves_to_where_it_would_not_be_sent() -> None:
    fleet = make_fleet("slo")
    run_there(fleet, 1, 20, slo=CHAT, expected_output_tokens=20, now_s=0.1)
    fleet.close(1)
    submit(fleet, 0.1, slo=CHAT, prompt_tokens=7000, arrival_at_s=0.1)
    fleet.open(1)
    note(fleet, 0, now_s=0.1, price_s=0.0)
    assert fleet.rebalance(0.2) == []


def test_what_is_lost_moves_to_an_engine_at_which_nobody_waits() -> None:
    fleet = make_fleet("slo")
    fleet.close(1)
    handles = [submit(fleet, slo=CODE, prompt_tokens=3000)[1] for _ in range(3)]
    fleet.open(1)
    note(fleet, 0, now_s=3.0)
    assert fleet.rebalance(3.0) == [Move(handles[0], 0, 1)]


def test_a_fixed_rule_with_a_queue_has_no_room() -> None:
    fleet = make_fleet("slo", max_batch_size=1)
    scheduler = fleet.scheduler(0)
    run_there(fleet, 0, 1, slo=make_slo())
    scheduler.add(make_spec(slo=make_slo(), prompt_tokens=10, expected_output_tokens=2))
    run_there(fleet, 1, 1, slo=make_slo(), expected_output_tokens=900)
    fleet.scheduler(1).finish(int(fleet.scheduler(1).snapshot(0.0).running["handle"][0]), 900)
    assert submit(fleet, slo=CHAT)[0] == 1


def test_replicas_come_and_go_and_batches_grow() -> None:
    fleet = make_fleet("slo", replicas=2)
    submit(fleet, slo=CHAT)
    for _ in range(9):
        add_replica(fleet, max_batch_size=600)
    run_there(fleet, 4, 300, slo=CHAT)
    places = [submit(fleet, slo=CHAT, prompt_tokens=2000)[0] for _ in range(8)]
    assert 4 not in places
    assert len(set(places)) == 8
    idle = next(number for number in fleet.replicas() if not fleet.scheduler(number).held)
    fleet.remove(idle)
    added = add_replica(fleet)
    assert added == 11
    assert submit(fleet, slo=CHAT, prompt_tokens=2000)[0] == added


def test_looks_are_bounded_and_the_cheapest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two in one go at least, and the next time those that were left out."""
    monkeypatch.setattr(placement_slo, "WEIGHED", 1)
    fleet = make_fleet("slo", replicas=0)
    for _ in range(2):
        add_replica(fleet, policy=None)
    fleet.close(1)
    handles = [submit(fleet, slo=CHAT, prompt_tokens=tokens)[1] for tokens in (900, 300, 100, 600)]
    fleet.open(1)
    note(fleet, 0, now_s=0.1)
    assert [move.handle for move in fleet.rebalance(0.2)] == [handles[2], handles[1]]
    assert fleet.rebalance(0.2) == []  # too soon
    assert [move.handle for move in fleet.rebalance(0.3)] == [handles[3], handles[0]]


def test_equal_histories_give_equal_places() -> None:
    def history() -> list[Any]:
        rng = np.random.default_rng(3)
        fleet = Fleet(placement_slo.SloPlacement())
        policies = [make_policy("annealing", budget=SearchBudget(time_s=None, evaluations=60)) for _ in range(3)]
        for policy in policies:
            scheduler = Scheduler(
                limits=EngineLimits(8), model=MODEL, lengths=TaskLengthPredictor(), numbers=fleet.numbers
            )
            fleet.add(scheduler, policy)
        found: list[Any] = []
        for number in range(150):
            now_s = 0.01 * number
            slo = [CHAT, CODE][int(rng.integers(2))]
            found.append(submit(fleet, now_s, slo=slo, prompt_tokens=int(rng.integers(50, 4000)), arrival_at_s=now_s))
            scheduler = fleet.scheduler(number % 3)
            plan = policies[number % 3].plan(scheduler.snapshot(now_s))
            for dispatch in scheduler.apply(plan, now_s):
                scheduler.on_tokens(dispatch.handle, 1, now_s)
            for row in scheduler.snapshot(now_s).running:
                if row["dispatched_at_s"] < now_s - 0.2 - 0.1 * (number % 3):
                    scheduler.finish(int(row["handle"]), 20, now_s)
            fleet.note_plan(number % 3, plan, now_s)
            found += fleet.rebalance(now_s)
        return found

    first = history()
    assert first == history()
    assert any(isinstance(entry, Move) for entry in first)
