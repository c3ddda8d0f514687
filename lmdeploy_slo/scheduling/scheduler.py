"""The one scheduler, driven by the runtime in real time and by the simulator in virtual time.

It keeps the waiting and the running requests, hands immutable snapshots to a policy, and turns the policy's plan
into dispatches. A plan is a suggestion made on an old picture: whoever has left since is skipped, and the in-flight
cap holds whatever the plan says.

    add -> (snapshot -> policy.plan -> apply)* -> on_tokens* -> finish | drop
     |                                            (requeue: once more from the start)
     take_out -> take_in: while it waits, to the scheduler of another engine
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.model_range import RangeWatch
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.core.snapshot import EngineLimits, Rows, Snapshot
from lmdeploy_slo.errors import QueueFull
from lmdeploy_slo.prediction.length import LengthForecast, LengthPredictor
from lmdeploy_slo.prediction.length_remaining import cap_length
from lmdeploy_slo.prediction.prefix import PrefixPredictor
from lmdeploy_slo.scheduling.policy import Policy
from lmdeploy_slo.scheduling.row_table import RowTable


@dataclass(frozen=True, slots=True)
class Dispatch:
    """A request that goes to the engine now; `rank` is its place in the plan, smaller first, `row` what it was
    planned with (a record of ROW_DTYPE)."""

    handle: int
    rank: int
    row: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class SchedulerStatistics:
    waiting: int
    running: int
    waiting_prompt_tokens: int
    added: int
    dispatched: int
    refused: int
    plans_applied: int
    stale_entries: int  # plan entries of requests that had left before the plan was applied


class Scheduler:
    """Not thread-safe: all calls from one thread. Snapshots may be read from any thread.

    model: what is believed of the engine; may be replaced at any time, and holds for the next snapshot. prefixes: what
    is believed of its prefix cache; None: nothing is in it.
    """

    def __init__(
        self,
        *,
        limits: EngineLimits,
        model: StepModel,
        lengths: LengthPredictor,
        prefixes: PrefixPredictor | None = None,
        max_queued_requests: int | None = None,
        range_watch: RangeWatch | None = None,
        numbers: Iterator[int] | None = None,
    ) -> None:
        """range_watch: of what `model` was fitted on; it is told the prompts that come. numbers: where handles come
        from, growing; several schedulers that share one never give two requests the same."""
        self.limits = limits
        self.model = model
        self.lengths = lengths
        self.prefixes = prefixes
        self.max_queued_requests = max_queued_requests  # may be changed, and holds for the next request
        self._range_watch = range_watch
        self._numbers = numbers or itertools.count(1)
        self._waiting = RowTable()
        self._running = RowTable()
        self._specs: dict[int, RequestSpec] = {}
        self._turns: dict[tuple[str, str], set[int]] = {}  # (client, conversation) -> waiting handles
        self._prioritized = 0  # of them, with a priority other than 0
        self._order = np.empty(0, dtype=np.int64)  # the last plan's, for queue positions
        self._waiting_prompt_tokens = 0
        self.told_at_s = -math.inf  # up to when it was last told of progress
        self._added = self._dispatched = self._refused = self._plans = self._stale = 0

    # -- requests come and go -------------------------------------------------

    def add(self, spec: RequestSpec) -> int:
        """Queues a request and returns its handle; raises QueueFull at the bound."""
        if self.full:
            self._refused += 1
            raise QueueFull(f"{len(self._waiting)} requests are waiting, the limit is {self.max_queued_requests}")
        if self._range_watch is not None:
            self._range_watch.note(prompt_tokens=spec.prompt_tokens)
        handle = next(self._numbers)
        self.take_in(handle, spec)
        self._added += 1
        return handle

    def take_out(self, handle: int) -> RequestSpec:
        """A request that waits here leaves for the scheduler of another engine; raises KeyError where none of that
        handle waits."""
        self._waiting.remove(handle)
        self._stop_waiting(handle)
        spec = self._specs.pop(handle)
        self._prioritized -= spec.priority != 0
        return spec

    def take_in(self, handle: int, spec: RequestSpec) -> None:
        """Queues a request that another scheduler has given its handle, beyond the bound if need be; it is planned with
        what is believed here. Raises ValueError where the handle is in use here."""
        if handle in self._specs:
            raise ValueError(f"handle {handle} is in use")
        self._waiting.insert(self._row(handle, spec))
        self._specs[handle] = spec
        self._start_waiting(handle, spec)
        self._prioritized += spec.priority != 0

    def drop(self, handle: int) -> bool:
        """Forgets a request that did not run to its end, waiting or running; False where it is unknown."""
        if handle in self._waiting:
            self._waiting.remove(handle)
            self._stop_waiting(handle)
        elif handle in self._running:
            self._running.remove(handle)
        else:
            return False
        self._prioritized -= self._specs.pop(handle).priority != 0
        return True

    def requeue(self, handle: int) -> bool:
        """A running request lost what was done for it and waits again, beyond the bound if need be; False where it
        does not run."""
        if handle not in self._running:
            return False
        row = self._running.remove(handle)
        row["dispatched_at_s"] = row["first_token_at_s"] = math.nan
        row["generated_tokens"] = 0.0
        self._waiting.insert(row)
        self._start_waiting(handle, self._specs[handle])
        return True

    def on_tokens(self, handle: int, count: int, at_s: float) -> None:
        """`count` tokens of a running request became known at `at_s`; unknown handles are ignored."""
        if handle not in self._running:
            return
        self.told_at_s = max(self.told_at_s, at_s)
        if count and math.isnan(self._running.get(handle, "first_token_at_s")):
            self._running.set(handle, "first_token_at_s", at_s)
        self._running.add(handle, "generated_tokens", count)

    def on_steps(self, count: int) -> None:
        """Every running request that has emitted a token before emitted `count` more: as many calls of `on_tokens`."""
        self._running.add_where_positive("generated_tokens", count)

    def on_cached(self, handle: int, cached_tokens: int, at_s: float) -> None:
        """The engine tells, with the first token, how much of a request's prompt was in the prefix cache."""
        spec = self._specs.get(handle)
        if self.prefixes is not None and spec is not None:
            self.prefixes.observe(spec, cached_tokens, at_s)
            self._expect_anew(spec)

    def on_new_engine(self) -> None:
        """Its prefix cache is empty."""
        if self.prefixes is not None:
            self.prefixes.forget_conversations()
            for handles in self._turns.values():
                self._expect_anew(self._specs[next(iter(handles))])

    def finish(self, handle: int, output_tokens: int, at_s: float | None = None) -> None:
        """A running request ran to its end with `output_tokens`: its slot is free, its length is learnt, and, where
        the instant is told, that the next turn of its conversation may find it in the prefix cache."""
        spec = self._specs[handle]
        if self.drop(handle):
            self.lengths.observe(spec, output_tokens)
            if self.prefixes is not None and at_s is not None:
                self.prefixes.finish(spec, output_tokens, at_s)
                self._expect_anew(spec)

    # -- planning -------------------------------------------------------------

    def snapshot(self, now_s: float) -> Snapshot:
        """The picture a policy decides on; whoever asks has told what has been generated by then."""
        self.told_at_s = max(self.told_at_s, now_s)
        running = self._running.copy()
        if len(running):
            running.flags.writeable = True
            foretold = running["output_tokens"].copy()
            self.lengths.revise(running)
            for at in np.flatnonzero(running["output_tokens"] > foretold).tolist():
                cap_length(running, at, self._specs[int(running["handle"][at])].max_new_tokens)
            running.flags.writeable = False
        return Snapshot(now_s, self._waiting.copy(), running, self.limits, self.model)

    def apply(self, plan: Plan, now_s: float) -> list[Dispatch]:
        """Moves the head of the plan from waiting to running and returns who goes, best rank first."""
        self._plans += 1
        free = self.free_slots
        dispatches: list[Dispatch] = []
        order = self._by_priority(plan.order)
        for rank, handle in enumerate(order[: plan.send_now].tolist()):
            if len(dispatches) >= free:
                break
            if handle not in self._waiting:
                self._stale += 1
                continue
            row = self._waiting.remove(handle)
            row["dispatched_at_s"] = now_s
            self._running.insert(row)
            self._stop_waiting(handle)
            dispatches.append(Dispatch(handle, rank, row))
        self._dispatched += len(dispatches)
        self._order = order
        return dispatches

    def dispatch(self, handle: int, now_s: float) -> Dispatch | None:
        """A waiting request goes to the engine past every plan; None where no slot is free or it does not wait."""
        if not self.free_slots or handle not in self._waiting:
            return None
        row = self._waiting.remove(handle)
        row["dispatched_at_s"] = now_s
        self._running.insert(row)
        self._stop_waiting(handle)
        self._dispatched += 1
        return Dispatch(handle, 0, row)

    def start_ranks(self, rule: Policy, now_s: float) -> dict[int, int]:
        """Handle -> rank, 0 first, of the dispatched requests without a first token: the order in which `rule` would
        send them if it could choose again at `now_s`. As in `apply`, smaller priority numbers go first."""
        running = self._running.copy()
        unstarted = running[np.isnan(running["first_token_at_s"])]
        order = unstarted["handle"]
        if len(order) > 1:
            order = rule.plan(Snapshot(now_s, unstarted, running, self.limits, self.model)).order
        return {handle: rank for rank, handle in enumerate(self._by_priority(order).tolist())}

    # -- questions ------------------------------------------------------------

    def queue_position(self, handle: int) -> int | None:
        """How many waiting requests go before this one by the last plan; None where it does not wait."""
        if handle not in self._waiting:
            return None
        position = 0
        for other in self._order.tolist():
            if other == handle:
                return position
            position += other in self._waiting
        return len(self._waiting) - 1

    def waiting_order(self) -> npt.NDArray[np.int64]:
        """The handles that wait, in the order of the last plan; those it did not know come last, by arrival."""
        waits = [handle for handle in self._order.tolist() if handle in self._waiting]
        if len(waits) < len(self._waiting):
            waits += sorted(set(self._waiting.handles()).difference(waits))
        return np.array(waits, dtype=np.int64)

    @property
    def held(self) -> int:
        """How many requests are here, waiting or running."""
        return len(self._specs)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def full(self) -> bool:
        """Whether `add` would refuse."""
        return self.max_queued_requests is not None and len(self._waiting) >= self.max_queued_requests

    @property
    def changes(self) -> tuple[int, int]:
        """How often a request has begun or ceased to wait, and to run."""
        return self._waiting.changes, self._running.changes

    def spec(self, handle: int) -> RequestSpec:
        """Of a request that is here; raises KeyError for another."""
        return self._specs[handle]

    def rows(self) -> tuple[Rows, Rows]:
        """(waiting, running) as they are, without copies: read-only, and good until the next call of another method."""
        return self._waiting.view(), self._running.view()

    def oldest_arrival_s(self) -> float | None:
        """When the request that has waited longest arrived; None where none waits."""
        return self._waiting.smallest("arrival_at_s")

    def forecast(self, spec: RequestSpec) -> LengthForecast:
        """The output length this request would be planned with."""
        return self.lengths.predict(spec)

    def expected_cached_tokens(self, spec: RequestSpec) -> float:
        """How much of its prompt this request would be planned with as being in the prefix cache."""
        return 0.0 if self.prefixes is None else self.prefixes.predict(spec)

    def row_of(self, spec: RequestSpec) -> tuple[float, ...]:
        """The row (of ROW_DTYPE) this request would be planned with if it were here, with the handle 0."""
        return self._row(0, spec)

    def cached_tokens(self, handle: int) -> float:
        """How much of a running request's prompt it was planned with as being in the prefix cache; 0 where unknown."""
        return self._running.get(handle, "cached_tokens") if handle in self._running else 0.0

    @property
    def free_slots(self) -> int:
        """How many more requests may be dispatched before the engine is at its cap."""
        return max(0, self.limits.max_batch_size - len(self._running))

    def statistics(self) -> SchedulerStatistics:
        return SchedulerStatistics(
            waiting=len(self._waiting),
            running=len(self._running),
            waiting_prompt_tokens=self._waiting_prompt_tokens,
            added=self._added,
            dispatched=self._dispatched,
            refused=self._refused,
            plans_applied=self._plans,
            stale_entries=self._stale,
        )

    def _by_priority(self, order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Smaller priority numbers first, the policy's order among equals."""
        if not self._prioritized:
            return order
        priorities = [self._specs[h].priority if h in self._specs else 0 for h in order.tolist()]
        return order[np.argsort(priorities, kind="stable")]

    def _start_waiting(self, handle: int, spec: RequestSpec) -> None:
        self._waiting_prompt_tokens += spec.prompt_tokens
        if spec.conversation_id:
            self._turns.setdefault(_conversation(spec), set()).add(handle)

    def _stop_waiting(self, handle: int) -> None:
        spec = self._specs[handle]
        self._waiting_prompt_tokens -= spec.prompt_tokens
        if spec.conversation_id:
            key = _conversation(spec)
            self._turns[key].discard(handle)
            if not self._turns[key]:
                del self._turns[key]

    def _expect_anew(self, spec: RequestSpec) -> None:
        """A turn of a conversation was computed: what its waiting turns will find in the prefix cache has changed."""
        if spec.conversation_id:
            for handle in self._turns.get(_conversation(spec), ()):
                waits = self._specs[handle]
                cached_tokens = self.expected_cached_tokens(waits)
                self._waiting.set(handle, "prompt_tokens", waits.prompt_tokens - cached_tokens)
                self._waiting.set(handle, "cached_tokens", cached_tokens)

    def _row(self, handle: int, spec: RequestSpec) -> tuple[float, ...]:
        forecast = self.lengths.predict(spec)
        cached_tokens = self.expected_cached_tokens(spec)
        slo = spec.slo
        return (
            handle,
            int(spec.priority_class),
            spec.arrival_at_s,
            spec.prompt_tokens - cached_tokens,
            forecast.tokens,
            math.inf if slo.ttft_s is None else slo.ttft_s,
            math.inf if slo.tpot_s is None else slo.tpot_s,
            math.inf if slo.e2e_s is None else slo.e2e_s,
            math.nan,
            math.nan,
            0.0,
            forecast.sigma,
            cached_tokens,
            _client_number(spec),
        )


def _conversation(spec: RequestSpec) -> tuple[str, str]:
    return spec.client.name, spec.conversation_id


def _client_number(spec: RequestSpec) -> int:
    """Of who sent it, or whom it says it asks for: the same in every process. Two clients in four billion share one."""
    name = str(spec.client) or spec.fairness_id
    return zlib.crc32(name.encode()) if name else 0
