"""An engine that does what a test tells it, step by step, and a runtime on it whose planning the test controls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import EngineEvent, EngineInfo, EngineLoad, EngineRequest, EventSink
from lmdeploy_slo.engine.synthetic_tokenizer import VOCAB_SIZE, SyntheticTokenizer
from lmdeploy_slo.errors import EngineError, EngineUnavailable
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.runtime.runtime import Runtime, RuntimeOptions
from lmdeploy_slo.scheduling.limits import Limiter
from lmdeploy_slo.scheduling.policy import Policy
from lmdeploy_slo.scheduling.rules import RulePolicy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import NO_TIME

WAIT_S = 20.0  # how long a test waits for an event before it fails; never slept


class ScriptedEngine:
    """Keeps what it is given; nothing happens until the test emits."""

    def __init__(self, clock: Clock, *, limits: EngineLimits | None = None, **info: Any) -> None:
        defaults: dict[str, Any] = {
            "name": "scripted",
            "model": "scripted-model",
            "synthetic": True,
            "max_session_tokens": None,
            "vocab_size": VOCAB_SIZE,
        }
        self.info = EngineInfo(limits=limits or EngineLimits(), **(defaults | info))
        self.tokenizer = SyntheticTokenizer()
        self.requests: dict[str, EngineRequest] = {}  # in the engine
        self.ranks: dict[str, int] = {}
        self.submitted: list[str] = []
        self.aborts: list[str] = []
        self.unsupported: list[tuple[str, str]] = []
        self.submit_error: Exception | None = None
        self.abort_error: Exception | None = None
        self.deaf = False  # aborts are ignored
        self.confirms_late = False  # the event that follows an abort is left to the test
        self._clock = clock
        self._sink: EventSink | None = None
        self._changed = asyncio.Event()

    # -- what the runtime calls -----------------------------------------------

    async def start(self, sink: EventSink) -> None:
        self._sink = sink

    def submit(self, request: EngineRequest, rank: int) -> None:
        if self.submit_error is not None:
            raise self.submit_error
        assert request.request_id not in self.requests, "an id is used twice"
        self.requests[request.request_id] = request
        self.ranks[request.request_id] = rank
        self.submitted.append(request.request_id)
        self._changed.set()

    def rerank(self, ranks: Mapping[str, int]) -> None:
        self.ranks.update(ranks)

    def abort(self, request_id: str) -> None:
        self.aborts.append(request_id)
        self._changed.set()
        if self.abort_error is not None:
            raise self.abort_error
        if request_id in self.requests and not self.deaf:
            del self.requests[request_id]
            if not self.confirms_late:
                self.send(EngineEvent(request_id, end=FinishReason.ABORT))

    def load(self) -> EngineLoad:
        return EngineLoad(len(self.requests), len(self.requests), None, 0.25)

    async def close(self) -> None:
        self.crash("the engine was closed")

    def unsupported_fields(self, request: EngineRequest) -> Sequence[tuple[str, str]]:
        return self.unsupported

    # -- what the test calls --------------------------------------------------

    def send(self, *events: EngineEvent) -> None:
        assert self._sink is not None
        self._sink(events, self._clock.now_s())

    def emit(self, request_id: str, *token_ids: int, end: FinishReason | None = None, **fields: Any) -> None:
        """One event of one request; its text is its tokens', unless given."""
        fields.setdefault("text", self.tokenizer.decode(token_ids))
        if end is not None or fields.get("error") is not None:
            self.requests.pop(request_id, None)
        self.send(EngineEvent(request_id, token_ids, end=end, **fields))

    def step(self, *finishing: str) -> None:
        """One token for everything in the engine; the last one for those named."""
        events = []
        for request_id in list(self.requests):
            end = FinishReason.STOP if request_id in finishing else None
            if end is not None:
                del self.requests[request_id]
            events.append(EngineEvent(request_id, (97,), "a", end=end))
        self.send(*events)

    def crash(self, message: str = "the engine crashed") -> None:
        gone, self.requests = list(self.requests), {}
        self.submit_error = EngineUnavailable(message)
        if gone and self._sink is not None:
            self.send(*(EngineEvent(request_id, error=EngineUnavailable(message)) for request_id in gone))

    def fail(self, request_id: str) -> None:
        self.emit(request_id, error=EngineError("out of memory", code="oom"), text="")

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns when `condition` holds; it is looked at after every submit and abort."""
        while not condition():
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), WAIT_S)

    async def has(self, *request_ids: str) -> None:
        await self.until(lambda: all(r in self.requests for r in request_ids))


class InlineExecutor(Executor):
    """Runs what it is given at once, in the caller's thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class ManualExecutor(InlineExecutor):
    """Keeps what it is given until the test lets it run; `calls` counts what came."""

    def __init__(self) -> None:
        self.held: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.holds = False
        self.calls = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.calls += 1
        if not self.holds:
            return super().submit(fn, *args, **kwargs)
        future: Future[Any] = Future()
        self.held.append((future, lambda: fn(*args, **kwargs)))
        return future

    def release(self) -> None:
        held, self.held = self.held, []
        for future, call in held:
            if future.set_running_or_notify_cancel():
                future.set_result(call())


def make_runtime(
    engine: ScriptedEngine,
    clock: Clock,
    *,
    policy: Policy | None = None,
    max_queued_requests: int | None = None,
    executor: Executor | None = None,
    limiter: Limiter | None = None,
    **options: Any,
) -> Runtime:
    """Arrival order, one token a delta, no gap between plans, planned inline, unless said otherwise."""
    scheduler = Scheduler(
        limits=engine.info.limits,
        model=NO_TIME,
        lengths=TaskLengthPredictor(),
        max_queued_requests=max_queued_requests,
    )
    options = {"flush_interval_s": 0.0, "plan_gap_s": 0.0} | options
    policy = policy or RulePolicy("fcfs")
    executor = executor or InlineExecutor()
    return Runtime(engine, scheduler, policy, clock, RuntimeOptions(**options), limiter=limiter, executor=executor)


async def turns(count: int = 20) -> None:
    """Lets whatever is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)
