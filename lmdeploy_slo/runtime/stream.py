"""The tokens of one request on their way from the engine to one reader.

The runtime pushes the events of each step and closes the stream once; the reader iterates. A push never waits: tokens
of a slow reader stay here, at most `max_new_tokens` of them, and no other stream notices.

Coalescing. With a flush interval of 0 every token is one delta, always. With a positive one the first token goes at
once; after that a delta leaves when the last one is at least that old, with every token that has come by then.
The end never waits. Order and content are those of the engine's events either way.
"""

from __future__ import annotations

import asyncio
import math
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.core.slo import Slo, Timing
from lmdeploy_slo.engine.base import EngineEvent, TokenLogprob
from lmdeploy_slo.errors import Cancelled, RequestError
from lmdeploy_slo.scheduling.admission import Forecast

COMPACT_AT = 64
"""Events of a slow reader that are kept as they came; where deltas may be merged anyway, more become one."""

MAX_MERGED_TOKENS = 4096
"""No merged delta grows beyond this by more than one event: clients bound the size of a message, too."""

Encoder = Callable[[EngineEvent], bytes]
"""What a reader makes of the tokens and text of an event."""


@dataclass(frozen=True, slots=True)
class Completion:
    """How a request that ran to its end went.

    slo_met: None where it carried no objective. rank: its place in the plan that dispatched it, 0 first.
    cached_tokens: of the prompt, found in the prefix cache; None where the engine did not say.
    """

    request_id: str
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int | None
    timing: Timing
    slo: Slo
    slo_met: bool | None
    predicted: Forecast
    rank: int
    instance: str


@dataclass(slots=True)
class Delta:
    """What is new since the last delta; `completion` is set on the last one alone.

    text may lag behind the tokens while a character is incomplete. logprobs: one entry per token, or None.
    """

    token_ids: Sequence[int]
    text: str
    logprobs: Sequence[Sequence[TokenLogprob]] | None = None
    completion: Completion | None = None


class RequestStream:
    """An async iterator of `Delta` with one reader, on the loop of the runtime that made it.

    The last delta has `completion`. A request that ended otherwise raises the `RequestError` that ended it; tokens
    not read by then are dropped; `failed` says so to a reader that still holds some. A reader that stops early calls
    `cancel`, or the request runs on for nobody.

    With an encoder it is read by `ready` instead: tokens that are not merged are encoded when they come, all of a step
    in a row, and what waits for the reader is small.
    """

    __slots__ = (
        "_cancel",
        "_clock",
        "_completion",
        "_delivered",
        "_encode",
        "_error",
        "_interval_s",
        "_lagging_text",
        "_loose",
        "_merge",
        "_next_at_s",
        "_pending",
        "_timer",
        "_waiter",
        "failed",
        "request_id",
    )

    def __init__(
        self,
        request_id: str,
        clock: Clock,
        flush_interval_s: float,
        cancel: Callable[[RequestError], None],
        encode: Encoder | None = None,
    ) -> None:
        self.request_id = request_id
        self.failed = False
        self._clock = clock
        self._interval_s = flush_interval_s
        self._merge = flush_interval_s > 0
        self._cancel = cancel
        self._encode = encode
        self._pending: deque[Any] = deque()  # events; where none are merged and there is an encoder, what it made
        self._loose = 0  # of them, at the end: as they came, not merged yet
        self._lagging_text = ""  # text that came without a token; goes with the next
        self._next_at_s = -math.inf  # the next delta leaves no earlier, unless it is the last
        self._completion: Completion | None = None
        self._error: RequestError | None = None
        self._delivered = False
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    # -- the reader -----------------------------------------------------------

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Delta:
        assert self._encode is None, "a stream with an encoder is read by `ready`"
        await self._due()
        if self._delivered:
            raise StopAsyncIteration
        event = self._take_merged() if self._merge else self._pending.popleft() if self._pending else None
        completion = self._completion if not self._pending else None
        self._delivered = completion is not None
        if event is None:
            return Delta((), self._take_lagging_text(), None, completion)
        text = event.text + self._take_lagging_text() if self._delivered else event.text
        return Delta(event.token_ids, text, event.logprobs, completion)

    async def ready(self) -> tuple[list[bytes], Completion | None]:
        """As `anext`, encoded: all that is due, in order, and the completion where the request has ended.

        The list may be empty with a completion, never without. Not to be called again after the completion.
        """
        assert self._encode is not None, "a stream without an encoder is iterated over"
        await self._due()
        if self._merge:
            event = self._take_merged()
            messages = [] if event is None else [self._encode(event)]
        else:
            messages = list(self._pending)
            self._pending.clear()
        if self._completion is None or self._pending:
            return messages, None
        self._delivered = True
        if self._lagging_text:
            messages.append(self._encode(EngineEvent(self.request_id, text=self._take_lagging_text())))
        return messages, self._completion

    async def result(self) -> Delta:
        """Waits for the end and returns everything not yet read as one delta; raises as iteration does."""
        assert self._encode is None, "a stream with an encoder is read by `ready`"
        self._merge, self._next_at_s = True, math.inf
        while self._completion is None and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error
        self._delivered = True
        whole = _merged([*self._pending, EngineEvent(self.request_id, text=self._lagging_text)])
        self._pending.clear()
        return Delta(whole.token_ids, whole.text, whole.logprobs, self._completion)

    def cancel(self, error: RequestError | None = None) -> None:
        """Ends the request with `error` (default `Cancelled`) where it has not ended; frees its slot at once."""
        self._cancel(error or Cancelled("the reader went away"))

    # -- the runtime ----------------------------------------------------------

    def push(self, event: EngineEvent) -> None:
        """New tokens; must not be called after `close`."""
        count = len(event.token_ids)
        if self._lagging_text or count != 1:
            self._push_irregular(event, count)
        elif self._merge:
            self._keep_to_merge(event)
        else:
            self._pending.append(event if self._encode is None else self._encode(event))
        if self._waiter is not None and self._pending:
            self._wake_when_due()

    def close(self, outcome: Completion | RequestError) -> None:
        """The end; called once."""
        if isinstance(outcome, Completion):
            self._completion = outcome
        else:
            self._error, self.failed = outcome, True
            self._pending.clear()
        self._cancel = _nothing
        self._wake()

    # -- inside ---------------------------------------------------------------

    def _push_irregular(self, event: EngineEvent, count: int) -> None:
        text, self._lagging_text = self._lagging_text + event.text, ""
        if count == 0:
            self._lagging_text = text
        elif self._merge:
            self._keep_to_merge(EngineEvent(event.request_id, event.token_ids, text, logprobs=event.logprobs))
        else:  # one token a delta, also where the engine reports several; their text goes with the last
            for i, token_id in enumerate(event.token_ids):
                logprobs = None if event.logprobs is None else event.logprobs[i : i + 1]
                single = EngineEvent(event.request_id, (token_id,), text if i == count - 1 else "", logprobs=logprobs)
                self._pending.append(single if self._encode is None else self._encode(single))

    def _keep_to_merge(self, event: EngineEvent) -> None:
        self._pending.append(event)
        self._loose += 1
        if self._loose > COMPACT_AT:
            self._compact()

    def _take_lagging_text(self) -> str:
        text, self._lagging_text = self._lagging_text, ""
        return text

    async def _due(self) -> None:
        """Waits until something may be taken; raises the error the request ended with."""
        while self._error is None and self._completion is None:
            if self._pending and (not self._merge or self._clock.now_s() >= self._next_at_s):
                return
            await self._wait()
        if self._error is not None:
            raise self._error

    def _take_merged(self) -> EngineEvent | None:
        """Many events, in order, as one; None where there are none."""
        pending, tokens = self._pending, 0
        taken: list[EngineEvent] = []
        while pending and tokens < MAX_MERGED_TOKENS:
            event = pending.popleft()
            tokens += len(event.token_ids)
            taken.append(event)
        self._loose = min(self._loose, len(pending))
        self._next_at_s = -math.inf if pending else self._clock.now_s() + self._interval_s
        if not taken:
            return None
        return taken[0] if len(taken) == 1 else _merged(taken)

    def _compact(self) -> None:
        """Merges the events that came last, into the block before them where that is not full."""
        pending = self._pending
        tail = [pending.pop() for _ in range(min(self._loose, len(pending)))]
        if pending and len(pending[-1].token_ids) < MAX_MERGED_TOKENS:
            tail.append(pending.pop())
        pending.append(_merged(tail[::-1]))
        self._loose = 0

    async def _wait(self) -> None:
        if self._waiter is not None:
            raise RuntimeError(f"request {self.request_id!r}: a stream has one reader")
        self._waiter = asyncio.get_running_loop().create_future()
        if self._pending:
            self._wake_when_due()
        try:
            await self._waiter
        finally:
            self._waiter = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _wake_when_due(self) -> None:
        if not self._merge:
            self._wake()
            return
        if self._timer is not None or self._next_at_s == math.inf:  # inf: the reader waits for the end
            return
        wait_s = self._next_at_s - self._clock.now_s()
        if wait_s <= 0:
            self._wake()
        else:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._on_due)

    def _on_due(self) -> None:
        self._timer = None
        self._next_at_s = -math.inf  # timers may fire a little early
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _nothing(error: RequestError) -> None:
    """What `cancel` does after the end."""


def _merged(events: Sequence[EngineEvent]) -> EngineEvent:
    """One event with everything of `events`, in order, in as little memory as it takes."""
    token_ids = array("I")
    logprobs: list[Sequence[TokenLogprob]] | None = None
    for event in events:
        token_ids.extend(event.token_ids)
        if event.logprobs is not None:
            logprobs = logprobs if logprobs is not None else []
            logprobs.extend(event.logprobs)
    text = "".join([event.text for event in events])
    return EngineEvent(events[0].request_id, token_ids, text, logprobs=logprobs)
