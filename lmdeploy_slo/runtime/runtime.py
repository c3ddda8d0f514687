"""Drives the scheduler, a policy and an engine on one event loop.

    submit -> scheduler.add -> (snapshot -> policy, in a worker thread -> apply -> engine.submit) -> events -> stream

Every request ends exactly once, in `_end`, whatever ended it: its last token, an abort, its reader, its deadline, its
queue timeout, the engine, or the shutdown. From then on nothing here knows it.

Times. A request is judged by the instants at which the engine's events became known, on the clock given.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.request import ClientId, EndStatus, FinishReason, PriorityClass, RequestSpec
from lmdeploy_slo.core.slo import Timing
from lmdeploy_slo.engine.base import Engine, EngineEvent, EngineRequest
from lmdeploy_slo.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    QueueFull,
    QueueTimeout,
    RequestError,
    RequestIdInUse,
    Unattainable,
)
from lmdeploy_slo.runtime.decisions import DecisionLimits
from lmdeploy_slo.runtime.expectation import Expectation
from lmdeploy_slo.runtime.journal import Journal
from lmdeploy_slo.runtime.learning import Learning
from lmdeploy_slo.runtime.live import Live, RuntimeOptions
from lmdeploy_slo.runtime.plan_loop import PlanLoop
from lmdeploy_slo.runtime.planner import Planner
from lmdeploy_slo.runtime.recovery import Recovery
from lmdeploy_slo.runtime.start_order import StartOrder
from lmdeploy_slo.runtime.statistics import RuntimeLoad
from lmdeploy_slo.runtime.stream import Completion, Encoder, RequestStream
from lmdeploy_slo.scheduling.admission import Forecast, unmet_objectives
from lmdeploy_slo.scheduling.limits import Limiter, Ticket
from lmdeploy_slo.scheduling.policy import Policy
from lmdeploy_slo.scheduling.scheduler import Dispatch, Scheduler

logger = logging.getLogger(__name__)


class Runtime:
    """All methods on the loop that called `start`, from one thread."""

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        policy: Policy,
        clock: Clock,
        options: RuntimeOptions | None = None,
        *,
        limiter: Limiter | None = None,
        executor: Executor | None = None,
    ) -> None:
        """limiter: None for no limits but the scheduler's. executor: where plans are made, one at a time; a thread of
        its own where None is given."""
        self.engine = engine
        self.scheduler = scheduler
        self.policy = policy
        self.clock = clock
        self.options = options or RuntimeOptions()
        self.limiter = limiter or Limiter()
        self.on_serving_change: Callable[[], None] | None = None  # called when `serving` may have changed
        self._own_executor: Executor | None = None
        if executor is None:
            executor = self._own_executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="planner")
        self._planner = Planner(policy, executor, clock)
        self.journal = Journal(scheduler, clock, DecisionLimits(requests=self.options.explain_requests))
        self._plans = PlanLoop(
            scheduler,
            self._planner,
            StartOrder(engine, scheduler, policy, lambda h: self._by_handle[h].spec.request_id),
            self.journal,
            clock,
            self.options.plan_gap_s,
            report_progress=self._report_progress,
            dispatch=self._dispatch,
        )
        self._live: dict[str, Live] = {}
        self._by_handle: dict[int, Live] = {}
        self._learning = Learning(scheduler, engine.info.limits, self._by_handle, calibrate=self.options.calibrate)
        self.calibration = self._learning.calibration  # its `statistics` say how right forecasts of steps are
        self._in_engine: dict[str, Live] = {}
        self._leaving: set[str] = set()  # aborted in the engine, its last event still to come
        self._last_step_at_s = 0.0
        self._started = self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()
        self._expectation = Expectation(scheduler, clock, self._report_progress, keeps_order=not policy.wants_ticks)
        self.forecaster = self._expectation.forecaster  # what was learnt of how forecasts turn out
        self.recovery = Recovery(
            engine, scheduler, self._plans, self.options.hold_s, fail_all=self._fail_all, changed=self._tell_serving
        )

    # -- life -----------------------------------------------------------------

    async def start(self) -> None:
        """Ready for requests when it returns: policy compiled, engine up. Raises what either raises."""
        await self._planner.warm_up()
        await self.engine.start(self._on_events)
        limits = self.scheduler.limits
        if limits.kv_tokens is None:  # some engines know the size of their cache only once they are up
            self.scheduler.limits = replace(limits, kv_tokens=self.engine.info.limits.kv_tokens)
        self._plans.start()
        self._started = True

    async def drain(self, grace_s: float) -> None:
        """Takes no new requests, lets those here end for up to `grace_s` seconds, ends the rest with `Draining`."""
        self._draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), grace_s)
        except asyncio.TimeoutError:
            logger.warning("%d requests did not end within %g s", len(self._live), grace_s)
        self._end_all()

    async def close(self) -> None:
        """Ends whatever is left with `Draining`, closes the engine and the worker thread. Idempotent."""
        self._draining = True
        self._end_all()
        self.recovery.close()
        await self._plans.close()
        await self.engine.close()
        if self._own_executor is not None:
            self._own_executor.shutdown(wait=False)

    @property
    def serving(self) -> bool:
        """Whether a new request would be taken and the engine is not known to be gone."""
        return self._started and not self._draining and self.recovery.up

    # -- requests -------------------------------------------------------------

    def enter(self, client: ClientId, priority_class: PriorityClass, *, queues: bool = True) -> Ticket:
        """For a request that has come and is not read yet: a ticket for `submit`, or what is known to refuse it.

        queues: False where it is only asked about. Who gets a ticket hands it to `submit`, or has it leave. Raises
        Draining, EngineUnavailable (not started, or being restarted), and what `Limiter.enter` does; nothing is counted
        then.
        """
        self._check_open()
        return self.limiter.enter(client, self.clock.now_s(), priority_class, queues=queues)

    def submit(
        self,
        spec: RequestSpec,
        request: EngineRequest,
        *,
        deadline_at_s: float | None = None,
        encode: Encoder | None = None,
        ticket: Ticket | None = None,
        traceparent: str | None = None,
    ) -> RequestStream:
        """Queues a request; `deadline_at_s` is the instant of its hard cancel, `encode` as in `RequestStream`.

        ticket: from `enter`; None where it enters only now. traceparent: its caller's, for traces. Raises
        RequestIdInUse, Unattainable, DeadlineExceeded and what `enter` does; then nothing of it is kept, and it counts
        as refused.
        """
        now_s = self.clock.now_s()
        try:
            if deadline_at_s is not None and deadline_at_s <= now_s:
                raise DeadlineExceeded("the deadline passed before the request was read")
            if ticket is None:
                ticket = self.limiter.enter(spec.client, now_s, spec.priority_class)
            live = self._accept(spec, request, encode, ticket)
        except BaseException as refusal:
            if ticket is not None:
                ticket.leave(0, now_s)
            if isinstance(refusal, RequestError):
                self.journal.refused(refusal, spec, traceparent=traceparent)
            raise
        live.traceparent = traceparent
        loop = asyncio.get_running_loop()
        if spec.queue_timeout_s is not None:
            wait_s = max(0.0, spec.arrival_at_s + spec.queue_timeout_s - now_s)
            live.queue_timer = loop.call_later(wait_s, self._on_queue_timeout, live)
        if deadline_at_s is not None:
            live.deadline_timer = loop.call_later(deadline_at_s - now_s, self._on_deadline, live)
        self._plans.mark_stale()
        return live.stream

    def abort(self, request_id: str, *, of: str | None = None) -> bool:
        """Ends a request with `Cancelled`, waiting or running; False where none of that id is here.

        of: only one of the client of this name, or of its users; None: anybody's."""
        live = self._live.get(request_id)
        if live is None or of not in (None, live.spec.client.name):
            return False
        self._end(live, EndStatus.CANCELLED, Cancelled("aborted on request"))
        return True

    def predict(self, spec: RequestSpec) -> Forecast:
        """What would happen to this request if it were submitted now (see `scheduling.admission`)."""
        return self._expectation.of(spec, afresh=True)

    def load(self) -> RuntimeLoad:
        queue, counts, oldest_at_s = self.scheduler.statistics(), self.journal.counts, self.scheduler.oldest_arrival_s()
        return RuntimeLoad(
            waiting=queue.waiting,
            in_flight=queue.running,
            waiting_prompt_tokens=queue.waiting_prompt_tokens,
            kv_usage=self.engine.load().kv_usage,
            ended=dict(counts.by_status),
            refused=dict(counts.refused),
            with_slo=counts.with_slo,
            slo_met=counts.slo_met,
            planner=self._planner.statistics(),
            draining=self._draining,
            max_in_flight=self.scheduler.limits.max_batch_size,
            oldest_wait_s=None if oldest_at_s is None else self.clock.now_s() - oldest_at_s,
            output_tokens=self.journal.output_tokens + sum(live.output_tokens for live in self._in_engine.values()),
            last_plan=self.journal.last_plan,
            last_minute=self.journal.last_minute(),
            calibration=self.calibration.statistics(),
            serving=self.serving,
            engine_restarts=self.recovery.restarts,
            retried=counts.retried,
        )

    def _check_open(self) -> None:
        if self._draining:
            raise Draining("the server is shutting down")
        if not self._started:
            raise EngineUnavailable("the engine is not ready yet")
        self.recovery.check()

    def _accept(self, spec: RequestSpec, request: EngineRequest, encode: Encoder | None, ticket: Ticket) -> Live:
        request_id = spec.request_id
        self._check_open()
        if request_id in self._live or request_id in self._leaving:
            raise RequestIdInUse(f"request_id {request_id!r} belongs to a request that has not ended")
        expected = self._expectation.of(spec)
        if self.options.shed and spec.sheddable:
            unmet = unmet_objectives(spec.slo, expected)
            if unmet:
                hopeless = self._expectation.hopeless(spec, expected)
                raise Unattainable("; ".join(unmet), None if hopeless else self.limiter.retry_after_s())
        ticket.queue(spec.prompt_tokens + math.ceil(expected.output_tokens), self.clock.now_s())
        try:
            handle = self.scheduler.add(spec)
        except QueueFull as full:
            raise QueueFull(str(full), self.limiter.retry_after_s()) from None
        self._expectation.add(spec, expected)
        interval_s = self.options.flush_interval_s
        stream = RequestStream(request_id, self.clock, interval_s, lambda error: self._leave(live, error), encode)
        live = Live(spec, request, handle, ticket, stream, Timing(spec.arrival_at_s), expected)
        self._live[request_id] = self._by_handle[handle] = live
        self.journal.accepted(live)
        self._empty.clear()
        return live

    # -- dispatch -------------------------------------------------------------

    def _dispatch(self, dispatch: Dispatch, now_s: float) -> None:
        live = self._by_handle.get(dispatch.handle)
        if live is None:  # ended by what the dispatch of another one led to
            return
        live.rank = dispatch.rank
        live.timing.dispatched_at_s = now_s
        request_id = live.spec.request_id
        self._in_engine[request_id] = live
        if live.queue_timer is not None:
            live.queue_timer.cancel()
        live.ticket.start(now_s)
        try:
            self.engine.submit(live.request, dispatch.rank)
            live.attempts += 1
            self._learning.sent(live, now_s)
            self.recovery.seen(up=True)
        except InvalidRequest as refusal:
            self._end(live, EndStatus.REJECTED, refusal, in_engine=False)
        except EngineError as failure:
            self._fail(live, failure)
        except Exception:
            logger.exception("the engine raised on submit of %s", request_id, extra={"request_id": request_id})
            self._end(live, EndStatus.FAILED, EngineError("the engine failed"), in_engine=False)

    def _fail(self, live: Live, error: EngineError) -> None:
        """The engine failed it, and holds it no more: it waits again where it has shown nothing yet and an engine is to
        come, with what is left of its queue timeout; else it ends."""
        if isinstance(error, EngineUnavailable):
            self.recovery.seen(up=False)
            queue_timeout_s, now_s = live.spec.queue_timeout_s, self.clock.now_s()
            left_s = math.inf if queue_timeout_s is None else live.spec.arrival_at_s + queue_timeout_s - now_s
            if self.recovery.returning and live.timing.first_token_at_s is None and live.attempts <= 1 and left_s > 0:
                self._requeue(live, left_s, now_s)
                return
        self._end(live, EndStatus.FAILED, error, in_engine=False)

    def _requeue(self, live: Live, left_s: float, now_s: float) -> None:
        del self._in_engine[live.spec.request_id]
        self._learning.gone(live)
        live.timing.dispatched_at_s, live.rank = None, -1
        self.scheduler.requeue(live.handle)
        live.ticket.wait_again(now_s)
        if left_s < math.inf:
            live.queue_timer = asyncio.get_running_loop().call_later(left_s, self._on_queue_timeout, live)
        self.journal.requeued(live)

    def _tell_serving(self) -> None:
        if self.on_serving_change is not None:
            self.on_serving_change()

    def _report_progress(self) -> None:
        """Tells the scheduler what was generated since it last looked; one call a request, not one a token."""
        for live in self._in_engine.values():
            count = live.output_tokens - live.reported_tokens
            if count:
                live.reported_tokens = live.output_tokens
                self.scheduler.on_tokens(live.handle, count, self._last_step_at_s)

    # -- events ---------------------------------------------------------------

    def _on_events(self, events: Sequence[EngineEvent], at_s: float) -> None:
        """The engine's sink."""
        in_engine = self._in_engine
        self._last_step_at_s = at_s
        tokens = 0
        for event in events:  # every token passes here: what is common comes first
            live = in_engine.get(event.request_id)
            if live is None:
                self._on_stray_event(event)
                continue
            try:
                count = len(event.token_ids)
                if count:
                    live.output_tokens += count
                    live.last_token_at_s = at_s
                    if live.timing.first_token_at_s is None:
                        self._on_first_token(live, event, at_s)
                    else:
                        tokens += count
                if event.cached_tokens is not None:
                    live.cached_tokens = event.cached_tokens
                if event.end is None and event.error is None:
                    live.stream.push(event)
                else:
                    self._on_last_event(live, event, at_s)
            except Exception:  # the other requests of this step go on
                extra = {"request_id": event.request_id}
                logger.exception("an event of request %s could not be handled", event.request_id, extra=extra)
                self._end(live, EndStatus.FAILED, RequestError("internal error"))
        self._learning.step(at_s, tokens)
        if self.policy.wants_ticks:
            self._plans.mark_stale()

    def _on_first_token(self, live: Live, event: EngineEvent, at_s: float) -> None:
        live.timing.first_token_at_s = at_s
        live.reported_tokens = live.output_tokens
        self.scheduler.on_tokens(live.handle, live.output_tokens, at_s)
        self._learning.first_token(live, event, at_s)

    def _on_last_event(self, live: Live, event: EngineEvent, at_s: float) -> None:
        if event.error is not None:
            self._fail(live, event.error)
        elif event.end is None or event.end is FinishReason.ABORT:
            self._end(live, EndStatus.FAILED, EngineError("the engine ended it", "aborted"), in_engine=False)
        else:
            live.stream.push(event)
            completion = live.complete(event.end, at_s, self.options.instance or f"{self.engine.info.name}-0")
            self._end(live, EndStatus.FINISHED, completion, in_engine=False)

    def _on_stray_event(self, event: EngineEvent) -> None:
        """An event of a request that has ended here: its last one, or a token that nobody waits for."""
        if event.end is not None or event.error is not None:
            self._leaving.discard(event.request_id)
        else:  # the abort crossed with this token, or got lost; a second one does no harm
            self._abort_in_engine(event.request_id)

    def _on_queue_timeout(self, live: Live) -> None:
        timeout_s = live.spec.queue_timeout_s or 0.0
        self._end(live, EndStatus.TIMED_OUT, QueueTimeout(f"not started within {timeout_s * 1e3:g} ms"))

    def _on_deadline(self, live: Live) -> None:
        self._end(live, EndStatus.TIMED_OUT, DeadlineExceeded("the deadline passed"))

    # -- the end --------------------------------------------------------------

    def _leave(self, live: Live, error: RequestError) -> None:
        """The reader gave up."""
        timed_out = isinstance(error, DeadlineExceeded)
        self._end(live, EndStatus.TIMED_OUT if timed_out else EndStatus.CANCELLED, error)

    def _fail_all(self, error: EngineUnavailable) -> None:
        """There is no engine that holds anything."""
        for live in list(self._live.values()):
            self._end(live, EndStatus.FAILED, error, in_engine=False)

    def _end_all(self) -> None:
        for live in list(self._live.values()):
            self._end(live, EndStatus.FAILED, Draining("the server is shutting down"))

    def _end(
        self, live: Live, status: EndStatus, outcome: Completion | RequestError, *, in_engine: bool | None = None
    ) -> None:
        """The one place where a request ends; what comes second is ignored.

        in_engine: whether the engine still holds it; None: where it was dispatched.
        """
        if live.ended:
            return
        live.ended = True
        request_id = live.spec.request_id
        del self._live[request_id]
        del self._by_handle[live.handle]
        self._in_engine.pop(request_id, None)
        for timer in (live.queue_timer, live.deadline_timer):
            if timer is not None:
                timer.cancel()
        live.ticket.leave(live.spec.prompt_tokens + live.output_tokens, self.clock.now_s())
        live.stream.close(outcome)
        try:
            self._expectation.ended(live.spec, live.predicted, live.timing, status)
            if status is EndStatus.FINISHED:
                self.scheduler.finish(live.handle, live.output_tokens, self._last_step_at_s)
                self._learning.finished(live, self._last_step_at_s)
            else:
                self.scheduler.drop(live.handle)
                self._learning.gone(live)
        except Exception:  # what is learnt of a request must not undo its end
            logger.exception("the scheduler raised at the end of %s", request_id, extra={"request_id": request_id})
        self.journal.ended(live, status, outcome)
        if in_engine is None and live.timing.dispatched_at_s is not None:
            self._leaving.add(request_id)
            self._abort_in_engine(request_id)
        if not self._live:
            self._empty.set()
        self._plans.mark_stale()

    def _abort_in_engine(self, request_id: str) -> None:
        try:
            self.engine.abort(request_id)
        except Exception:
            logger.exception("the engine raised on abort of %s", request_id, extra={"request_id": request_id})
            self._leaving.discard(request_id)
