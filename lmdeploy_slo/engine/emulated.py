"""An engine without a GPU and without a model: TurboMind's persistent batch in time, synthetic tokens in content.

Time. Steps follow a nominal schedule: each starts where the one before it nominally ended, the first of a busy period
at the instant of the submit that ended the idleness. A request joins the first step that nominally starts at or after
its submit; all submits of one turn of the loop share one instant. Tokens are sent when the loop gets to them, never
before the nominal end of their step; late timers and a busy loop delay tokens, not the schedule. A step without
duration starts when the loop gets to it.

Content. See `synthetic_text`; the tokenizer is `SyntheticTokenizer`.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine import batch, synthetic_text
from lmdeploy_slo.engine.base import EngineEvent, EngineInfo, EngineLoad, EngineRequest, EventSink
from lmdeploy_slo.engine.faults import NO_FAULTS, Faults
from lmdeploy_slo.engine.synthetic_tokenizer import VOCAB_SIZE, SyntheticTokenizer
from lmdeploy_slo.errors import EngineError, EngineUnavailable, FieldViolation, InvalidRequest

_EARLY_S = 1e-6
"""A timer this much early counts as on time: the rounding of floating-point instants."""

_TIMER_RESOLUTION_S = 1e-3
"""Of uvloop's timers, which may fire early by as much; shorter waits would spin."""


_CYCLE = len(synthetic_text.TEXTS)


@dataclass(slots=True, eq=False)
class _Stream:
    """A request in flight. `next_token` counts through the cycle of `synthetic_text`."""

    request_id: str
    sequence: batch.Sequence
    next_token: int
    texts: Iterator[str] | None  # what the coming tokens show; None: their own text
    end: FinishReason | None  # how it ends with its last token, if it does not fail then
    error: EngineError | None
    shows_last_token: bool  # False where it fails before its first token


class EmulatedEngine:
    """See the module; `engine.base.Engine` says what each method promises.

    model: seconds. seed: of the lengths nobody dictates. max_session_tokens: prompt + output, >= 2; None: unbounded.
    model_name, profile: only told, in `info`.
    """

    def __init__(
        self,
        model: StepModel,
        limits: EngineLimits,
        clock: Clock,
        *,
        seed: int = 0,
        max_session_tokens: int | None = None,
        faults: Faults = NO_FAULTS,
        model_name: str = "emulated",
        profile: str = "custom",
    ) -> None:
        if max_session_tokens is not None and max_session_tokens < 2:
            raise ValueError(f"max_session_tokens must be at least 2, got {max_session_tokens}")
        self._clock = clock
        self._seed = seed
        self._faults = faults
        self._info = EngineInfo(
            name="emulated",
            model=model_name,
            synthetic=True,
            limits=limits,
            max_session_tokens=max_session_tokens,
            vocab_size=VOCAB_SIZE,
            details={"profile": profile},
        )
        self._tokenizer = SyntheticTokenizer()
        self._batch = batch.PersistentBatch(model, limits)
        self._streams: dict[Hashable, _Stream] = {}  # by request id
        self._arriving: dict[str, tuple[float, batch.Sequence]] = {}  # (submitted at), not handed to the batch yet
        self._outbox: list[EngineEvent] = []  # ends that are due on the next turn of the loop
        self._sink: EventSink | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn_at_s: float | None = None  # instant of this turn's submits; None: none yet
        self._step_ends_at_s: float | None = None  # nominal; None: no step is running
        self._wakeup: asyncio.Handle | None = None  # the timer or callback that will run `_advance`
        self._stalled_at_s: float | None = None
        self._released_at_s = -math.inf  # of the last stall
        self._gone: str | None = None  # why no more requests are taken
        self._steps = 0

    # -- what callers may ask -------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def tokenizer(self) -> SyntheticTokenizer:
        return self._tokenizer

    def load(self) -> EngineLoad:
        kv_tokens, used = self._info.limits.kv_tokens, self._batch.kv_tokens_used
        return EngineLoad(
            in_flight=len(self._streams),
            active=self._batch.active,
            kv_tokens_used=used,
            kv_usage=None if kv_tokens is None else used / kv_tokens,
            gone=self._gone,
            steps=self._steps,
        )

    def unsupported_fields(self, request: EngineRequest) -> Sequence[tuple[str, str]]:
        limits = self._info.limits
        prompt_tokens, session_tokens = len(request.prompt_token_ids), self._info.max_session_tokens
        wrong = []
        if request.sampling.logprobs is not None:
            wrong.append(("sampling.logprobs", "synthetic tokens have no probabilities"))
        if prompt_tokens < 1:
            wrong.append(("prompt", "needs at least one token"))
        if session_tokens is not None and prompt_tokens >= session_tokens:
            wrong.append(("prompt", f"{prompt_tokens} tokens leave no room in a session of {session_tokens}"))
        if limits.kv_tokens is not None and prompt_tokens > limits.kv_tokens:
            wrong.append(("prompt", f"{prompt_tokens} tokens exceed the KV cache of {limits.kv_tokens}"))
        return wrong

    # -- the engine's life ----------------------------------------------------

    async def start(self, sink: EventSink) -> None:
        if self._gone is not None:
            raise EngineUnavailable(self._gone)
        if self._sink is not None:
            raise EngineUnavailable("the engine was started already")
        self._sink = sink
        self._loop = asyncio.get_running_loop()

    async def close(self) -> None:
        self._end_all("the engine was closed")
        self._flush()

    # -- requests -------------------------------------------------------------

    def submit(self, request: EngineRequest, rank: int) -> None:
        if self._gone is not None or self._loop is None:
            raise EngineUnavailable(self._gone or "the engine was not started")
        violations = [FieldViolation(*wrong) for wrong in self.unsupported_fields(request)]
        if request.request_id in self._streams or any(e.request_id == request.request_id for e in self._outbox):
            violations.append(FieldViolation("request_id", f"{request.request_id!r} is in the engine already"))
        if violations:
            raise InvalidRequest(violations)
        stream = self._stream_of(request, rank)
        self._streams[request.request_id] = stream
        if self._turn_at_s is None:
            self._turn_at_s = self._clock.now_s()
            self._loop.call_soon(self._end_turn)
        self._arriving[request.request_id] = (self._turn_at_s, stream.sequence)
        if self._step_ends_at_s is None and self._wakeup is None and self._stalled_at_s is None:
            self._sleep(self._turn_at_s)

    def rerank(self, ranks: Mapping[str, int]) -> None:
        for request_id, rank in ranks.items():
            arriving = self._arriving.get(request_id)
            if arriving is not None:
                arriving[1].rank = rank
            else:
                self._batch.rerank(request_id, rank)

    def abort(self, request_id: str) -> None:
        """The event that ends the request is sent on the next turn of the loop; no token of it comes before."""
        if request_id in self._streams and self._faults.lost_aborts > 0:
            self.inject(replace(self._faults, lost_aborts=self._faults.lost_aborts - 1))
        elif self._drop(request_id):
            self._post(EngineEvent(request_id, end=FinishReason.ABORT))

    # -- faults ---------------------------------------------------------------

    def inject(self, faults: Faults) -> None:
        """Replaces what goes wrong from now on."""
        self._faults = faults

    def fail(self, request_id: str, error: EngineError | None = None) -> None:
        """Ends a request with `error`; one that is not in flight is ignored."""
        if self._drop(request_id):
            self._post(EngineEvent(request_id, error=error or EngineError("a fault was injected", code="injected")))

    def stall(self) -> None:
        """Time stands still for the batch until `release`; submit and abort go on working."""
        if self._stalled_at_s is None:
            self._stalled_at_s = self._clock.now_s()
            self._sleep()

    def release(self) -> None:
        """Ends a stall: the step that was running needs what was left of it."""
        if self._stalled_at_s is None or self._loop is None:
            return
        self._released_at_s = self._clock.now_s()
        if self._step_ends_at_s is not None:
            self._step_ends_at_s += self._released_at_s - self._stalled_at_s
        self._stalled_at_s = None
        self._sleep(self._released_at_s if self._step_ends_at_s is None else self._step_ends_at_s)

    def crash(self, message: str = "the engine crashed") -> None:
        """All in flight end with EngineUnavailable on the next turn of the loop; submit raises it from now on."""
        self._end_all(message)

    # -- inside: requests -----------------------------------------------------

    def _stream_of(self, request: EngineRequest, rank: int) -> _Stream:
        prompt_tokens, fails_after = len(request.prompt_token_ids), self._faults.fail_after_tokens
        room = [sys.maxsize]
        if self._info.max_session_tokens is not None:
            room.append(self._info.max_session_tokens - prompt_tokens)
        if self._info.limits.kv_tokens is not None:
            room.append(self._info.limits.kv_tokens - prompt_tokens + 1)  # the last token is never cached
        output = synthetic_text.synthesize(request, max_tokens=min(room), seed=self._seed)
        tokens, error = output.tokens, None
        if fails_after.get(request.request_id, tokens) < tokens:
            tokens, error = fails_after[request.request_id], EngineError("a fault was injected", code="injected")
        return _Stream(
            request_id=request.request_id,
            sequence=batch.Sequence(request.request_id, prompt_tokens, max(1, tokens), rank=rank),
            next_token=output.start,
            texts=None if output.texts is None else iter(output.texts),
            end=output.end if error is None else None,
            error=error,
            shows_last_token=tokens > 0,
        )

    def _drop(self, request_id: str) -> bool:
        """Forgets a request in flight, with all it held; False where it is not in flight."""
        if self._streams.pop(request_id, None) is None:
            return False
        if self._arriving.pop(request_id, None) is None:
            self._batch.cancel(request_id)
        return True

    def _post(self, event: EngineEvent) -> None:
        """Sends an event on the next turn of the loop: the sink is never called from within a call of its owner."""
        assert self._loop is not None
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(event)

    def _flush(self) -> None:
        events, self._outbox = self._outbox, []
        if events and self._sink is not None:
            self._sink(events, self._clock.now_s())

    def _end_all(self, message: str) -> None:
        if self._gone is not None:
            return
        self._gone = message
        self._sleep()
        self._step_ends_at_s = None
        for stream in [*self._streams.values()]:
            self._drop(stream.request_id)
            self._post(EngineEvent(stream.request_id, error=EngineUnavailable(message)))

    # -- inside: time ---------------------------------------------------------

    def _end_turn(self) -> None:
        self._turn_at_s = None

    def _sleep(self, until_s: float | None = None) -> None:
        """Has `_advance` run at an instant, or not at all."""
        if self._wakeup is not None:
            self._wakeup.cancel()
            self._wakeup = None
        if until_s is not None and self._loop is not None:
            wait_s = until_s - self._clock.now_s()
            # call_soon rather than a loop here: steps that are late, or take no time, let others run in between.
            if wait_s > 0:
                self._wakeup = self._loop.call_later(wait_s, self._advance)
            else:
                self._wakeup = self._loop.call_soon(self._advance)

    def _advance(self) -> None:
        """Ends the step that is running, if its time has come, and begins the next."""
        self._wakeup = None
        ends_at_s, now_s = self._step_ends_at_s, self._clock.now_s()
        if ends_at_s is None:
            self._begin_step(-math.inf)
        elif now_s < ends_at_s - _EARLY_S:
            self._sleep(max(ends_at_s, now_s + _TIMER_RESOLUTION_S))
        else:
            self._step_ends_at_s = None
            try:
                self._end_step(now_s)
            finally:  # a sink that raises is a defect, but must not stop the batch
                self._begin_step(ends_at_s)

    def _begin_step(self, start_at_s: float) -> None:
        """Begins the step that nominally starts at `start_at_s`, or, where nothing runs, when the next request came."""
        self._take_arrived(start_at_s)
        if not len(self._batch):
            if not self._arriving:
                return
            start_at_s = max(next(iter(self._arriving.values()))[0], self._released_at_s)
            self._take_arrived(start_at_s)
        duration_s = self._batch.begin_step()
        assert duration_s is not None, "a batch that holds requests has a step to do"
        duration_s *= self._faults.slow_factor
        self._step_ends_at_s = start_at_s + duration_s if duration_s > 0 else self._clock.now_s()
        if self._stalled_at_s is None:
            self._sleep(self._step_ends_at_s)

    def _take_arrived(self, until_s: float) -> None:
        while self._arriving:
            request_id, (at_s, sequence) = next(iter(self._arriving.items()))
            if at_s > until_s:
                return
            del self._arriving[request_id]
            self._batch.submit(sequence)

    def _end_step(self, now_s: float) -> None:
        self._steps += 1
        events: list[EngineEvent] = []
        streams, ids, texts, cycle = self._streams, synthetic_text.TOKEN_IDS, synthetic_text.TEXTS, _CYCLE
        for sequence, last in self._batch.end_step():
            stream = streams[sequence.key]
            at = stream.next_token
            stream.next_token = at + 1 if at + 1 < cycle else 0
            event = EngineEvent(stream.request_id, ids[at], texts[at] if stream.texts is None else next(stream.texts))
            events.append(event)
            if last:
                self._end_stream(stream, event)
                if self._faults.duplicate_ends > 0:
                    self.inject(replace(self._faults, duplicate_ends=self._faults.duplicate_ends - 1))
                    events.append(event)
        assert self._sink is not None
        if events:
            self._sink(events, now_s)
        steps_left = self._faults.crash_after_steps
        if steps_left is not None:
            self.inject(replace(self._faults, crash_after_steps=steps_left - 1 or None))
            if steps_left == 1:
                self.crash()

    def _end_stream(self, stream: _Stream, event: EngineEvent) -> None:
        event.end, event.error = stream.end, stream.error
        if not stream.shows_last_token:
            event.token_ids, event.text = (), ""
        del self._streams[stream.request_id]
