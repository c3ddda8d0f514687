"""Drives engines, each with its scheduler and its policy, on one event loop.

    submit -> fleet.place -> scheduler.add -> (snapshot -> policy, in a worker thread -> apply -> engine.submit)
           -> events -> stream

What happens at one engine is in `runtime.replica`; here is what concerns a request, wherever it is. Every request ends
exactly once, in `end`, whatever ended it: its last token, an abort, its reader, its deadline, its queue timeout, the
engine, or the shutdown. From then on nothing here knows it.

Times. A request is judged by the instants at which the engine's events became known, on the clock given.
"""

from __future__ import annotations

import asyncio
import logging
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import ClientId, EndStatus, PriorityClass, RequestSpec
from lmdeploy_slo.core.slo import Timing
from lmdeploy_slo.core.snapshot import Snapshot
from lmdeploy_slo.engine.base import Engine, EngineRequest
from lmdeploy_slo.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    EngineError,
    EngineUnavailable,
    QueueFull,
    QueueTimeout,
    RequestError,
    RequestIdInUse,
    Unattainable,
)
from lmdeploy_slo.prediction.calibration import Calibration
from lmdeploy_slo.runtime.decisions import DecisionLimits
from lmdeploy_slo.runtime.failover import Failover
from lmdeploy_slo.runtime.journal import Journal
from lmdeploy_slo.runtime.live import Live, RuntimeOptions
from lmdeploy_slo.runtime.planner import PlannerStatistics
from lmdeploy_slo.runtime.pool import EnginePool
from lmdeploy_slo.runtime.replica import Replica
from lmdeploy_slo.runtime.statistics import RuntimeLoad
from lmdeploy_slo.runtime.stream import Completion, Encoder, RequestStream
from lmdeploy_slo.scheduling.admission import Forecast, unmet_objectives
from lmdeploy_slo.scheduling.fleet import Fleet
from lmdeploy_slo.scheduling.forecaster import Forecaster
from lmdeploy_slo.scheduling.limits import Limiter, Ticket
from lmdeploy_slo.scheduling.placement import DEFAULT_PLACEMENT, make_placement
from lmdeploy_slo.scheduling.policy import Policy
from lmdeploy_slo.scheduling.scheduler import Dispatch, Scheduler

logger = logging.getLogger(__name__)


class Runtime:
    """All methods on the loop that called `start`, from one thread.

    lost: set once none of its engines will come back.
    """

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
        fleet: Fleet | None = None,
    ) -> None:
        """For one engine; `add` gives it more. limiter: None for no limits but the scheduler's. executor: where plans
        are made, one at a time; a thread of its own for each engine where None is given. fleet: empty; where there are
        to be several engines, the one whose `numbers` all schedulers take their handles from."""
        self.clock = clock
        self.options = options or RuntimeOptions()
        self.limiter = limiter or Limiter()
        self.lost = asyncio.Event()
        self.on_serving_change: Callable[[], None] | None = None  # called when `serving` may have changed
        self.journal = Journal(clock, DecisionLimits(requests=self.options.explain_requests))
        self._live: dict[str, Live] = {}
        self._by_handle: dict[int, Live] = {}
        self._pool = EnginePool(fleet or Fleet(make_placement(DEFAULT_PLACEMENT)), clock, self.journal, self._by_handle)
        self._failover = Failover(
            self._pool,
            clock,
            self.journal,
            self.options.retries,
            end=lambda live, error: self.end(live, EndStatus.FAILED, error, in_engine=False),
            queue_timeout=self._on_queue_timeout,
        )
        self._executor = executor
        self._started = self._draining = self._was_serving = False
        self._resumes = fleet is not None  # there may be another engine to go on in
        self._empty = asyncio.Event()
        self._empty.set()
        self.add(engine, scheduler, policy)

    # -- engines --------------------------------------------------------------

    def add(self, engine: Engine, scheduler: Scheduler, policy: Policy) -> Replica:
        """One more engine; nothing is placed there before its `start` has returned and `changed` was called. Those that
        are there when the runtime starts are started and opened with it."""
        number = self._pool.fleet.add(scheduler, policy)
        name = self.options.instance or engine.info.name
        if self.options.instance is None or self._resumes:
            name = f"{name}-{number}"
        replica = Replica(
            number, name, engine, scheduler, policy, self.clock, self.options, self, self._by_handle, self._executor
        )
        self._pool.add(replica)
        return replica

    async def remove(self, replica: Replica, grace_s: float) -> None:
        """Takes an engine away: who waits for it waits for another one, what runs in it may end for up to `grace_s`
        seconds, then goes on elsewhere. It must not be the only one that takes requests, now or by then, else
        ValueError; then, and where this is cancelled, it stays as it was."""
        needed = ValueError(f"{replica.name} is the only engine that takes requests")
        if not self._pool.others_open(replica):
            raise needed
        replica.draining = True
        self.changed(replica)
        try:
            await replica.drained(grace_s)
            if not replica.draining or not self._pool.others_open(replica):  # told to stay when it was the only one
                raise needed
            self._failover.evacuate(replica)
            self._pool.rebalance()
            self._pool.remove(replica)
        except BaseException:
            replica.draining = False
            self.changed(replica)
            raise
        self._tell_serving()
        await replica.close()

    def discard(self, replica: Replica) -> None:
        """Forgets an engine that was added and never opened; it is the caller's to close."""
        self._pool.remove(replica)

    @property
    def replicas(self) -> Mapping[int, Replica]:
        """Its engines, by number; at least one."""
        return self._pool.replicas

    @property
    def engine(self) -> Engine:
        """The first one: they are all of one model."""
        return self._pool.first.engine

    @property
    def scheduler(self) -> Scheduler:
        """Of the first engine."""
        return self._pool.first.scheduler

    @property
    def policy(self) -> Policy:
        """Of the first engine; they have all the same name."""
        return self._pool.first.policy

    @property
    def calibration(self) -> Calibration:
        """Of the first engine: its `statistics` say how right forecasts of steps are."""
        return self._pool.first.learning.calibration

    @property
    def forecaster(self) -> Forecaster:
        """What was learnt of how forecasts turn out."""
        return self._pool.first.expectation.forecaster

    # -- life -----------------------------------------------------------------

    async def start(self) -> None:
        """Ready for requests when it returns: policies compiled, engines up. Raises what any of them raises."""
        if self._resumes:  # there may be several, among which requests are placed on the loop
            await asyncio.get_running_loop().run_in_executor(self._executor, self._pool.fleet.warm_up)
        starting = [asyncio.ensure_future(replica.start()) for replica in self.replicas.values()]
        try:
            await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                task.cancel()
            await asyncio.wait(starting)
            raise
        self._started = True
        self._was_serving = True
        for replica in self.replicas.values():
            self.changed(replica)

    async def drain(self, grace_s: float) -> None:
        """Takes no new requests, lets those here end for up to `grace_s` seconds, ends the rest with `Draining`."""
        self._draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), grace_s)
        except asyncio.TimeoutError:
            logger.warning("%d requests did not end within %g s", len(self._live), grace_s)
        self._end_all()

    async def close(self) -> None:
        """Ends whatever is left with `Draining`, closes the engines and the worker threads. Idempotent."""
        self._draining = True
        self._end_all()
        await asyncio.gather(*(replica.close() for replica in self.replicas.values()))

    @property
    def serving(self) -> bool:
        """Whether a new request would be taken, and not all engines are known to be gone."""
        if not self._started or self._draining:
            return False
        return any(replica.up and self._pool.fleet.is_open(number) for number, replica in self.replicas.items())

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
        live.replica.plans.mark_stale()
        return live.stream

    def abort(self, request_id: str, *, of: str | None = None) -> bool:
        """Ends a request with `Cancelled`, waiting or running; False where none of that id is here.

        of: only one of the client of this name, or of its users; None: anybody's."""
        live = self._live.get(request_id)
        if live is None or of not in (None, live.spec.client.name):
            return False
        self.end(live, EndStatus.CANCELLED, Cancelled("aborted on request"))
        return True

    def predict(self, spec: RequestSpec) -> Forecast:
        """What would happen to this request if it were submitted now (see `scheduling.admission`)."""
        return self._pool.place(spec).expectation.of(spec, afresh=True)

    def load(self) -> RuntimeLoad:
        replicas = [replica.load() for replica in self.replicas.values()]
        counts, oldest_at_s = self.journal.counts, self._pool.oldest_arrival_s()
        usages = [one.kv_usage for one in replicas if one.kv_usage is not None]
        return RuntimeLoad(
            waiting=sum(one.waiting for one in replicas),
            in_flight=sum(one.in_flight for one in replicas),
            waiting_prompt_tokens=sum(one.waiting_prompt_tokens for one in replicas),
            kv_usage=max(usages, default=None),
            ended=dict(counts.by_status),
            refused=dict(counts.refused),
            with_slo=counts.with_slo,
            slo_met=counts.slo_met,
            planner=self._pool.planners(),
            draining=self._draining,
            max_in_flight=sum(one.max_in_flight for one in replicas),
            oldest_wait_s=None if oldest_at_s is None else self.clock.now_s() - oldest_at_s,
            output_tokens=self.journal.output_tokens + sum(live.output_tokens for live in self._live.values()),
            last_plan=self.journal.last_plan,
            last_minute=self.journal.last_minute(),
            calibration=replicas[0].calibration,
            serving=self.serving,
            engine_restarts=self._pool.restarts,
            retried=counts.retried,
            resumed=counts.resumed,
            replicas=tuple(replicas),
            predicted_attainment=self.journal.demand.of_last(60.0, self.clock.now_s()).attainment,
        )

    def _check_open(self) -> None:
        if self._draining:
            raise Draining("the server is shutting down")
        if not self._started:
            raise EngineUnavailable("the engine is not ready yet")
        if not self._pool.any_open:
            self._pool.first.recovery.check()
            raise EngineUnavailable("no engine takes requests now")

    def _accept(self, spec: RequestSpec, request: EngineRequest, encode: Encoder | None, ticket: Ticket) -> Live:
        request_id = spec.request_id
        self._check_open()
        if request_id in self._live or any(request_id in replica.leaving for replica in self.replicas.values()):
            raise RequestIdInUse(f"request_id {request_id!r} belongs to a request that has not ended")
        replica = self._pool.place(spec)
        expected = replica.expectation.of(spec)
        if self.options.shed and spec.sheddable:
            unmet = unmet_objectives(spec.slo, expected)
            if unmet:
                hopeless = replica.expectation.hopeless(spec, expected)
                raise Unattainable("; ".join(unmet), None if hopeless else self.limiter.retry_after_s())
        ticket.queue(spec.prompt_tokens + math.ceil(expected.output_tokens), self.clock.now_s())
        try:
            handle = replica.scheduler.add(spec)
        except QueueFull as full:
            raise QueueFull(str(full), self.limiter.retry_after_s()) from None
        replica.expectation.add(spec, expected)
        interval_s = self.options.flush_interval_s
        stream = RequestStream(request_id, self.clock, interval_s, lambda error: self._leave(live, error), encode)
        live = Live(spec, request, handle, ticket, stream, Timing(spec.arrival_at_s), expected, replica)
        if self._resumes and request.prepared is None:
            live.generated = array("I")
        self._live[request_id] = self._by_handle[handle] = live
        self.journal.accepted(live)
        self._empty.clear()
        return live

    # -- replicas tell (see `replica.Owner`) -----------------------------------

    def before_plan(self, replica: Replica) -> None:
        self._pool.rebalance()

    def failed(self, live: Live, error: EngineError) -> None:
        self._failover.failed(live, error)

    def planned(
        self,
        replica: Replica,
        snapshot: Snapshot,
        plan: Plan,
        dispatches: Sequence[Dispatch],
        planner: PlannerStatistics,
        now_s: float,
    ) -> None:
        self._pool.fleet.note_plan(replica.number, plan, now_s)
        self.journal.planned(replica.number, snapshot, plan, dispatches, planner, now_s)

    def changed(self, replica: Replica) -> None:
        """It takes requests if it is up and shall stay."""
        if replica.recovery.closed or replica.draining:
            self._pool.fleet.close(replica.number)
        elif replica.started:
            self._pool.fleet.open(replica.number)
        if not self._pool.any_open:
            for other in self.replicas.values():
                if other.draining and other.up:  # it is needed after all
                    other.stay()
                    self._pool.fleet.open(other.number)
        self._pool.rebalance()
        if all(other.recovery.lost.is_set() for other in self.replicas.values()):
            self.lost.set()
        self._tell_serving()

    def _tell_serving(self) -> None:
        was, self._was_serving = self._was_serving, self.serving
        if self.on_serving_change is not None and was != self._was_serving:
            self.on_serving_change()

    def held_too_long(self, replica: Replica, error: EngineUnavailable) -> None:
        in_engine = replica.in_engine  # those it held are told of by its events, and may go on elsewhere
        for live in [live for live in self._live.values() if live.replica is replica]:
            if live.spec.request_id not in in_engine:
                self.end(live, EndStatus.FAILED, error, in_engine=False)

    # -- the end --------------------------------------------------------------

    def _on_queue_timeout(self, live: Live) -> None:
        timeout_s = live.spec.queue_timeout_s or 0.0
        self.end(live, EndStatus.TIMED_OUT, QueueTimeout(f"not started within {timeout_s * 1e3:g} ms"))

    def _on_deadline(self, live: Live) -> None:
        self.end(live, EndStatus.TIMED_OUT, DeadlineExceeded("the deadline passed"))

    def _leave(self, live: Live, error: RequestError) -> None:
        """The reader gave up."""
        timed_out = isinstance(error, DeadlineExceeded)
        self.end(live, EndStatus.TIMED_OUT if timed_out else EndStatus.CANCELLED, error)

    def _end_all(self) -> None:
        for live in list(self._live.values()):
            self.end(live, EndStatus.FAILED, Draining("the server is shutting down"))

    def end(
        self, live: Live, status: EndStatus, outcome: Completion | RequestError, *, in_engine: bool | None = None
    ) -> None:
        """The one place where a request ends; what comes second is ignored.

        in_engine: whether the engine still holds it; None: where it was dispatched.
        """
        if live.ended:
            return
        live.ended = True
        request_id, replica = live.spec.request_id, live.replica
        del self._live[request_id]
        del self._by_handle[live.handle]
        dispatched = replica.in_engine.pop(request_id, None) is not None
        for timer in (live.queue_timer, live.deadline_timer):
            if timer is not None:
                timer.cancel()
        live.ticket.leave(live.spec.prompt_tokens + live.output_tokens, self.clock.now_s())
        live.stream.close(outcome)
        try:
            replica.expectation.ended(live.spec, live.predicted, live.timing, status)
        except Exception:
            logger.exception("what was foretold of %s could not be compared", request_id)
        try:
            replica.forget(live, finished=status is EndStatus.FINISHED, dispatched=dispatched)
        except Exception:  # what is learnt of a request must not undo its end
            logger.exception("the scheduler raised at the end of %s", request_id, extra={"request_id": request_id})
        self.journal.ended(live, status, outcome)
        if in_engine is None and dispatched:
            replica.abort(request_id)
        if not self._live:
            self._empty.set()
        replica.plans.mark_stale()
