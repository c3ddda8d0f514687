"""Slow plain twin of the order for slots: the same answers under the same draws, written to be read."""

from __future__ import annotations

import heapq
import math

from lmdeploy_slo.scheduling.slot_order_kernel import COLD, HOT, NOTHING_MET


def plain_score(order, run, limit, worth, waited, free) -> float:
    slots = list(free)
    heapq.heapify(slots)
    met, total = 0.0, waited
    for job in order:
        start = heapq.heappop(slots)
        heapq.heappush(slots, start + run[job])
        total += start + run[job]
        met += worth[job] * sum(start <= latest for latest in limit[job]) / len(limit[job])
    return max(met, NOTHING_MET) / total


def plain_search(starts, run, limit, worth, waited, free, moves, random):
    """(order, its G)."""

    def score_of(order) -> float:
        return plain_score(order, run, limit, worth, waited, free)

    best = max(([int(job) for job in start] for start in starts), key=score_of)
    order, n = list(best), len(best)
    current = top = score_of(best)
    for move in range(moves):
        temperature = HOT * (COLD / HOT) ** (move / moves)
        i, j = int(random() * n), int(random() * (n - 1))
        j += j >= i
        changed = list(order)
        if random() < 0.5:
            changed[i], changed[j] = changed[j], changed[i]
        else:
            changed.insert(j, changed.pop(i))
        score = score_of(changed)
        loss = n * (current - score) / top
        if loss <= 0 or random() < math.exp(-loss / temperature):
            order, current = changed, score
            if score > top:
                best, top = list(changed), score
    return best, top
