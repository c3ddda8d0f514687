"""Enumeration of static plans: the best of all of them, and whether one meets every SLO.

Both work on sets of requests as bit masks and take the tables of `static_kernel`, which see. Time and memory grow
exponentially with the requests: eight are milliseconds for either, the second takes up to about sixteen.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lmdeploy_slo.scheduling.static_kernel import jit, occupy, score


@jit
def _weigh_subsets(n: Any, batch_size: Any, run_time: Any, limit: Any) -> Any:
    """Of each set of requests (bit r: request r) as a batch: (its size, longest run time, sum of run times)."""
    sets = 1 << n
    size, longest, total = np.zeros(sets, np.int64), np.zeros(sets, np.int64), np.zeros(sets, np.int64)
    for chosen in range(1, sets):
        size[chosen] = size[chosen & (chosen - 1)] + 1
        if size[chosen] <= batch_size:
            for r in range(n):
                if (chosen >> r) & 1:
                    run = run_time[size[chosen] * (n + 1) + r]
                    longest[chosen] = max(longest[chosen], run)
                    total[chosen] += run
    return size, longest, total


@jit
def enumerate_plans(n: Any, run_time: Any, limit: Any, waited: Any, free: Any, batch_size: Any, batch_of: Any) -> Any:
    """Scores every sequence of batches there is; as `anneal`, with the best of all plans. About 5 ms for n = 8."""
    size, longest, run_total = _weigh_subsets(n, batch_size, run_time, limit)
    left, chosen = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)  # by depth: not yet in a batch; the batch
    todo = np.zeros(n + 1, np.int64)  # the subset of `left` to try next, downwards
    total, met = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)
    wait = np.zeros((n + 1, free.shape[0]), np.int64)  # when each engine is free, the soonest in front
    wait[0] = free
    left[0] = todo[0] = (1 << n) - 1
    total[0] = waited
    best, best_total, best_met = -1.0, 0, 0
    evaluations = 0
    depth = 0
    while depth >= 0:
        batch = todo[depth]
        if batch == 0:
            depth -= 1
            continue
        todo[depth] = (batch - 1) & left[depth]
        if size[batch] > batch_size:
            continue
        chosen[depth] = batch
        met_now = met[depth]
        for r in range(n):
            if (batch >> r) & 1 and limit[size[batch] * (n + 1) + r] >= wait[depth, 0]:
                met_now += 1
        total_now = total[depth] + run_total[batch] + size[batch] * wait[depth, 0]
        rest = left[depth] ^ batch
        if rest:
            depth += 1
            left[depth] = todo[depth] = rest
            for e in range(free.shape[0]):
                wait[depth, e] = wait[depth - 1, e]
            occupy(depth, longest[batch], wait)
            total[depth], met[depth] = total_now, met_now
            continue
        evaluations += 1
        if score(met_now, total_now) > best:
            best, best_total, best_met = score(met_now, total_now), total_now, met_now
            for k in range(depth + 1):
                for r in range(n):
                    if (chosen[k] >> r) & 1:
                        batch_of[r] = k + 1
    return best_met, best_total, evaluations


@jit
def all_can_meet(n: Any, run_time: Any, limit: Any, batch_size: Any, obliged: Any) -> Any:
    """Whether some plan meets every SLO of the requests in the set `obliged`; by the least wait after each set."""
    size, longest, _ = _weigh_subsets(n, batch_size, run_time, limit)
    sets = 1 << n
    never = np.int64(1) << 62
    least = np.full(sets, never, np.int64)
    least[0] = 0
    for done in range(1, sets):
        batch = done
        while batch:
            wait = least[done ^ batch]
            if size[batch] <= batch_size and wait + longest[batch] < least[done]:
                meets = True
                for r in range(n):
                    if (batch & obliged) >> r & 1 and limit[size[batch] * (n + 1) + r] < wait:
                        meets = False
                if meets:
                    least[done] = wait + longest[batch]
            batch = (batch - 1) & done
    return least[sets - 1] < never
