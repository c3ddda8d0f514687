"""The paper's setting: its requests, engines of static batches, and cells of both engines."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy_slo.core.latency_model import BilinearModel
from lmdeploy_slo.core.slo import NO_SLO, Slo
from lmdeploy_slo.offline.paper import setting
from lmdeploy_slo.offline.paper.batches import fcfs, serve
from lmdeploy_slo.offline.paper.cells import ARRIVALS, ENGINES, SCHEDULERS, Cell, all_cells, capacity_rps, run_cell
from lmdeploy_slo.offline.paper.workload import draw_rows, read_pairs
from lmdeploy_slo.offline.workload import OfferedRequest
from lmdeploy_slo.scheduling.static_model import StaticProblem
from lmdeploy_slo.scheduling.static_planner import anneal, follow_rule

A_SECOND_A_TOKEN = BilinearModel(prefill=(0.0, 0.0, 0.0, 1.0), decode=(0.0, 0.0, 0.0, 1.0))
"""Whatever the batch: 1 s of prefill, and 1 s for each token."""


def offered(*requests: tuple[float, int], slo: Slo = NO_SLO, hints: Sequence[int] = ()) -> list[OfferedRequest]:
    """(due, output tokens) each; the hints are the truth where none are given."""
    return [
        OfferedRequest(index, due_s, 10, output, 1000, "task", slo, hint)
        for index, ((due_s, output), hint) in enumerate(zip(requests, hints or [None] * len(requests)))
    ]


def shortest_first(problem: StaticProblem) -> Sequence[Sequence[int]]:
    return follow_rule(problem, "sjf").batches


# -- requests -------------------------------------------------------------------------------------------------------


def test_half_of_the_requests_are_code_and_half_are_chat() -> None:
    for requests in (4, 7, 200):
        tasks = [row.task for row in draw_rows(requests, seed=3)]
        assert tasks.count("code") == (requests + 1) // 2
        assert set(tasks) == set(setting.SLOS)
    orders = {tuple(row.task for row in draw_rows(8, seed)) for seed in range(20)}
    assert len(orders) > 10


def test_arrivals_are_at_once_or_poisson_and_scale_with_the_rate() -> None:
    assert {row.arrival_s for row in draw_rows(50, seed=0)} == {0.0}
    slow, fast = draw_rows(4000, seed=0, rate_rps=0.5), draw_rows(4000, seed=0, rate_rps=2.0)
    assert [row.arrival_s for row in slow] == pytest.approx([4 * row.arrival_s for row in fast])
    gaps = np.diff([row.arrival_s for row in fast])
    assert gaps.mean() == pytest.approx(0.5, rel=0.05)
    assert gaps.std() == pytest.approx(0.5, rel=0.05)
    lengths = [(row.input_tokens, row.output_tokens) for row in draw_rows(4000, seed=0)]
    assert lengths == [(row.input_tokens, row.output_tokens) for row in slow]


def test_chat_lengths_can_be_recorded_pairs(tmp_path: Path) -> None:
    text = "input_tokens,output_tokens,task_class\n5,50,chat\n7,70,chat\n5,50,chat\n"
    (tmp_path / "pairs.csv").write_text(text)
    (tmp_path / "pairs.csv.gz").write_bytes(gzip.compress(text.encode()))
    pairs = read_pairs(tmp_path / "pairs.csv")
    assert pairs.tolist() == read_pairs(tmp_path / "pairs.csv.gz").tolist() == [[5, 50], [7, 70]]
    rows = draw_rows(40, seed=1, chat=pairs)
    drawn = {(row.input_tokens, row.output_tokens) for row in rows if row.task == "chat"}
    assert drawn == {(5, 50), (7, 70)}
    code = [(row.input_tokens, row.output_tokens) for row in rows if row.task == "code"]
    assert code == [(r.input_tokens, r.output_tokens) for r in draw_rows(40, seed=1) if r.task == "code"]


# -- engines of static batches --------------------------------------------------------------------------------------


def test_a_batch_runs_until_its_longest_is_done_and_each_ends_by_itself() -> None:
    served = serve(offered((0.0, 3), (0.0, 5), (0.5, 2), (7.0, 1)), fcfs, A_SECOND_A_TOKEN, 2)
    assert [one.ttft_s for one in served] == [1.0, 1.0, 6.0 - 0.5 + 1.0, 9.0 - 7.0 + 1.0]
    assert [one.e2e_s for one in served] == [4.0, 6.0, 6.0 - 0.5 + 3.0, 9.0 - 7.0 + 2.0]


def test_an_objective_is_met_up_to_its_limit() -> None:
    for slo, met in (
        (Slo(ttft_s=1.0, tpot_s=1.0, e2e_s=4.0), True),
        (Slo(ttft_s=0.99), False),
        (Slo(tpot_s=0.99), False),
        (Slo(e2e_s=3.99), False),
        (NO_SLO, False),
    ):
        (served,) = serve(offered((0.0, 3), slo=slo), fcfs, A_SECOND_A_TOKEN, 2)
        assert served.met == met


def test_planners_see_hints_and_engines_the_truth() -> None:
    seen = []

    def watch(problem: StaticProblem) -> Sequence[Sequence[int]]:
        seen.append([(request.output_tokens, request.waited_s) for request in problem.requests])
        return shortest_first(problem)

    served = serve(offered((0.0, 3), (0.0, 5), hints=[9, 2]), watch, A_SECOND_A_TOKEN, 1)
    assert seen == [[(9, 0.0), (2, 0.0)], [(9, 6.0)]]
    assert [one.e2e_s for one in served] == [10.0, 6.0]


def test_requests_go_to_the_instance_with_the_least_work_when_they_arrive() -> None:
    requests = offered((0.0, 9), (0.0, 2), (0.0, 2), (3.5, 1))
    served = serve(requests, fcfs, A_SECOND_A_TOKEN, 1, instances=2)
    assert [one.e2e_s for one in served] == [10.0, 3.0, 6.0, 2.5 + 2.0]


def test_requests_held_back_go_to_whichever_instance_is_free() -> None:
    requests = offered((0.0, 9), (0.0, 3), (0.0, 3), hints=[2, 3, 3])
    placed = serve(requests, fcfs, A_SECOND_A_TOKEN, 1, instances=2)
    held = serve(requests, fcfs, A_SECOND_A_TOKEN, 1, instances=2, hold_back=True)
    assert [one.e2e_s for one in placed] == [10.0, 4.0, 14.0]
    assert [one.e2e_s for one in held] == [10.0, 4.0, 8.0]
    free = []

    def watch(problem: StaticProblem) -> Sequence[Sequence[int]]:
        free.append(len(problem.engines_free_s))
        return fcfs(problem)

    serve(requests, watch, A_SECOND_A_TOKEN, 1, instances=2, hold_back=True)
    assert free == [2, 1, 1]


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.floats(0, 60), st.integers(1, 40)), min_size=1, max_size=20),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([fcfs, shortest_first, lambda problem: anneal(problem).batches]),
)
def test_everybody_is_served_once_and_no_engine_does_two_batches(
    requests: list[tuple[float, int]], size: int, instances: int, hold_back: bool, planner: object
) -> None:
    listed = offered(*sorted(requests), slo=Slo(e2e_s=30.0))
    batches = []

    def watch(problem: StaticProblem) -> Sequence[Sequence[int]]:
        plan = planner(problem)  # type: ignore[operator]
        batches.append(len(plan[0]))
        return plan

    served = serve(listed, watch, A_SECOND_A_TOKEN, size, instances=instances, hold_back=hold_back)
    assert sum(batches) == len(listed)
    assert max(batches) <= size
    ends = [request.due_s + one.e2e_s for request, one in zip(listed, served)]
    begins = [end - 1.0 - request.output_tokens for request, end in zip(listed, ends)]
    assert all(begin >= request.due_s - 1e-9 for request, begin in zip(listed, begins))
    instants = sorted(set(np.round(begins, 6)))
    for at in instants:
        running = [r for r, (b, e) in enumerate(zip(begins, ends)) if b <= at + 1e-6 and at < e - 1e-6]
        assert len(running) <= size * instances
    assert [one.met for one in served] == [one.e2e_s <= 30.0 for one in served]


# -- cells ----------------------------------------------------------------------------------------------------------


def test_the_cells_are_those_of_the_setting() -> None:
    cells = list(all_cells())
    at_once = len(setting.AT_ONCE) * len(setting.BATCH_SIZES) * len(setting.INSTANCES)
    poisson = len(setting.LOADS) * len(setting.BATCH_SIZES) * len(setting.INSTANCES)
    assert len(cells) == len(set(cells)) == len(ENGINES) * (at_once + poisson)
    assert len({cell.family for cell in cells}) == len(ENGINES) * len(ARRIVALS) * len(setting.INSTANCES)
    assert (min(setting.AT_ONCE), max(setting.AT_ONCE)) == (4, 32)
    assert (min(setting.LOADS), max(setting.LOADS)) == (0.5, 2.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cell_gives_the_same_figures_each_time_and_annealing_meets_more(engine: str) -> None:
    cell = Cell(engine, "at once", 2, 2, 16)
    results = {scheduler: run_cell(cell, scheduler, 0, 1.0) for scheduler in SCHEDULERS}
    assert results == {scheduler: run_cell(cell, scheduler, 0, 1.0) for scheduler in SCHEDULERS}
    assert results["annealing"].attainment > results["fcfs"].attainment
    assert results["annealing"].mean_e2e_s < results["fcfs"].mean_e2e_s
    assert results["shortest"].mean_e2e_s < results["fcfs"].mean_e2e_s
    for result in results.values():
        assert result.attainment == pytest.approx(np.mean(list(result.by_task.values())))
        assert result.mean_e2e_s < result.p99_e2e_s <= result.makespan_s


def test_larger_batches_serve_more_and_load_is_relative_to_that() -> None:
    for engine in ENGINES:
        capacities = [capacity_rps(engine, size) for size in setting.BATCH_SIZES]
        assert capacities == sorted(capacities)
        light = run_cell(Cell(engine, "Poisson", 1, 4, 0.5), "fcfs", 0, capacities[2])
        heavy = run_cell(Cell(engine, "Poisson", 1, 4, 2.0), "fcfs", 0, capacities[2])
        assert light.attainment > 0.9 > 0.3 > heavy.attainment
        served_rps = setting.POISSON_REQUESTS / heavy.makespan_s
        assert served_rps == pytest.approx(capacities[2], rel=0.15)
