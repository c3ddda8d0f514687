"""The price of engine time, and what a request counts beside those of greedier clients."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import ROW_DTYPE, EngineLimits, Snapshot
from lmdeploy_slo.scheduling.annealing import AnnealingOptions, AnnealingPolicy
from lmdeploy_slo.scheduling.policy import SearchBudget
from lmdeploy_slo.scheduling.rules import engine_time_s
from lmdeploy_slo.scheduling.shadow_price import LEAST_WORTH, ShadowPrice, fair_level

MODEL = StepModel(c0=0.01025, p1=4.752e-5, p2=1.13e-9, d1=2.377e-5, d2=3.67e-8)
BATCH = 64.0


def snapshot(now_s: float, prompts: list[float], clients: list[int]) -> Snapshot:
    """One request with an E2E objective for each prompt, arrived just now; nothing runs."""
    rows = np.zeros(len(prompts), dtype=ROW_DTYPE)
    rows["handle"] = np.arange(1, len(prompts) + 1)
    rows["tier"], rows["arrival_at_s"], rows["output_tokens"] = 1, now_s, 10
    rows["prompt_tokens"], rows["client"] = prompts, clients
    rows["ttft_s"], rows["tpot_s"], rows["e2e_s"] = np.inf, np.inf, 2.0
    rows["dispatched_at_s"] = rows["first_token_at_s"] = np.nan
    return Snapshot(now_s, rows, rows[:0].copy(), EngineLimits(), MODEL)


def learnt(prompts: list[float], clients: list[int]) -> ShadowPrice:
    price = ShadowPrice(window_s=40.0, capacity=1.0)
    price.learn(snapshot(0.0, [], []), BATCH)
    price.learn(snapshot(100.0, prompts, clients), BATCH)
    return price


def test_the_price_is_that_of_the_first_that_does_not_fit() -> None:
    prompts = [1000.0] * 60 + [4000.0] * 60  # what 5 s (a young history) can take is somewhere among the long ones
    rows = snapshot(100.0, prompts, [0] * 120).waiting
    ascending = np.sort(engine_time_s(rows, MODEL, BATCH))
    fits = int(np.searchsorted(np.cumsum(ascending), 5.0))
    assert learnt(prompts, [0] * 120).price_s == pytest.approx(1.0 / ascending[fits])


def test_nothing_costs_where_everything_fits() -> None:
    price = learnt([100.0, 200.0], [0, 7])
    assert price.price_s == 0.0
    assert price.worth_of(np.array([0, 7, 99])).tolist() == [1.0, 1.0, 1.0]


def test_a_client_beyond_its_share_counts_less_and_the_others_in_full() -> None:
    price = learnt([1000.0] * 10 + [2000.0] * 200, [1] * 10 + [2] * 200)
    within, beyond, unknown = price.worth_of(np.array([1, 2, 3]))
    assert (within, unknown) == (1.0, 1.0)
    assert LEAST_WORTH <= beyond < 0.2


def test_clients_that_ask_for_the_same_count_the_same() -> None:
    price = learnt([2000.0] * 300, [1, 2, 3] * 100)
    assert price.worth_of(np.array([1, 2, 3])).tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert price.price_s == pytest.approx(learnt([2000.0] * 300, [0] * 300).price_s)


@given(asked=st.lists(st.floats(0.0, 10.0), min_size=1, max_size=20), capacity=st.floats(0.1, 20.0))
def test_the_fair_level_shares_out_the_capacity(asked: list[float], capacity: float) -> None:
    level = fair_level(np.array(asked), capacity)
    if math.isinf(level):
        assert sum(asked) <= capacity + 1e-9
    else:
        assert sum(min(level, amount) for amount in asked) == pytest.approx(capacity)


def test_a_flood_does_not_go_before_a_client_within_its_share() -> None:
    """A request of the quiet client is dearer than any of the flood, and goes all the same."""
    waiting = snapshot(100.0, [3000.0] + [1500.0] * 300, [1] + [2] * 300)
    options = AnnealingOptions(max_candidates=400)

    def sent(clients: list[int]) -> set[int]:
        rows = waiting.waiting.copy()
        rows["client"] = clients
        policy = AnnealingPolicy(budget=SearchBudget(time_s=None, evaluations=8000), options=options)
        policy.plan(snapshot(0.0, [], []))
        plan = policy.plan(Snapshot(100.0, rows, waiting.running, waiting.limits, MODEL))
        return set(plan.order[: plan.send_now].tolist())

    assert 1 in sent([1] + [2] * 300)
    assert 1 not in sent([0] * 301)


@pytest.mark.parametrize(
    ("field", "value"), [("patience", 0.0), ("patience", math.nan), ("floor", 1.0), ("floor", -0.1), ("search", "x")]
)
def test_options_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        AnnealingOptions(**{field: value})  # type: ignore[arg-type]


def test_it_tells_how_many_come_and_how_much_prefill_they_can_wait_for() -> None:
    price = learnt([1000.0] * 10 + [100_000.0] * 3, [0] * 13)  # the long ones miss on an idle engine
    assert price.arrivals_per_s == 10 / 5.0
    assert price.slack_s == pytest.approx(2.0 - MODEL.prefill_stall_s(1000.0))


@pytest.mark.parametrize(("arrive", "goes"), [(True, False), (False, True)])
def test_a_long_prefill_with_nothing_to_gain_waits_while_others_arrive(arrive: bool, goes: bool) -> None:
    """Those who come while it is computed would get their first token too late."""
    policy = AnnealingPolicy(budget=SearchBudget(time_s=None, evaluations=50))
    running = snapshot(0.0, [100.0], [0]).waiting.copy()
    running["handle"], running["e2e_s"], running["output_tokens"] = 10_000, np.inf, 1e6
    running["dispatched_at_s"] = running["first_token_at_s"] = 0.0
    running["generated_tokens"] = 1
    for number in range(40 if arrive else 0):
        at_s = 100.0 + number / 4
        row = snapshot(at_s, [200.0], [0]).waiting.copy()
        row["handle"], row["ttft_s"], row["e2e_s"] = number + 1, 1.0, np.inf
        policy.plan(Snapshot(at_s, row, running, EngineLimits(), MODEL))
    leftover = snapshot(110.0, [80_000.0], [0]).waiting.copy()
    leftover["handle"], leftover["e2e_s"] = 20_000, np.inf
    plan = policy.plan(Snapshot(110.0, leftover, running, EngineLimits(), MODEL))
    assert (plan.send_now == 1) is goes
