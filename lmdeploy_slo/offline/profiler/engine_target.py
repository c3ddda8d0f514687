"""An engine in the profiler's own process as its target: nothing stands between the two."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.engine.base import Engine, EngineEvent, EngineRequest, Stopping
from lmdeploy_slo.errors import Cancelled, SloError
from lmdeploy_slo.offline.profiler.target import Answer, TargetInfo

JITTER_S = 0.0005
"""Tokens of one pass have one instant, or nearly so where an engine tells of each request by itself."""


class EngineTarget:
    """See `target`. The engine's events are on the clock given, token by token."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._calls: dict[str, _EngineCall] = {}
        self._numbers = itertools.count()

    @property
    def info(self) -> TargetInfo:
        told = self._engine.info
        return TargetInfo(
            engine=told.name,
            model=told.model,
            synthetic=told.synthetic,
            limits=told.limits,
            max_session_tokens=told.max_session_tokens,
            vocab_size=told.vocab_size,
            versions=dict(told.details),
            jitter_s=JITTER_S,
        )

    def send(self, prompt: Sequence[int], output_tokens: int, *, watched: bool = True) -> _EngineCall:
        number = next(self._numbers)
        request_id = f"profile-{number}"
        stopping = Stopping(max_new_tokens=output_tokens, min_new_tokens=output_tokens, ignore_eos=True)
        emulated = output_tokens if self._engine.info.synthetic else None
        call = _EngineCall(self, request_id, self._clock.now_s())
        self._calls[request_id] = call
        try:
            self._engine.submit(EngineRequest(request_id, prompt, stopping, emulated_output_tokens=emulated), number)
        except SloError:
            del self._calls[request_id]
            raise
        return call

    async def in_flight(self) -> tuple[int, int]:
        load = self._engine.load()
        return load.in_flight, 0

    def abort(self, request_id: str) -> None:
        """What a call that is cancelled does."""
        if self._calls.pop(request_id, None) is not None:
            self._engine.abort(request_id)

    def on_events(self, events: Sequence[EngineEvent], at_s: float) -> None:
        """The engine's sink."""
        for event in events:
            call = self._calls.get(event.request_id)
            if call is None:
                continue
            call.take(event, at_s)
            if call.ended:
                del self._calls[event.request_id]


@asynccontextmanager
async def engine_target(engine: Engine, clock: Clock) -> AsyncIterator[EngineTarget]:
    """The engine, started inside the block and closed after it. Raises EngineUnavailable where it does not start."""
    target = EngineTarget(engine, clock)
    try:
        await engine.start(target.on_events)
        yield target
    finally:
        await engine.close()


class _EngineCall:
    """A request of an `EngineTarget`."""

    def __init__(self, target: EngineTarget, request_id: str, sent_at_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._target = target
        self._request_id = request_id
        self._sent_at_s = sent_at_s
        self._tokens = 0
        self._first_at_s = sent_at_s
        self._first: asyncio.Future[float] = loop.create_future()
        self._answer: asyncio.Future[Answer] = loop.create_future()

    @property
    def sent_at_s(self) -> float:
        return self._sent_at_s

    @property
    def ended(self) -> bool:
        return self._answer.done()

    @property
    def generated(self) -> int | None:
        return self._tokens

    async def first_token_at_s(self) -> float:
        return await asyncio.shield(self._first)

    async def answer(self) -> Answer:
        return await asyncio.shield(self._answer)

    def cancel(self) -> None:
        if not self.ended:
            self._end(Cancelled("the profiler is done with it"))
            self._target.abort(self._request_id)

    def take(self, event: EngineEvent, at_s: float) -> None:
        """What the engine says of it."""
        if event.token_ids and not self._tokens:
            self._first_at_s = at_s
            self._first.set_result(at_s)
        self._tokens += len(event.token_ids)
        if event.error is not None:
            self._end(event.error)
        elif event.end is not None:
            prefill_s = self._first_at_s - self._sent_at_s
            self._end(Answer(self._tokens, prefill_s, prefill_s, at_s - self._first_at_s))

    def _end(self, outcome: Answer | SloError) -> None:
        if isinstance(outcome, Answer):
            self._answer.set_result(outcome)
            if self._first.done():
                return
            outcome = SloError(f"the engine ended request {self._request_id} without a token")
        else:
            self._answer.set_exception(outcome)
            self._answer.exception()  # nobody need ask
        if not self._first.done():
            self._first.set_exception(outcome)
            self._first.exception()
