"""Slow plain twins of the online annealing kernels: the same answers under the same draws, written to be read.

Nothing here is shared with the kernels but the constants and the meaning of the arrays.
"""

from __future__ import annotations

import math

import numpy as np

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
    prompt = row["prompt_tokens"]
    return pace.p1 * prompt + pace.p2 * prompt * (prompt + 2 * row["cached_tokens"])


def engine_time_s(row, pace, batch) -> float:
    output = max(row["output_tokens"], 1.0)
    context = row["prompt_tokens"] + row["cached_tokens"] + output / 2
    return stall_s(row, pace) + output * (pace.d1 + pace.d2 * context + pace.c0 / batch)


STARTS = [*range(FINE), *range(FINE, MAX_STEPS + COARSE, COARSE)]
"""The first pass of each span."""


def moved_to_an_edge(end: int) -> int:
    """Where a sequence that ends before pass `end` is taken to end: the nearest first pass of a span."""
    return min(STARTS, key=lambda start: (abs(start - end), -start))


def instant(ends_at, step: int) -> float:
    """When pass `step` begins, in a straight line between the instants of spans and beyond the last."""
    spans = len(ends_at) - 2
    span = min(max(i for i, start in enumerate(STARTS) if start <= step), spans)
    if step == STARTS[span]:
        return ends_at[span]
    return ends_at[span] + (step - STARTS[span]) / COARSE * (ends_at[span + 1] - ends_at[span])


def lengths(row, spread, least: float) -> list[float]:
    return [max(float(np.rint(row["output_tokens"] * math.exp(z * row["length_sigma"]))), least) for z in spread]


def running_base(rows, pace):
    """(seconds of decoding, prefill seconds, sequences decoding, their contexts) by span, pass by pass in it."""
    decode, prefill = np.zeros(SPANS + 2), np.zeros(SPANS + 2)
    sequences, context = np.zeros(SPANS + 2), np.zeros(SPANS + 2)
    for row in rows:
        if row["generated_tokens"] <= 0:
            prefill[0] += stall_s(row, pace)
    for span, start in enumerate(STARTS):
        for step in range(start, start + (1 if span < FINE else COARSE)):
            decode[span] += pace.c0
            for row in rows:
                started = row["generated_tokens"] > 0
                known = row["generated_tokens"] if started else 0.0
                join = 0 if started else 1
                end = moved_to_an_edge(int(min(max(row["output_tokens"] - known, 1.0), MAX_STEPS)))
                tokens = row["prompt_tokens"] + row["cached_tokens"] + max(known - 1.0, 0.0) + (step - join)
                if join <= start < end:
                    decode[span] += pace.d1 + pace.d2 * tokens
                    sequences[span] += step == start
                    context[span] += tokens * (step == start)
    return decode, prefill, sequences, context


def running_stakes(rows, worth, now_s, pace, spread):
    """[(pass after which it ends, deadline, weight)] of every running request and quantile still at stake."""
    pending = sum(stall_s(row, pace) for row in rows if row["generated_tokens"] <= 0)
    first_pending = pending + pace.c0 + pace.d1 * len(rows)
    stakes = []
    for row, weight in zip(rows, worth, strict=True):
        started = row["generated_tokens"] > 0
        known = row["generated_tokens"] if started else 0.0
        arrival = row["arrival_at_s"] - now_s
        first = row["first_token_at_s"] - now_s if started else first_pending
        if not has_objective(row) or first - arrival > row["ttft_s"]:
            continue
        for total in lengths(row, spread, known + 1.0):
            by_tpot = first + row["tpot_s"] * (total - 1.0) if total > 1 else math.inf
            stakes.append((int(total - known), min(arrival + row["e2e_s"], by_tpot), weight / QUANTILES))
    return stakes


def hopeful_rows(rows, now_s, pace, spread, base) -> list[bool]:
    """Which waiting rows would still meet if sent now, at the short end of their forecast."""
    _, prefill, decoding, context = base
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


def plain_rollout(admit, n, pace, base, spans, stakes, candidates) -> float:
    """Runs span after span with every candidate kept apart."""
    ends_at, quiet = [0.0], [0.0]
    for k in range(spans + 1):
        start, width = STARTS[k], 1 if k < FINE else COARSE
        decode, stall = base[0][k], base[1][k] if k < FINE else 0.0
        for j in range(n):
            if admit[j] == k:
                stall += candidates.stall[j]
            end = moved_to_an_edge(min(admit[j] + int(candidates.output[j]), MAX_STEPS))
            if candidates.output[j] > 1 and admit[j] < start < end:
                for step in range(start, start + width):
                    decode += pace.d1 + pace.d2 * (candidates.prompt[j] + step - admit[j] - 1)
        ends_at.append(ends_at[-1] + decode + max(stall, pace.background * decode))
        quiet.append(quiet[-1] + decode + stall)

    def share(late, soon, deadline) -> float:
        """Of all amounts of stall between none and what is expected, those with which the deadline is met."""
        return 1.0 if late <= deadline else 0.0 if soon >= late else max(0.0, (deadline - soon) / (late - soon))

    score = 0.0
    for end, deadline, weight in stakes:
        score += weight * share(instant(ends_at, end), instant(quiet, end), deadline)
    for j in range(n):
        if admit[j] >= FINE:
            continue
        score -= candidates.price[j]
        first, quiet_first = ends_at[admit[j] + 1], quiet[admit[j] + 1]
        for output in candidates.outputs[j]:
            end, quiet_end = (instant(each, admit[j] + int(output)) for each in (ends_at, quiet))
            shares = [share(first, quiet_first, candidates.ttft_at[j]), share(end, quiet_end, candidates.e2e_at[j])]
            if output > 1:
                tokens_s = candidates.tpot[j] * (output - 1)
                shares.append(share(end - first, quiet_end - quiet_first, tokens_s))
            score += candidates.worth[j] * min(shares) / QUANTILES
    return score


def plain_greedy(order, n, evaluations, score_of):
    """insert_greedily into an empty plan with a scoring function: (admission steps, score, evaluations spent)."""
    admit = [NEVER] * n
    current, spent = score_of(admit), 0
    candidates = score_of.candidates
    for j in order:
        if spent >= evaluations:
            break
        choice, value = NEVER, current
        for wave in GREEDY_WAVES.tolist():
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
        if kind < 0.15 and trial[j] != 0:
            trial[j] = 0
        elif kind < 0.3 and trial[j] < NEVER:
            trial[j] = NEVER
        elif kind < 0.75:
            wave = int(WAVES[int(random() * len(WAVES))])
            trial[j] = wave if wave != trial[j] else NEVER
        else:
            start = int(random() * n)
            around = [*range(start, n), *range(start)]
            other = next((k for k in around if trial[k] != trial[j]), start)
            trial[j], trial[other] = trial[other], trial[j]
        value = score_of(trial)
        if value >= score or random() < math.exp((value - score) / temperature):
            admit, score = trial, value
            if score > best_score + EPSILON:
                best, best_score = list(admit), score
        temperature *= (cold / hot) ** (1.0 / max(1, evaluations))
    return best, score, best_score
