"""What a request would be worth at each replica: the rollout of `annealing_kernel`, with and without it.

Each replica has a row in the arrays of `Sites`, filled when something there has changed and kept until it changes
again. The worth of a request at a replica is what its being sent there now adds to the requests expected to meet: its
own chance, less what its prefill and its decoding take from those that run there or are about to, less the price of its
engine time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from lmdeploy_slo.scheduling import annealing_kernel as kernel
from lmdeploy_slo.scheduling.annealing_arrays import (
    QUANTILES,
    SPANS,
    Base,
    Candidates,
    Floats,
    Ints,
    Pace,
    Scratch,
    Stakes,
)

PROMISED = 15
"""Requests on their way to a replica, placed but not yet planned for, that are taken into account there at most."""

NO_ROOM = -1e9

_jit: Callable[[Callable[..., Any]], Callable[..., Any]] = njit(nogil=True, cache=True)


class Sites(NamedTuple):
    """One row a replica; the second index is that of `annealing_arrays`."""

    pace: Floats  # (replicas, 6): the fields of Pace
    decode: Floats
    prefill: Floats
    sequences: Floats
    context: Floats
    end: Ints
    deadline: Floats
    weight: Floats
    spans: Ints
    at_stake: Ints
    promised: Ints  # entries of the candidates that are taken
    score: Floats  # of what runs there and was promised, alone
    free_slots: Ints
    free_tokens: Floats  # KV memory left by predicted lengths; inf without a bound
    row: Ints
    stall: Floats
    prompt: Floats
    output: Ints
    outputs: Ints  # (replicas, candidates, QUANTILES)
    ttft_at: Floats
    e2e_at: Floats
    tpot: Floats
    worth: Floats
    price: Floats


def make_sites(replicas: int, stakes: int) -> Sites:
    """stakes: the most entries of a replica."""

    def floats(*shape: int) -> npt.NDArray[np.float64]:
        return np.zeros((replicas, *shape))

    def ints(*shape: int) -> npt.NDArray[np.int64]:
        return np.zeros((replicas, *shape), dtype=np.int64)

    some = PROMISED + 1
    return Sites(
        pace=floats(6),
        decode=floats(SPANS + 2),
        prefill=floats(SPANS + 2),
        sequences=floats(SPANS + 2),
        context=floats(SPANS + 2),
        end=ints(stakes),
        deadline=floats(stakes),
        weight=floats(stakes),
        spans=ints(),
        at_stake=ints(),
        promised=ints(),
        score=floats(),
        free_slots=ints(),
        free_tokens=floats(),
        row=ints(some),
        stall=floats(some),
        prompt=floats(some),
        output=ints(some),
        outputs=ints(some, QUANTILES),
        ttft_at=floats(some),
        e2e_at=floats(some),
        tpot=floats(some),
        worth=floats(some),
        price=floats(some),
    )


@_jit
def pace_of(sites: Any, r: Any) -> Any:
    p = sites.pace[r]
    return Pace(p[0], p[1], p[2], p[3], p[4], p[5])


@_jit
def base_of(sites: Any, r: Any) -> Any:
    return Base(sites.decode[r], sites.prefill[r], sites.sequences[r], sites.context[r])


@_jit
def stakes_of(sites: Any, r: Any) -> Any:
    return Stakes(sites.end[r], sites.deadline[r], sites.weight[r])


@_jit
def candidates_of(sites: Any, r: Any, first: Any) -> Any:
    """From the one numbered `first` on."""
    return Candidates(
        sites.row[r, first:], sites.stall[r, first:], sites.prompt[r, first:], sites.output[r, first:],
        sites.outputs[r, first:], sites.ttft_at[r, first:], sites.e2e_at[r, first:], sites.tpot[r, first:],
        sites.worth[r, first:], sites.price[r, first:],
    )  # fmt: skip


@_jit
def most_background(rows: Any, pace: Any, tpot_share: Any, most: Any) -> Any:
    """The largest share of time that prefills still to come can take, given the TPOT objectives of what runs."""
    context = 0.0
    objectives = np.empty(rows.shape[0])
    count = 0
    for i in range(rows.shape[0]):
        context += rows[i]["prompt_tokens"] + rows[i]["cached_tokens"] + rows[i]["generated_tokens"]
        if rows[i]["tpot_s"] < np.inf:
            objectives[count] = rows[i]["tpot_s"]
            count += 1
    if not count:
        return most
    decode_s = pace.c0 + pace.d1 * rows.shape[0] + pace.d2 * context
    return min(most, max(0.0, 1.0 - decode_s / (tpot_share * np.median(objectives[:count]))))


@_jit
def look_at_site(sites: Any, r: Any, running: Any, worth: Any, told_at_s: Any, model: Any, duty: Any,
                 tpot_share: Any, most: Any, max_batch_size: Any, kv_tokens: Any, spread: Any) -> Any:  # fmt: skip
    """Fills the row of a replica from its running rows, as they were known at `told_at_s`. worth: of each one's SLO.

    model: c0, p1, p2, d1, d2. duty: the share of time that its prefills are expected to take.
    """
    pace = Pace(model[0], model[1], model[2], model[3], model[4], 0.0)
    share = min(duty, most_background(running, pace, tpot_share, most))
    for k in range(5):
        sites.pace[r, k] = model[k]
    sites.pace[r, 5] = share / (1.0 - share)
    sites.at_stake[r], sites.spans[r] = kernel.look_at_running(
        running, worth, told_at_s, pace_of(sites, r), spread, base_of(sites, r), stakes_of(sites, r)
    )
    used = 0.0
    for i in range(running.shape[0]):
        used += running[i]["prompt_tokens"] + running[i]["cached_tokens"] + running[i]["output_tokens"]
    sites.free_slots[r] = max_batch_size - running.shape[0]
    sites.free_tokens[r] = kv_tokens - used


@_jit
def promise(sites: Any, r: Any, rows: Any, worth: Any, now_s: Any, price_s: Any, least: Any, reference_batch: Any,
            spread: Any, admit: Any, scratch: Any) -> Any:  # fmt: skip
    """Takes those of `rows` for about to be sent there that gain more than `least` of their `worth`, one after the
    other, PROMISED at most."""
    count = 0
    pace = pace_of(sites, r)
    base, stakes, candidates = base_of(sites, r), stakes_of(sites, r), candidates_of(sites, r, 0)
    score = kernel.rollout(admit, 0, pace, base, sites.spans[r], stakes, sites.at_stake[r], candidates, scratch)
    engine_s = np.empty(rows.shape[0])
    chosen = np.zeros(1, dtype=np.int64)
    for i in range(rows.shape[0]):
        if count >= PROMISED:
            break
        engine_s[i] = kernel.engine_time_of(rows[i], pace, reference_batch)
        chosen[0] = i
        kernel.take_candidates(
            rows, chosen, worth[i : i + 1], now_s, pace, spread, price_s, engine_s, candidates_of(sites, r, count)
        )
        after = kernel.rollout(
            admit, count + 1, pace, base, sites.spans[r], stakes, sites.at_stake[r], candidates, scratch
        )
        if after - score > least * worth[i]:
            score = after
            count += 1
    sites.promised[r] = count
    sites.score[r] = score


@_jit
def weigh(sites: Any, which: Any, asks: Any, worth: Any, now_s: Any, prices_s: Any, reference_batch: Any, spread: Any,
          admit: Any, scratch: Any, gains: Any, engine_s: Any) -> Any:  # fmt: skip
    """For each replica in `which`, in that order: what a request adds there (NO_ROOM without a slot or the memory), and
    the engine time it takes there. asks: its row as each of them would plan it; prices_s: of a second there; admit:
    zeros."""
    first = np.zeros(1, dtype=np.int64)
    for k in range(which.shape[0]):
        r = which[k]
        pace = pace_of(sites, r)
        ask = asks[k]
        engine_s[k] = kernel.engine_time_of(ask, pace, reference_batch)
        count = sites.promised[r]
        tokens = ask["prompt_tokens"] + ask["cached_tokens"] + ask["output_tokens"]
        for i in range(count):
            tokens += sites.prompt[r, i] + sites.output[r, i]
        if count >= PROMISED or sites.free_slots[r] <= count or tokens > sites.free_tokens[r]:
            gains[k] = NO_ROOM
            continue
        kernel.take_candidates(
            asks[k : k + 1], first, worth, now_s, pace, spread, prices_s[k], engine_s[k : k + 1],
            candidates_of(sites, r, count),
        )  # fmt: skip
        gains[k] = kernel.rollout(
            admit, count + 1, pace, base_of(sites, r), sites.spans[r], stakes_of(sites, r), sites.at_stake[r],
            candidates_of(sites, r, 0), scratch,
        ) - sites.score[r]  # fmt: skip


@_jit
def best_site(gains: Any, engine_s: Any, work_s: Any, least: Any, grain: Any) -> Any:
    """The position of the best replica: where a request gains more than `least`, the largest gain in steps of `grain`,
    then the smallest (work + engine time) x engine time; where it gains at none, the least work."""
    best = 0
    best_level, best_cost = -1.0, np.inf
    for k in range(gains.shape[0]):
        level, cost = 0.0, work_s[k]
        if gains[k] > least:
            level, cost = np.rint(gains[k] / grain) + 1.0, (work_s[k] + engine_s[k]) * engine_s[k]
        if level > best_level or (level == best_level and cost < best_cost):
            best, best_level, best_cost = k, level, cost
    return best


def make_scratch() -> tuple[Scratch, Ints]:
    """Work arrays of a rollout, and admission steps that send everybody now."""
    scratch = Scratch(*(np.zeros(SPANS + 2) for _ in Scratch._fields))
    return scratch, np.zeros(PROMISED + 1, dtype=np.int64)
