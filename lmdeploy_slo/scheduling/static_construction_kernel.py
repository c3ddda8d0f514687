"""Construction of static plans, batch by batch: a beam search that gives the annealing its start.

The next batch is told by its longest member, the leader. Its other places go to shorter requests that meet their SLO in
it: first those that could wait for the fewest more batches as long as the leader, among equals the longest; what is
left over goes to the longest of the shorter ones that are lost already, for whom this is a free ride. A beginning is
judged by the plan it becomes if the rest follows shortest first, those that can still meet before the others.

Most best plans are of this form, and shortest first is a good guess at what is still to come: of 300 problems drawn as
in `paper_setting`, beams of 16, 32 and 64 find the best plan known of 96 % of 12, 90 % of 15 and 91 % of 20 requests.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lmdeploy_slo.scheduling.static_kernel import inlined, jit, occupy, score

# Arrays go from function to function one by one: numba counts references to those in a tuple at every call, which
# takes as long as the work itself. run_time, limit: as in `static_kernel`, shape (batch_size + 1, n), the requests by
# run time in a full batch, shortest first. left: who is in no batch yet. rest: what follows a beginning, in full
# batches but for one of cut[1] that begins at cut[0]. free[row]: when each engine is free, the soonest in front; its
# last row is for trials.


@jit
def _fill(leader: Any, wait: Any, batch_size: Any, run_time: Any, limit: Any, left: Any, batch: Any) -> Any:
    """Chooses the leader's batch into `batch`, and takes it out of `left`; (its size, whether anybody may meet)."""
    batch[0] = leader
    left[leader] = False
    size = 1
    longest = run_time[batch_size, leader]
    while size < batch_size:
        chosen, fewest = -1, 0
        for r in range(leader - 1, -1, -1):
            spare = limit[batch_size, r] - wait
            if left[r] and spare >= 0 and (chosen < 0 or spare < fewest * longest):
                chosen, fewest = r, spare // longest
        if chosen < 0:
            break
        batch[size] = chosen
        left[chosen] = False
        size += 1
    hopeful = size > 1 or limit[1, leader] >= wait
    r = leader - 1
    while r >= 0 and size < batch_size:
        if left[r]:
            batch[size] = r
            left[r] = False
            size += 1
        r -= 1
    return size, hopeful


@inlined
def _weigh(batch: Any, begin: Any, size: Any, wait: Any, run_time: Any, limit: Any) -> Any:
    """(longest run time, sum of E2E, requests that meet) of batch[begin:begin + size]."""
    longest, total, met = 0, size * wait, 0
    for i in range(begin, begin + size):
        run = run_time[size, batch[i]]
        longest = max(longest, run)
        total += run
        met += limit[size, batch[i]] >= wait
    return longest, total, met


@jit
def _weigh_rest(
    count: Any, head: Any, odd: Any, row: Any, free: Any, batch_size: Any, run_time: Any, limit: Any, rest: Any
) -> Any:
    """(sum of E2E, requests that meet) of rest[:count] after free[row]: full batches, but one of `odd` at `head`."""
    trial = free.shape[0] - 1
    for e in range(free.shape[1]):
        free[trial, e] = free[row, e]
    total, met, i = 0, 0, 0
    while i < count:
        size = odd if i == head else min(batch_size, (head if i < head else count) - i)
        longest, more, gain = _weigh(rest, i, size, free[trial, 0], run_time, limit)
        occupy(trial, longest, free)
        total += more
        met += gain
        i += size
    return total, met


@jit
def _finish(left: Any, row: Any, free: Any, batch_size: Any, run_time: Any, limit: Any, rest: Any, cut: Any) -> Any:
    """Puts what is left after free[row] into `rest` and `cut`; (how many, their sum of E2E, requests that meet).

    Of two ways to cut it the better: full batches as far as they go, or those that are lost in batches of their own, of
    which the first is the odd one.
    """
    n, wait = left.shape[0], free[row, 0]
    hopeful = 0
    for r in range(n):
        if left[r] and limit[batch_size, r] >= wait:
            rest[hopeful] = r
            hopeful += 1
    count = hopeful
    for r in range(n):
        if left[r] and limit[batch_size, r] < wait:
            rest[count] = r
            count += 1
    cut[0], cut[1] = count, 0
    total, met = _weigh_rest(count, count, 0, row, free, batch_size, run_time, limit, rest)
    lost = count - hopeful
    if lost > 0 and (hopeful % batch_size != 0 or lost % batch_size != 0):
        odd = (lost - 1) % batch_size + 1
        other_total, other_met = _weigh_rest(count, hopeful, odd, row, free, batch_size, run_time, limit, rest)
        if score(other_met, other_total) > score(met, total):
            cut[0], cut[1] = hopeful, odd
            return count, other_total, other_met
    return count, total, met


@jit
def _place(batch: Any, begin: Any, size: Any, number: Any, k: Any, batch_of: Any) -> Any:
    for i in range(begin, begin + size):
        batch_of[k, batch[i]] = number


@jit
def _place_rest(count: Any, number: Any, batch_size: Any, rest: Any, cut: Any, k: Any, batch_of: Any) -> Any:
    """Writes down the batches of `rest`, from this number on."""
    i = 0
    while i < count:
        size = cut[1] if i == cut[0] else min(batch_size, (cut[0] if i < cut[0] else count) - i)
        _place(rest, i, size, number, k, batch_of)
        number += 1
        i += size


@jit
def _copy(i: Any, k: Any, out: Any, batch_of: Any, facts: Any, free: Any, value: Any) -> Any:
    for r in range(out.shape[1]):
        out[k, r] = out[i, r]
        batch_of[k, r] = batch_of[i, r]
    for j in range(2):
        facts[k, j] = facts[i, j]
    for e in range(free.shape[1]):
        free[k, e] = free[i, e]
    value[k] = value[i]


@jit
def _rank(g: Any, first: Any, kept: Any, width: Any, out: Any, batch_of: Any, facts: Any, free: Any, value: Any) -> Any:
    """Makes room among the best beginnings, best first, from row `first` on; (the row or -1, how many there are then).

    A value that is there already is taken to be the same plan by another way, and left out.
    """
    row = first + kept
    while row > first and value[row - 1] < g:
        row -= 1
    if row == first + width or (row > first and value[row - 1] == g):
        return -1, kept
    kept = min(kept + 1, width)
    for k in range(first + kept - 1, row, -1):
        _copy(k - 1, k, out, batch_of, facts, free, value)
    value[row] = g
    return row, kept


@jit
def construct(
    by_length: Any, run_time: Any, limit: Any, waited: Any, free: Any, batch_size: Any, width: Any, batch_of: Any
) -> Any:
    """The best plan that a beam of `width` (>= 1) beginnings comes by; leaves each one's batch, from 1, in `batch_of`.

    by_length: the requests by run time in a full batch, shortest first. run_time, limit, waited, free: as in
    `static_kernel`, the tables in two dimensions. Returns (requests that meet, sum of E2E in ticks, plans scored). Time
    grows with width and the third power of the requests: 30 microseconds for ten in a beam of 16, 160 for twenty.
    """
    n = by_length.shape[0]
    run_time, limit = run_time[:, by_length], limit[:, by_length]
    # Beginnings: rows of this level and, `width` further on or back, of the next; behind them the best plan.
    out = np.ones((2 * width + 1, n), np.bool_)  # who is in none of its batches
    batches = np.zeros((2 * width + 1, n), np.int64)  # the others' batches, from 1
    facts = np.zeros((2 * width + 1, 2), np.int64)  # sum of E2E; requests that meet
    frees = np.zeros((2 * width + 3, free.shape[0]), np.int64)  # when each engine is free then
    value = np.zeros(2 * width + 1)  # G of the plan it becomes
    best_row, after = 2 * width, 2 * width + 1
    frees[0] = free
    left, batch = np.ones(n, np.bool_), np.empty(batch_size, np.int64)
    rest, cut = np.empty(n, np.int64), np.zeros(2, np.int64)
    _, best_total, best_met = _finish(left, 0, frees, batch_size, run_time, limit, rest, cut)
    best_total += waited
    best = score(best_met, best_total)
    _place_rest(n, 1, batch_size, rest, cut, best_row, batches)
    facts[0, 0] = waited
    evaluations, number, first, kept = 1, 0, 0, 1
    while kept > 0:
        number += 1
        here, stop = first, first + kept
        first, kept = width - first, 0
        for k in range(here, stop):
            wait = frees[k, 0]
            for leader in range(n):
                if not out[k, leader]:
                    continue
                for r in range(n):
                    left[r] = out[k, r]
                size, hopeful = _fill(leader, wait, batch_size, run_time, limit, left, batch)
                if not hopeful:
                    continue
                longest, total, met = _weigh(batch, 0, size, wait, run_time, limit)
                total += facts[k, 0]
                met += facts[k, 1]
                for e in range(frees.shape[1]):
                    frees[after, e] = frees[k, e]
                occupy(after, longest, frees)
                count, more, gain = _finish(left, after, frees, batch_size, run_time, limit, rest, cut)
                evaluations += 1
                g = score(met + gain, total + more)
                if g > best:
                    best, best_met, best_total = g, met + gain, total + more
                    for r in range(n):
                        batches[best_row, r] = batches[k, r]
                    _place(batch, 0, size, number, best_row, batches)
                    _place_rest(count, number + 1, batch_size, rest, cut, best_row, batches)
                if count > 0:
                    row, kept = _rank(g, first, kept, width, out, batches, facts, frees, value)
                    if row >= 0:
                        for r in range(n):
                            out[row, r] = left[r]
                            batches[row, r] = batches[k, r]
                        _place(batch, 0, size, number, row, batches)
                        facts[row, 0], facts[row, 1] = total, met
                        for e in range(frees.shape[1]):
                            frees[row, e] = frees[after, e]
    for i in range(n):
        batch_of[by_length[i]] = batches[best_row, i]
    return best_met, best_total, evaluations
