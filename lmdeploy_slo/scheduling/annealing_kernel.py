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
from typing import Any

import numpy as np
from numba import njit

from lmdeploy_slo.scheduling.annealing_arrays import (
    COARSE,
    EPSILON,
    FINE,
    GREEDY_WAVES,
    MAX_STEPS,
    NEVER,
    QUANTILES,
    SPANS,
    WAVES,
)

_jit: Callable[[Callable[..., Any]], Callable[..., Any]] = njit(nogil=True, cache=True)


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
def span_of(step: Any) -> Any:
    """The span in which pass `step` lies."""
    if step <= FINE:
        return step
    return FINE + (step - FINE) // COARSE


@_jit
def start_of(span: Any) -> Any:
    """The first pass of a span."""
    if span <= FINE:
        return span
    return FINE + (span - FINE) * COARSE


@_jit
def at_step(times: Any, spans: Any, step: Any) -> Any:
    """The instant pass `step` begins, between the instants of spans; `times[spans + 1]` extrapolates."""
    if step <= FINE:
        return times[step]
    span = min(FINE + (step - FINE) // COARSE, spans)
    part = (step - start_of(span)) / COARSE
    return times[span] + part * (times[span + 1] - times[span])


@_jit
def stall_of(row: Any, pace: Any) -> Any:
    """Prefill of a row's prompt, s; the part in the prefix cache is only attended to."""
    prompt = row["prompt_tokens"]
    return pace.p1 * prompt + pace.p2 * prompt * (prompt + 2.0 * row["cached_tokens"])


@_jit
def engine_time_of(row: Any, pace: Any, reference_batch: Any) -> Any:
    """As `rules.engine_time_s`, with the exact prefill."""
    output = max(row["output_tokens"], 1.0)
    context = row["prompt_tokens"] + row["cached_tokens"] + 0.5 * output
    return stall_of(row, pace) + output * (pace.d1 + pace.d2 * context + pace.c0 / reference_batch)


@_jit
def look_at_running(rows: Any, worth: Any, now_s: Any, pace: Any, spread: Any, base: Any, stakes: Any) -> Any:
    """Fills `base` and `stakes` from the running rows; (entries in stakes, spans worth rolling out).

    worth: of each row's SLO being met. spread: multiples of the relative length error, one a quantile.
    A request that has lost already (its first token was late) or carries no objective is not at stake.
    """
    decode, prefill, joining, context = base
    decode[:] = 0.0
    prefill[:] = 0.0
    joining[:] = 0.0
    context[:] = 0.0
    pending = 0.0
    for i in range(rows.shape[0]):
        if rows[i]["generated_tokens"] <= 0:
            pending += stall_of(rows[i], pace)
    prefill[0] = pending
    first_pending = pending + pace.c0 + pace.d1 * rows.shape[0]
    count = 0
    steps = FINE
    for i in range(rows.shape[0]):
        row = rows[i]
        generated = row["generated_tokens"]
        started = generated > 0
        known = generated if started else 0.0
        join = 0 if started else 1
        in_cache = row["prompt_tokens"] + row["cached_tokens"] + max(known - 1.0, 0.0)
        add_sequence(join, int(min(max(row["output_tokens"] - known, 1.0), MAX_STEPS)), in_cache, joining, context)
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
            stakes.weight[count] = worth[i] / QUANTILES
            steps = max(steps, stakes.end[count])
            count += 1
    sequences = 0.0
    tokens = 0.0
    for k in range(SPANS + 1):
        width = 1.0 if k < FINE else 1.0 * COARSE
        tokens += context[k]
        sequences += joining[k]
        joining[k] = sequences
        context[k] = tokens
        decode[k] = width * (pace.c0 + pace.d1 * sequences + pace.d2 * (tokens + sequences * (width - 1.0) * 0.5))
        tokens += sequences * width
    return count, span_of(min(steps, MAX_STEPS) + COARSE - 1 if steps > FINE else FINE)


@_jit
def add_sequence(join: Any, end: Any, in_cache: Any, joining: Any, context: Any) -> Any:
    """One that decodes in the passes from `join` (a single one) to before `end`, as differences from span to span; an
    end within a group is moved to the nearer edge of it."""
    last = span_of(end) if end <= FINE else FINE + (end - FINE + COARSE // 2) // COARSE
    joining[join] += 1.0
    context[join] += in_cache
    joining[last] -= 1.0
    context[last] -= in_cache + (start_of(last) - join)


@_jit
def look_at_waiting(rows: Any, now_s: Any, pace: Any, spread: Any, reference_batch: Any, base: Any, engine_s: Any,
                    hopeful: Any) -> Any:  # fmt: skip
    """For each row: its engine time, and whether it can still meet its SLO; returns how many can.

    A row can still meet if it would, sent now, at the short end of its length forecast and at the present pace.
    """
    pending = base.prefill[0]
    step = pace.c0 + pace.d1 * (base.sequences[0] + 1.0) + pace.d2 * base.context[0]
    count = 0
    for i in range(rows.shape[0]):
        row = rows[i]
        ttft, tpot, e2e = row["ttft_s"], row["tpot_s"], row["e2e_s"]
        engine_s[i] = engine_time_of(row, pace, reference_batch)
        hopeful[i] = False
        if (ttft == np.inf and tpot == np.inf and e2e == np.inf) or tpot < step:
            continue
        arrival = row["arrival_at_s"] - now_s
        first = pending + stall_of(row, pace) + step
        if first > arrival + min(ttft, e2e):
            continue
        if e2e < np.inf:
            output = max(row["output_tokens"], 1.0)
            short = max(np.rint(output * math.exp(spread[0] * row["length_sigma"])), 1.0)
            if first + (short - 1.0) * step > arrival + e2e:
                continue
        hopeful[i] = True
        count += 1
    return count


@_jit
def take_candidates(rows: Any, chosen: Any, worth: Any, now_s: Any, pace: Any, spread: Any, price_s: Any,
                    engine_s: Any, candidates: Any) -> Any:  # fmt: skip
    """Fills `candidates` with the rows numbered `chosen`. worth: of each one's SLO being met; price_s: of a second of
    engine time, in the same unit."""
    for k in range(chosen.shape[0]):
        i = chosen[k]
        row = rows[i]
        output = max(row["output_tokens"], 1.0)
        arrival = row["arrival_at_s"] - now_s
        candidates.row[k] = i
        candidates.stall[k] = stall_of(row, pace)
        candidates.prompt[k] = row["prompt_tokens"] + row["cached_tokens"]
        candidates.output[k] = int(np.rint(output))
        for q in range(QUANTILES):
            candidates.outputs[k, q] = int(max(np.rint(output * math.exp(spread[q] * row["length_sigma"])), 1.0))
        candidates.ttft_at[k] = arrival + row["ttft_s"]
        candidates.e2e_at[k] = arrival + row["e2e_s"]
        candidates.tpot[k] = row["tpot_s"]
        candidates.worth[k] = worth[k]
        candidates.price[k] = price_s * engine_s[i]


@_jit
def chance(end: Any, quiet_end: Any, deadline: Any) -> Any:
    """Of meeting a deadline, in [0, 1], where the stall to come is anything between none (the end is `quiet_end`) and
    all that is expected (`end`), each as likely."""
    if end <= deadline:
        return 1.0
    return max(0.0, (deadline - quiet_end) / (end - quiet_end)) if end > quiet_end else 0.0


@_jit
def rollout(admit: Any, n: Any, pace: Any, base: Any, spans: Any, stakes: Any, at_stake: Any, candidates: Any,
            scratch: Any) -> Any:  # fmt: skip
    """Worth of the requests expected to meet, less the price of the work admitted, under admission steps `admit`."""
    joining, context, prefill, times, quiet = scratch
    for k in range(spans + 1):
        joining[k] = 0.0
        context[k] = 0.0
    for k in range(FINE):
        prefill[k] = base.prefill[k]
    score = 0.0
    for j in range(n):
        at = admit[j]
        if at >= FINE:
            continue
        prefill[at] += candidates.stall[j]
        score -= candidates.price[j]
        output = candidates.output[j]
        if output > 1:
            add_sequence(at + 1, min(at + output, MAX_STEPS), candidates.prompt[j], joining, context)
    time = 0.0
    sequences = 0.0
    tokens = 0.0
    times[0] = 0.0
    quiet_time = 0.0
    quiet[0] = 0.0
    for k in range(FINE):
        tokens += sequences + context[k]
        sequences += joining[k]
        decode = base.decode[k] + pace.d1 * sequences + pace.d2 * tokens
        time += decode + max(prefill[k], pace.background * decode)
        times[k + 1] = time
        quiet_time += decode + prefill[k]
        quiet[k + 1] = quiet_time
    tokens += sequences
    slower = 1.0 + pace.background
    last = 0.0
    for k in range(FINE, spans + 1):
        tokens += context[k]
        sequences += joining[k]
        last = base.decode[k] + COARSE * (pace.d1 * sequences + pace.d2 * (tokens + sequences * (COARSE - 1) * 0.5))
        time += last * slower
        times[k + 1] = time
        quiet_time += last
        quiet[k + 1] = quiet_time
        tokens += sequences * COARSE
    for i in range(at_stake):
        end = stakes.end[i]
        score += stakes.weight[i] * chance(at_step(times, spans, end), at_step(quiet, spans, end), stakes.deadline[i])
    for j in range(n):
        at = admit[j]
        if at >= FINE:
            continue
        first, quiet_first = times[at + 1], quiet[at + 1]
        in_time = chance(first, quiet_first, candidates.ttft_at[j])
        if in_time <= 0.0:
            continue
        met = 0.0
        for q in range(QUANTILES):
            output = candidates.outputs[j, q]
            end, quiet_end = at_step(times, spans, at + output), at_step(quiet, spans, at + output)
            part = min(in_time, chance(end, quiet_end, candidates.e2e_at[j]))
            if output > 1:  # a single token meets any TPOT; without the test, no objective (inf) times 0 would be nan
                part = min(part, chance(end - first, quiet_end - quiet_first, candidates.tpot[j] * (output - 1)))
            met += part
        score += candidates.worth[j] * met / QUANTILES
    return score


@_jit
def insert_greedily(
    admit: Any, order: Any, n: Any, current: Any, evaluations: Any, pace: Any, base: Any, spans: Any, stakes: Any,
    at_stake: Any, candidates: Any, scratch: Any,
) -> Any:  # fmt: skip
    """Takes the candidates in `order`, all NEVER in `admit`, into the plan one after the other: each at the wave that
    scores best, or never. current: the score of `admit`.

    Returns (score, evaluations spent); stops inserting when `evaluations` are spent.
    """
    spent = 0
    for i in range(order.shape[0]):
        if spent >= evaluations:
            break
        j = order[i]
        choice = NEVER
        value = current
        most = current + candidates.worth[j] - candidates.price[j] - EPSILON
        for s in range(GREEDY_WAVES.shape[0]):
            admit[j] = GREEDY_WAVES[s]
            score = rollout(admit, n, pace, base, spans, stakes, at_stake, candidates, scratch)
            spent += 1
            if score > value + EPSILON:
                value = score
                choice = GREEDY_WAVES[s]
                if score >= most:
                    break
        admit[j] = choice
        current = value
    return current, spent


@_jit
def anneal(
    admit: Any, best: Any, n: Any, score: Any, best_score: Any, hot: Any, cold: Any, evaluations: Any, state: Any,
    pace: Any, base: Any, spans: Any, stakes: Any, at_stake: Any, candidates: Any, scratch: Any,
) -> Any:  # fmt: skip
    """`evaluations` moves from `admit` (whose score is `score`), the temperature falling from `hot` to `cold`.

    Moves: one candidate to now, to another wave or to never; two of different steps change places. A worse plan is
    accepted with exp(difference / temperature). Leaves the best plan seen in `best`; returns (score, best score).
    """
    cooling = (cold / hot) ** (1.0 / max(1, evaluations))
    temperature = hot
    for _ in range(evaluations):
        j = int(next_random(state) * n)
        old = admit[j]
        other = -1
        kind = next_random(state)
        if kind < 0.15 and old != 0:
            admit[j] = 0
        elif kind < 0.3 and old < NEVER:
            admit[j] = NEVER
        elif kind < 0.75:
            wave = int(next_random(state) * WAVES.shape[0])
            admit[j] = WAVES[wave] if WAVES[wave] != old else NEVER
        else:
            other = int(next_random(state) * n)
            for _ in range(n):
                if admit[other] != old:
                    break
                other = (other + 1) % n
            admit[j] = admit[other]
            admit[other] = old
        value = rollout(admit, n, pace, base, spans, stakes, at_stake, candidates, scratch)
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
    rows: Any, order: Any, now_s: Any, patience_s: Any, overdue_s: Any, queue_s: Any, loss: Any, reserve_s: Any,
    granted: Any, price_s: Any, coming: Any, slack_s: Any, engine_s: Any, admit: Any, n: Any, pace: Any, base: Any,
    spans: Any, stakes: Any, at_stake: Any, candidates: Any, scratch: Any,
) -> Any:  # fmt: skip
    """How many of the rows in `order` may be sent now on top of the plan; (count, what is left of `granted`).

    These are requests with nothing to gain: without an objective, or with one that is lost. One may cost the plan at
    most `loss` (what its score falls by with `reserve_s` of stall to come, requests that come too late behind its
    prefill, and the price of its engine time); all three but what is at stake now fade to nothing over a wait of
    `patience_s`. Too late: of `coming` requests a second those that arrive while more than `slack_s` of prefill is due,
    for what the engine has begun it finishes first. Who has waited `overdue_s` may cost what runs and the plan as much
    as `granted`, which is used up then. Nobody is sent behind more than `queue_s` of submitted prefill:
    there is another plan before the engine could begin with it. Changes `base`.
    """
    taken = 0
    reserve = 0.0
    for k in range(order.shape[0]):
        row = rows[order[k]]
        if base.prefill[0] - reserve > queue_s:
            break
        charged = max(0.0, 1.0 - (now_s - row["arrival_at_s"]) / patience_s)
        base.prefill[0] += reserve_s * charged - reserve
        reserve = reserve_s * charged
        score = rollout(admit, n, pace, base, spans, stakes, at_stake, candidates, scratch)
        stall = stall_of(row, pace)
        base.prefill[0] += stall
        held = row["prompt_tokens"] + row["cached_tokens"]
        end = span_of(int(min(row["output_tokens"], MAX_STEPS)))
        for s in range(1, end):
            width = 1 if s < FINE else COARSE
            base.decode[s] += width * (pace.d1 + pace.d2 * (held + (start_of(s) - 1) + (width - 1) * 0.5))
        value = rollout(admit, n, pace, base, spans, stakes, at_stake, candidates, scratch)
        due = base.prefill[0] - reserve - slack_s
        late = coming * charged * (max(0.0, due) - max(0.0, due - stall))
        if score - value + late > loss or price_s * engine_s[order[k]] * charged > loss:
            if now_s - row["arrival_at_s"] < overdue_s or score - value > granted:
                break
            granted -= max(0.0, score - value)
        taken += 1
    return taken, granted
