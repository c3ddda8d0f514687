"""Online annealing for a persistent batch: a rollout of the step model, and a search over admission steps.

A plan gives each candidate the forward pass in which its prompt is prefilled (its admission step, 0 is the next
pass), or NEVER. The rollout runs the engine's step model forward on predictions and counts how many requests, running
ones included, are expected to meet their SLO. Passes are the natural clock of a persistent batch: however long they
last, a sequence that needs n more tokens ends n passes from now, so one sweep over the passes times everybody.

Lengths are uncertain. Each request stands for `QUANTILES` lengths of its forecast, and counts with the share of them
that meet. Times are seconds from now. Everything here is compiled, allocates nothing and reads no clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

MAX_STEPS = 640
"""Passes a rollout looks ahead; what ends later is extrapolated from the pace of the last one."""

NEVER = 1 << 30
QUANTILES = 3
WAVES = np.array([0, 1, 2, 4, 7, 11, 16, 24, 36, 52], dtype=np.int64)
"""Admission steps the search tries: near ones finely, far ones coarsely."""

EPSILON = 1e-9

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_jit: Callable[[Callable[..., Any]], Callable[..., Any]] = njit(nogil=True, cache=True)


class Pace(NamedTuple):
    """The step model, and what else is expected of the coming passes."""

    c0: float
    p1: float
    p2: float
    d1: float
    d2: float
    background: float  # stall by requests still to come, as a multiple of each pass's decode time


class Base(NamedTuple):
    """What the running requests do in each coming pass; length MAX_STEPS + 2."""

    decoding: Floats  # sequences
    context: Floats  # tokens in the KV cache of those
    prefill: Floats  # seconds of prompts submitted but not prefilled


class Stakes(NamedTuple):
    """One entry for each running request and length quantile whose SLO is still at stake."""

    end: Ints  # the pass after which it ends
    deadline: Floats
    weight: Floats


class Candidates(NamedTuple):
    """Waiting requests the search decides on, one entry each."""

    row: Ints  # of the snapshot's waiting rows
    stall: Floats  # prefill, s
    prompt: Floats  # tokens
    output: Ints  # predicted tokens
    outputs: Ints  # the same by quantile, shape (n, QUANTILES)
    ttft_at: Floats  # latest first token
    e2e_at: Floats  # latest last token
    tpot: Floats
    worth: Floats  # of meeting its SLO
    price: Floats  # of the engine time it takes


class Scratch(NamedTuple):
    """Work arrays of the rollout; length MAX_STEPS + 2."""

    joining: Floats
    context: Floats
    prefill: Floats
    times: Floats


def make_base() -> Base:
    return Base(*(np.zeros(MAX_STEPS + 2) for _ in Base._fields))


def make_scratch() -> Scratch:
    return Scratch(*(np.zeros(MAX_STEPS + 2) for _ in Scratch._fields))


def make_stakes(capacity: int) -> Stakes:
    return Stakes(np.zeros(capacity, dtype=np.int64), np.zeros(capacity), np.zeros(capacity))


def make_candidates(capacity: int) -> Candidates:
    ints, floats = np.zeros(capacity, dtype=np.int64), np.zeros(capacity)
    return Candidates(
        row=ints.copy(),
        stall=floats.copy(),
        prompt=floats.copy(),
        output=ints.copy(),
        outputs=np.zeros((capacity, QUANTILES), dtype=np.int64),
        ttft_at=floats.copy(),
        e2e_at=floats.copy(),
        tpot=floats.copy(),
        worth=floats.copy(),
        price=floats.copy(),
    )


@_jit
def next_random(state: Any) -> Any:
    """xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift generators", 2016): a draw in [0, 1).

    `state` is one uint64, never 0, updated in place.
    """
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return ((x * np.uint64(2685821657736338717)) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@_jit
def look_at_running(rows: Any, now_s: Any, pace: Any, spread: Any, worths: Any, base: Any, stakes: Any) -> Any:
    """Fills `base` and `stakes` from the running rows; (entries in stakes, passes worth rolling out).

    spread: multiples of the relative length error, one a quantile. worths: of a request met, by tier.
    A request that has lost already (its first token was late) or carries no objective is not at stake.
    """
    decoding, context, prefill = base
    decoding[:] = 0.0
    context[:] = 0.0
    prefill[:] = 0.0
    pending = 0.0
    for i in range(rows.shape[0]):
        if rows[i]["generated_tokens"] <= 0:
            prompt = rows[i]["prompt_tokens"]
            pending += pace.p1 * prompt + pace.p2 * prompt * prompt
    prefill[0] = pending
    first_pending = pending + pace.c0 + pace.d1 * rows.shape[0]
    count = 0
    steps = 64
    for i in range(rows.shape[0]):
        row = rows[i]
        generated = row["generated_tokens"]
        started = generated > 0
        known = generated if started else 0.0
        join = 0 if started else 1
        in_cache = row["prompt_tokens"] + max(known - 1.0, 0.0)
        middle = int(min(max(row["output_tokens"] - known, 1.0), MAX_STEPS))
        decoding[join] += 1.0
        decoding[middle] -= 1.0
        context[join] += in_cache
        context[middle] -= in_cache + (middle - join)
        first = row["first_token_at_s"] - now_s if started else first_pending
        arrival = row["arrival_at_s"] - now_s
        ttft, tpot, e2e = row["ttft_s"], row["tpot_s"], row["e2e_s"]
        if first - arrival > ttft or (ttft == np.inf and tpot == np.inf and e2e == np.inf):
            continue
        for q in range(QUANTILES):
            total = max(np.rint(row["output_tokens"] * math.exp(spread[q] * row["length_sigma"])), known + 1.0)
            deadline = arrival + e2e
            if total > 1:
                deadline = min(deadline, first + tpot * (total - 1.0))
            stakes.end[count] = int(total - known)
            stakes.deadline[count] = deadline
            stakes.weight[count] = worths[row["tier"]] / QUANTILES
            steps = max(steps, stakes.end[count])
            count += 1
    # running sums: sequences decoding, and their contexts, which grow by one token a pass each
    here = 0.0
    tokens = 0.0
    for k in range(MAX_STEPS + 2):
        tokens += here + context[k]
        here += decoding[k]
        decoding[k] = here
        context[k] = tokens
    return count, min(steps, MAX_STEPS)


@_jit
def look_at_waiting(
    rows: Any, order: Any, now_s: Any, pace: Any, spread: Any, worths: Any, price_s: Any, reference_batch: Any,
    base: Any, candidates: Any, hopeful: Any,
) -> Any:  # fmt: skip
    """Fills `candidates` with the rows, in `order`, that can still meet their SLO; returns how many.

    A row can still meet if it would, sent now, at the short end of its length forecast and at the present pace.
    hopeful[i] tells this of row i, also where `candidates` is full. price_s: of a second of engine time.
    """
    pending = base.prefill[0]
    step = pace.c0 + pace.d1 * (base.decoding[0] + 1.0) + pace.d2 * base.context[0]
    count = 0
    for k in range(order.shape[0]):
        i = order[k]
        row = rows[i]
        ttft, tpot, e2e = row["ttft_s"], row["tpot_s"], row["e2e_s"]
        hopeful[i] = False
        if (ttft == np.inf and tpot == np.inf and e2e == np.inf) or tpot < step:
            continue
        prompt, output = row["prompt_tokens"], max(row["output_tokens"], 1.0)
        stall = pace.p1 * prompt + pace.p2 * prompt * prompt
        arrival = row["arrival_at_s"] - now_s
        first = pending + stall + step
        short = max(np.rint(output * math.exp(spread[0] * row["length_sigma"])), 1.0)
        if first > arrival + ttft or first + (short - 1.0) * step > arrival + e2e:
            continue
        hopeful[i] = True
        if count == candidates.row.shape[0]:
            continue
        candidates.row[count] = i
        candidates.stall[count] = stall
        candidates.prompt[count] = prompt
        candidates.output[count] = int(np.rint(output))
        for q in range(QUANTILES):
            candidates.outputs[count, q] = int(max(np.rint(output * math.exp(spread[q] * row["length_sigma"])), 1.0))
        candidates.ttft_at[count] = arrival + ttft
        candidates.e2e_at[count] = arrival + e2e
        candidates.tpot[count] = tpot
        candidates.worth[count] = worths[row["tier"]]
        engine_s = stall + output * (pace.d1 + pace.d2 * (prompt + 0.5 * output) + pace.c0 / reference_batch)
        candidates.price[count] = price_s * engine_s
        count += 1
    return count


@_jit
def rollout(admit: Any, n: Any, pace: Any, base: Any, steps: Any, stakes: Any, at_stake: Any, candidates: Any,
            scratch: Any) -> Any:  # fmt: skip
    """Worth of the requests expected to meet, less the price of the work admitted, under admission steps `admit`."""
    joining, context, prefill, times = scratch
    for k in range(steps + 1):
        joining[k] = 0.0
        context[k] = 0.0
        prefill[k] = base.prefill[k]
    score = 0.0
    for j in range(n):
        at = admit[j]
        if at >= steps:
            continue
        prefill[at] += candidates.stall[j]
        score -= candidates.price[j]
        output = candidates.output[j]
        if output > 1:
            joining[at + 1] += 1.0
            context[at + 1] += candidates.prompt[j]
            end = at + output
            if end <= steps:
                joining[end] -= 1.0
                context[end] -= candidates.prompt[j] + (output - 1)
    time = 0.0
    sequences = 0.0
    tokens = 0.0
    times[0] = 0.0
    last = 0.0
    for k in range(steps):
        tokens += sequences + context[k]
        sequences += joining[k]
        decode = pace.c0 + pace.d1 * (base.decoding[k] + sequences) + pace.d2 * (base.context[k] + tokens)
        last = decode + max(prefill[k], pace.background * decode)
        time += last
        times[k + 1] = time
    for i in range(at_stake):
        end = stakes.end[i]
        at_s = times[end] if end <= steps else time + (end - steps) * last
        if at_s <= stakes.deadline[i]:
            score += stakes.weight[i]
    for j in range(n):
        at = admit[j]
        if at >= steps:
            continue
        first = times[at + 1]
        if first > candidates.ttft_at[j]:
            continue
        met = 0
        for q in range(QUANTILES):
            output = candidates.outputs[j, q]
            end = at + output
            at_s = times[end] if end <= steps else time + (end - steps) * last
            # a single token meets any TPOT; without the test, no objective (inf) times 0 would be nan
            paced = output < 2 or at_s - first <= candidates.tpot[j] * (output - 1)
            if at_s <= candidates.e2e_at[j] and paced:
                met += 1
        score += candidates.worth[j] * met / QUANTILES
    return score


@_jit
def insert_greedily(
    admit: Any, order: Any, n: Any, evaluations: Any, pace: Any, base: Any, steps: Any, stakes: Any, at_stake: Any,
    candidates: Any, scratch: Any,
) -> Any:  # fmt: skip
    """Builds a plan: one candidate after the other, in `order`, at the wave that scores best, or never.

    Returns (score, evaluations spent); stops inserting when `evaluations` are spent.
    """
    for j in range(n):
        admit[j] = NEVER
    current = rollout(admit, n, pace, base, steps, stakes, at_stake, candidates, scratch)
    spent = 1
    for i in range(n):
        if spent >= evaluations:
            break
        j = order[i]
        choice = NEVER
        value = current
        most = current + candidates.worth[j] - candidates.price[j] - EPSILON
        for s in range(WAVES.shape[0]):
            admit[j] = WAVES[s]
            score = rollout(admit, n, pace, base, steps, stakes, at_stake, candidates, scratch)
            spent += 1
            if score > value + EPSILON:
                value = score
                choice = WAVES[s]
                if score >= most:
                    break
        admit[j] = choice
        current = value
    return current, spent


@_jit
def anneal(
    admit: Any, best: Any, n: Any, score: Any, best_score: Any, hot: Any, cold: Any, evaluations: Any, state: Any,
    pace: Any, base: Any, steps: Any, stakes: Any, at_stake: Any, candidates: Any, scratch: Any,
) -> Any:  # fmt: skip
    """`evaluations` moves from `admit` (whose score is `score`), the temperature falling from `hot` to `cold`.

    Moves: one candidate to now, to another wave or to never; two candidates change places. A worse plan is accepted
    with exp(difference / temperature). Leaves the best plan seen in `best`; returns (score, best score).
    """
    cooling = (cold / hot) ** (1.0 / max(1, evaluations))
    temperature = hot
    for _ in range(evaluations):
        j = int(next_random(state) * n)
        old = admit[j]
        other = -1
        kind = next_random(state)
        if kind < 0.35 and old != 0:
            admit[j] = 0
        elif kind < 0.5 and old < NEVER:
            admit[j] = NEVER
        elif kind < 0.75:
            admit[j] = WAVES[int(next_random(state) * WAVES.shape[0])]
        else:
            other = int(next_random(state) * n)
            admit[j] = admit[other]
            admit[other] = old
        value = rollout(admit, n, pace, base, steps, stakes, at_stake, candidates, scratch)
        if value >= score or next_random(state) < math.exp((value - score) / temperature):
            score = value
            if score > best_score + EPSILON:
                best_score = score
                for k in range(n):
                    best[k] = admit[k]
        elif other >= 0:
            admit[other] = admit[j]
            admit[j] = old
        else:
            admit[j] = old
        temperature *= cooling
    return score, best_score


@_jit
def admit_leftovers(
    rows: Any, order: Any, most: Any, now_s: Any, loss: Any, patience_s: Any, price_s: Any, reference_batch: Any,
    admit: Any, n: Any, pace: Any, base: Any, steps: Any, stakes: Any, at_stake: Any, candidates: Any, scratch: Any,
) -> Any:  # fmt: skip
    """How many of the rows in `order` may be sent now on top of the plan for at most `loss` each.

    These are requests with nothing to gain: without an objective, or with one that is lost. The loss is what the
    plan's score falls by, and the price of their engine time, which fades to nothing over a wait of `patience_s`.
    Changes `base`.
    """
    score = rollout(admit, n, pace, base, steps, stakes, at_stake, candidates, scratch)
    taken = 0
    for k in range(min(most, order.shape[0])):
        row = rows[order[k]]
        prompt, output = row["prompt_tokens"], max(row["output_tokens"], 1.0)
        stall = pace.p1 * prompt + pace.p2 * prompt * prompt
        engine_s = stall + output * (pace.d1 + pace.d2 * (prompt + 0.5 * output) + pace.c0 / reference_batch)
        base.prefill[0] += stall
        end = int(min(output, MAX_STEPS))
        for s in range(1, end + 1):
            base.decoding[s] += 1.0
            base.context[s] += prompt + (s - 1)
        value = rollout(admit, n, pace, base, steps, stakes, at_stake, candidates, scratch)
        charged = max(0.0, 1.0 - (now_s - row["arrival_at_s"]) / patience_s)
        if score - value > loss or price_s * engine_s * charged > loss:
            break
        score = value
        taken += 1
    return taken
