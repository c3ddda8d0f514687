"""The twin of `static_kernel.anneal` in plain Python: the same draws, plans and scores, from lists.

A plan is a list of rows, each with one entry a place: a request, or None for nobody. Row 0 and the last are empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.scheduling.paper_setting import SCHEDULE, AnnealingSchedule
from lmdeploy_slo.scheduling.static_kernel import LOG_DRAWS
from lmdeploy_slo.scheduling.static_model import StaticProblem, weigh
from lmdeploy_slo.scheduling.static_planner import LOSS_SCALE, RULES, WALKS, rule_order

MASK = (1 << 64) - 1
LUCK: list[float] = LOG_DRAWS.tolist()

Rows = list[list[int | None]]
Before = list[tuple[int, int, int]]
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
    return anneal(
        [rule_order(problem, rule).tolist() for rule in RULES],
        tables.run_time,
        tables.limit,
        tables.waited,
        problem.largest_batch,
        seed,
        hot=schedule.hot,
        cold=schedule.cold,
        cooling=schedule.cooling,
        moves=-(-schedule.moves_per_level // WALKS),
        walks=WALKS,
        unit=1.0 / (LOSS_SCALE * len(problem.requests) ** 2),
        enough=enough,
    )


def splitmix64(state: int) -> Iterator[int]:
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def anneal(
    starts: Sequence[Sequence[int]],
    run_time: npt.NDArray[np.int64],
    limit: npt.NDArray[np.int64],
    waited: int,
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
    laid_out = [_full_batches(order, batch_size) for order in starts]
    found = []
    for rows in laid_out:
        _, total, met = _weigh(rows, [(0, waited, 0)], 0, run_times, limits)[-1]
        found.append(Found(met, total, len(starts), _batch_of(rows)))
    chosen = max(range(len(starts)), key=lambda i: (found[i].score, -i))
    best = found[chosen]
    if best.met == enough:
        return best
    draws = splitmix64(seed)
    evaluations = len(starts)
    for _ in range(walks):
        walk = _Walk([row[:] for row in laid_out[chosen]], batch_size, run_times, limits, waited)
        walk.run(draws, hot, cold, cooling, moves, unit)
        evaluations += walk.weighed
        if walk.best.score > best.score:
            best = walk.best
    best.evaluations = evaluations
    return best


class _Walk:
    def __init__(self, rows: Rows, batch_size: int, run_times: Table, limits: Table, waited: int) -> None:
        self.rows, self.batch_size = rows, batch_size
        self.run_times, self.limits = run_times, limits
        self.before = _weigh(rows, [(0, waited, 0)], 0, run_times, limits)
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


def _full_batches(order: Sequence[int], batch_size: int) -> Rows:
    rows: Rows = [[None] * batch_size]
    for i in range(0, len(order), batch_size):
        batch: list[int | None] = [int(r) for r in order[i : i + batch_size]]
        rows.append(batch + [None] * (batch_size - len(batch)))
    return [*rows, [None] * batch_size]


def _weigh(rows: Rows, before: Before, first: int, run_times: Table, limits: Table) -> Before:
    """(wait, sum of E2E, requests that meet) before each row and behind the last, row `first` the first to differ."""
    after = before[: first + 1]
    wait, total, met = after[first]
    for row in rows[first:]:
        batch = [r for r in row if r is not None]
        if batch:
            of_size, limits_of_size = run_times[len(batch)], limits[len(batch)]
            times = [of_size[r] for r in batch]
            total += sum(times) + len(batch) * wait
            for r in batch:
                met += limits_of_size[r] >= wait
            wait += max(times)
        after.append((wait, total, met))
    return after


def _batch_of(rows: Rows) -> list[int]:
    batches = [[r for r in row if r is not None] for row in rows]
    numbered = [batch for batch in batches if batch]
    found = {r: k + 1 for k, batch in enumerate(numbered) for r in batch}
    return [found[r] for r in sorted(found)]
