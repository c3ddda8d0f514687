"""Slow plain twins of the placement kernels, on the plain twin of the rollout."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
from plain_annealing import engine_time_s, lengths, plain_rollout, running_base, running_stakes, stall_s

from lmdeploy_slo.scheduling.annealing_arrays import Pace
from lmdeploy_slo.scheduling.placement_kernel import NO_ROOM, PROMISED


def pace_of(running, model, duty, tpot_share, most) -> Pace:
    """The step model with the background that recent arrivals, and the objectives of what runs, make likely."""
    objectives = [row["tpot_s"] for row in running if math.isfinite(row["tpot_s"])]
    if objectives:
        context = sum(row["prompt_tokens"] + row["cached_tokens"] + row["generated_tokens"] for row in running)
        decode_s = model.c0 + model.d1 * len(running) + model.d2 * context
        most = min(most, max(0.0, 1.0 - decode_s / (tpot_share * float(np.median(objectives)))))
    share = min(duty, most)
    return Pace(model.c0, model.p1, model.p2, model.d1, model.d2, share / (1.0 - share))


class PlainSite:
    """A replica with what runs there. score(rows, worths): of what runs and of these rows, sent now."""

    def __init__(self, running, worth, now_s, pace, spread, spans, price_s, batch) -> None:
        self.base = running_base(running, pace)
        self.stakes = running_stakes(running, worth, now_s, pace, spread)
        self.now_s, self.pace, self.spread, self.spans = now_s, pace, spread, spans
        self.price_s, self.batch = price_s, batch
        self.tokens = sum(row["prompt_tokens"] + row["cached_tokens"] + row["output_tokens"] for row in running)
        self.running = len(running)

    def score(self, rows, worths) -> float:
        candidates = SimpleNamespace(
            stall=[stall_s(row, self.pace) for row in rows],
            prompt=[row["prompt_tokens"] + row["cached_tokens"] for row in rows],
            output=[int(np.rint(max(row["output_tokens"], 1.0))) for row in rows],
            outputs=[lengths(row, self.spread, 1.0) for row in rows],
            ttft_at=[row["arrival_at_s"] - self.now_s + row["ttft_s"] for row in rows],
            e2e_at=[row["arrival_at_s"] - self.now_s + row["e2e_s"] for row in rows],
            tpot=[row["tpot_s"] for row in rows],
            worth=worths,
            price=[self.price_s * engine_time_s(row, self.pace, self.batch) for row in rows],
        )
        return plain_rollout([0] * len(rows), len(rows), self.pace, self.base, self.spans, self.stakes, candidates)

    def promised(self, rows, worths, least):
        """Of the rows, those that gain, one after the other: (rows, worths)."""
        taken, worth_of_taken = [], []
        for row, worth in zip(rows, worths, strict=True):
            before = self.score(taken, worth_of_taken)
            after = self.score([*taken, row], [*worth_of_taken, worth])
            if len(taken) < PROMISED and after - before > least * worth:
                taken.append(row)
                worth_of_taken.append(worth)
        return taken, worth_of_taken

    def gain(self, ask, worth, promised, worths, slots, kv_tokens) -> float:
        tokens = self.tokens + sum(
            row["prompt_tokens"] + row["cached_tokens"] + int(np.rint(max(row["output_tokens"], 1.0)))
            for row in promised
        )
        after = tokens + ask["prompt_tokens"] + ask["cached_tokens"] + ask["output_tokens"]
        if len(promised) >= PROMISED or self.running + len(promised) >= slots or after > kv_tokens:
            return NO_ROOM
        return self.score([*promised, ask], [*worths, worth]) - self.score(promised, worths)


def plain_best(gains, engine_s, work_s, least, grain) -> int:
    """The first of the best."""

    def key(k: int) -> tuple[float, float]:
        if gains[k] > least:
            return -(float(np.rint(gains[k] / grain)) + 1.0), (work_s[k] + engine_s[k]) * engine_s[k]
        return 0.0, work_s[k]

    return min(range(len(gains)), key=key)
