"""Remembers, in bounded memory, what explains why a request waited: `explain` puts it together when somebody asks.

Kept are a story of each request that has not ended and of the last ones that did, the last dispatches as rows of
arrays, and the order of the queue as plans left it, at most every `PLACE_GAP_S`; where these are too many, every second
one of the older half goes, so the past is remembered for long, but coarsely. Nothing is done once a token.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import EndStatus, PriorityClass, RequestSpec
from lmdeploy_slo.core.slo import Timing
from lmdeploy_slo.core.snapshot import ROW_DTYPE, Rows, Snapshot
from lmdeploy_slo.runtime.explanation import Explanation, Place, Queued, RequestState, Sent
from lmdeploy_slo.scheduling.admission import Forecast
from lmdeploy_slo.scheduling.rules import engine_time_s, latest_start_s, step_time_s
from lmdeploy_slo.scheduling.scheduler import Dispatch, Scheduler

PLACE_GAP_S = 0.05
PLACE_GAP_S_PER_REQUEST = 5e-5
"""The gap grows with the queue, so that remembering takes a thousandth of the time however long it is."""

IDLE_GAPS = 10
"""A plan for a full engine lets nobody go: of such plans every so many gaps one is remembered."""

PLACES_TOLD, SENT_TOLD = 64, 20


@dataclass(frozen=True, slots=True)
class DecisionLimits:
    """What is remembered at most. requests: that have ended, >= 0. dispatches: >= 1. orders: of the queue, >= 2, and
    entries: the requests in all of them, >= 1 (8 bytes each)."""

    requests: int = 4096
    dispatches: int = 16384
    orders: int = 2048
    entries: int = 1_000_000


@dataclass(frozen=True, slots=True)
class _Order:
    """The waiting requests after a plan; sent: dispatches until then."""

    at_s: float
    handles: npt.NDArray[np.int64]
    in_flight: int
    sent: int
    step_s: float


@dataclass(slots=True, eq=False)
class _Story:
    """A request. log: of the engine it waits for, or is in. first: dispatches before it came there. number: of its own
    dispatch; stop: dispatches until it waited no more. full_s, held_s: of that log, until it came, then, once its wait
    is over, during its wait; spent_*: of its wait, elsewhere before that. moves: from engine to engine."""

    log: DecisionLog
    spec: RequestSpec
    handle: int
    predicted: Forecast
    timing: Timing
    came_at_s: float
    first: int
    full_s: float
    held_s: float
    spent_full_s: float = 0.0
    spent_held_s: float = 0.0
    moves: int = 0
    number: int | None = None
    stop: int | None = None
    left_at_s: float | None = None  # the queue
    status: EndStatus | None = None
    reason: str = ""
    slo_met: bool | None = None


class Stories:
    """Of all engines: requests that have not ended, and the last `ended` that did."""

    def __init__(self, ended: int) -> None:
        self._most = ended
        self._by_id: dict[str, _Story] = {}
        self._ended: deque[_Story] = deque()

    def explain(self, request_id: str, now_s: float) -> Explanation | None:
        """Of requests with the same id, the last; None where none is remembered. Takes a millisecond or less."""
        story = self._by_id.get(request_id)
        return None if story is None else story.log.tell(story, now_s)

    def begin(self, story: _Story) -> None:
        self._by_id[story.spec.request_id] = story

    def end(self, story: _Story) -> None:
        self._ended.append(story)
        if len(self._ended) > self._most:
            oldest = self._ended.popleft()
            if self._by_id.get(oldest.spec.request_id) is oldest:  # else the id was used again
                del self._by_id[oldest.spec.request_id]


class DecisionLog:
    """Of one engine, on the loop of the runtime that owns it. Instants are those of the runtime's clock."""

    def __init__(
        self, scheduler: Scheduler, limits: DecisionLimits | None = None, stories: Stories | None = None
    ) -> None:
        """stories: shared by the logs of all engines; None where there is one engine."""
        self._scheduler = scheduler
        self._limits = limits or DecisionLimits()
        self.stories = stories or Stories(self._limits.requests)
        self._by_handle: dict[int, _Story] = {}  # not ended
        size = self._limits.dispatches
        self._sent = 0
        self._rows: Rows = np.zeros(size, dtype=ROW_DTYPE)  # dispatch n is at n % size
        self._facts = np.zeros((size, 4))  # at_s, rank, step_s, cost
        self._orders: list[_Order] = []
        self._entries = 0
        self._next_order_at_s = self._next_idle_order_at_s = -math.inf
        self._step_s = 0.0  # of a decode step when an order was remembered last
        self._full_s = self._held_s = 0.0  # so long in all
        self._full = self._held = False
        self._since_s = 0.0

    # -- what happens ---------------------------------------------------------

    def accepted(self, handle: int, spec: RequestSpec, predicted: Forecast, timing: Timing, now_s: float) -> None:
        """A request has joined the queue; `timing` is kept and read again later."""
        self._pass_time(now_s)
        if self._scheduler.statistics().waiting == 1:  # no plan has looked at this queue yet
            self._full = self._held = False
        story = _Story(self, spec, handle, predicted, timing, now_s, self._sent, self._full_s, self._held_s)
        self._by_handle[handle] = story
        self.stories.begin(story)

    def planned(self, snapshot: Snapshot, plan: Plan, dispatches: Sequence[Dispatch], now_s: float) -> None:
        """A plan made of `snapshot` was applied."""
        self._pass_time(now_s)
        self._full = self._scheduler.free_slots == 0
        self._held = not self._full
        remember = now_s >= (self._next_order_at_s if snapshot.free_slots else self._next_idle_order_at_s)
        if remember:
            self._step_s = step_time_s(snapshot)
        for dispatch in dispatches:
            self._remember_sent(dispatch, plan, now_s)
        if remember:
            self._remember_order(now_s)

    def requeued(self, handle: int, now_s: float) -> None:
        """A dispatched request lost its engine and waits again; that it was sent before is forgotten."""
        story = self._by_handle[handle]
        if story.left_at_s is not None:
            self._pass_time(now_s)
            story.left_at_s = story.number = story.stop = None
            story.spent_full_s, story.spent_held_s = story.full_s, story.held_s
            story.full_s, story.held_s = self._full_s, self._held_s

    def moved(self, handle: int, to: DecisionLog, now_s: float) -> None:
        """A request waits for another engine from now on, or goes on there."""
        story = self._by_handle.pop(handle)
        waits = story.left_at_s is None
        if waits:
            self._pass_time(now_s)
            story.spent_full_s += self._full_s - story.full_s
            story.spent_held_s += self._held_s - story.held_s
        to._take(story, waits, now_s)

    def ended(self, handle: int, status: EndStatus, reason: str, slo_met: bool | None, now_s: float) -> None:
        """An accepted request has ended."""
        story = self._by_handle.pop(handle)
        self._leave(story, now_s)
        story.status, story.reason, story.slo_met = status, reason, slo_met
        self.stories.end(story)

    # -- inside ---------------------------------------------------------------

    def _pass_time(self, now_s: float) -> None:
        passed_s, self._since_s = now_s - self._since_s, now_s
        if self._full:
            self._full_s += passed_s
        elif self._held:
            self._held_s += passed_s

    def _leave(self, story: _Story, now_s: float) -> None:
        """It does not wait any more."""
        if story.left_at_s is None:
            self._pass_time(now_s)
            story.left_at_s, story.stop = now_s, self._sent
            story.full_s = story.spent_full_s + self._full_s - story.full_s
            story.held_s = story.spent_held_s + self._held_s - story.held_s

    def _take(self, story: _Story, waits: bool, now_s: float) -> None:
        self._pass_time(now_s)
        story.log, story.first, story.number, story.came_at_s = self, self._sent, None, now_s
        story.moves += 1
        if waits:
            story.full_s, story.held_s = self._full_s, self._held_s
        else:
            story.stop = self._sent
        self._by_handle[story.handle] = story

    def _remember_sent(self, dispatch: Dispatch, plan: Plan, now_s: float) -> None:
        slot = self._sent % len(self._rows)
        self._rows[slot] = dispatch.row
        cost = math.nan
        if plan.costs is not None:
            cost = plan.costs[int(np.argmax(plan.order == dispatch.handle))]
        self._facts[slot] = (now_s, dispatch.rank, self._step_s, cost)
        story = self._by_handle.get(dispatch.handle)
        if story is not None:
            story.number = self._sent
            self._leave(story, now_s)
        self._sent += 1

    def _remember_order(self, now_s: float) -> None:
        handles = self._scheduler.waiting_order()
        gap_s = max(PLACE_GAP_S, PLACE_GAP_S_PER_REQUEST * len(handles))
        self._next_order_at_s, self._next_idle_order_at_s = now_s + gap_s, now_s + IDLE_GAPS * gap_s
        self._orders.append(_Order(now_s, handles, self._scheduler.statistics().running, self._sent, self._step_s))
        self._entries += len(handles)
        while self._entries > self._limits.entries or len(self._orders) > self._limits.orders:
            if len(self._orders) < 4:
                self._orders = self._orders[1:]
            else:
                half = len(self._orders) // 2
                self._orders = self._orders[:half:2] + self._orders[half:]
            self._entries = sum(len(order.handles) for order in self._orders)

    # -- explaining -----------------------------------------------------------

    def explain(self, request_id: str, now_s: float) -> Explanation | None:
        """As `Stories.explain`."""
        return self.stories.explain(request_id, now_s)

    def tell(self, story: _Story, now_s: float) -> Explanation:
        """What became of a request of this log."""
        self._pass_time(now_s)
        waits = story.left_at_s is None
        full_s, held_s = story.full_s, story.held_s
        if waits:
            full_s = story.spent_full_s + self._full_s - full_s
            held_s = story.spent_held_s + self._held_s - held_s
        left_at_s = now_s if story.left_at_s is None else story.left_at_s
        waited_s = left_at_s - story.spec.arrival_at_s
        stop = next((n for n in (story.number, story.stop) if n is not None), self._sent)
        oldest = self._sent - len(self._rows)
        before = self._sent_from(np.arange(max(story.first, oldest), stop))
        own = None if story.number is None or story.number < oldest else self._sent_from(np.array([story.number]))
        state = RequestState.WAITING if waits else RequestState.RUNNING if story.status is None else RequestState.ENDED
        return Explanation(
            spec=story.spec,
            state=state,
            status=story.status,
            reason=story.reason,
            timing=story.timing,
            slo_met=story.slo_met,
            predicted=story.predicted,
            arrival_position=story.predicted.queue_position,
            waited_s=waited_s,
            planning_s=max(0.0, waited_s - full_s - held_s),
            full_s=full_s,
            held_s=held_s,
            places=self._places(story, left_at_s, now_s),
            queued=before.summed(stop - story.first, story.spec.arrival_at_s),
            before=before.told(before.dearest(), story.spec.arrival_at_s),
            sent=None if own is None else own.told([0], story.spec.arrival_at_s)[0],
            complete=story.first >= oldest and not story.moves,
            moves=story.moves,
        )

    def _places(self, story: _Story, left_at_s: float, now_s: float) -> tuple[Place, ...]:
        first = bisect.bisect_left(self._orders, story.came_at_s, key=lambda order: order.at_s)
        last = bisect.bisect_left(self._orders, left_at_s, key=lambda order: order.at_s)
        orders = self._orders[first:last]
        if len(orders) >= PLACES_TOLD:
            orders = [orders[i] for i in np.linspace(0, len(orders) - 1, PLACES_TOLD - 1).astype(int)]
        if story.left_at_s is None:
            running = self._scheduler.statistics().running
            orders.append(_Order(now_s, self._scheduler.waiting_order(), running, self._sent, self._step_s))
        if not orders:
            return ()
        at_s = np.array([order.at_s for order in orders])
        steps_s = np.array([order.step_s for order in orders])
        spare_s = latest_start_s(_row_of(story), self._scheduler.model, steps_s) - at_s
        arrival_at_s = story.spec.arrival_at_s
        return tuple(
            Place(
                at_s=order.at_s - arrival_at_s,
                position=_place_in(order.handles, story.handle),
                waiting=len(order.handles),
                in_flight=order.in_flight,
                sent=order.sent - story.first,
                spare_s=_or_none(spare),
            )
            for order, spare in zip(orders, spare_s.tolist())
        )

    def _sent_from(self, numbers: npt.NDArray[np.int64]) -> _SentRows:
        slots = numbers % len(self._rows)
        rows, facts, model = self._rows[slots], self._facts[slots], self._scheduler.model
        spare_s = latest_start_s(rows, model, facts[:, 2]) - facts[:, 0]
        return _SentRows(rows, facts, engine_time_s(rows, model), spare_s)


@dataclass(frozen=True, slots=True)
class _SentRows:
    """Dispatches in the order in which they went, column by column; facts as in DecisionLog."""

    rows: Rows
    facts: npt.NDArray[np.float64]
    engine_s: npt.NDArray[np.float64]
    spare_s: npt.NDArray[np.float64]

    def summed(self, count: int, arrival_at_s: float) -> Queued:
        """`count`: how many there were, forgotten ones included."""
        costs = self.facts[:, 3]
        return Queued(
            requests=count,
            overtook=int(np.sum(self.rows["arrival_at_s"] > arrival_at_s)),
            prompt_tokens=int(np.sum(self.rows["prompt_tokens"])),
            engine_s=float(np.sum(self.engine_s)),
            cost=float(np.nansum(costs)) if np.isfinite(costs).any() else None,
        )

    def dearest(self) -> list[int]:
        """Those that cost most (engine time where no costs are known), in the order in which they went."""
        dearest_last = np.lexsort((self.engine_s, np.nan_to_num(self.facts[:, 3])))
        return sorted(dearest_last[-SENT_TOLD:].tolist())

    def told(self, chosen: Sequence[int], arrival_at_s: float) -> tuple[Sent, ...]:
        """Some of them, as seen from a request that arrived then."""
        told = []
        for i in chosen:
            row, (at_s, rank, _, cost) = self.rows[i], self.facts[i].tolist()
            told.append(
                Sent(
                    at_s=at_s - arrival_at_s,
                    arrived_s=float(row["arrival_at_s"]) - arrival_at_s,
                    rank=int(rank),
                    priority_class=PriorityClass(int(row["tier"])),
                    prompt_tokens=int(row["prompt_tokens"]),
                    output_tokens=float(row["output_tokens"]),
                    engine_s=float(self.engine_s[i]),
                    spare_s=_or_none(float(self.spare_s[i])),
                    cost=_or_none(cost),
                )
            )
        return tuple(told)


def _row_of(story: _Story) -> Rows:
    """What the scheduler was told of it, as far as `latest_start_s` reads it."""
    spec, row = story.spec, np.zeros(1, dtype=ROW_DTYPE)
    row["arrival_at_s"], row["prompt_tokens"] = spec.arrival_at_s, spec.prompt_tokens
    row["output_tokens"] = story.predicted.output_tokens
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        objective = getattr(spec.slo, name)
        row[name] = math.inf if objective is None else objective
    return row


def _place_in(handles: npt.NDArray[np.int64], handle: int) -> int:
    found = np.flatnonzero(handles == handle)
    return int(found[0]) if len(found) else len(handles)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
