"""Step-model coefficients from what an engine recorded of its requests: when each was scheduled, when its first and
last token came, and how many tokens it had. No step was recorded; they are reconstructed.

**What is known.** A step begins where an engine schedules and ends where tokens come out, so every recorded instant is
the edge of a step, and between two neighbouring instants lies a whole number of steps of the same batch. Who decodes in
them is known exactly; how many steps they were is not, but must be whole. Where a request ran to its end, its output
tokens count the steps between its first and last token.

**The fit.** Steps and coefficients are found in turn (a hard form of expectation maximisation). With coefficients
given, `_Steps` walks along the instants and says how many steps lie between them, which prompt tokens were computed in
them (in order of first tokens, `max_prefill_tokens` a step, as early as their request was scheduled), and how many
tokens were in the cache. With steps given, duration is linear in the coefficients, and these are found by least squares
that outliers hardly pull (residuals of Student's t with 3 degrees of freedom), positive because it is their logarithms
that are searched. Many starts are tried; the reconstruction that explains the instants best is kept. Steps half as long
would explain them too, twice as many of them: each interval therefore costs the logarithm of its number of steps.

**What cannot be seen** in a short record (how the cost of a sequence splits from that of its context while both grow
together, or what a decode step costs where every step had a prompt in it) is filled in from what engines have in
common: the ratios of `TYPICAL`, each with a spread. With enough in the record they hardly matter.

Engines that schedule one step ahead (vLLM's asynchronous scheduling) compute what they schedule one step later; both
kinds are tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.errors import TraceError
from lmdeploy_slo.prediction.observations import Observation

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

TYPICAL = {
    "c0/p1": (220.0, 0.4),
    "p2/p1": (2.9e-5, 0.3),
    "d1/p1": (0.5, 0.5),
    "d2/c0": (7e-6, 0.8),
}
"""Ratios of coefficients and the spread (sigma) of their logarithms: geometric means over the shipped profiles, in
tokens, 1/tokens, 1 and 1/tokens. The spreads are wider than theirs, which are 0.2, 0.2, 0.1 and 1.0."""

SAME_INSTANT_S = 1e-3
"""Instants closer than this are the edge of the same step: an engine stamps its requests one after the other."""

COUNTED_STEPS = 12
"""Up to so many steps between two instants are told apart; more are not rounded, and take no part in the fit."""

DECODE_NOISE, PREFILL_NOISE = 0.004, 0.06
"""Relative error of a step that is taken for granted. That of one with a prompt in it is the model's: computing a long
prompt hides part of what a decode step costs, so that the sum is up to so much too high."""

LONGEST_RECORD = 2000
"""Requests a fit looks at; of a longer record the first so many."""

FEWEST_REQUESTS = 8
_STARTS = np.geomspace(60.0, 900.0, 10)  # of c0/p1, tokens
_REFINED = 16  # of the starts, the best ones
_ROUNDS = 15


@dataclass(frozen=True, slots=True)
class Timelines:
    """What was recorded, one element per request. Instants in seconds on one clock, nan where they are not known.

    scheduled_at_s: when the engine took it from its queue. output_tokens: counts where last_token_at_s is known.
    """

    queued_at_s: Floats
    scheduled_at_s: Floats
    first_token_at_s: Floats
    last_token_at_s: Floats
    prompt_tokens: Floats
    output_tokens: Floats

    def __len__(self) -> int:
        return len(self.queued_at_s)

    def first(self, count: int, until_s: float) -> Timelines:
        """The first `count` requests, by queueing, and of them what was known before `until_s`."""
        order = np.argsort(self.queued_at_s, kind="stable")[:count]

        def known(instants: Floats) -> Floats:
            chosen = instants[order]
            return np.where(chosen < until_s, chosen, np.nan)

        return Timelines(
            known(self.queued_at_s),
            known(self.scheduled_at_s),
            known(self.first_token_at_s),
            known(self.last_token_at_s),
            self.prompt_tokens[order],
            self.output_tokens[order],
        )


@dataclass(frozen=True, slots=True)
class StepFit:
    """requests: with a first token. finished: with a last one, too. intervals: how many the fit rests on; error: their
    median |predicted / recorded duration - 1|, by kind, None where there was none. batch_range, context_range:
    sequences and cached tokens seen decoding. steps_ahead: 1 for an engine that schedules one step ahead, else 0.
    observations: the intervals themselves, as they were reconstructed."""

    model: StepModel
    requests: int
    finished: int
    intervals: int
    decode_error: float | None
    prefill_error: float | None
    batch_range: tuple[int, int]
    context_range: tuple[int, int]
    steps_ahead: int
    observations: tuple[Observation, ...]


def fit_step_model(timelines: Timelines, max_prefill_tokens: int) -> StepFit:
    """The step model that explains the timelines best; see the module. Takes seconds.

    max_prefill_tokens: prompt tokens the engine computed in one step, at most. Raises TraceError where fewer than
    `FEWEST_REQUESTS` requests have a first token.
    """
    with_first_token = int(np.sum(np.isfinite(timelines.first_token_at_s)))
    if with_first_token < FEWEST_REQUESTS:
        raise TraceError(f"a fit needs at least {FEWEST_REQUESTS} requests with a first token, got {with_first_token}")
    if len(timelines) > LONGEST_RECORD:
        timelines = timelines.first(LONGEST_RECORD, np.inf)
    record = _Record(timelines, max_prefill_tokens)
    found = [
        (_score(record, _Steps(record, theta, ahead), theta), ahead, theta)
        for theta in record.starts()
        for ahead in (0, 1)
    ]
    found.sort(key=lambda start: -start[0])
    refined = [_refine(record, theta, ahead) for _, ahead, theta in found[:_REFINED]]
    _, ahead, theta = max(refined, key=lambda end: end[0])
    return _described(record, _Steps(record, theta, ahead), theta)


class _Record:
    """The timelines cut into intervals, and everything about these that no coefficient changes."""

    def __init__(self, timelines: Timelines, max_prefill_tokens: int) -> None:
        scheduled = np.where(
            np.isfinite(timelines.scheduled_at_s), timelines.scheduled_at_s, timelines.first_token_at_s
        )
        first, last = timelines.first_token_at_s, timelines.last_token_at_s
        self.max_prefill_tokens = max_prefill_tokens
        self.edges = _edges(timelines.queued_at_s, np.concatenate([scheduled, first, last]))
        self.count = len(self.edges) - 1
        self.duration = np.diff(self.edges)
        edge = self.edges + SAME_INSTANT_S

        order = np.lexsort((scheduled, np.where(np.isfinite(first), first, np.inf)))
        order = order[np.isfinite(scheduled[order])]
        prompts = timelines.prompt_tokens[order]
        self.prompts_until = np.concatenate([[0.0], np.cumsum(prompts)])  # of the first k requests, by first token
        self.done = np.searchsorted(np.where(np.isfinite(first[order]), first[order], np.inf), edge)
        self.begun = np.searchsorted(np.maximum.accumulate(scheduled[order]), edge)

        started = np.flatnonzero(np.isfinite(first))
        self.prompt = timelines.prompt_tokens[started]
        self.output = timelines.output_tokens[started]
        self.join = np.searchsorted(self.edges, first[started] - SAME_INSTANT_S)
        ends = np.where(np.isfinite(last[started]), last[started], np.inf)
        self.leave = np.searchsorted(self.edges, ends - SAME_INSTANT_S)
        self.finished = np.flatnonzero((self.leave <= self.count) & (self.output > 1) & (self.leave > self.join))
        self.joining: list[list[int]] = [[] for _ in range(self.count + 2)]
        self.leaving: list[list[int]] = [[] for _ in range(self.count + 2)]
        for number, (join, leave) in enumerate(zip(self.join.tolist(), self.leave.tolist(), strict=True)):
            self.joining[join].append(number)
            if leave <= self.count:
                self.leaving[leave].append(number)
        changes = [len(j) - len(v) for j, v in zip(self.joining, self.leaving, strict=True)]
        self.batch = np.cumsum(changes)[: self.count].astype(np.float64)
        # Where prompts are open at the end of the record, nobody knows which of their tokens were computed when.
        cut = ~np.isfinite(first) & np.isfinite(scheduled)
        self.usable = np.ones(self.count, dtype=bool)
        if np.any(cut):
            last_first = self.edges[self.join.max()]
            opened = float(np.min(scheduled[cut]))
            self.usable = ~(
                (self.edges[:-1] >= last_first - SAME_INSTANT_S) & (self.edges[1:] > opened + SAME_INSTANT_S)
            )

    def starts(self) -> list[Floats]:
        """Coefficients to begin with: the speed of prefill read off the record, the rest by the typical ratios."""
        own = np.diff(self.prompts_until[self.done])
        some = own > 0
        big = some & (own >= np.median(own[some]))
        pace = self.duration[big] / own[big]
        paces = [*np.percentile(pace, [20, 50, 80]), float(np.sum(self.duration)) / max(1.0, float(np.sum(own)))]
        found = []
        for seconds_per_token in paces:
            for tokens in _STARTS:
                p1 = seconds_per_token / (1 + tokens / self.max_prefill_tokens)
                c0 = tokens * p1
                found.append(
                    np.array([c0, p1, TYPICAL["p2/p1"][0] * p1, TYPICAL["d1/p1"][0] * p1, TYPICAL["d2/c0"][0] * c0])
                )
        return found


def _edges(queued: Floats, instants: Floats) -> Floats:
    """Edges of steps, by time. Where the engine looks at its queue between steps only, queueing instants are, too."""
    edges = _distinct(instants)
    waiting = queued[np.isfinite(queued) & (queued >= edges[0]) & (queued <= edges[-1])]
    if len(waiting) and len(edges) > 1:
        after = np.clip(np.searchsorted(edges, waiting), 1, len(edges) - 1)
        gaps = np.minimum(np.abs(waiting - edges[after]), np.abs(waiting - edges[after - 1]))
        by_chance = 2 * SAME_INSTANT_S * len(edges) / (edges[-1] - edges[0])
        if float(np.mean(gaps < SAME_INSTANT_S)) > max(0.25, 5 * by_chance):
            return _distinct(np.concatenate([edges, queued]))
    return edges


def _distinct(instants: Floats) -> Floats:
    ordered = np.sort(instants[np.isfinite(instants)])
    return np.asarray(ordered[np.concatenate([[True], np.diff(ordered) > SAME_INSTANT_S])])


class _Steps:
    """The record with its steps reconstructed under the coefficients `theta`: c0, p1, p2, d1, d2 in seconds.

    steps: between two instants, not rounded. prefill: prompt tokens computed in them. context: tokens in the cache of
    those who decode, at the beginning.
    """

    def __init__(self, record: _Record, theta: Floats, ahead: int) -> None:
        c0, p1, p2, d1, d2 = (float(value) for value in theta)
        self.ahead = ahead
        self.steps = np.zeros(record.count)
        self.context = np.zeros(record.count)
        self.prefill = np.zeros(record.count)
        most = record.max_prefill_tokens
        until, done, begun = record.prompts_until.tolist(), record.done.tolist(), record.begun.tolist()
        prompt, duration = record.prompt.tolist(), record.duration.tolist()
        joined = [0.0] * len(prompt)
        decoded = context = computed = 0.0  # steps so far; tokens in the cache; prompt tokens so far
        batch = 0
        for k in range(record.count):
            for number in record.leaving[k]:
                context -= prompt[number] + decoded - joined[number]
                batch -= 1
            for number in record.joining[k]:
                context += prompt[number]
                batch += 1
                joined[number] = decoded
            before = max(computed, until[done[k]])
            least = until[done[k + 1]]
            # Somebody after those who have their first token by then may have part of a prompt computed.
            more = begun[k - ahead] > done[k + 1] if k >= ahead else False
            greatest = until[min(done[k + 1] + 1, len(until) - 1)] - 1 if more else least
            growth = d2 * batch / 2
            step = c0 + d1 * batch + d2 * context - growth
            count = 1
            while True:
                tokens = max(least, min(greatest, before + count * most)) - before
                rest = max(duration[k] - p1 * tokens - p2 * tokens * min(tokens, most), 0.0)
                steps = rest / step if growth <= 0 else ((step * step + 4 * growth * rest) ** 0.5 - step) / (2 * growth)
                if round(steps) <= count or count >= 8:
                    break
                count = round(steps)
            self.steps[k], self.context[k], self.prefill[k] = steps, context, tokens
            computed = before + tokens
            if batch or tokens:
                taken = max(1.0, steps if steps >= COUNTED_STEPS else round(steps))
                decoded += taken
                context += taken * batch
        self.busy = (record.batch > 0) | (self.prefill > 0)

    def design(self, record: _Record) -> tuple[Floats, Floats]:
        """(steps as whole numbers, what multiplies each coefficient), one row per interval."""
        counted = np.maximum(1.0, np.round(self.steps))
        return counted, self._columns(record, counted)

    def _columns(self, record: _Record, steps: Floats) -> Floats:
        square = self.prefill * np.minimum(self.prefill, record.max_prefill_tokens)
        contexts = steps * self.context + record.batch * steps * (steps - 1) / 2
        return np.column_stack([steps, self.prefill, square, steps * record.batch, contexts])

    def design_of_finished(self, record: _Record) -> tuple[Floats, Floats]:
        """(what multiplies each coefficient, seconds) of each finished request, from its first token to its last.

        How many steps these were is known: one a token. What ran beside it is taken from the reconstruction.
        """
        steps = np.where(self.steps < COUNTED_STEPS, np.maximum(1.0, np.round(self.steps)), self.steps) * self.busy
        totals = np.vstack([np.zeros(5), np.cumsum(self._columns(record, steps), axis=0)])
        done = record.finished
        rows = totals[record.leave[done]] - totals[record.join[done]]
        seconds = record.edges[record.leave[done]] - record.edges[record.join[done]]
        known = rows[:, 0] > 0
        rows, seconds, tokens = rows[known], seconds[known], record.output[done][known]
        factor = (tokens - 1) / rows[:, 0]
        rows[:, [0, 3, 4]] *= factor[:, None]
        return rows, seconds


def _typicality(log_theta: Floats) -> Floats:
    """How many spreads each ratio is off the typical one."""
    c0, p1, p2, d1, d2 = log_theta
    ratios = {"c0/p1": c0 - p1, "p2/p1": p2 - p1, "d1/p1": d1 - p1, "d2/c0": d2 - c0}
    return np.array([(ratios[name] - np.log(typical)) / spread for name, (typical, spread) in TYPICAL.items()])


def _score(record: _Record, steps: _Steps, theta: Floats) -> float:
    """Log-likelihood of the instants, but for a constant: the noise of each kind of interval is estimated with it."""
    _, columns = steps.design(record)
    missed = columns @ theta / record.duration - 1
    score = -0.5 * float(np.sum(_typicality(np.log(theta)) ** 2))
    usable = record.usable & steps.busy
    for kind, least in ((usable & (steps.prefill == 0), DECODE_NOISE), (usable & (steps.prefill > 0), PREFILL_NOISE)):
        if np.sum(kind) < 3:
            continue
        noise = max(1.48 * float(np.median(np.abs(missed[kind]))), least)
        score -= float(np.sum(np.log(np.maximum(1.0, steps.steps[kind])) + np.log(noise)))
        score -= float(np.sum(1.5 * np.log1p((missed[kind] / noise) ** 2 / 2)))
    rows, seconds = steps.design_of_finished(record)
    if len(rows):
        score -= 2 * float(np.sum(np.sqrt(1 + ((rows @ theta - seconds) / (0.01 * seconds)) ** 2) - 1))
    return score


def _refine(record: _Record, theta: Floats, ahead: int) -> tuple[float, int, Floats]:
    """Steps and coefficients in turn until nothing changes; (score, ahead, coefficients) of the best round."""
    from scipy.optimize import least_squares

    best = (-np.inf, ahead, theta)
    for _ in range(_ROUNDS):
        steps = _Steps(record, theta, ahead)
        score = _score(record, steps, theta)
        if score > best[0]:
            best = (score, ahead, theta)
        counted, columns = steps.design(record)
        used = (counted <= COUNTED_STEPS) & record.usable & steps.busy
        finished, finished_s = steps.design_of_finished(record)
        durations = record.duration[used]
        noise_s = np.hypot(
            np.where(steps.prefill[used] > 0, 1e-3, 3e-4), np.where(steps.prefill[used] > 0, 0.02, 0.01) * durations
        )
        rows = np.vstack([columns[used], finished])
        seconds = np.concatenate([durations, finished_s])
        noise_s = np.concatenate([noise_s, 0.01 * finished_s])

        def residuals(log_theta: Floats, rows: Floats = rows, seconds: Floats = seconds, s: Floats = noise_s) -> Floats:
            z = (rows @ np.exp(log_theta) - seconds) / s
            return np.concatenate([np.sign(z) * np.sqrt(3 * np.log1p(z * z / 3)), _typicality(log_theta)])

        found = np.exp(least_squares(residuals, np.log(np.maximum(theta, 1e-14)), max_nfev=20).x)
        if np.allclose(found, theta, rtol=1e-3):
            break
        theta = found
    return best


def _described(record: _Record, steps: _Steps, theta: Floats) -> StepFit:
    counted, columns = steps.design(record)
    used = (counted <= COUNTED_STEPS) & record.usable & steps.busy
    relative = np.abs(columns @ theta - record.duration) / record.duration
    decode, prefill = used & (steps.prefill == 0), used & (steps.prefill > 0)
    decoding = record.batch > 0
    return StepFit(
        StepModel(*(float(value) for value in theta)),
        requests=len(record.prompt),
        finished=len(record.finished),
        intervals=int(np.sum(used)),
        decode_error=_median(relative[decode]),
        prefill_error=_median(relative[prefill]),
        batch_range=_range(record.batch[decoding]),
        context_range=_range(steps.context[decoding]),
        steps_ahead=steps.ahead,
        observations=tuple(_observation(record, counted, columns, k) for k in np.flatnonzero(used).tolist()),
    )


def _observation(record: _Record, counted: Floats, columns: Floats, k: int) -> Observation:
    """Interval k. Of prompts that were computed in part, one is counted."""
    _, tokens, square, _, contexts = (float(value) for value in columns[k])
    ended = int(record.done[k + 1] - record.done[k])
    return Observation(
        steps=int(counted[k]),
        seconds=float(record.duration[k]),
        prompts=max(1, ended) if tokens > 0 else 0,
        prefill_tokens=tokens,
        prefill_square=square,
        batch_size=float(record.batch[k]),
        context_tokens=contexts,
    )


def _median(values: Sequence[float] | Floats) -> float | None:
    return float(np.median(values)) if len(values) else None


def _range(values: Floats) -> tuple[int, int]:
    return (int(np.min(values)), int(np.max(values))) if len(values) else (0, 0)
