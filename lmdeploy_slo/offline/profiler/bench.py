"""One point of the grid, measured: which requests are sent, when, and what their times say about forward passes.

*Prompt by itself.* One request with one output token on an idle engine: its time to first token is that of the passes
that hold its prompt.

*Prompts together.* A request that arrives during a pass joins the next one. So one prompt, the opener, is sent first
and the others while it is computed: they share the next pass, which lasts from the opener's token to theirs. That they
did is seen from their tokens' coming at the same time; else the shot is spoiled.

*Decoding.* All sequences but one are started with long outputs. Then a probe of the same context follows: from its
first token to its last, one a pass, all of them decode, and how many tokens are in the cache is known. Several probes
go over the same background.

*Mixed.* Prompts together, over such a background.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.errors import SloError
from lmdeploy_slo.offline.profiler.grid import GridLimits, Point
from lmdeploy_slo.offline.profiler.target import Answer, Call, Target
from lmdeploy_slo.prediction.observations import Kind, Observation, decode_observation, prefill_observation

T = TypeVar("T")

LEAD_S, PER_PROMPT_S = 0.02, 0.002
"""How long an opener has to last for the prompts behind it to arrive, and how much longer for each of them."""

SAME_PASS_SHARE = 0.05
"""Tokens that come within this share of a pass, or within the target's jitter, are those of one pass."""

_LOOK_AGAIN_S = 0.005
_PATIENCE_S = 60.0
"""How long anything may take beyond what is expected of it."""

_NOT_AT_ONCE = "the sequences did not all decode at the same time"
_NOT_TOGETHER = "the prompts were not computed in one pass"
_LATE = "messages were late"

# Random ids, so that no prefix cache finds a prompt; the first ids of most vocabularies are special.
_FIRST_ID, _LAST_ID, _UNKNOWN_VOCABULARY = 256, 32000, 1024


@dataclass(slots=True)
class Shots:
    """What came of a visit: observations, and how many shots told nothing, with why the last of them did not."""

    observations: list[Observation] = field(default_factory=list)
    spoiled: int = 0
    why: str = ""

    def spoil(self, why: str) -> None:
        self.spoiled += 1
        self.why = why


class Bench:
    """Measures points against one target, one at a time. Nothing it sent is left running after a call, however it
    ends."""

    def __init__(
        self,
        target: Target,
        limits: GridLimits,
        clock: Clock,
        *,
        seed: int = 0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._target = target
        self._limits = limits
        self._clock = clock
        self._random = np.random.default_rng(seed)
        self._sleep = sleep
        self._calls: list[Call] = []
        vocabulary = target.info.vocab_size or _UNKNOWN_VOCABULARY
        last = min(_LAST_ID, vocabulary) - 1
        self._ids = (min(_FIRST_ID, last // 2), last)

    async def measure(self, point: Point, shots: int, believed: StepModel) -> Shots:
        """`shots` repeats. believed: what is known by now; it only says how long to wait for what.

        Raises SloError where the target fails, holds requests back, or is busy with those of others.
        """
        await self._await_idle()
        try:
            await self._settle(point, believed)
            if point.kind is Kind.DECODE:
                return await self._decode(point, shots, believed)
            if point.kind is Kind.PREFILL and point.prompts == 1:
                return await self._prompt_alone(point, shots, believed)
            return await self._prompts_together(point, shots, believed)
        finally:
            for call in self._calls:
                call.cancel()
            self._calls.clear()

    # -- the kinds of points ----------------------------------------------------

    async def _prompt_alone(self, point: Point, shots: int, believed: StepModel) -> Shots:
        found, most = Shots(), self._limits.max_prefill_tokens
        for _ in range(shots):
            answer = await self._soon(self._send(self._prompt(point.prompt_tokens), 1).answer(), believed, point)
            if answer.output_tokens < 1 or answer.prefill_s <= 0:
                found.spoil("no time passed")
                continue
            found.observations.append(
                prefill_observation(1, point.prompt_tokens, answer.prefill_s, max_prefill_tokens=most, point=point.name)
            )
        return found

    async def _decode(self, point: Point, shots: int, believed: StepModel) -> Shots:
        found, context, probe_tokens = Shots(), point.context_tokens, self._limits.probe_tokens
        background = await self._background(point.decoding - 1, context, point, believed)
        for _ in range(shots):
            probe = self._send(self._prompt(context), probe_tokens)
            first_at_s = await self._soon(probe.first_token_at_s(), believed, point)
            background.on_first_token(probe.sent_at_s, first_at_s, self._limits.passes(1, context))
            cached = background.cached_tokens() + context
            answer = await self._soon(probe.answer(), believed, point)
            steps = answer.output_tokens - 1
            if await background.is_short() or steps < 1 or answer.decode_s <= 0:
                found.spoil(_NOT_AT_ONCE)
                break
            background.on_passes(answer, self._clock.now_s())
            found.observations.append(
                decode_observation(point.decoding, cached, answer.decode_s, steps=steps, point=point.name)
            )
        return found

    async def _prompts_together(self, point: Point, shots: int, believed: StepModel) -> Shots:
        found = Shots()
        background = await self._background(point.decoding, point.context_tokens, point, believed)
        for _ in range(shots):
            openers = [self._prompt(self._limits.opener_tokens) for _ in range(self._openers(point, believed))]
            prompts = [self._prompt(point.prompt_tokens) for _ in range(point.prompts)]
            opening = [self._send(prompt, 1) for prompt in openers]
            opener_s = believed.c0 + believed.prefill_stall_s(self._limits.opener_tokens)
            await self._sleep(min(LEAD_S, opener_s / 5) if opener_s else LEAD_S)
            calls = [self._send(prompt, 1) for prompt in prompts]
            seen_begin_s = max([await self._soon(call.first_token_at_s(), believed, point) for call in opening])
            background.on_first_token(opening[0].sent_at_s, seen_begin_s, len(opening))
            cached = background.cached_tokens()
            seen_ends_s = [await self._soon(call.first_token_at_s(), believed, point) for call in calls]
            background.on_first_token(seen_begin_s, min(seen_ends_s), 0)
            began_at_s = max([await self._token_came_at_s(call, believed, point) for call in opening])
            seconds = max([await self._token_came_at_s(call, believed, point) for call in calls]) - began_at_s
            seen_s = min(seen_ends_s) - seen_begin_s
            apart_s = max(self._target.info.jitter_s, SAME_PASS_SHARE * seen_s)
            one_pass = max(seen_ends_s) - min(seen_ends_s) <= apart_s < seen_s
            # A message that was long on its way, there or back, puts the two apart.
            agree = seconds > 0 and abs(seconds - seen_s) <= 2 * apart_s
            if await background.is_short():
                found.spoil(_NOT_AT_ONCE)
                break
            if not one_pass or calls[-1].sent_at_s >= seen_begin_s:
                found.spoil(_NOT_TOGETHER)
                continue
            if not agree:
                found.spoil(_LATE)
                continue
            found.observations.append(
                Observation(
                    steps=1,
                    seconds=seconds,
                    prompts=point.prompts,
                    prefill_tokens=point.prompts * point.prompt_tokens,
                    prefill_square=point.prompts * point.prompt_tokens**2,
                    batch_size=point.decoding,
                    context_tokens=cached,
                    point=point.name,
                )
            )
        return found

    async def _token_came_at_s(self, call: Call, believed: StepModel, point: Point) -> float:
        """When its first token came, but for the time it was on its way to the target: that is how long it came before
        the instant told here. Of calls that get their tokens together, the latest is the one that was sent fastest."""
        return call.sent_at_s + (await self._soon(call.answer(), believed, point)).ttft_s

    # -- inside -----------------------------------------------------------------

    def _openers(self, point: Point, believed: StepModel) -> int:
        """How many prompts it takes to keep the engine busy while others arrive. Several only where each fills a pass
        by itself: else the others might share the last one's."""
        limits = self._limits
        opener_s = believed.c0 + believed.prefill_stall_s(limits.opener_tokens)
        if not opener_s or limits.opener_tokens < limits.max_prefill_tokens:
            return 1
        slots = limits.max_batch_size - point.decoding - point.prompts
        return max(1, min(slots, math.ceil((LEAD_S + PER_PROMPT_S * point.prompts) / opener_s)))

    async def _background(self, sequences: int, context: int, point: Point, believed: StepModel) -> _Background:
        """`sequences` that decode, or are about to: whatever is sent from now on comes behind all their prompts."""
        output = self._limits.hold_tokens(point.decoding, context)
        calls = [self._send(self._prompt(context), output, watched=False) for _ in range(sequences)]
        background = _Background(calls, context, self._limits.passes(sequences, context))
        if sequences:
            await self._soon(
                self._until(lambda running, _: running >= sequences or any(call.ended for call in calls)),
                believed,
                point,
            )
            # Of what comes in during one pass the last may be the first to start. With the first token of one that
            # came later they have all begun, and another one comes behind their prompts.
            await self._settle(point, believed)
            await self._settle(point, believed)
            background.on_first_token(self._clock.now_s(), self._clock.now_s(), 0)
        return background

    async def _settle(self, point: Point, believed: StepModel) -> None:
        """Until whatever was sent before has been computed, a pass for requests that were cancelled included: what
        comes behind it has its token."""
        await self._soon(self._send(self._prompt(min(8, self._limits.longest_prompt)), 1).answer(), believed, point)

    async def _await_idle(self) -> None:
        """Until what was cancelled has left the target. Raises SloError where others keep it busy."""
        try:
            await asyncio.wait_for(self._until(lambda running, waiting: not running and not waiting), _PATIENCE_S)
        except asyncio.TimeoutError:
            running, waiting = await self._target.in_flight()
            raise SloError(
                f"the engine is not idle: {running} requests run in it, {waiting} wait; measure one that nobody uses"
            ) from None

    async def _until(self, holds: Callable[[int, int], bool]) -> None:
        while not holds(*await self._target.in_flight()):
            await self._sleep(_LOOK_AGAIN_S)

    async def _soon(self, awaitable: Awaitable[T], believed: StepModel, point: Point) -> T:
        """The result, within several times what it should take."""
        patience_s = _PATIENCE_S + 10 * visit_s(point, 1, believed, self._limits)
        try:
            return await asyncio.wait_for(asyncio.ensure_future(awaitable), patience_s)
        except asyncio.TimeoutError:
            policy = self._target.info.policy
            held = f"; its policy {policy} may hold requests back: serve with --policy fcfs" if policy else ""
            raise SloError(f"{point.name}: nothing came within {patience_s:.0f} s{held}") from None

    def _send(self, prompt: Sequence[int], output_tokens: int, *, watched: bool = True) -> Call:
        call = self._target.send(prompt, output_tokens, watched=watched)
        self._calls.append(call)
        return call

    def _prompt(self, tokens: int) -> list[int]:
        ids: list[int] = self._random.integers(*self._ids, tokens, endpoint=True).tolist()
        return ids


class _Background:
    """Sequences that decode while something else is measured. Where nobody tells how many tokens they have, these are
    counted: `passes` went by until all of them decoded, and each pass since then gave each of them one."""

    def __init__(self, calls: Sequence[Call], context: int, passes: int) -> None:
        self._calls = calls
        self._context = context
        self._generated = passes / 2  # of each, on average
        self._idle_since_s: float | None = None  # no passes were counted since then
        self._pass_s = math.inf

    async def is_short(self) -> bool:
        """Whether one of them has ended: what was measured is of fewer sequences than it should be. Raises the
        SloError it failed with."""
        ended = [call for call in self._calls if call.ended]
        for call in ended:
            await call.answer()
        return bool(ended)

    def cached_tokens(self) -> float:
        """Of all of them together, before the next pass: the last token of each is not in the cache yet."""
        told = [call.generated for call in self._calls]
        if None not in told:
            return sum(self._context + max(0, (count or 0) - 1) for count in told)
        return len(told) * (self._context + max(0.0, self._generated - 1))

    def on_first_token(self, sent_at_s: float, first_at_s: float, passes: int) -> None:
        """Something that was sent then got its first token: `passes` went by for its prompt, one until it could join,
        and before it was sent as many as there was time for."""
        if self._idle_since_s is not None:
            self._generated += max(0.0, sent_at_s - self._idle_since_s) / self._pass_s
        self._generated += 1 + passes
        self._idle_since_s = first_at_s

    def on_passes(self, answer: Answer, now_s: float) -> None:
        """From a first token to a last one they decoded as well."""
        passes = answer.output_tokens - 1
        self._generated += passes
        if passes and answer.decode_s > 0:
            self._pass_s = answer.decode_s / passes
        self._idle_since_s = now_s


def visit_s(point: Point, shots: int, model: StepModel, limits: GridLimits) -> float:
    """What a visit should take by a model: setting up, and `shots` times what is measured. Seconds."""

    def prefill_s(prompts: int, tokens: int) -> float:
        return limits.passes(prompts, tokens) * model.c0 + prompts * model.prefill_stall_s(tokens)

    if point.kind is Kind.DECODE:
        sequences, context = point.decoding, point.context_tokens
        shot_s = prefill_s(1, context) + model.decode_stretch_s(
            limits.probe_tokens + 2, sequences, sequences * (context + limits.probe_tokens)
        )
        return prefill_s(sequences - 1, context) + shots * shot_s
    opener_s = prefill_s(1, limits.opener_tokens)
    shot_s = prefill_s(point.prompts, point.prompt_tokens) + (opener_s if point.prompts > 1 or point.decoding else 0.0)
    beside_s = model.decode_stretch_s(3, point.decoding, point.decoding * point.context_tokens)
    return prefill_s(point.decoding, point.context_tokens) + shots * (shot_s + (beside_s if point.decoding else 0.0))
