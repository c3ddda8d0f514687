"""Plans for the static model: by annealing, by a fixed rule, or the best of all.

Each takes a problem and returns a plan; the kernels that search know tables of ticks only. The online scheduler has
nothing of this: there requests join and leave one by one (`annealing`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.clock import Clock, MonotonicClock
from lmdeploy_slo.scheduling import static_construction_kernel, static_enumeration_kernel, static_kernel
from lmdeploy_slo.scheduling.paper_setting import LATENCY, SCHEDULE, AnnealingSchedule
from lmdeploy_slo.scheduling.static_model import Columns, StaticPlan, StaticProblem, StaticRequest, score, weigh

MAX_ENUMERATED = 8
"""Requests of which all plans are tried: 543,130 for eight in batches of up to four."""

MAX_WEIGHED = 16
"""Requests of which all sets are weighed."""

SCHEDULE_FOR = 10
MOST_WORK = 640.0
"""A schedule is for so many requests. More get more moves, by the square of their number, up to MOST_WORK divided by
their number times as many; fewer do not get fewer."""

FEWEST_WALKS, MOST_WALKS = 5, 20
"""So many walks share the moves of a level, one more for each request above ten: where one sticks, others do not."""

BEAM, WIDER_BEAM = 8, 16
MOST_BEAM_WORK = 512_000
"""Width of the beam in which a plan is constructed: BEAM for up to SCHEDULE_FOR requests, for more WIDER_BEAM times the
square of requests / SCHEDULE_FOR. Its work grows with its width and the third power of the requests: beyond this
product it is narrower, and above 80 requests there is none."""

LOSS_SCALE = 40.0
"""exp(dG/T) needs a unit: a loss of the whole G is LOSS_SCALE n^2, so one request in n is LOSS_SCALE n."""

_Column = npt.NDArray[np.float64]


def anneal(
    problem: StaticProblem,
    *,
    seed: int = 0,
    schedule: AnnealingSchedule = SCHEDULE,
    early_stop: bool = False,
    clock: Clock | None = None,
) -> StaticPlan:
    """The plan with the highest G that is found; never a worse one than any fixed rule's.

    Starts from the best of the rules, arrival order and shortest first among them, and of a plan that is constructed.
    seed: 0 <= seed < 2^64; equal seeds give equal plans. schedule: see SCHEDULE_FOR. early_stop: take the start as it
    is where it meets every SLO, though it often is not the optimum of G.
    """
    clock = clock or MonotonicClock()
    tables = weigh(problem)
    n = len(problem.requests)
    by_length = np.argsort(tables.run_time[problem.largest_batch, :n], kind="stable")
    starts = np.zeros((len(RULES) + 1, n), dtype=np.uint64)  # the last is for the plan that is constructed
    for start, rule in zip(starts, RULES):
        start[:] = cut(rule_order(problem, rule), problem.largest_batch)
    run_time, limit = tables.run_time.ravel(), tables.limit.ravel()
    batch_of = np.zeros(n, dtype=np.uint64)
    constructed = 0
    begun_at_s = clock.now_s()
    if beam_width(n):
        _, _, constructed = static_construction_kernel.construct(
            by_length,
            tables.run_time,
            tables.limit,
            tables.waited,
            tables.free,
            problem.largest_batch,
            beam_width(n),
            starts[-1],
        )
    else:
        starts = starts[:-1]
    met, total, evaluations = static_kernel.anneal(
        starts,
        run_time,
        limit,
        tables.waited,
        tables.free,
        np.uint64(problem.largest_batch),
        np.uint64(max(2, (problem.largest_batch - 1).bit_length())),
        np.uint64(seed),
        schedule.hot,
        schedule.cold,
        schedule.cooling,
        moves_of_a_walk(n, schedule),
        walks(n),
        1.0 / (LOSS_SCALE * n * n),
        problem.with_slo if early_stop else -1,
        batch_of,
    )
    elapsed_s = clock.now_s() - begun_at_s
    evaluations += constructed
    return StaticPlan(_batches(batch_of), int(met), int(total) * tables.tick_s, int(evaluations), elapsed_s)


def beam_width(requests: int) -> int:
    """Of the beam in which a plan for so many requests is constructed; 0 for none."""
    if requests <= SCHEDULE_FOR:
        return BEAM
    return min(WIDER_BEAM * requests**2 // SCHEDULE_FOR**2, MOST_BEAM_WORK // requests**3)


def walks(requests: int) -> int:
    """Into how many walks the annealing of so many requests is divided."""
    return min(FEWEST_WALKS + max(0, requests - SCHEDULE_FOR), MOST_WALKS)


def moves_of_a_walk(requests: int, schedule: AnnealingSchedule) -> int:
    """Moves of one walk at one temperature."""
    effort = max(1.0, min((requests / SCHEDULE_FOR) ** 2, MOST_WORK / requests))
    return math.ceil(schedule.moves_per_level * effort / walks(requests))


def cut(order: npt.NDArray[np.int64], batch_size: int) -> npt.NDArray[np.uint64]:
    """Each request's batch, from 1, where they go in this order in full batches."""
    batch_of = np.empty(len(order), dtype=np.uint64)
    batch_of[order] = 1 + np.arange(len(order)) // batch_size
    return batch_of


def enumerate_all(problem: StaticProblem, *, clock: Clock | None = None) -> StaticPlan:
    """The plan with the highest G there is, of up to MAX_ENUMERATED requests; else ValueError."""
    n = len(problem.requests)
    if n > MAX_ENUMERATED:
        raise ValueError(f"all plans are tried for up to {MAX_ENUMERATED} requests, got {n}")
    clock = clock or MonotonicClock()
    tables = weigh(problem)
    batch_of = np.zeros(n, dtype=np.uint64)
    begun_at_s = clock.now_s()
    met, total, evaluations = static_enumeration_kernel.enumerate_plans(
        n, tables.run_time.ravel(), tables.limit.ravel(), tables.waited, tables.free, problem.largest_batch, batch_of
    )
    elapsed_s = clock.now_s() - begun_at_s
    return StaticPlan(_batches(batch_of), int(met), int(total) * tables.tick_s, int(evaluations), elapsed_s)


def follow_rule(problem: StaticProblem, rule: str, *, clock: Clock | None = None) -> StaticPlan:
    """Full batches in the order of a rule, `rule` as in `RULES`, else KeyError."""
    clock = clock or MonotonicClock()
    tables = weigh(problem)
    begun_at_s = clock.now_s()
    order = rule_order(problem, rule)
    size = problem.largest_batch
    batches = tuple(tuple(int(r) for r in order[i : i + size]) for i in range(0, len(order), size))
    met, total = score(tables, batches)
    return StaticPlan(batches, met, total * tables.tick_s, 1, clock.now_s() - begun_at_s)


def rule_order(problem: StaticProblem, rule: str) -> npt.NDArray[np.int64]:
    """The requests in the order of a rule, ties by arrival; `rule` as in `RULES`, else KeyError."""
    if rule not in RULES:
        raise KeyError(rule)
    name, _, feasible_first = rule.partition("-")
    columns = Columns.of(problem.requests)
    key = _KEYS[name](problem, columns)
    hopeless = np.zeros(len(problem.requests), dtype=np.bool_)
    if feasible_first:
        tpot_s = problem.latency.decode_s(problem.largest_batch, columns.prompt_tokens, columns.output_tokens)
        tpot_s /= columns.output_tokens
        hopeless = (_latest_start_s(problem, columns) < 0) | (tpot_s > columns.tpot_s)
        key = np.where(hopeless, _work_s(problem, columns), key)
    return np.lexsort((key, hopeless))


def can_meet_all(problem: StaticProblem) -> bool:
    """Whether some plan meets every SLO; exact, for up to MAX_WEIGHED requests on one idle engine, else ValueError."""
    n = len(problem.requests)
    if n > MAX_WEIGHED:
        raise ValueError(f"all sets are weighed for up to {MAX_WEIGHED} requests, got {n}")
    if problem.engines_free_s != (0.0,):
        raise ValueError(f"all sets are weighed for one idle engine, got {problem.engines_free_s}")
    tables = weigh(problem)
    obliged = sum(1 << i for i, request in enumerate(problem.requests) if request.slo.has_objective)
    return bool(
        static_enumeration_kernel.all_can_meet(
            n, tables.run_time.ravel(), tables.limit.ravel(), problem.largest_batch, obliged
        )
    )


def warm_up() -> None:
    """Compiles the kernels, or loads them from numba's cache, so that the first plan is as fast as the next."""
    problem = StaticProblem((StaticRequest(1, 1), StaticRequest(2, 2)), 1, LATENCY)
    anneal(problem)
    enumerate_all(problem)


def _fcfs(problem: StaticProblem, columns: Columns) -> _Column:
    return np.zeros(len(problem.requests))  # they are in order of arrival


def _wall_s(problem: StaticProblem, columns: Columns) -> _Column:
    return _run_s(problem, columns, problem.largest_batch)


def _work_s(problem: StaticProblem, columns: Columns) -> _Column:
    return _run_s(problem, columns, 1)


def _run_s(problem: StaticProblem, columns: Columns, batch_size: int) -> _Column:
    latency, prompt = problem.latency, columns.prompt_tokens
    return latency.prefill_s(batch_size, prompt) + latency.decode_s(batch_size, prompt, columns.output_tokens)


def _deadline_s(problem: StaticProblem, columns: Columns) -> _Column:
    return np.minimum(columns.ttft_s, columns.e2e_s) - columns.waited_s


def _latest_start_s(problem: StaticProblem, columns: Columns) -> _Column:
    first_token_s = problem.latency.prefill_s(problem.largest_batch, columns.prompt_tokens)
    longest_s = np.minimum(columns.ttft_s - first_token_s, columns.e2e_s - _wall_s(problem, columns))
    return longest_s - columns.waited_s


_KEYS: dict[str, Callable[[StaticProblem, Columns], _Column]] = {
    "fcfs": _fcfs,
    "sjf": _wall_s,
    "swf": _work_s,
    "edf": _deadline_s,
    "llf": _latest_start_s,
}

RULES = tuple(f"{name}{suffix}" for name in _KEYS for suffix in ("", "-feasible"))
"""Sort keys, smallest first, as online but for the static model: `fcfs` arrival; `sjf` t_exec in a full batch; `swf`
t_exec alone; `edf` the smaller of the TTFT and the E2E objective; `llf` the longest wait from now that still meets, in
a full batch. With `-feasible` appended, those that cannot meet even if they run now go last, in order of t_exec alone.
"""


def _batches(batch_of: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    members: dict[int, list[int]] = {}
    for request, batch in enumerate(batch_of):
        members.setdefault(int(batch), []).append(request)
    return tuple(tuple(members[batch]) for batch in sorted(members))
