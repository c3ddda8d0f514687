"""Slow plain twins of the online annealing kernels: the same answers under the same draws, written to be read.

Nothing here is shared with the kernels but the constants and the meaning of the arrays.
"""

from __future__ import annotations

import math

import numpy as np

from lmdeploy_slo.scheduling.annealing_kernel import EPSILON, MAX_STEPS, NEVER, QUANTILES, WAVES

MASK = (1 << 64) - 1


class PlainRandom:
    """xorshift64* on Python integers."""

    def __init__(self, state: int) -> None:
        self.state = state

    def __call__(self) -> float:
        x = self.state
        x ^= x >> 12
        x ^= (x << 25) & MASK
        x ^= x >> 27
        self.state = x
        return (((x * 2685821657736338717) & MASK) >> 11) / 9007199254740992.0


def has_objective(row) -> bool:
    return math.isfinite(row["ttft_s"]) or math.isfinite(row["tpot_s"]) or math.isfinite(row["e2e_s"])


def stall_s(row, pace) -> float:
    return pace.p1 * row["prompt_tokens"] + pace.p2 * row["prompt_tokens"] ** 2


def lengths(row, spread, least: float) -> list[float]:
    return [max(float(np.rint(row["output_tokens"] * math.exp(z * row["length_sigma"]))), least) for z in spread]


def running_base(rows, pace):
    """(sequences decoding, their contexts, prefill seconds) per coming pass, one pass at a time."""
    decoding, context = np.zeros(MAX_STEPS + 2), np.zeros(MAX_STEPS + 2)
    prefill = np.zeros(MAX_STEPS + 2)
    for row in rows:
        started = row["generated_tokens"] > 0
        known = row["generated_tokens"] if started else 0.0
        join = 0 if started else 1
        if not started:
            prefill[0] += stall_s(row, pace)
        in_cache = row["prompt_tokens"] + max(known - 1.0, 0.0)
        for k in range(join, int(min(max(row["output_tokens"] - known, 1.0), MAX_STEPS))):
            decoding[k] += 1
            context[k] += in_cache + (k - join)
    return decoding, context, prefill


def running_stakes(rows, now_s, pace, spread, worths):
    """[(pass after which it ends, deadline, weight)] of every running request and quantile still at stake."""
    pending = sum(stall_s(row, pace) for row in rows if row["generated_tokens"] <= 0)
    first_pending = pending + pace.c0 + pace.d1 * len(rows)
    stakes = []
    for row in rows:
        started = row["generated_tokens"] > 0
        known = row["generated_tokens"] if started else 0.0
        arrival = row["arrival_at_s"] - now_s
        first = row["first_token_at_s"] - now_s if started else first_pending
        if not has_objective(row) or first - arrival > row["ttft_s"]:
            continue
        for total in lengths(row, spread, known + 1.0):
            by_tpot = first + row["tpot_s"] * (total - 1.0) if total > 1 else math.inf
            stakes.append((int(total - known), min(arrival + row["e2e_s"], by_tpot), worths[row["tier"]] / QUANTILES))
    return stakes


def hopeful_rows(rows, now_s, pace, spread, base) -> list[bool]:
    """Which waiting rows would still meet if sent now, at the short end of their forecast."""
    decoding, context, prefill = base
    step = pace.c0 + pace.d1 * (decoding[0] + 1.0) + pace.d2 * context[0]
    verdicts = []
    for row in rows:
        arrival = row["arrival_at_s"] - now_s
        first = prefill[0] + stall_s(row, pace) + step
        short = max(float(np.rint(max(row["output_tokens"], 1.0) * math.exp(spread[0] * row["length_sigma"]))), 1.0)
        verdicts.append(
            has_objective(row)
            and row["tpot_s"] >= step
            and first <= arrival + row["ttft_s"]
            and first + (short - 1.0) * step <= arrival + row["e2e_s"]
        )
    return verdicts


def plain_rollout(admit, n, pace, base, steps, stakes, candidates) -> float:
    """Runs the passes one by one with every candidate kept apart."""
    decoding, context, prefill = base
    ends_at = [0.0]
    last = 0.0
    for k in range(steps):
        sequences, tokens, stall = decoding[k], context[k], prefill[k]
        for j in range(n):
            if admit[j] == k:
                stall += candidates.stall[j]
            if admit[j] < k < admit[j] + candidates.output[j]:
                sequences += 1
                tokens += candidates.prompt[j] + (k - admit[j] - 1)
        decode = pace.c0 + pace.d1 * sequences + pace.d2 * tokens
        last = decode + max(stall, pace.background * decode)
        ends_at.append(ends_at[-1] + last)

    def after(passes: int) -> float:
        return ends_at[passes] if passes <= steps else ends_at[steps] + (passes - steps) * last

    score = sum(weight for end, deadline, weight in stakes if after(end) <= deadline)
    for j in range(n):
        if admit[j] >= steps:
            continue
        score -= candidates.price[j]
        first = after(admit[j] + 1)
        if first > candidates.ttft_at[j]:
            continue
        for output in candidates.outputs[j]:
            at = after(admit[j] + int(output))
            paced = output < 2 or at - first <= candidates.tpot[j] * (output - 1)
            if at <= candidates.e2e_at[j] and paced:
                score += candidates.worth[j] / QUANTILES
    return score


def plain_greedy(order, n, evaluations, score_of):
    """insert_greedily with a scoring function: (admission steps, score, evaluations spent)."""
    admit = [NEVER] * n
    current, spent = score_of(admit), 1
    candidates = score_of.candidates
    for j in order:
        if spent >= evaluations:
            break
        choice, value = NEVER, current
        for wave in WAVES.tolist():
            score = score_of([*admit[:j], wave, *admit[j + 1 :]])
            spent += 1
            if score > value + EPSILON:
                choice, value = wave, score
                if score >= current + candidates.worth[j] - candidates.price[j] - EPSILON:
                    break
        admit[j], current = choice, value
    return admit, current, spent


def plain_anneal(admit, hot, cold, evaluations, random, score_of):
    """anneal with a scoring function: (best admission steps, last score, best score)."""
    n = len(admit)
    score = best_score = score_of(admit)
    best = list(admit)
    temperature = hot
    for _ in range(evaluations):
        trial = list(admit)
        j = int(random() * n)
        kind = random()
        if kind < 0.35 and trial[j] != 0:
            trial[j] = 0
        elif kind < 0.5 and trial[j] < NEVER:
            trial[j] = NEVER
        elif kind < 0.75:
            trial[j] = int(WAVES[int(random() * len(WAVES))])
        else:
            other = int(random() * n)
            trial[j], trial[other] = trial[other], trial[j]
        value = score_of(trial)
        if value >= score or random() < math.exp((value - score) / temperature):
            admit, score = trial, value
            if score > best_score + EPSILON:
                best, best_score = list(admit), score
        temperature *= (cold / hot) ** (1.0 / max(1, evaluations))
    return best, score, best_score
