"""One engine of the runtime: what goes in, what comes out, and what is learnt from it.

Each has its own scheduler, policy, plans and models, for engines differ. What is done with a request when its engine
fails, and where new ones go, is the runtime's business, which is told through `Owner`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Protocol

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import EndStatus, FinishReason
from lmdeploy_slo.core.snapshot import Snapshot
from lmdeploy_slo.engine.base import Engine, EngineEvent
from lmdeploy_slo.errors import EngineError, EngineUnavailable, InvalidRequest, RequestError
from lmdeploy_slo.runtime.expectation import Expectation
from lmdeploy_slo.runtime.learning import Learning
from lmdeploy_slo.runtime.live import Live, RuntimeOptions
from lmdeploy_slo.runtime.plan_loop import PlanLoop
from lmdeploy_slo.runtime.planner import Planner, PlannerStatistics
from lmdeploy_slo.runtime.recovery import Recovery
from lmdeploy_slo.runtime.start_order import StartOrder
from lmdeploy_slo.runtime.statistics import ReplicaLoad
from lmdeploy_slo.runtime.stream import Completion
from lmdeploy_slo.scheduling.policy import Policy
from lmdeploy_slo.scheduling.scheduler import Dispatch, Scheduler

logger = logging.getLogger(__name__)


class Owner(Protocol):
    """What a replica tells its runtime."""

    def end(
        self, live: Live, status: EndStatus, outcome: Completion | RequestError, *, in_engine: bool | None = None
    ) -> None:
        """A request ends. in_engine: whether the engine still holds it; None: where it was dispatched."""
        ...

    def failed(self, live: Live, error: EngineError) -> None:
        """The engine failed it, and holds it no more."""
        ...

    def before_plan(self, replica: Replica) -> None:
        """A plan is about to be made: who waits elsewhere and would do better here may still come."""
        ...

    def planned(
        self,
        replica: Replica,
        snapshot: Snapshot,
        plan: Plan,
        dispatches: Sequence[Dispatch],
        planner: PlannerStatistics,
        now_s: float,
    ) -> None:
        """A plan was applied; `dispatches` are about to be sent."""
        ...

    def changed(self, replica: Replica) -> None:
        """It came up or went down."""
        ...

    def held_too_long(self, replica: Replica, error: EngineUnavailable) -> None:
        """Nothing is in its engine, and those that wait for it shall wait no longer."""
        ...


class Replica:
    """All methods on the runtime's loop.

    number: in the fleet. name: the instance, as clients are told. in_engine: requests the engine holds, by id; leaving:
    those aborted there, whose last event is still to come. draining: it takes no more, and will be removed.
    """

    def __init__(
        self,
        number: int,
        name: str,
        engine: Engine,
        scheduler: Scheduler,
        policy: Policy,
        clock: Clock,
        options: RuntimeOptions,
        owner: Owner,
        by_handle: Mapping[int, Live],
        executor: Executor | None = None,
    ) -> None:
        """by_handle: all requests of the runtime. executor: where plans are made, one at a time; a thread of its own
        where None is given."""
        self.number = number
        self.name = name
        self.engine = engine
        self.scheduler = scheduler
        self.policy = policy
        self.draining = self.started = False
        self.in_engine: dict[str, Live] = {}
        self.leaving: set[str] = set()
        self.last_step_at_s = 0.0
        self.output_tokens = 0  # all that this engine has generated
        self._drained: asyncio.Future[None] | None = None
        self._owner = owner
        self._by_handle = by_handle
        self._own_executor: Executor | None = None
        if executor is None:
            executor = self._own_executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="planner")
        self.planner = Planner(policy, executor, clock)
        self.plans = PlanLoop(
            scheduler,
            self.planner,
            StartOrder(engine, scheduler, policy, lambda h: by_handle[h].spec.request_id),
            partial(owner.planned, self),
            clock,
            options.plan_gap_s,
            report_progress=self._before_plan,
            dispatch=self._dispatch,
        )
        self.expectation = Expectation(scheduler, clock, self.report_progress, keeps_order=not policy.wants_ticks)
        self.learning = Learning(scheduler, engine.info.limits, by_handle, calibrate=options.calibrate)
        self.recovery = Recovery(
            engine,
            scheduler,
            self.plans,
            options.hold_s,
            fail_all=lambda error: owner.held_too_long(self, error),
            changed=lambda: owner.changed(self),
        )

    # -- life -----------------------------------------------------------------

    async def start(self) -> None:
        """Ready for requests when it returns: policy compiled, engine up. Raises what either raises."""
        await self.planner.warm_up()
        await self.engine.start(self._on_events)
        limits = self.scheduler.limits
        if limits.kv_tokens is None:  # some engines know the size of their cache only once they are up
            self.scheduler.limits = replace(limits, kv_tokens=self.engine.info.limits.kv_tokens)
        self.plans.start()
        self.started = True

    async def close(self) -> None:
        """Of what it still holds nothing more is heard. Idempotent."""
        self.started = False
        self.recovery.close()
        await self.plans.close()
        await self.engine.close()
        if self._own_executor is not None:
            self._own_executor.shutdown(wait=False)

    async def drained(self, grace_s: float) -> None:
        """Returns when it holds no request any more, when `grace_s` seconds have passed, or when it is to stay."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + grace_s
        while self.draining and not self.empty and loop.time() < until_s:
            self._drained = loop.create_future()
            await asyncio.wait([self._drained], timeout=until_s - loop.time())
        self._drained = None

    def stay(self) -> None:
        """It is not taken away after all."""
        self.draining = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    @property
    def up(self) -> bool:
        """Started, and its engine is not known to be gone."""
        return self.started and self.recovery.up

    @property
    def empty(self) -> bool:
        return not self.in_engine and not self.scheduler.statistics().waiting

    def load(self) -> ReplicaLoad:
        queue = self.scheduler.statistics()
        return ReplicaLoad(
            name=self.name,
            up=self.up,
            draining=self.draining,
            waiting=queue.waiting,
            in_flight=queue.running,
            waiting_prompt_tokens=queue.waiting_prompt_tokens,
            max_in_flight=self.scheduler.limits.max_batch_size,
            kv_usage=self.engine.load().kv_usage,
            output_tokens=self.output_tokens,
            engine_restarts=self.recovery.restarts,
            calibration=self.learning.calibration.statistics(),
        )

    # -- plans ----------------------------------------------------------------

    def report_progress(self) -> None:
        """Tells the scheduler what was generated since it last looked; one call a request, not one a token."""
        for live in self.in_engine.values():
            count = live.output_tokens - live.reported_tokens
            if count:
                live.reported_tokens = live.output_tokens
                self.scheduler.on_tokens(live.handle, count, self.last_step_at_s)

    def _before_plan(self) -> None:
        self.report_progress()
        self._owner.before_plan(self)

    def send_now(self, live: Live, now_s: float) -> None:
        """Without a plan, where a slot is free and the engine there; else it waits for the next one."""
        dispatch = self.scheduler.dispatch(live.handle, now_s) if self.up else None
        if dispatch is None:
            self.plans.mark_stale()
        else:
            self._dispatch(dispatch, now_s)

    def _dispatch(self, dispatch: Dispatch, now_s: float) -> None:
        """Hands a request to the engine; whatever comes of it, it does not raise."""
        live = self._by_handle.get(dispatch.handle)
        if live is None:  # ended by what the dispatch of another one led to
            return
        live.rank = dispatch.rank
        live.started = False
        if not live.resumed_tokens:
            live.timing.dispatched_at_s = now_s
        request_id = live.spec.request_id
        self.in_engine[request_id] = live
        if live.queue_timer is not None:
            live.queue_timer.cancel()
        live.ticket.start(now_s)
        try:
            self.engine.submit(live.request, dispatch.rank)
            live.attempts += 1
            self.learning.sent(live, now_s)
            self.recovery.seen(up=True)
        except InvalidRequest as refusal:
            self._owner.end(live, EndStatus.REJECTED, refusal, in_engine=False)
        except EngineError as failure:
            self._owner.failed(live, failure)
        except Exception:
            logger.exception("the engine raised on submit of %s", request_id, extra={"request_id": request_id})
            self._owner.end(live, EndStatus.FAILED, EngineError("the engine failed"), in_engine=False)

    def lose(self, live: Live) -> None:
        """It is in the engine no more, and has not ended."""
        del self.in_engine[live.spec.request_id]
        self.learning.gone(live)
        self._tell_drained()

    def forget(self, live: Live, *, finished: bool, dispatched: bool) -> None:
        """It has ended. finished: it ran to its end. dispatched: it was in the engine."""
        scheduler = self.scheduler
        if finished and not live.resumed_tokens:
            scheduler.finish(live.handle, live.output_tokens, self.last_step_at_s)
        else:
            scheduler.drop(live.handle)
        if finished:
            if live.resumed_tokens:  # the scheduler knew it as another request, with less to come
                scheduler.lengths.observe(live.spec, live.output_tokens)
            self.learning.finished(live, self.last_step_at_s)
        elif dispatched:
            self.learning.gone(live)
        self._tell_drained()

    def _tell_drained(self) -> None:
        if self._drained is not None and self.empty and not self._drained.done():
            self._drained.set_result(None)

    # -- events ---------------------------------------------------------------

    def _on_events(self, events: Sequence[EngineEvent], at_s: float) -> None:
        """The engine's sink."""
        in_engine = self.in_engine
        self.last_step_at_s = at_s
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
                    if live.generated is not None:
                        live.generated.extend(event.token_ids)
                    if live.started:
                        tokens += count
                    else:
                        self._on_first_token(live, event, at_s)
                if event.cached_tokens is not None and live.resumed_tokens == 0:
                    live.cached_tokens = event.cached_tokens
                if event.end is None and event.error is None:
                    live.stream.push(event)
                else:
                    self._on_last_event(live, event, at_s)
            except Exception:  # the other requests of this step go on
                extra = {"request_id": event.request_id}
                logger.exception("an event of request %s could not be handled", event.request_id, extra=extra)
                self._owner.end(live, EndStatus.FAILED, RequestError("internal error"))
        self.output_tokens += tokens
        self.learning.step(at_s, tokens)
        if self.policy.wants_ticks:
            self.plans.mark_stale()

    def _on_first_token(self, live: Live, event: EngineEvent, at_s: float) -> None:
        """The first of this engine; of a request that is resumed, not its first."""
        live.started = True
        if live.timing.first_token_at_s is None:
            live.timing.first_token_at_s = at_s
        count = live.output_tokens - live.resumed_tokens
        self.output_tokens += count
        live.reported_tokens = live.output_tokens
        self.scheduler.on_tokens(live.handle, count, at_s)
        self.learning.first_token(live, event, at_s)

    def _on_last_event(self, live: Live, event: EngineEvent, at_s: float) -> None:
        if event.error is not None:
            if event.token_ids or event.text:  # what came with the failure was generated all the same
                live.stream.push(replace(event, error=None))
            self._owner.failed(live, event.error)
        elif event.end is None or event.end is FinishReason.ABORT:
            self._owner.end(live, EndStatus.FAILED, EngineError("the engine ended it", "aborted"), in_engine=False)
        else:
            live.stream.push(event)
            completion = live.complete(event.end, at_s, self.name)
            self._owner.end(live, EndStatus.FINISHED, completion, in_engine=False)

    def _on_stray_event(self, event: EngineEvent) -> None:
        """An event of a request that has ended here: its last one, or a token that nobody waits for."""
        if event.end is not None or event.error is not None:
            self.leaving.discard(event.request_id)
        else:  # the abort crossed with this token, or got lost; a second one does no harm
            self._abort_in_engine(event.request_id)

    def abort(self, request_id: str) -> None:
        """What the engine still holds of a request that has ended, or goes on elsewhere."""
        self.leaving.add(request_id)
        self._abort_in_engine(request_id)

    def _abort_in_engine(self, request_id: str) -> None:
        try:
            self.engine.abort(request_id)
        except Exception:
            logger.exception("the engine raised on abort of %s", request_id, extra={"request_id": request_id})
            self.leaving.discard(request_id)
