"""What a remote engine and its host say to each other, and the host's bounded memory of what it has not said yet.

Bytes in both directions, pickled: both ends run this package in the same version. A request is a number here, given by
the caller of the engine and never used again, so that nothing late is taken for something new.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.engine.base import EngineEvent, EngineRequest, TokenLogprob
from lmdeploy_slo.errors import EngineError, EngineUnavailable, RequestError

MAX_STEPS = 64
"""Steps of an engine that wait for their reader one by one; beyond, they become one."""

OFFSET_WINDOW_S = 60.0
"""Two clocks that differ by 50 millionths drift 6 ms apart in two of these."""

Failure: TypeAlias = tuple[bool, str, str]
"""(the engine is gone, text, code)."""

WireEvent: TypeAlias = tuple[Any, ...]
"""(number, token ids, text), and, where there is more to say, end, failure, logprobs, cached tokens, queued and
scheduled at."""


@dataclass(frozen=True, slots=True)
class Commands:
    """One turn's worth for the host; counted without a gap from 1. Aborts come first, ranks last."""

    count: int
    aborts: Sequence[int] = ()
    submits: Sequence[tuple[int, int, EngineRequest]] = ()  # (number, rank, request)
    ranks: Mapping[int, int] = field(default_factory=dict)  # by number

    def encoded(self) -> bytes:
        return pickle.dumps((self.count, self.aborts, self.submits, self.ranks), pickle.HIGHEST_PROTOCOL)

    @classmethod
    def decoded(cls, data: bytes) -> Commands:
        return cls(*pickle.loads(data))


@dataclass(frozen=True, slots=True)
class Report:
    """What became of requests. sent_at_s, and the instants of the steps, are on the host's clock.

    taken: commands that were carried out, by their count. load: active, kv_tokens_used, kv_usage, gone, steps, as in
    `EngineLoad`. steps: (instant, events). logs: (level, logger, text) of warnings and errors, where there are any.
    """

    sent_at_s: float
    taken: int
    load: tuple[int, int | None, float | None, str | None, int | None]
    steps: Sequence[tuple[float, Sequence[WireEvent]]]
    logs: Sequence[tuple[int, str, str]] = ()

    def encoded(self) -> bytes:
        values = (self.sent_at_s, self.taken, self.load, self.steps, self.logs)
        return pickle.dumps(values, pickle.HIGHEST_PROTOCOL)

    @classmethod
    def decoded(cls, data: bytes) -> Report:
        return cls(*pickle.loads(data))


_NO_MORE = (None,) * 6


def wire_event(number: int, event: EngineEvent) -> WireEvent:
    more = (
        None if event.end is None else event.end.value,
        None if event.error is None else failure_of(event.error),
        event.logprobs,
        event.cached_tokens,
        event.queued_at_s,
        event.scheduled_at_s,
    )
    told = number, event.token_ids, event.text
    return told if more == _NO_MORE else told + more


def engine_event(request_id: str, event: WireEvent, offset_s: float) -> EngineEvent:
    """offset_s: what is added to instants of the host."""
    if len(event) == 3:
        return EngineEvent(request_id, event[1], event[2])
    _, token_ids, text, end, failure, logprobs, cached_tokens, queued_at_s, scheduled_at_s = event
    return EngineEvent(
        request_id,
        token_ids,
        text,
        None if end is None else FinishReason(end),
        None if failure is None else error_of(failure),
        logprobs,
        cached_tokens,
        None if queued_at_s is None else queued_at_s + offset_s,
        None if scheduled_at_s is None else scheduled_at_s + offset_s,
    )


def failure_of(error: RequestError) -> Failure:
    """Exceptions themselves do not travel: what they need to be built again differs from one to the next."""
    code = error.code if isinstance(error, EngineError) else error.reason.lower()
    return isinstance(error, EngineUnavailable), str(error), code


def error_of(failure: Failure) -> EngineError:
    gone, text, code = failure
    return EngineUnavailable(text) if gone else EngineError(text, code)


@dataclass(frozen=True, slots=True)
class OutboxStatistics:
    """steps: that wait now, of at most `max_steps`. merges: how often they became one."""

    steps: int
    max_steps: int
    merges: int


class Outbox:
    """Steps that nobody has fetched yet, at most `max_steps` of them: a reader that is slow gets the tokens of several
    steps of a request as one event, at the instant of the last, and none is lost. So it holds that many steps, and the
    tokens of requests whose end was not fetched."""

    def __init__(self, max_steps: int = MAX_STEPS) -> None:
        self._merges = 0
        self._max_steps = max_steps
        self._steps: list[tuple[float, Sequence[WireEvent]]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def statistics(self) -> OutboxStatistics:
        return OutboxStatistics(len(self._steps), self._max_steps, self._merges)

    def add(self, at_s: float, events: Sequence[WireEvent]) -> None:
        self._steps.append((at_s, events))
        if len(self._steps) > self._max_steps:
            self._merge()

    def take(self) -> Sequence[tuple[float, Sequence[WireEvent]]]:
        taken, self._steps = self._steps, []
        return taken

    def _merge(self) -> None:
        self._merges += 1
        by_number: dict[int, list[WireEvent]] = {}
        for _, events in self._steps:
            for event in events:
                by_number.setdefault(event[0], []).append(event)
        at_s = self._steps[-1][0]
        self._steps = [(at_s, [merged(events) for events in by_number.values()])]


def merged(events: Sequence[WireEvent]) -> WireEvent:
    """Events of one request as one."""
    if len(events) == 1:
        return events[0]
    token_ids = [token_id for event in events for token_id in event[1]]
    text = "".join(event[2] for event in events)
    if all(len(event) == 3 for event in events):
        return events[0][0], token_ids, text
    longer = [event for event in events if len(event) > 3]
    logprobs: list[Sequence[TokenLogprob]] | None = None
    if any(event[5] is not None for event in longer):
        logprobs = [each for event in longer for each in event[5] or ()]
    first = [next((event[at] for event in longer if event[at] is not None), None) for at in (6, 7, 8)]
    return (events[0][0], token_ids, text, longer[-1][3], longer[-1][4], logprobs, *first)


class ClockOffset:
    """What must be added to the host's instants to have them on this clock: the smallest (receipt - sending) of the
    last one to two windows, for a message needs some time and never less than none. So an instant is told later than it
    was by the journey of the quickest message at most, and never after the receipt of the message that told it. Clocks
    that drift apart are followed."""

    def __init__(self, window_s: float = OFFSET_WINDOW_S) -> None:
        self._window_s = window_s
        self._ends_at_s = -math.inf
        self._before = self._now = math.inf  # smallest of the last window, and of this

    def observe(self, sent_at_s: float, received_at_s: float) -> float:
        """The offset by now, seconds. sent_at_s on the host's clock."""
        if received_at_s >= self._ends_at_s:
            self._before, self._now = self._now, math.inf
            self._ends_at_s = received_at_s + self._window_s
        self._now = min(self._now, received_at_s - sent_at_s)
        return min(self._before, self._now)
