"""LMDeploy's priority goes before the policy's order, which holds among equals."""

from __future__ import annotations

import numpy as np

from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import A100, make_spec


def make_scheduler(*priorities: int, slots: int = 2) -> tuple[Scheduler, list[int]]:
    scheduler = Scheduler(limits=EngineLimits(max_batch_size=slots), model=A100, lengths=TaskLengthPredictor())
    return scheduler, [scheduler.add(make_spec(f"r{n}", priority=p)) for n, p in enumerate(priorities)]


def dispatched(scheduler: Scheduler, order: list[int], send_now: int) -> list[tuple[int, int]]:
    plan = Plan(np.array(order, dtype=np.int64), send_now)
    return [(dispatch.handle, dispatch.rank) for dispatch in scheduler.apply(plan, 0.0)]


def test_smaller_numbers_go_first_and_the_plan_decides_among_equals() -> None:
    scheduler, (a, b, c, d) = make_scheduler(3, 0, 3, 0)
    assert dispatched(scheduler, [c, a, d, b], 2) == [(d, 0), (b, 1)]
    assert scheduler.queue_position(c) == 0
    assert scheduler.queue_position(a) == 1


def test_how_many_go_stays_the_plans_decision() -> None:
    scheduler, (a, b, c) = make_scheduler(5, 4, 0)
    assert dispatched(scheduler, [a, b, c], 1) == [(c, 0)]
    scheduler.drop(b)
    assert dispatched(scheduler, [b, a], 2) == [(a, 1)]


def test_without_priorities_the_plan_is_taken_as_it_is() -> None:
    scheduler, (a, b) = make_scheduler(0, 7)
    scheduler.drop(b)
    c = scheduler.add(make_spec("c"))
    assert dispatched(scheduler, [c, a], 2) == [(c, 0), (a, 1)]
