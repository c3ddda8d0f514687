"""From tokens with instants to observations of how long the engine needed for what.

Nobody tells how long a forward pass took. What is known: when each request was sent, how long its prompt is, and when
which tokens became known. From these, stretches of engine time are cut, windows, whose work is known:

**Passes.** One decoding request is the clock of a window: it gets one token a pass, and the window ends with one of its
tokens. It counts right also where the tokens of a pass arrive in parts, or those of several passes together.

**Decoding.** Every token of a decoding request is a sequence-step at the context that this request had.

**Prompts.** A first token says that the prompt is computed. Where the next prompt is longer than what is left of a
pass, what is left went into it: prompts are computed in the order they were sent, at most `max_prefill_tokens` a pass.
A request that could have had its first token and has none waits inside the engine; no work is ascribed to it.

A window ends with a first token (unless the tokens of a pass arrive in parts, and their instants say less), with a pass
that computes a part of a long prompt, else after `WINDOW_STEPS` passes.
One whose work cannot be known (its clock was aborted, somebody was evicted or is computed anew, a pass would have
computed more than it can) is dropped. What is ascribed to a prompt that is under way is believed only once its first
token comes when it is due. The first window after the engine was idle begins when the request that ended the idleness
was sent, or, where the engine tells, when it began to work on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from lmdeploy_slo.prediction.calibration_estimator import Work

WINDOW_STEPS = 8
"""Passes of a window in which no prompt is computed: fewer are more at the mercy of late timers."""

SHORTEST_S = 0.002
"""A shorter window goes on: what event loops add would be most of it."""

PARTS = 4
"""Where the tokens of a pass arrive in parts, so many more than a pass gives may be still to come."""


@dataclass(slots=True)
class _Prompt:
    """A request without a first token. cached_tokens: of its prompt, expected. computed_tokens: ascribed to passes so
    far. held: the windows of these passes, with the tokens, kept until its first token shows that this was right, and
    how much was cached. doubtful: it was wrong."""

    tokens: int
    cached_tokens: float
    sent_at_s: float
    computed_tokens: float = 0.0
    held: list[tuple[Work, float]] = field(default_factory=list)
    doubtful: bool = False

    @property
    def left_tokens(self) -> float:
        """To be computed yet, at most: once it was begun, only that it is not done says how much was cached."""
        return self.tokens - self.computed_tokens - (0 if self.computed_tokens else self.cached_tokens)

    def windows(self) -> list[Work]:
        """Those held, with what they computed of it in the place that it has behind the cached tokens."""
        before, windows = self.cached_tokens, []
        for work, tokens in self.held:
            windows.append(replace(work, prefill_square=work.prefill_square + tokens * (tokens + 2 * before)))
            before += tokens
        return windows


@dataclass(slots=True)
class _Window:
    """clock: the request whose tokens count the passes, None where nobody decoded when it began. clock_began,
    clock_tokens: its tokens then and now. unknown: what was done in it cannot be known. held: windows of the prompts
    whose first token came in this one."""

    begun_at_s: float
    clock: int | None
    clock_began: int = 0
    clock_tokens: int = 0
    has_first_token: bool = False
    prefill_tokens: float = 0.0
    prefill_square: float = 0.0
    sequence_steps: float = 0.0
    context_tokens: float = 0.0
    largest_batch: int = 0
    unknown: bool = False
    held: list[Work] = field(default_factory=list)


class StepObserver:
    """See the module. Memory is bounded by the requests in flight. A handle stands for one request.

    progress: the tokens a decoding request has got so far, by its handle. on_window: called with each observation.
    dropped: windows whose work could not be known.
    """

    def __init__(
        self,
        *,
        max_prefill_tokens: int,
        max_batch_size: int,
        progress: Callable[[int], int],
        on_window: Callable[[Work], None],
    ) -> None:
        self._most = max_prefill_tokens
        self._max_batch_size = max_batch_size
        self._progress = progress
        self._on_window = on_window
        self._prompts: dict[int, _Prompt] = {}  # in the order they were sent
        self._decoding: dict[int, int] = {}  # handle -> prompt tokens
        self._context = 0.0  # tokens in the cache of those who decode
        self._firsts: list[tuple[int, int, int | None]] = []  # since the last step: (handle, tokens, cached)
        self._ended: list[tuple[int, int]] = []  # since the last step: (handle, its tokens)
        self._gone = 0  # of them, decoding requests that get no token in this step
        self._occupied = 0  # places of the batch that were taken in the last step
        self._scheduled_at_s = math.inf  # the earliest told since the last step
        self._window: _Window | None = None  # None: the engine is idle
        self._last_at_s = -math.inf
        self._owed = 0.0  # tokens that were due by the clock and have not come
        self._moved = 0  # who left, less who joined, since the clock's last token
        self._parts = 0.0  # share of the steps that are parts of a pass
        self.dropped = 0

    def renewed(self) -> StepObserver:
        """One that knows of nothing in flight; what is, is left out until it has ended."""
        fresh = StepObserver(
            max_prefill_tokens=self._most,
            max_batch_size=self._max_batch_size,
            progress=self._progress,
            on_window=self._on_window,
        )
        fresh.dropped = self.dropped
        return fresh

    # -- what happens ---------------------------------------------------------

    def sent(self, handle: int, prompt_tokens: int, cached_tokens: float, at_s: float) -> None:
        """A request went to the engine; so many tokens of its prompt are expected in the prefix cache."""
        self._prompts[handle] = _Prompt(prompt_tokens, min(cached_tokens, prompt_tokens - 1), at_s)
        if self._window is None:
            self._window = _Window(at_s, None)

    def first_token(
        self, handle: int, tokens: int = 1, cached_tokens: int | None = None, scheduled_at_s: float | None = None
    ) -> None:
        """A request has its first token (or its first few) in the step that comes to its end.

        cached_tokens, scheduled_at_s: as in `EngineEvent`; None where the engine does not say.
        """
        self._firsts.append((handle, tokens, cached_tokens))
        if scheduled_at_s is not None:
            self._scheduled_at_s = min(self._scheduled_at_s, scheduled_at_s)

    def left(self, handle: int, output_tokens: int, *, finished: bool) -> None:
        """A request is gone after so many tokens; one that was never sent is ignored.

        finished: with its last token, in the step that comes to its end; else at any time, for any reason.
        """
        self._ended.append((handle, output_tokens))
        if self._window is None:
            self._settle()
        if finished or self._window is None:
            return
        self._gone += handle in self._decoding
        self._window.unknown |= handle == self._window.clock or handle in self._prompts
        if len(self._ended) >= len(self._decoding) + len(self._prompts):
            self._settle()
            if not self._decoding and not self._prompts:
                self._window = None

    def step(self, at_s: float, tokens: int) -> None:
        """Tokens became known at an instant, `tokens` of them of requests that had a first token before."""
        since_s, self._last_at_s = self._last_at_s, at_s
        window = self._window
        if window is None or not (tokens or self._firsts):
            self._settle()
            return
        batch = len(self._decoding) - self._gone
        self._occupied = len(self._decoding) + len(self._firsts)
        if batch > 0:
            window.sequence_steps += tokens
            window.context_tokens += tokens * (self._context / batch + (tokens / batch - 1) / 2)
            window.largest_batch = max(window.largest_batch, batch)
            self._context += tokens
        merged = max((self._take_first(window, *first) for first in self._firsts), default=1) - 1
        if window.clock is None:
            if self._scheduled_at_s < at_s:
                window.begun_at_s = max(window.begun_at_s, self._scheduled_at_s)
            self._settle()
            passes = max(1, math.ceil(window.prefill_tokens / self._most)) + merged
            self._end(window, at_s, passes, since_s, passes)
            return
        ended = next((count for handle, count in self._ended if handle == window.clock), None)
        decoding, ends = len(self._decoding), len(self._ended)
        self._settle()
        if ended is not None:
            clock_tokens = ended
        elif window.clock in self._decoding:
            clock_tokens = self._progress(window.clock)
        else:  # it went without a step
            clock_tokens, window.unknown = window.clock_tokens, True
        advanced, window.clock_tokens = clock_tokens - window.clock_tokens, clock_tokens
        passes = clock_tokens - window.clock_began
        outrun = window.sequence_steps > (passes + 2) * window.largest_batch
        window.unknown |= self._is_uneven(advanced, batch, tokens, ends) or outrun
        if advanced:
            self._moved = 0
        else:  # who left before the clock's token was due one in its pass, and who joined was not
            self._moved += decoding - len(self._decoding)
        if ended is not None or window.unknown or (advanced and self._is_due(window, passes, at_s)):
            self._end(window, at_s, passes, since_s, max(1, advanced))

    # -- inside ---------------------------------------------------------------

    def _take_first(self, window: _Window, handle: int, tokens: int, cached_tokens: int | None) -> int:
        """The prompt of a request is computed; returns how many tokens came of it."""
        prompt = self._prompts.get(handle)
        if prompt is not None:
            if cached_tokens is not None:
                prompt.cached_tokens = cached_tokens
            in_cache = prompt.cached_tokens + prompt.computed_tokens
            if prompt.doubtful or in_cache >= prompt.tokens:
                window.unknown = True
                self.dropped += len(prompt.held)
            else:
                window.prefill_tokens += prompt.tokens - in_cache
                window.prefill_square += prompt.tokens**2 - in_cache**2
                window.held += prompt.windows()
            window.has_first_token = True
            more = tokens - 1
            window.sequence_steps += more
            window.context_tokens += more * (prompt.tokens + (more - 1) / 2)
        return tokens

    def _is_uneven(self, passes: int, batch: int, tokens: int, ends: int) -> bool:
        """Whether some of those who decode get no tokens, or go on after that (they were evicted, and what it takes to
        compute them anew is not known), or got more than the clock, which ended before the last pass."""
        self._parts += 0.02 * ((passes == 0) - self._parts)
        due = passes * batch + self._moved if passes else 0
        if passes > 1 and 0 < due - tokens <= ends * (passes - 1):
            due = tokens  # of several passes told together, who ended needed not all
        owed = self._owed * 0.99**passes + due - tokens
        tolerance = batch + PARTS if self._in_parts else 0.5  # parts of the last passes may be still to come
        uneven = max(self._owed, owed) > tolerance or owed < -tolerance
        self._owed = 0.0 if passes and tokens == due else owed
        return uneven

    def _settle(self) -> None:
        """Who has a first token decodes from now on; who has left is forgotten."""
        for handle, tokens, _ in self._firsts:
            prompt = self._prompts.pop(handle, None)
            if prompt is not None:
                self._decoding[handle] = prompt.tokens
                self._context += prompt.tokens + tokens - 1
        for handle, output_tokens in self._ended:
            prompt = self._prompts.pop(handle, None)
            if prompt is not None:
                self.dropped += len(prompt.held)
            elif handle in self._decoding:
                self._context -= self._decoding.pop(handle) + max(0, output_tokens - 1)
        self._firsts.clear()
        self._ended.clear()
        self._gone = 0
        self._scheduled_at_s = math.inf
        if not self._decoding:
            self._context = 0.0  # not what rounding has left

    @property
    def _in_parts(self) -> bool:
        """Whether the tokens of a pass come in parts: then single passes cannot be timed well."""
        return self._parts > 0.01

    def _is_due(self, window: _Window, passes: int, at_s: float) -> bool:
        if at_s - window.begun_at_s < SHORTEST_S:
            return False
        if passes >= WINDOW_STEPS or window.held or self._partly_computed(0.0) is not None:
            return True
        return window.has_first_token and not self._in_parts

    def _partly_computed(self, own_tokens: float) -> tuple[_Prompt, float] | None:
        """The prompt that is next, and how much of it the last pass computed beside `own_tokens` of others; None where
        there is no next, or it was not begun."""
        if not self._prompts or self._occupied >= self._max_batch_size:
            return None
        prompt = next(iter(self._prompts.values()))
        room = math.ceil(own_tokens / self._most) * self._most - own_tokens if own_tokens else float(self._most)
        return (prompt, room) if 1 <= room < prompt.left_tokens and not prompt.doubtful else None

    def _end(self, window: _Window, at_s: float, passes: int, since_s: float, last_passes: int) -> None:
        """Ends the window, `passes` after it began, `last_passes` of them since `since_s`."""
        own_tokens = window.prefill_tokens
        if window.held:
            if passes > math.ceil(own_tokens / self._most):  # it was not under way all the time
                window.unknown = True
                self.dropped += len(window.held)
            else:
                for work in window.held:
                    self._on_window(work)
        prompt, tokens = None, 0.0
        partly = self._partly_computed(own_tokens)
        if partly is not None and partly[0].sent_at_s <= max(since_s, window.begun_at_s):
            prompt, tokens = partly
            if not window.has_first_token:
                tokens = min(tokens * last_passes, prompt.left_tokens - 1)
            prompt.computed_tokens += tokens
            window.prefill_tokens += tokens
        elif partly is None:
            self._doubt_overdue()
        duration_s = at_s - window.begun_at_s
        if partly is not None and prompt is None and last_passes > 1:
            partly[0].doubtful = True  # it was sent meanwhile, and may have been begun
        window.unknown |= any(waits.doubtful for waits in self._prompts.values())
        if window.unknown or passes < 1 or own_tokens > passes * self._most:
            self.dropped += 1
        elif duration_s >= SHORTEST_S:
            work = Work(
                duration_s,
                passes,
                window.prefill_tokens,
                window.prefill_square,
                window.sequence_steps,
                window.context_tokens,
            )
            if prompt is None:
                self._on_window(work)
            else:
                prompt.held.append((work, tokens))
        if self._decoding:
            clock = window.clock if window.clock in self._decoding else next(reversed(self._decoding))
            if clock != window.clock and self._in_parts:
                self._owed = 0.0  # its token of this pass may have come or not
            tokens_now = self._progress(clock)
            self._window = _Window(at_s, clock, tokens_now, tokens_now)
        else:
            self._window = _Window(at_s, None) if self._prompts else None

    def _doubt_overdue(self) -> None:
        """The prompt that is next was to be computed by now: it was not begun when it seemed so, or is held up."""
        prompt = next(iter(self._prompts.values()), None)
        if prompt is not None and prompt.computed_tokens and not prompt.doubtful:
            self.dropped += len(prompt.held)
            prompt.held.clear()
            prompt.doubtful = True
