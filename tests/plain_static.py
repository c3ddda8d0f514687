"""The twins of `static_kernel.anneal` and of `static_construction_kernel` in plain Python: the same draws, plans and
scores, from lists.

While it is annealed a plan is a list of rows, each with one entry a place: a request, or None for nobody. Row 0 and the
last are empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.scheduling.paper_setting import SCHEDULE, AnnealingSchedule
from lmdeploy_slo.scheduling.static_kernel import LOG_DRAWS
from lmdeploy_slo.scheduling.static_model import StaticProblem, weigh
from lmdeploy_slo.scheduling.static_planner import (
    LOSS_SCALE,
    RULES,
    beam_width,
    cut,
    moves_of_a_walk,
    rule_order,
    walks,
)

MASK = (1 << 64) - 1
LUCK: list[float] = LOG_DRAWS.tolist()

Rows = list[list[int | None]]
State = tuple[tuple[int, ...], int, int]  # when each engine is free, sum of E2E, requests that meet
Before = list[State]
Table = list[list[int]]


@dataclass
class Found:
    met: int
    total: int
    evaluations: int
    batch_of: list[int]

    @property
    def score(self) -> float:
        return max(float(self.met), 1e-9) / float(self.total)


def plan(problem: StaticProblem, seed: int = 0, schedule: AnnealingSchedule = SCHEDULE, enough: int = -1) -> Found:
    """As `static_planner.anneal`."""
    tables = weigh(problem)
    n, size = len(problem.requests), problem.largest_batch
    starts = [_rows(cut(rule_order(problem, rule), size).tolist(), size) for rule in RULES]
    constructed = 0
    if beam_width(n):
        start = construct(problem, beam_width(n))
        starts.append(_rows(start.batch_of, size))
        constructed = start.evaluations
    found = anneal(
        starts,
        tables.run_time,
        tables.limit,
        tables.waited,
        tables.free.tolist(),
        size,
        seed,
        hot=schedule.hot,
        cold=schedule.cold,
        cooling=schedule.cooling,
        moves=moves_of_a_walk(n, schedule),
        walks=walks(n),
        unit=1.0 / (LOSS_SCALE * n**2),
        enough=enough,
    )
    found.evaluations += constructed
    return found


def splitmix64(state: int) -> Iterator[int]:
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def anneal(
    starts: Sequence[Rows],
    run_time: npt.NDArray[np.int64],
    limit: npt.NDArray[np.int64],
    waited: int,
    free: Sequence[int],
    batch_size: int,
    seed: int,
    *,
    hot: float,
    cold: float,
    cooling: float,
    moves: int,
    walks: int,
    unit: float,
    enough: int = -1,
) -> Found:
    """As the kernel; `run_time` and `limit` of shape (batch_size + 1, n + 1)."""
    run_times, limits = run_time.tolist(), limit.tolist()
    found = []
    for rows in starts:
        _, total, met = _weigh(rows, [(tuple(free), waited, 0)], 0, run_times, limits)[-1]
        found.append(Found(met, total, len(starts), _batch_of(rows)))
    chosen = max(range(len(starts)), key=lambda i: (found[i].score, -i))
    best = found[chosen]
    if best.met == enough:
        return best
    draws = splitmix64(seed)
    evaluations = len(starts)
    for _ in range(walks):
        walk = _Walk([row[:] for row in starts[chosen]], batch_size, run_times, limits, (tuple(free), waited, 0))
        walk.run(draws, hot, cold, cooling, moves, unit)
        evaluations += walk.weighed
        if walk.best.score > best.score:
            best = walk.best
    best.evaluations = evaluations
    return best


class _Walk:
    def __init__(self, rows: Rows, batch_size: int, run_times: Table, limits: Table, begin: State) -> None:
        self.rows, self.batch_size = rows, batch_size
        self.run_times, self.limits = run_times, limits
        self.before = _weigh(rows, [begin], 0, run_times, limits)
        self.where = {r: (k, j) for k, row in enumerate(rows) for j, r in enumerate(row) if r is not None}
        self.weighed = 0
        self.best = Found(self.before[-1][2], self.before[-1][1], 0, _batch_of(rows))

    def run(self, draws: Iterator[int], hot: float, cold: float, cooling: float, moves: int, unit: float) -> None:
        rows, n = self.rows, len(self.where)
        current = self.best.score
        temperature = hot
        while temperature > cold:
            for _ in range(moves):
                batches = len(rows) - 2
                draw = next(draws)
                kind = draw & 7
                r = (((draw >> 13) & 0x1FFFF) * n) >> 17
                k, i = self.where[r]
                if kind < 2:
                    t = k + 1
                elif kind < 4:
                    t = k - 1
                elif kind < 7:
                    t = k + 1 + ((((draw >> 30) & 0x1FFFF) * (batches - 1)) >> 17)
                    t = t - batches if t > batches else t
                else:
                    t = k + 1 if k < batches else max(k - 1, 1)
                j = ((draw >> 47) * self.batch_size) >> 17
                self._move(kind, k, i, t, j)
                trial = _weigh(rows, self.before, min(k, t), self.run_times, self.limits)
                self.weighed += 1
                _, total, met = trial[-1]
                heat = temperature * unit * self.best.score
                threshold = (current + heat * LUCK[(draw >> 3) & 1023]) * float(total)
                if max(float(met), 1e-9) >= threshold:
                    self.before = trial
                    self._tidy()
                    current = Found(met, total, 0, []).score
                    if current > self.best.score:
                        self.best = Found(met, total, 0, _batch_of(rows))
                else:
                    self._move(kind, k, i, t, j)  # every move undoes itself
            temperature *= cooling

    def _move(self, kind: int, k: int, i: int, t: int, j: int) -> None:
        rows, where = self.rows, self.where
        if kind == 7:
            rows[k], rows[t] = rows[t], rows[k]
            for row in (k, t):
                where.update({r: (row, place) for place, r in enumerate(rows[row]) if r is not None})
            return
        rows[k][i], rows[t][j] = rows[t][j], rows[k][i]
        for row, place in ((k, i), (t, j)):
            r = rows[row][place]
            if r is not None:
                where[r] = (row, place)

    def _tidy(self) -> None:
        """One empty row in front, one behind, none between."""
        rows, before = self.rows, self.before
        kept = [k for k, row in enumerate(rows) if any(r is not None for r in row)]
        if kept == list(range(1, len(rows) - 1)):
            return
        before[:] = [before[0]] + [before[k] for k in kept] + [before[-1]] * 2
        rows[:] = [[None] * self.batch_size] + [rows[k] for k in kept] + [[None] * self.batch_size]
        self.where.update({r: (k, j) for k, row in enumerate(rows) for j, r in enumerate(row) if r is not None})


def _rows(batch_of: Sequence[int], batch_size: int) -> Rows:
    rows: Rows = [[r for r, batch in enumerate(batch_of) if batch == k] for k in range(max(batch_of) + 2)]
    return [row + [None] * (batch_size - len(row)) for row in rows]


def _weigh(rows: Rows, before: Before, first: int, run_times: Table, limits: Table) -> Before:
    """The states before each row and behind the last, row `first` the first to differ."""
    after = before[: first + 1]
    free, total, met = after[first]
    for row in rows[first:]:
        batch = [r for r in row if r is not None]
        if batch:
            wait, *others = sorted(free)
            of_size, limits_of_size = run_times[len(batch)], limits[len(batch)]
            times = [of_size[r] for r in batch]
            total += sum(times) + len(batch) * wait
            for r in batch:
                met += limits_of_size[r] >= wait
            free = (*others, wait + max(times))
        after.append((free, total, met))
    return after


def _batch_of(rows: Rows) -> list[int]:
    batches = [[r for r in row if r is not None] for row in rows]
    numbered = [batch for batch in batches if batch]
    found = {r: k + 1 for k, batch in enumerate(numbered) for r in batch}
    return [found[r] for r in sorted(found)]


# -- construction ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Beginning:
    batches: tuple[tuple[int, ...], ...]
    left: tuple[int, ...]  # shortest first


def construct(problem: StaticProblem, width: int) -> Found:
    """As `static_construction_kernel.construct`."""
    tables, n, size = weigh(problem), len(problem.requests), problem.largest_batch
    run_times, limits = tables.run_time.tolist(), tables.limit.tolist()

    def weighed(batches: Sequence[Sequence[int]], free: Sequence[int]) -> tuple[list[int], int, int]:
        total = met = 0
        for batch in batches:
            wait, *others = sorted(free)
            times = [run_times[len(batch)][r] for r in batch]
            total += sum(times) + len(batch) * wait
            met += sum(limits[len(batch)][r] >= wait for r in batch)
            free = [*others, wait + max(times)]
        return sorted(free), total, met

    def finished(left: Sequence[int], free: Sequence[int]) -> list[list[int]]:
        wait = min(free)
        hopeful = [r for r in left if limits[size][r] >= wait]
        lost = [r for r in left if limits[size][r] < wait]
        together = _cut(hopeful + lost, size)
        odd = (len(lost) - 1) % size + 1
        apart = _cut(hopeful, size) + ([lost[:odd]] if lost else []) + _cut(lost[odd:], size)
        of_together, of_apart = weighed(together, free)[1:], weighed(apart, free)[1:]
        return apart if left and _score(*of_apart) > _score(*of_together) else together

    def next_batch(leader: int, left: Sequence[int], wait: int) -> list[int] | None:
        shorter = left[: left.index(leader)][::-1]
        may_meet = [r for r in shorter if limits[size][r] >= wait]
        patience = {r: (limits[size][r] - wait) // run_times[size][leader] for r in may_meet}
        fillers = sorted(may_meet, key=lambda r: patience[r])[: size - 1]
        if not fillers and limits[1][leader] < wait:
            return None
        lost = [r for r in shorter if r not in fillers]
        return [leader, *fillers, *lost][:size]

    in_order = tuple(sorted(range(n), key=lambda r: run_times[size][r]))
    idle = tables.free.tolist()
    best = finished(in_order, idle)
    evaluations = 1
    beginnings = [_Beginning((), in_order)]
    while beginnings:
        ranked: list[tuple[float, _Beginning]] = []
        for beginning in beginnings:
            wait = weighed(beginning.batches, idle)[0][0]
            for leader in beginning.left:
                batch = next_batch(leader, beginning.left, wait)
                if batch is None:
                    continue
                batches = (*beginning.batches, tuple(batch))
                left = tuple(r for r in beginning.left if r not in batch)
                plan = [list(b) for b in batches] + finished(left, weighed(batches, idle)[0])
                value, least = (_score(b[1] + tables.waited, b[2]) for b in (weighed(plan, idle), weighed(best, idle)))
                evaluations += 1
                if value > least:
                    best = plan
                if left and value not in [other for other, _ in ranked]:
                    ranked.append((value, _Beginning(batches, left)))
                    ranked = sorted(ranked, key=lambda entry: -entry[0])[:width]
        beginnings = [beginning for _, beginning in ranked]
    numbers = {r: k + 1 for k, batch in enumerate(best) for r in batch}
    _, total, met = weighed(best, idle)
    return Found(met, total + tables.waited, evaluations, [numbers[r] for r in range(n)])


def _score(total: int, met: int) -> float:
    return max(float(met), 1e-9) / float(total)


def _cut(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[i : i + size]) for i in range(0, len(order), size)]
