"""Order of requests for which there are fewer slots than requests: each in turn takes the slot that is free first.

A slot is a machine, and a request a job of fixed length on it: with a full batch the pace of the engine hardly depends
on who is in it. Seen so, an order is scored by

    G = worth of the requests expected to meet / sum of E2E

as in `static_model`, with a batch for each request and an engine for each slot. Each request stands for several lengths
of its forecast and counts with the share of them that meet. Compiled code; reads no clock, allocates nothing in its
loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from lmdeploy_slo.scheduling.annealing_kernel import next_random

NOTHING_MET = 1e-9
"""What an order counts as having met that meets no SLO: of two such orders the shorter sum still scores higher."""

HOT, COLD = 0.5, 0.02
"""Temperatures, in requests of average worth."""

_jit: Callable[[Callable[..., Any]], Callable[..., Any]] = njit(nogil=True, cache=True, error_model="numpy")
_inlined: Callable[[Callable[..., Any]], Callable[..., Any]] = njit(inline="always", error_model="numpy")


# Arrays go from function to function one by one, as in `static_construction_kernel`, for the sake of speed:
# run: seconds of each job in a slot, above 0. limit: the latest start at which it meets, seconds from now, by length
# quantile, shape (n, any); negative: it cannot. worth: of its SLO being met. free: when each slot is free, seconds from
# now, soonest first.


@_inlined
def place(job: Any, run: Any, limit: Any, worth: Any, free: Any) -> Any:
    """Runs a job in the slot that is free first and moves that slot back; (its end, worth of what is met)."""
    start = free[0]
    end = start + run[job]
    soonest = end
    for slot in range(1, free.shape[0]):  # no branches: where the job's end belongs cannot be foretold
        other = free[slot]
        free[slot] = max(soonest, other)
        soonest = min(soonest, other)
    free[0] = soonest
    met = 0
    for q in range(limit.shape[1]):
        met += start <= limit[job, q]
    return end, worth[job] * met / limit.shape[1]


@_jit
def score_from(
    first: Any, order: Any, run: Any, limit: Any, worth: Any, waited: Any, before: Any, sums: Any, free: Any
) -> Any:
    """G of `order`, whose places before `first` are as `before` and `sums` have it; leaves them alone.

    waited: of all jobs together, until now. before[i]: when each slot is free before the job at place i. sums[i]: the
    sum of the ends and the worth of the jobs before it. free: work space, as long as there are slots.
    """
    for slot in range(free.shape[0]):
        free[slot] = before[first, slot]
    total, met = sums[first, 0], sums[first, 1]
    for i in range(first, order.shape[0]):
        end, gain = place(order[i], run, limit, worth, free)
        total += end
        met += gain
    return max(met, NOTHING_MET) / (waited + total)


@_jit
def score_order(order: Any, run: Any, limit: Any, worth: Any, waited: Any, free: Any) -> Any:
    """G of a whole order."""
    before, sums = np.zeros((1, free.shape[0])), np.zeros((1, 2))
    before[0] = free
    return score_from(0, order, run, limit, worth, waited, before, sums, np.empty(free.shape[0]))


@_jit
def settle_from(first: Any, order: Any, run: Any, limit: Any, worth: Any, before: Any, sums: Any) -> Any:
    """Brings `before` and `sums` up to `order` behind `first`."""
    for i in range(first, order.shape[0]):
        for slot in range(before.shape[1]):
            before[i + 1, slot] = before[i, slot]
        end, gain = place(order[i], run, limit, worth, before[i + 1])
        sums[i + 1, 0] = sums[i, 0] + end
        sums[i + 1, 1] = sums[i, 1] + gain


@_jit
def shift(i: Any, j: Any, order: Any) -> Any:
    """Takes the job at place i to place j; those between move up."""
    job = order[i]
    step = 1 if j > i else -1
    while i != j:
        order[i] = order[i + step]
        i += step
    order[j] = job


@_jit
def search_order(
    starts: Any, run: Any, limit: Any, worth: Any, waited: Any, free: Any, moves: Any, state: Any, best: Any
) -> Any:
    """The best order found by `moves` moves from the best of `starts`, in `best`; returns its G.

    starts: permutations, shape (any, n), n >= 2. state: as `next_random`.
    Moves: one job to another place, or two change places; a worse order is accepted with exp(-loss / temperature), the
    loss being n times the part of the best G that goes with it.
    """
    n = starts.shape[1]
    before, sums = np.zeros((n + 1, free.shape[0])), np.zeros((n + 1, 2))
    work = np.empty(free.shape[0])
    before[0] = free
    top = -1.0
    for k in range(starts.shape[0]):
        score = score_from(0, starts[k], run, limit, worth, waited, before, sums, work)
        if score > top:
            top = score
            best[:] = starts[k]
    order = best.copy()
    settle_from(0, order, run, limit, worth, before, sums)
    current = top
    cooling = (COLD / HOT) ** (1.0 / max(1, moves))
    temperature = HOT
    for _ in range(moves):
        i, j = int(next_random(state) * n), int(next_random(state) * (n - 1))
        j += j >= i
        exchange = next_random(state) < 0.5
        if exchange:
            order[i], order[j] = order[j], order[i]
        else:
            shift(i, j, order)
        score = score_from(min(i, j), order, run, limit, worth, waited, before, sums, work)
        loss = n * (current - score) / top
        if loss <= 0.0 or next_random(state) < math.exp(-loss / temperature):
            current = score
            settle_from(min(i, j), order, run, limit, worth, before, sums)
            if score > top:
                top = score
                best[:] = order
        elif exchange:
            order[i], order[j] = order[j], order[i]
        else:
            shift(j, i, order)
        temperature *= cooling
    return top
