"""What the runtime remembers of requests and plans, and whom it tells: the one place through which both pass.

Counts since the start, the last minute by task, and the decisions are kept whoever asks; observers (metrics, traces,
logs) come and go.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import ParamSpec, TypeVar

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import EndStatus, RequestSpec
from lmdeploy_slo.core.snapshot import Snapshot
from lmdeploy_slo.errors import DeadlineExceeded, RequestError, RequestIdInUse
from lmdeploy_slo.runtime.decisions import DecisionLimits, DecisionLog, Stories
from lmdeploy_slo.runtime.demand import DemandLog
from lmdeploy_slo.runtime.explanation import Explanation
from lmdeploy_slo.runtime.last_minute import LastMinute, TaskCounts, TaskNames
from lmdeploy_slo.runtime.live import Live
from lmdeploy_slo.runtime.observer import AppliedPlan, EndedRequest, Observer, Refusal
from lmdeploy_slo.runtime.planner import PlannerStatistics
from lmdeploy_slo.runtime.statistics import EndCounts
from lmdeploy_slo.runtime.stream import Completion
from lmdeploy_slo.scheduling.scheduler import Dispatch, Scheduler

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_P = ParamSpec("_P")


def _harmless(note: Callable[_P, None]) -> Callable[_P, None]:
    """A defect in remembering harms no request."""

    @functools.wraps(note)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            note(*args, **kwargs)
        except Exception:
            logger.exception("the journal failed")

    return guarded


class Journal:
    """On the loop of the runtime that owns it.

    last_plan: what was applied last; of a policy that searches, the last for which it did; None before the first.
    output_tokens: of requests that have ended. demand: what was asked of the engines lately.
    """

    def __init__(self, clock: Clock, limits: DecisionLimits | None = None) -> None:
        self.counts = EndCounts()
        self.output_tokens = 0
        self.last_plan: AppliedPlan | None = None
        self.demand = DemandLog()
        self.tasks = TaskNames()
        self._clock = clock
        self._minute = LastMinute()
        self._limits = limits or DecisionLimits()
        self._stories = Stories(self._limits.requests)
        self._logs: dict[int, DecisionLog] = {}  # by number of the replica
        self._observers: list[Observer] = []
        self._failures = 0
        self._failed_plans: dict[int, int] = {}

    def know_tasks(self, task_types: Iterable[str]) -> None:
        """These are counted by name, however many others come; to be called before the first request."""
        self.tasks = TaskNames(known=task_types)

    def join(self, replica: int, scheduler: Scheduler) -> None:
        """There is one more engine, of this number."""
        self._logs[replica] = DecisionLog(scheduler, self._limits, self._stories)

    def leave(self, replica: int) -> None:
        """It is no more; what is remembered of its requests can still be explained."""
        del self._logs[replica]

    def watch(self, observer: Observer) -> None:
        """Tells it of everything from now on."""
        self._observers.append(observer)

    def unwatch(self, observer: Observer) -> None:
        """Tells it no more."""
        self._observers.remove(observer)

    # -- what happens ---------------------------------------------------------

    @_harmless
    def accepted(self, live: Live) -> None:
        """A request has joined the queue."""
        log, spec, now_s = self._logs[live.replica.number], live.spec, self._clock.now_s()
        log.accepted(live.handle, spec, live.predicted, live.timing, now_s)
        scheduler = live.replica.scheduler
        cached_tokens = scheduler.expected_cached_tokens(spec)
        engine_s = scheduler.model.engine_time_s(
            spec.prompt_tokens - cached_tokens, live.predicted.output_tokens, cached_tokens
        )
        self.demand.came(engine_s, spec.slo.has_objective, live.predicted, now_s)

    @_harmless
    def requeued(self, live: Live) -> None:
        """A request lost its engine before its first token, and waits again."""
        self.counts.retried += 1
        self._logs[live.replica.number].requeued(live.handle, self._clock.now_s())

    @_harmless
    def resumed(self, live: Live) -> None:
        """A request lost its engine in mid-output, and goes on elsewhere."""
        self.counts.resumed += 1

    @_harmless
    def moved(self, live: Live, source: int) -> None:
        """A request that was the replica `source`'s is its `live.replica`'s now."""
        self._logs[source].moved(live.handle, self._logs[live.replica.number], self._clock.now_s())

    @_harmless
    def planned(
        self,
        replica: int,
        snapshot: Snapshot,
        plan: Plan,
        dispatches: Sequence[Dispatch],
        planner: PlannerStatistics,
        now_s: float,
    ) -> None:
        """A plan was applied; `dispatches` are about to be sent."""
        failed = planner.failures > self._failed_plans.get(replica, 0)
        self._failed_plans[replica] = planner.failures
        applied = AppliedPlan(now_s, plan, planner.last_plan_s or 0.0, dispatches, failed)
        if plan.quality.evaluations or self.last_plan is None or not self.last_plan.plan.quality.evaluations:
            self.last_plan = applied
        self._logs[replica].planned(snapshot, plan, dispatches, now_s)
        self._tell(lambda observer: observer.on_plan, applied)

    @_harmless
    def refused(
        self,
        error: RequestError,
        spec: RequestSpec | None = None,
        *,
        request_id: str = "",
        task_type: str = "",
        with_slo: bool = False,
        arrival_at_s: float | None = None,
        traceparent: str | None = None,
        malformed: bool = False,
    ) -> None:
        """A request was not accepted. spec: where it was read; else what is known of it. malformed: it is not one of
        those that were offered, and has missed nothing."""
        now_s = self._clock.now_s()
        if spec is not None:
            request_id, task_type, arrival_at_s = spec.request_id, spec.task_type, spec.arrival_at_s
            with_slo = spec.slo.has_objective
        task = self.tasks.of(task_type)
        if malformed:
            self.counts.refused[error.reason] += 1
        else:
            self.counts.refuse(error, with_slo)
        counted = not malformed and not isinstance(error, RequestIdInUse)
        with_slo = with_slo and counted
        if counted:
            counts = self._minute.counts(task, now_s)
            counts.requests += 1
            counts.with_slo += with_slo
            counts.unfinished += with_slo
            self.demand.refused(with_slo, now_s)
        refusal = Refusal(
            reason=error.reason,
            status=EndStatus.TIMED_OUT if isinstance(error, DeadlineExceeded) else EndStatus.REJECTED,
            task=task,
            request_id=request_id,
            arrival_at_s=now_s if arrival_at_s is None else arrival_at_s,
            at_s=now_s,
            counted=counted,
            with_slo=with_slo,
            traceparent=traceparent,
        )
        self._tell(lambda observer: observer.on_refusal, refusal)

    @_harmless
    def ended(self, live: Live, status: EndStatus, outcome: Completion | RequestError) -> None:
        """An accepted request has ended."""
        now_s, timing, slo = self._clock.now_s(), live.timing, live.spec.slo
        if timing.ended_at_s is None:
            timing.ended_at_s, timing.output_tokens = now_s, live.output_tokens
        slo_met: bool | None = None
        if slo.has_objective and status is not EndStatus.CANCELLED:
            slo_met = status is EndStatus.FINISHED and bool(slo.met_by(timing))
        reason = outcome.finish_reason.value if isinstance(outcome, Completion) else outcome.reason
        self.counts.count(status, slo_met)
        self.output_tokens += live.output_tokens
        self._logs[live.replica.number].ended(live.handle, status, reason, slo_met, now_s)
        ended = EndedRequest(
            spec=live.spec,
            task=self.tasks.of(live.spec.task_type),
            status=status,
            reason=reason,
            timing=timing,
            slo_met=slo_met,
            predicted=live.predicted,
            rank=live.rank if live.rank >= 0 else None,
            cached_tokens=live.cached_tokens,
            traceparent=live.traceparent,
            instance=live.replica.name,
        )
        _count(self._minute.counts(ended.task, now_s), ended)
        self._tell(lambda observer: observer.on_end, ended)

    # -- questions ------------------------------------------------------------

    def explain(self, request_id: str, *, of: str | None = None) -> Explanation | None:
        """Why the request waited; None where nothing of it is remembered. of: only one of the client of this name, or
        of its users; None: anybody's."""
        told = self._stories.explain(request_id, self._clock.now_s())
        return told if told is None or of in (None, told.spec.client.name) else None

    def last_minute(self) -> dict[str, TaskCounts]:
        """By task."""
        return self._minute.sums(self._clock.now_s())

    def _tell(self, method: Callable[[Observer], Callable[[_T], None]], what: _T) -> None:
        for observer in self._observers:
            try:
                method(observer)(what)
            except Exception:  # whoever watches must not harm what is watched
                self._failures += 1
                level = logging.ERROR if self._failures == 1 else logging.DEBUG
                logger.log(
                    level, "%s failed; later failures are logged at DEBUG", type(observer).__name__, exc_info=True
                )


def _count(counts: TaskCounts, ended: EndedRequest) -> None:
    timing = ended.timing
    counts.requests += 1
    counts.prompt_tokens += ended.spec.prompt_tokens
    counts.output_tokens += timing.output_tokens
    if ended.slo_met is not None:
        counts.with_slo += 1
        counts.slo_met += ended.slo_met
    if ended.status is EndStatus.FINISHED:
        counts.finished += 1
        counts.ttft_s += timing.ttft_s or 0.0
        if timing.tpot_s is not None:
            counts.with_tpot += 1
            counts.tpot_s += timing.tpot_s
        for name in ended.spec.slo.broken_by(timing):
            setattr(counts, f"broke_{name}", getattr(counts, f"broke_{name}") + 1)
    elif ended.slo_met is not None:
        counts.unfinished += 1
