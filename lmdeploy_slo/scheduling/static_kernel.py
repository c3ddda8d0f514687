"""Annealing of static plans: batches in a row, each of which begins on the engine that is free first.

Times are integers (ticks), so that sums are exact in every order. Two tables tell all there is to know of a request;
column n, "nobody", stands for an empty place:

    run_time[b, r]  its execution time in a batch of b, at least 1; nobody's is 0
    limit[b, r]     the longest wait at which it meets its SLO in a batch of b; -1: it cannot, has no SLO, or is nobody

While it is searched a plan is rows of 2 ** shift places. The batches are rows 1, 2 ...; row 0 and the row behind the
last batch are empty, to open a batch in. Where in its row a request stands means nothing. Indices are unsigned, because
numba tests signed ones for being negative. What is compiled here reads no clock and allocates nothing in its loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

LOG_DRAWS = np.log((np.arange(1024) + 0.5) / 1024)
"""Logarithms of 1,024 even steps through (0, 1): u < exp(d / T) is T log u < d."""

NOTHING_MET = 1e-9
"""What a plan counts as having met that meets no SLO: of two such plans the shorter sum still scores higher."""

_U = np.uint64
_0, _1, _2, _3, _4 = _U(0), _U(1), _U(2), _U(3), _U(4)
_PUSH, _PULL, _WHOLE = _U(2), _U(4), _U(7)  # kinds of moves: below 2 push, below 4 pull, below 7 exchange, 7 batches
_DRAWS = _U(len(LOG_DRAWS) - 1)
_17 = _U(17)
_17_BITS = _U((1 << 17) - 1)

jit: Callable[[Callable[..., Any]], Callable[..., Any]] = njit(nogil=True, cache=True, error_model="numpy")
inlined: Callable[[Callable[..., Any]], Callable[..., Any]] = njit(inline="always", error_model="numpy")
"""For what is called so often, with so many arrays, that the call itself would count."""


class Rows(NamedTuple):
    """A plan while it is searched, in n + 3 rows: one batch each at most, the empty ones around, one to move over."""

    place: npt.NDArray[np.uint64]  # flat: the request at a place, n for nobody
    size: npt.NDArray[np.uint64]  # of each row's batch
    place_of: npt.NDArray[np.uint64]  # by request; nobody's means nothing
    before: npt.NDArray[np.int64]  # by row: wait, sum of E2E and requests that meet, of all batches before it
    trial: npt.NDArray[np.int64]  # the same while a move is weighed
    others: npt.NDArray[np.int64]  # by row: when the other engines are free; then the same while a move is weighed


class Tables(NamedTuple):
    """See the module; flat, row by row."""

    run_time: npt.NDArray[np.int64]
    limit: npt.NDArray[np.int64]


@jit
def score(met: Any, total: Any) -> Any:
    """G = met / sum of E2E, per tick."""
    return max(float(met), NOTHING_MET) / float(total)


@jit
def _mixed(state: Any) -> Any:
    """The output of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014)."""
    z = (state ^ (state >> _U(30))) * _U(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> _U(27))) * _U(0x94D049BB133111EB)
    return z ^ (z >> _U(31))


@jit
def _weigh(first: Any, stop: Any, n: Any, shift: Any, rows: Any, tables: Any) -> Any:
    """Goes on from `before[first]` through rows first..stop-1, into `trial`; (sum of E2E, requests that meet)."""
    wait, total, met = rows.before[first, _0], rows.before[first, _1], rows.before[first, _2]
    width = _1 << shift
    for k in range(first, stop):
        rows.trial[k, _0] = wait
        rows.trial[k, _1] = total
        rows.trial[k, _2] = met
        size = rows.size[k]
        column = size * (n + _1)
        longest = 0
        p = k << shift
        end = p + width
        while p < end:  # by four: a row's width is a multiple of it
            a, b = rows.place[p] + column, rows.place[p + _1] + column
            c, d = rows.place[p + _2] + column, rows.place[p + _3] + column
            run_a, run_b, run_c, run_d = tables.run_time[a], tables.run_time[b], tables.run_time[c], tables.run_time[d]
            longest = max(longest, max(max(run_a, run_b), max(run_c, run_d)))
            total += (run_a + run_b) + (run_c + run_d)
            met += (tables.limit[a] >= wait) + (tables.limit[b] >= wait)
            met += (tables.limit[c] >= wait) + (tables.limit[d] >= wait)
            p += _4
        total += np.int64(size) * wait
        wait += longest
    rows.trial[stop, _0] = wait
    rows.trial[stop, _1] = total
    rows.trial[stop, _2] = met
    return total, met


@jit
def _weigh_on_several(first: Any, stop: Any, n: Any, shift: Any, rows: Any, tables: Any) -> Any:
    """As `_weigh`, for any number of engines: that of a row takes its place among the others when it is done."""
    wait, total, met = rows.before[first, _0], rows.before[first, _1], rows.before[first, _2]
    others = rows.others.shape[1] >> 1
    rows.others[first, others:] = rows.others[first, :others]
    for k in range(first, stop):
        rows.trial[k, _0], rows.trial[k, _1], rows.trial[k, _2] = wait, total, met
        column = rows.size[k] * (n + _1)
        longest = 0
        for p in range(k << shift, (k + _1) << shift):
            entry = rows.place[p] + column
            longest = max(longest, tables.run_time[entry])
            total += tables.run_time[entry]
            met += tables.limit[entry] >= wait
        total += np.int64(rows.size[k]) * wait
        wait += longest
        for e in range(others, others << 1):
            other = rows.others[k, e]
            rows.others[k + _1, e] = max(wait, other)
            wait = min(wait, other)
    rows.trial[stop, _0], rows.trial[stop, _1], rows.trial[stop, _2] = wait, total, met
    return total, met


@inlined
def occupy(row: Any, longest: Any, free: Any) -> Any:
    """The engine that is free first, free[row, 0], works for so long; whichever is free first then is in its place."""
    wait = free[row, 0] + longest
    for e in range(1, free.shape[1]):
        other = free[row, e]
        free[row, e] = max(wait, other)
        wait = min(wait, other)
    free[row, 0] = wait


@jit
def _keep(first: Any, stop: Any, rows: Any) -> Any:
    for k in range(first, stop + _1):
        for j in range(3):
            rows.before[k, j] = rows.trial[k, j]
    others = rows.others.shape[1] >> 1
    if others > 0:
        for k in range(first, stop + _1):
            for e in range(others):
                rows.others[k, e] = rows.others[k, others + e]


@jit
def _put(r: Any, p: Any, rows: Any) -> Any:
    rows.place[p] = r
    rows.place_of[r] = p


@jit
def _exchange_rows(k: Any, t: Any, shift: Any, rows: Any) -> Any:
    for j in range(_1 << shift):
        p, q = (k << shift) + j, (t << shift) + j
        r = rows.place[p]
        _put(rows.place[q], p, rows)
        _put(r, q, rows)
    size = rows.size[k]
    rows.size[k] = rows.size[t]
    rows.size[t] = size


@jit
def _open_front(batches: Any, n: Any, shift: Any, rows: Any) -> Any:
    """Row 0 got a request: all rows move back by one, and row 0 is empty again."""
    width = _1 << shift
    for k in range(batches + _1, _0, -1):
        t = _U(k)
        for j in range(width):
            p = (t << shift) + j
            _put(rows.place[p - width], p, rows)
        rows.size[t] = rows.size[t - _1]
        for j in range(3):
            rows.before[t, j] = rows.before[t - _1, j]
        for e in range(rows.others.shape[1]):
            rows.others[t, e] = rows.others[t - _1, e]
    for j in range(width):
        rows.place[j] = n
    rows.size[_0] = _0


@jit
def _close(k: Any, batches: Any, shift: Any, rows: Any) -> Any:
    """Row k lost its last request: the rows behind it move up by one."""
    width = _1 << shift
    for t in range(k, batches + _1):
        for j in range(width):
            p = (t << shift) + j
            _put(rows.place[p + width], p, rows)
        rows.size[t] = rows.size[t + _1]
        for j in range(3):
            rows.before[t, j] = rows.before[t + _1, j]
        for e in range(rows.others.shape[1]):
            rows.others[t, e] = rows.others[t + _1, e]


@jit
def _lay_out(batch_of: Any, n: Any, shift: Any, rows: Any) -> Any:
    """The plan in which each request has this batch, counted from 1; returns how many there are."""
    rows.place[:] = n
    rows.size[:] = _0
    batches = _0
    for r in range(n):
        row = batch_of[r]
        _put(r, (row << shift) + rows.size[row], rows)
        rows.size[row] += _1
        batches = max(batches, row)
    return batches


@jit
def _walk(
    batches: Any, n: Any, batch_size: Any, shift: Any, rows: Any, tables: Any, state: Any, hot: Any, cold: Any,
    cooling: Any, moves: Any, unit: Any, best_row: Any, total: Any, met: Any,
) -> Any:  # fmt: skip
    """One walk from the plan in `rows`, which has `total` and `met`; `best_row`: of each request in the best plan.

    A draw is, from its lowest bit on: 3 bits for the kind of move, 10 for luck, 17 each for request, batch and place.
    Returns (moves weighed, total and met of the best plan, the generator's state).
    """
    current = best = score(met, total)
    best_total, best_met = total, met
    for r in range(n):
        best_row[r] = rows.place_of[r] >> shift
    weighed = 0
    several = rows.others.shape[1] > 0
    temperature = hot
    while temperature > cold:
        heat = temperature * unit * best
        for _ in range(moves):
            state += _U(0x9E3779B97F4A7C15)
            draw = _mixed(state)
            kind = draw & _U(7)
            luck = LOG_DRAWS[(draw >> _3) & _DRAWS]
            r = (((draw >> _U(13)) & _17_BITS) * n) >> _17
            i = rows.place_of[r]
            k = i >> shift
            t = k + _1 + ((((draw >> _U(30)) & _17_BITS) * (batches - _1)) >> _17)  # any batch but its own ...
            t = t - batches if t > batches else t
            t = k - _1 if kind < _PULL else t  # ... or the one before ...
            t = k + _1 if kind < _PUSH else t  # ... or behind it
            j = (t << shift) + (((draw >> _U(47)) * batch_size) >> _17)
            other = rows.place[j]
            moved = _U(other == n)
            if kind == _WHOLE:
                t = k + _1 if k < batches else max(k - _1, _1)
                moved = _0
                _exchange_rows(k, t, shift, rows)
            else:
                _put(other, i, rows)
                _put(r, j, rows)
                rows.size[k] -= moved
                rows.size[t] += moved
            first, stop = min(k, t), max(t, batches) + _1
            if several:
                total, met = _weigh_on_several(first, stop, n, shift, rows, tables)
            else:
                total, met = _weigh(first, stop, n, shift, rows, tables)
            weighed += 1
            if max(float(met), NOTHING_MET) >= (current + heat * luck) * float(total):
                _keep(first, stop, rows)
                if moved != _0:
                    if t == _0:
                        _open_front(batches, n, shift, rows)
                        k += _1
                    if t == _0 or t > batches:
                        batches += _1
                    if rows.size[k] == _0:
                        _close(k, batches, shift, rows)
                        batches -= _1
                current = score(met, total)
                if current > best:
                    best, best_total, best_met = current, total, met
                    heat = temperature * unit * best
                    for q in range(n):
                        best_row[q] = rows.place_of[q] >> shift
            elif kind == _WHOLE:
                _exchange_rows(k, t, shift, rows)
            else:
                _put(other, j, rows)
                _put(r, i, rows)
                rows.size[k] += moved
                rows.size[t] -= moved
        temperature *= cooling
    return weighed, best_total, best_met, state


@jit
def anneal(
    starts: Any, run_time: Any, limit: Any, waited: Any, free: Any, batch_size: Any, shift: Any, seed: Any, hot: Any,
    cold: Any, cooling: Any, moves: Any, walks: Any, unit: Any, enough: Any, batch_of: Any,
) -> Any:  # fmt: skip
    """Searches for the plan of n requests with the highest G; leaves each one's batch, counted from 1, in `batch_of`.

    waited: before the plan begins, of all requests together; in the sum of E2E. free: when each engine is free, soonest
    first. starts: plans, shape (any, n), each request's batch as in `batch_of`; all walks begin from the best of them.
    enough: a start that meets so many is returned at once; -1 for never. shift: 2 ** shift >= batch_size, at least 2.
    walks: independent searches, in which the temperature falls from `hot`, times `cooling` after `moves` moves, while
    it is above `cold`. A worse plan is accepted with exp(dG / T), dG in units of `unit` times the best G of the walk.
    Moves: pull a request into the previous batch, push it into the next, exchange it with one of any other batch, or
    exchange two neighbouring batches. Where a request goes, one of `batch_size` places is drawn: if it is empty the
    request moves there, and the batches change their sizes; else it changes places with who is there.
    Returns (requests that meet, sum of E2E in ticks, plans scored).
    """
    n = _U(starts.shape[1])
    count = starts.shape[1] + 3
    rows = Rows(
        np.empty(count << np.int64(shift), np.uint64),
        np.empty(count, np.uint64),
        np.empty(count, np.uint64),
        np.zeros((count, 3), np.int64),
        np.zeros((count, 3), np.int64),
        np.zeros((count, 2 * (free.shape[0] - 1)), np.int64),
    )
    rows.before[_0, _0] = free[0]
    rows.before[_0, _1] = waited
    rows.others[_0, : free.shape[0] - 1] = free[1:]
    tables = Tables(run_time, limit)
    best_row = np.empty(starts.shape[1], np.uint64)
    chosen = 0
    best_total, best_met = 0, 0
    best = -1.0
    for i in range(starts.shape[0]):
        batches = _lay_out(starts[i], n, shift, rows)
        total, met = _weigh_on_several(_0, batches + _1, n, shift, rows, tables)
        if score(met, total) > best:
            best, best_total, best_met = score(met, total), total, met
            chosen = i
            for r in range(n):
                batch_of[r] = rows.place_of[r] >> shift
    start_total, start_met = best_total, best_met
    evaluations = starts.shape[0]
    if best_met == enough:
        return best_met, best_total, evaluations
    state = seed
    for _ in range(walks):
        batches = _lay_out(starts[chosen], n, shift, rows)
        _weigh_on_several(_0, batches + _1, n, shift, rows, tables)
        _keep(_0, batches + _1, rows)
        weighed, total, met, state = _walk(
            batches, n, batch_size, shift, rows, tables, state, hot, cold, cooling, moves, unit, best_row,
            start_total, start_met,
        )  # fmt: skip
        evaluations += weighed
        if score(met, total) > best:
            best, best_total, best_met = score(met, total), total, met
            batch_of[:] = best_row
    return best_met, best_total, evaluations
