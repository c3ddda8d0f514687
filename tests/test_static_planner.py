"""The static planner: the model against its formulas, the kernel against its twin, plans against all plans."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import plain_static
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.latency_model import BilinearModel
from lmdeploy_slo.core.slo import NO_SLO, Slo
from lmdeploy_slo.scheduling import (
    static_construction_kernel,
    static_enumeration_kernel,
    static_kernel,
    static_planner,
)
from lmdeploy_slo.scheduling.paper_setting import (
    CHAT,
    CODE,
    LATENCY,
    MAX_BATCH_SIZE,
    SCHEDULE,
    AnnealingSchedule,
    draw_problem,
)
from lmdeploy_slo.scheduling.rules import RULES as ONLINE_RULES
from lmdeploy_slo.scheduling.static_model import MAX_REQUESTS, StaticPlan, StaticProblem, StaticRequest, score, weigh
from lmdeploy_slo.scheduling.static_planner import (
    RULES,
    anneal,
    beam_width,
    can_meet_all,
    enumerate_all,
    follow_rule,
    moves_of_a_walk,
    rule_order,
    walks,
)

SHORT = AnnealingSchedule(hot=500.0, cold=20.0, cooling=0.5)  # 5 levels

objective = st.none() | st.floats(0.05, 40)
slos = st.just(NO_SLO) | st.builds(Slo, objective, st.none() | st.floats(0.01, 0.03), objective)
waits = st.just(0.0) | st.floats(0, 30)
requests = st.builds(StaticRequest, st.integers(1, 2000), st.integers(1, 1000), slos, waits)


def problems(most: int) -> st.SearchStrategy[StaticProblem]:
    lists = st.lists(requests, min_size=1, max_size=most).map(tuple)
    engines = st.just((0.0,)) | st.lists(st.just(0.0) | st.floats(0, 20), min_size=1, max_size=4).map(tuple)
    return st.builds(StaticProblem, lists, st.integers(1, 9), st.just(LATENCY), engines)


def all_plans(n: int, batch_size: int) -> Iterator[list[list[int]]]:
    """Every sequence of batches, written down naively; a plan whose batches only differ in their order is one."""
    for order in itertools.permutations(range(n)):
        for cuts in itertools.product((False, True), repeat=n - 1):
            batches = [[order[0]]]
            for r, cut in zip(order[1:], cuts):
                if cut:
                    batches.append([r])
                else:
                    batches[-1].append(r)
            if all(len(b) <= batch_size and b == sorted(b) for b in batches):
                yield batches


def outcomes(problem: StaticProblem, batches: Sequence[Sequence[int]]) -> Iterator[tuple[float, bool]]:
    """(E2E in seconds, whether every objective is met) of each request, by the formulas as they are written."""
    free_s = list(problem.engines_free_s)
    for batch in batches:
        longest_s, wait_s = 0.0, min(free_s)
        for r in batch:
            request, slo = problem.requests[r], problem.requests[r].slo
            prefill_s = problem.latency.prefill_s(len(batch), float(request.prompt_tokens))
            decode_s = problem.latency.decode_s(len(batch), float(request.prompt_tokens), float(request.output_tokens))
            longest_s = max(longest_s, prefill_s + decode_s)
            waited_s = request.waited_s + wait_s
            ttft_s, tpot_s = waited_s + prefill_s, decode_s / request.output_tokens
            e2e_s = ttft_s + decode_s
            limits = ((slo.e2e_s, e2e_s), (slo.ttft_s, ttft_s), (slo.tpot_s, tpot_s))
            yield e2e_s, slo.has_objective and all(most is None or value <= most for most, value in limits)
        free_s[free_s.index(wait_s)] += longest_s


def check_plan(problem: StaticProblem, plan: StaticPlan) -> None:
    """It is a plan of this problem, and comes to what it says."""
    assert sorted(r for batch in plan.batches for r in batch) == list(range(len(problem.requests)))
    assert all(1 <= len(batch) <= problem.max_batch_size for batch in plan.batches)
    tables = weigh(problem)
    met, total = score(tables, plan.batches)
    assert (plan.met, plan.sum_e2e_s) == (met, total * tables.tick_s)
    assert plan.objective == plan.met / plan.sum_e2e_s


def as_good(plan: StaticPlan, other: StaticPlan) -> bool:
    """No lower G, or both 0 and no longer sum; up to rounding."""
    if plan.met == other.met == 0:
        return plan.sum_e2e_s <= other.sum_e2e_s * (1 + 1e-12)
    return plan.objective >= other.objective * (1 - 1e-12)


# -- the model ------------------------------------------------------------------------------------------------------


@given(problems(7))
def test_a_plan_is_scored_by_the_formulas(problem: StaticProblem) -> None:
    plan = anneal(problem, schedule=SHORT)
    judged = list(outcomes(problem, plan.batches))
    assert plan.sum_e2e_s == pytest.approx(math.fsum(e2e_s for e2e_s, _ in judged), abs=1e-8)
    assert plan.met == sum(met for _, met in judged)


def test_an_objective_that_is_met_exactly_is_met() -> None:
    latency = BilinearModel(prefill=(0.0, 0.0, 0.0, 0.1), decode=(0.0, 0.0, 0.0, 0.1))
    exact = Slo(ttft_s=1.3, tpot_s=0.1, e2e_s=1.5)  # 1.2 of waiting, 0.1 + 2 x 0.1 of its own
    requests = (StaticRequest(5, 11), StaticRequest(5, 2, exact))
    assert follow_rule(StaticProblem(requests, 1, latency), "fcfs").met == 1
    for tighter in (Slo(ttft_s=1.2999), Slo(tpot_s=0.0999), Slo(e2e_s=1.4999)):
        requests = (StaticRequest(5, 11), StaticRequest(5, 2, tighter))
        assert follow_rule(StaticProblem(requests, 1, latency), "fcfs").met == 0


def test_a_request_without_an_objective_counts_in_the_sum_alone() -> None:
    problem = StaticProblem((StaticRequest(10, 10, Slo(e2e_s=100.0)), StaticRequest(10, 10)), 2, LATENCY)
    plan = anneal(problem)
    assert plan.met == 1
    assert plan.sum_e2e_s > anneal(replace(problem, requests=problem.requests[:1])).sum_e2e_s


def test_times_that_would_not_fit_are_counted_in_longer_ticks() -> None:
    latency = BilinearModel(prefill=(1.0, 1e3, 1e3, 1e3), decode=(1e3, 1e3, 1e3, 1e3))
    problem = StaticProblem(tuple(StaticRequest(10**7, 10**7, Slo(e2e_s=1e30)) for _ in range(6)), 3, latency)
    plan = anneal(problem)
    judged = [e2e_s for e2e_s, _ in outcomes(problem, plan.batches)]
    assert plan.sum_e2e_s == pytest.approx(math.fsum(judged), rel=1e-9)
    assert weigh(problem).tick_s > 1e-9
    assert plan.met == 6


@pytest.mark.parametrize(("prompt_tokens", "output_tokens"), [(0, 1), (1, 0), (-1, 5)])
def test_a_request_has_tokens(prompt_tokens: int, output_tokens: int) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        StaticRequest(prompt_tokens, output_tokens)


@pytest.mark.parametrize("waited_s", [-1.0, math.inf, math.nan])
def test_nobody_waits_backwards_or_for_ever(waited_s: float) -> None:
    with pytest.raises(ValueError, match="waited_s"):
        StaticRequest(1, 1, waited_s=waited_s)


@given(problems(5), st.floats(0.1, 20))
def test_who_has_waited_may_wait_that_much_less(problem: StaticProblem, waited_s: float) -> None:
    longer = tuple(replace(r, waited_s=r.waited_s + waited_s) for r in problem.requests)
    plan, later = follow_rule(problem, "fcfs"), follow_rule(replace(problem, requests=longer), "fcfs")
    assert later.sum_e2e_s == pytest.approx(plan.sum_e2e_s + waited_s * len(longer))
    assert later.met <= plan.met


@pytest.mark.parametrize(("count", "batch_size"), [(0, 1), (MAX_REQUESTS + 1, 1), (1, 0), (1, 10**6)])
def test_a_problem_has_bounds(count: int, batch_size: int) -> None:
    with pytest.raises(ValueError):
        StaticProblem((StaticRequest(1, 1),) * count, batch_size, LATENCY)


# -- fixed rules ----------------------------------------------------------------------------------------------------


def test_the_rules_are_those_of_the_online_scheduler() -> None:
    assert set(RULES) == {f"{name}{suffix}" for name in ONLINE_RULES for suffix in ("", "-feasible")}
    with pytest.raises(KeyError):
        rule_order(draw_problem(2, np.random.default_rng(0)), "fcfs-backwards")


def test_rules_order_by_their_keys() -> None:
    problem = StaticProblem(
        (
            StaticRequest(4000, 60, Slo(e2e_s=30.0)),
            StaticRequest(10, 200, Slo(ttft_s=20.0)),
            StaticRequest(10, 100, Slo(e2e_s=0.5)),  # takes longer than this even alone
            StaticRequest(10, 400),
            StaticRequest(10, 50, Slo(ttft_s=25.0, tpot_s=0.001)),  # no batch is that fast
        ),
        2,
        LATENCY,
    )
    expected = {
        "fcfs": [0, 1, 2, 3, 4],
        "sjf": [4, 2, 0, 1, 3],
        "swf": [4, 2, 0, 1, 3],
        "edf": [2, 1, 4, 0, 3],
        "llf": [2, 1, 4, 0, 3],
        "fcfs-feasible": [0, 1, 3, 4, 2],
        "sjf-feasible": [0, 1, 3, 4, 2],
        "edf-feasible": [1, 0, 3, 4, 2],
        "llf-feasible": [1, 0, 3, 4, 2],
    }
    assert {rule: rule_order(problem, rule).tolist() for rule in expected} == expected
    assert follow_rule(problem, "edf").batches == ((2, 1), (4, 0), (3,))


@given(problems(12), st.sampled_from(RULES))
def test_rules_cut_full_batches(problem: StaticProblem, rule: str) -> None:
    plan = follow_rule(problem, rule)
    check_plan(problem, plan)
    assert all(len(batch) == problem.largest_batch for batch in plan.batches[:-1])
    assert plan.evaluations == 1


# -- annealing ------------------------------------------------------------------------------------------------------


@given(problems(12), st.integers(0, 2**64 - 1))
def test_the_kernel_equals_its_plain_twin(problem: StaticProblem, seed: int) -> None:
    plan, twin = anneal(problem, seed=seed, schedule=SHORT), plain_static.plan(problem, seed, SHORT)
    tables = weigh(problem)
    assert (plan.met, plan.sum_e2e_s, plan.evaluations) == (twin.met, twin.total * tables.tick_s, twin.evaluations)
    assert [twin.batch_of[r] for batch in plan.batches for r in batch] == [
        number + 1 for number, batch in enumerate(plan.batches) for _ in batch
    ]


@pytest.mark.parametrize(("count", "moves"), [(1, 6300), (2, 6300), (7, 6300), (10, 6300), (20, 25515)])
def test_the_kernel_equals_its_plain_twin_on_the_papers_schedule(count: int, moves: int) -> None:
    problem = draw_problem(count, np.random.default_rng(count))
    plan, twin = anneal(problem, seed=5), plain_static.plan(problem, 5)
    assert (plan.met, plan.evaluations) == (twin.met, twin.evaluations)
    assert plan.sum_e2e_s == twin.total * weigh(problem).tick_s
    constructed = plain_static.construct(problem, beam_width(count))
    assert plan.evaluations == moves + len(RULES) + constructed.evaluations + 1  # it is scored again as a start


def test_construction_equals_its_plain_twin_with_many_requests_and_narrow_beams() -> None:
    for count, batch_size, engines in ((18, 1, 1), (25, 4, 1), (40, 7, 2), (60, 60, 3)):
        problem = replace(
            draw_problem(count, np.random.default_rng(count)),
            max_batch_size=batch_size,
            engines_free_s=tuple(map(float, range(engines))),
        )
        tables, batch_of = weigh(problem), np.zeros(count, dtype=np.uint64)
        by_length = np.argsort(tables.run_time[problem.largest_batch, :count], kind="stable")
        found = static_construction_kernel.construct(
            by_length,
            tables.run_time,
            tables.limit,
            tables.waited,
            tables.free,
            problem.largest_batch,
            beam_width(count),
            batch_of,
        )
        twin = plain_static.construct(problem, beam_width(count))
        assert (*found, batch_of.tolist()) == (twin.met, twin.total, twin.evaluations, twin.batch_of)


def test_more_requests_get_more_moves_and_a_narrower_beam() -> None:
    assert [beam_width(n) for n in (1, 10, 20, 32, 80, 81)] == [8, 8, 64, 15, 1, 0]
    assert [walks(n) for n in (1, 10, 15, 25, 4096)] == [5, 5, 10, 20, 20]
    for n, moves in ((1, 100), (10, 100), (20, 400), (40, 1600), (100, 640), (640, 100), (4096, 100)):
        assert 0 <= walks(n) * moves_of_a_walk(n, SCHEDULE) - moves < walks(n)


@given(problems(14), st.integers(0, 2**64 - 1))
def test_a_plan_is_sound_and_repeatable_and_no_rule_is_better(problem: StaticProblem, seed: int) -> None:
    plan = anneal(problem, seed=seed, schedule=SHORT)
    check_plan(problem, plan)
    again = anneal(problem, seed=seed, schedule=SHORT)
    assert (again.batches, again.evaluations) == (plan.batches, plan.evaluations)
    for rule in RULES:
        assert as_good(plan, follow_rule(problem, rule))


def test_many_requests_and_large_batches() -> None:
    for count, batch_size in ((400, 4), (300, 300), (1000, 64)):
        problem = replace(draw_problem(count, np.random.default_rng(1)), max_batch_size=batch_size)
        plan = anneal(problem)
        check_plan(problem, plan)
        assert as_good(plan, follow_rule(problem, "sjf"))


def test_the_search_is_timed_by_the_clock_it_is_given() -> None:
    problem = draw_problem(3, np.random.default_rng(0))
    clock = VirtualClock(5.0)
    for search in (anneal, enumerate_all, functools.partial(follow_rule, rule="llf")):
        assert search(problem, clock=clock).elapsed_s == 0.0


def test_early_stop_takes_a_start_that_meets_every_slo() -> None:
    easy = draw_problem(8, np.random.default_rng(0), slo_scale=100.0)
    stopped, searched = anneal(easy, early_stop=True), anneal(easy)
    constructed = plain_static.construct(easy, beam_width(8))
    assert (stopped.evaluations, stopped.met) == (len(RULES) + constructed.evaluations + 1, 8)
    assert searched.evaluations == stopped.evaluations + 6300
    best_rule = max((follow_rule(easy, rule) for rule in RULES), key=lambda plan: plan.objective)
    assert stopped.objective >= best_rule.objective
    hard = draw_problem(10, np.random.default_rng(0), unless=can_meet_all)
    assert anneal(hard, early_stop=True, clock=VirtualClock()) == anneal(hard, clock=VirtualClock())


@pytest.mark.parametrize(
    "wrong", [{"hot": 20.0}, {"cold": 0.0}, {"cooling": 1.0}, {"cooling": 0.0}, {"moves_per_level": 0}]
)
def test_a_schedule_has_bounds(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="hot > cold > 0"):
        replace(SCHEDULE, **wrong)


# -- against all plans ----------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(problems(5))
def test_enumeration_finds_the_best_of_all_plans(problem: StaticProblem) -> None:
    n, tables = len(problem.requests), weigh(problem)
    scored = [score(tables, plan) for plan in all_plans(n, problem.max_batch_size)]
    plan = enumerate_all(problem)
    check_plan(problem, plan)
    assert plan.evaluations == len(scored)
    most = max(met / total for met, total in scored)
    if most > 0:
        assert plan.objective * tables.tick_s == pytest.approx(most, rel=1e-12)
    else:
        assert plan.sum_e2e_s == min(total for _, total in scored) * tables.tick_s
    if problem.engines_free_s == (0.0,):
        everybody = problem.with_slo
        assert can_meet_all(problem) == any(met == everybody for met, _ in scored)
    else:
        with pytest.raises(ValueError, match="one idle engine"):
            can_meet_all(problem)


def test_enumeration_counts_ordered_partitions() -> None:
    def count(n: int) -> int:
        return 1 if n == 0 else sum(math.comb(n, b) * count(n - b) for b in range(1, min(n, MAX_BATCH_SIZE) + 1))

    for n in range(1, 9):
        assert enumerate_all(draw_problem(n, np.random.default_rng(n))).evaluations == count(n)


def test_enumeration_has_a_limit() -> None:
    with pytest.raises(ValueError, match="up to 8 requests, got 9"):
        enumerate_all(draw_problem(9, np.random.default_rng(0)))
    with pytest.raises(ValueError, match="up to 16 requests, got 17"):
        can_meet_all(draw_problem(17, np.random.default_rng(0)))


@pytest.mark.parametrize(
    ("count", "slo_scale"),
    [*itertools.product((2, 4, 5, 6, 7), (0.03, 0.1, 0.25, 0.5, 1.0)), (8, 0.1), (8, 0.5)],
)
def test_annealing_reaches_the_optimum(count: int, slo_scale: float) -> None:
    reached = 0
    for seed in range(100):
        problem = draw_problem(count, np.random.default_rng((seed, count)), slo_scale=slo_scale)
        reached += as_good(anneal(problem, seed=seed), enumerate_all(problem))
    assert reached == 100


@pytest.mark.parametrize("engines_free_s", [(0.0, 0.0), (0.0, 2.0, 9.0)])
def test_annealing_reaches_the_optimum_on_several_engines(engines_free_s: tuple[float, ...]) -> None:
    reached = 0
    for seed in range(100):
        problem = replace(draw_problem(7, np.random.default_rng(seed), slo_scale=0.25), engines_free_s=engines_free_s)
        reached += as_good(anneal(problem, seed=seed), enumerate_all(problem))
    assert reached >= 99


@pytest.mark.parametrize("engines_free_s", [(), (0.0,) * 65, (-1.0,), (math.inf,), (0.0, math.nan)])
def test_engines_are_few_and_free_some_time(engines_free_s: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="engines"):
        StaticProblem((StaticRequest(1, 1),), 1, LATENCY, engines_free_s)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_annealing_reaches_the_optimum_with_other_batch_sizes(batch_size: int) -> None:
    reached = 0
    for seed in range(100):
        problem = replace(draw_problem(7, np.random.default_rng(seed)), max_batch_size=batch_size)
        some = tuple(replace(r, slo=NO_SLO) if i % 4 == 3 else r for i, r in enumerate(problem.requests))
        problem = replace(problem, requests=some)
        reached += as_good(anneal(problem, seed=seed), enumerate_all(problem))
    assert reached >= 99


@pytest.mark.parametrize("count", [12, 15, 20])
def test_annealing_comes_close_to_a_search_of_a_million(count: int) -> None:
    long = replace(SCHEDULE, moves_per_level=1_600_000 // count**2)
    shares = []
    for seed in range(20):
        problem = draw_problem(count, np.random.default_rng(seed))
        shares.append(anneal(problem, seed=seed).objective / anneal(problem, seed=seed + 1, schedule=long).objective)
    assert min(shares) > 0.99


# -- the paper's parameters -----------------------------------------------------------------------------------------


def test_problems_are_drawn_as_stated() -> None:
    rng = np.random.default_rng(7)
    drawn = [request for _ in range(500) for request in draw_problem(10, rng).requests]
    for task in (CODE, CHAT):
        of_task = [request for request in drawn if request.slo == task.slo.scaled(0.5)]
        assert len(of_task) == pytest.approx(2500, rel=0.06)
        assert np.median([r.prompt_tokens for r in of_task]) == pytest.approx(task.prompt_median, rel=0.06)
        assert np.median([r.output_tokens for r in of_task]) == pytest.approx(task.output_median, rel=0.06)


def test_ten_requests_can_be_drawn_that_cannot_all_meet() -> None:
    for seed in range(20):
        problem = draw_problem(10, np.random.default_rng(seed), unless=can_meet_all)
        assert not can_meet_all(problem)
        assert anneal(problem, seed=seed).met < 10


def test_the_warm_up_compiles_all_that_plans_need() -> None:
    kernels = (
        static_construction_kernel.construct,
        static_kernel.anneal,
        static_enumeration_kernel.enumerate_plans,
    )
    static_planner.warm_up()
    compiled = [len(kernel.signatures) for kernel in kernels]
    problem = draw_problem(6, np.random.default_rng(0))
    anneal(problem, seed=2**64 - 1, early_stop=True)
    enumerate_all(problem)
    assert [len(kernel.signatures) for kernel in kernels] == compiled == [1, 1, 1]
