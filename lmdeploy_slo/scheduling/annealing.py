"""`annealing`, the default policy: order and number in flight by simulated annealing on a rollout of the engine.

Each plan starts from a portfolio (the rules of `rules` with several numbers sent at once, the last plan, a greedy
insertion), anneals from the best of them while the budget lasts, and never returns less than the best it has seen.
What the plan admits now is sent; the rest waits for the next plan, which comes with the next event or engine step.
Where fewer slots are free than it admits, `slot_order` says who gets them.

Requests that can no longer meet their SLO, or carry none, go by response ratio into what is left over: one is admitted
when that costs the others no more than `leftover_loss`: in expected misses, of those that run and of those that will
arrive behind a long prefill, and in the shadow price of its engine time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.clock import Clock, MonotonicClock
from lmdeploy_slo.core.plan import DEFAULT_PATIENCE, Plan, PlanQuality
from lmdeploy_slo.core.snapshot import EngineLimits, Rows, Snapshot
from lmdeploy_slo.scheduling import annealing_kernel as kernel
from lmdeploy_slo.scheduling.annealing_arrays import (
    EPSILON,
    NEVER,
    QUANTILES,
    Base,
    Candidates,
    Pace,
    Scratch,
    Stakes,
    make_base,
    make_candidates,
    make_scratch,
    make_stakes,
)
from lmdeploy_slo.scheduling.fcfs_backlog import FcfsBacklog
from lmdeploy_slo.scheduling.policy import SearchBudget
from lmdeploy_slo.scheduling.rules import rule_order, step_time_s
from lmdeploy_slo.scheduling.shadow_price import ShadowPrice
from lmdeploy_slo.scheduling.slot_order import order_for_slots

PORTFOLIO_RULES = ("fcfs", "edf", "llf", "swf")
PORTFOLIO_SIZES = (1, 2, 4, 8, 16)
SLICE = 64
"""Evaluations between two looks at the clock."""

FIRST_CYCLE = 8 * SLICE
"""Evaluations in which the search cools down for the first time."""

GREEDY_SLICE = 6
"""Candidates inserted between two looks at the clock."""

HOT, COLD = 0.12, 0.01
"""Temperatures, in requests: at first a plan that loses an eighth of a request is often tried, at last hardly ever."""

OVERDUE = 0.5
"""Share of patience after which a leftover is overdue: it may cost others what the floor grants."""

PRICE_BATCH = 128.0
"""Sequences taken to share the fixed cost of a pass when engine time is priced: a loaded engine runs about so many."""

LATER = 0.9
"""What a request that can wait for ever is worth while it waits, as a part of its worth."""

SHORTEST_STEP_S = 1e-6

SEARCH_SHARE, SEARCH_SHARE_WITHOUT_SLOTS = 0.85, 0.72
"""Part of a time budget after which the search ends; the rest is for what comes after it, which is more where there are
more candidates than free slots."""

FLOOR_SAVED, FLOOR_SAVED_SLOTS_S = 1.0, 600.0
"""Of what the floor grants, so much can be saved up, in requests and of the time of slots (the longest run). While
somebody is overdue, all that is at stake on top of it: enough for anybody."""

Steps: TypeAlias = npt.NDArray[np.int64]
Stage: TypeAlias = tuple[Pace, Base, int, Stakes, int, Candidates, Scratch]
"""What every kernel takes last."""

SEARCHES = ("annealing", "greedy", "portfolio")

TIER_WORTH = np.array([0.1, 1.0, 10.0, 100.0])
"""Worth of a request met, by PriorityClass."""


@dataclass(frozen=True, slots=True)
class AnnealingOptions:
    """Settings of the policy; the defaults are meant for everybody.

    patience: > 0, the knob between attainment and the longest waits: a leftover pays the price of its engine time in
    full at first, nothing after this many times the longest wait FCFS would have caused of late.
    floor: in [0, 1), what leftovers may cost others once they are overdue (OVERDUE of that wait): this share of the
    arrivals that could meet their SLO, and of the time of slots.
    max_candidates: waiting requests one search decides on, the cheapest that can still meet. length_spread: how many
    sigmas the outer length quantiles lie off the forecast. price_window_s, price_capacity, price_weight: see
    ShadowPrice; the weight scales it. background_max: largest share of time ascribed to prefills still to come, and
    tpot_share: of the median TPOT objective that decoding and those prefills may fill together.
    leftover_loss: requests one leftover may cost; larger serves hopeless requests sooner, at others' expense.
    reserve_s: stall still to come that running requests must be able to absorb beside a leftover's own.
    congestion_s: prefill work that is due, submitted or still with a chance, at which a leftover pays the full price of
    its engine time; in a lull it pays less, so that lulls are used. leftovers_per_plan: how many may start at once, and
    leftover_queue_s: behind how much submitted prefill, for which the next request with a chance would have to wait.
    commitment: worth of a running request in terms of a waiting one; above 1, because what was spent on it is lost with
    it, and whoever takes its place may be given up in turn.
    search: what a plan is made by: "annealing" is all of it, "greedy" stops before annealing, "portfolio" tries the
    rules alone; for comparisons.
    """

    patience: float = DEFAULT_PATIENCE
    floor: float = 0.01
    max_candidates: int = 48
    length_spread: float = 0.8
    price_window_s: float = 40.0
    price_capacity: float = 1.0
    price_weight: float = 0.5
    background_max: float = 0.6
    tpot_share: float = 0.9
    leftover_loss: float = 0.02
    reserve_s: float = 0.3
    congestion_s: float = 0.5
    leftovers_per_plan: int = 4
    leftover_queue_s: float = 0.1
    commitment: float = 2.0
    search: str = "annealing"

    def __post_init__(self) -> None:
        if not self.patience > 0:
            raise ValueError(f"patience must be positive, got {self.patience}")
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor must be at least 0 and below 1, got {self.floor}")
        if self.search not in SEARCHES:
            raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {self.search!r}")


@dataclass(slots=True)
class _Search:
    """The search of one plan as it goes on. spent: plans scored; start: where the best one came from."""

    best: Steps
    score: float
    start: str = "none"
    start_score: float = 0.0
    spent: int = 1

    def offer(self, name: str, admit: Steps, score: float) -> None:
        if score > self.score:
            self.best, self.score, self.start = admit.copy(), score, name


class AnnealingPolicy:
    """See the module. Not thread-safe; one `plan` at a time. `clock` is read only where the budget is a time."""

    wants_ticks = True
    few_at_once = 2
    fills_idle_engine = True
    name = "annealing"

    def __init__(
        self,
        *,
        seed: int = 0,
        budget: SearchBudget | None = None,
        options: AnnealingOptions | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._options = options or AnnealingOptions()
        self._budget = budget or SearchBudget()
        self._clock = clock or MonotonicClock()
        self._state = np.array([(seed + 1) * 0x9E3779B97F4A7C15 % 2**64 | 1], dtype=np.uint64)
        self._price = ShadowPrice(self._options.price_window_s, self._options.price_capacity)
        self._backlog = FcfsBacklog()
        self._spread = np.linspace(-1.0, 1.0, QUANTILES) * self._options.length_spread
        self._base = make_base()
        self._scratch = make_scratch()
        self._candidates = make_candidates(self._options.max_candidates)
        self._stakes = make_stakes(QUANTILES * 256)
        self._batch = PRICE_BATCH
        self._granted = 0.0  # what the floor has granted and nobody has used, in requests ...
        self._slots_granted_s = 0.0  # ... and of the time of slots
        self._planned_at_s: float | None = None
        self._last: dict[int, int] = {}  # handle -> admission step of the last plan
        self._last_at_s = 0.0

    def warm_up(self) -> None:
        """Compiles the kernels (or loads them from the cache) by planning a made-up snapshot."""
        from lmdeploy_slo.scheduling.warm_up import example_snapshot

        snapshot = example_snapshot()
        policy = AnnealingPolicy(budget=SearchBudget(time_s=None, evaluations=200))
        policy.plan(snapshot)
        *_, n, stage = policy._set_stage(snapshot)
        order_for_slots(snapshot, policy._candidates, np.arange(n), stage[0], policy._state)

    def plan(self, snapshot: Snapshot) -> Plan:
        started_at_s = self._clock.now_s()
        options, waiting, now_s = self._options, snapshot.waiting, snapshot.now_s
        self._batch = float(min(PRICE_BATCH, snapshot.limits.max_batch_size))  # one type: one compiled kernel
        self._price.learn(snapshot, self._batch)
        self._backlog.learn(snapshot, self._batch)
        if self._planned_at_s is not None:
            granted_s = options.floor * max(0.0, now_s - self._planned_at_s)
            self._granted += granted_s * self._price.arrivals_per_s
            slots_s = self._slots_granted_s + granted_s * snapshot.limits.max_batch_size
            self._slots_granted_s = min(slots_s, FLOOR_SAVED_SLOTS_S)
        self._planned_at_s = now_s
        if snapshot.free_slots == 0 or not len(waiting):
            return Plan(order=waiting["handle"][np.argsort(waiting["arrival_at_s"], kind="stable")], send_now=0)

        engine_s, hopeful, n, stage = self._set_stage(snapshot)
        search = self._search(n, stage, snapshot, started_at_s)
        rows, now = self._candidates.row[:n], np.flatnonzero(search.best == 0)
        if len(now) > snapshot.free_slots:
            now = order_for_slots(snapshot, self._candidates, now, stage[0], self._state)
        send = rows[now]
        leftovers = self._by_response(snapshot, engine_s, np.flatnonzero(~hopeful))
        most = FLOOR_SAVED + (max(0.0, search.score) if self._any_overdue(snapshot, leftovers) else 0.0)
        self._granted = min(self._granted, most)
        if len(now) >= snapshot.free_slots and self._has_earned_a_slot(snapshot, leftovers):
            send, leftovers = np.concatenate([leftovers[:1], send]), leftovers[1:]
        extra, self._granted = kernel.admit_leftovers(
            waiting, leftovers[: options.leftovers_per_plan], now_s, self._patience_s, OVERDUE * self._patience_s,
            options.leftover_queue_s, options.leftover_loss, options.reserve_s, self._granted,
            self._price_s * self._congestion(n), self._price.arrivals_per_s, self._price.slack_s, engine_s,
            search.best, n, *stage,
        )  # fmt: skip
        if not len(send) and not extra and not len(snapshot.running):
            # An idle engine earns nothing: whatever the price, somebody goes.
            send, extra = (rows[:1], 0) if n else (send, 1)
        chosen = _within_kv(snapshot, np.concatenate([send, leftovers[:extra]]))[: snapshot.free_slots]
        order = self._order(snapshot, (chosen, send, rows[np.argsort(search.best, kind="stable")], leftovers))
        self._remember(waiting, rows, search.best, now_s)
        return Plan(
            order=waiting["handle"][order],
            send_now=len(chosen),
            quality=PlanQuality(
                search.start, search.start_score, search.score, search.spent, self._price_s, self._price.duty
            ),
            costs=self._price_s * engine_s[order],
        )

    # -- what it looks at -----------------------------------------------------

    @property
    def _price_s(self) -> float:
        return self._options.price_weight * self._price.price_s

    @property
    def _patience_s(self) -> float:
        return self._options.patience * self._backlog.longest_s

    def _set_stage(self, snapshot: Snapshot) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], int, Stage]:
        """(engine time by waiting row, which can still meet, how many candidates, what every kernel takes last)."""
        model, running, waiting, options = snapshot.model, snapshot.running, snapshot.waiting, self._options
        if QUANTILES * len(running) > len(self._stakes.end):
            self._stakes = make_stakes(2 * QUANTILES * len(running))
        duty = min(self._price.duty, self._most_background(snapshot))
        pace = Pace(model.c0, model.p1, model.p2, model.d1, model.d2, duty / (1.0 - duty))
        worth = options.commitment * self._worth_of(running)
        at_stake, spans = kernel.look_at_running(
            running, worth, snapshot.now_s, pace, self._spread, self._base, self._stakes
        )
        engine_s = np.empty(len(waiting))
        hopeful = np.empty(len(waiting), dtype=np.bool_)
        kernel.look_at_waiting(waiting, snapshot.now_s, pace, self._spread, self._batch, self._base, engine_s, hopeful)
        chosen = np.flatnonzero(hopeful)
        if len(chosen) > options.max_candidates:
            chosen = chosen[np.argpartition(engine_s[chosen], options.max_candidates)[: options.max_candidates]]
        chosen = chosen[np.argsort(engine_s[chosen], kind="stable")]
        kernel.take_candidates(
            waiting, chosen, self._worth_of(waiting[chosen]), snapshot.now_s, pace, self._spread, self._price_s,
            engine_s, self._candidates,
        )  # fmt: skip
        self._price_of_patience(len(chosen))
        stage = (pace, self._base, spans, self._stakes, at_stake, self._candidates, self._scratch)
        return engine_s, hopeful, len(chosen), stage

    def _price_of_patience(self, n: int) -> None:
        """A request with a TPOT objective alone loses nothing by waiting: it goes where it is all but sure to meet."""
        who = self._candidates
        price, worth = who.price[:n], who.worth[:n]
        can_wait = np.isinf(who.ttft_at[:n]) & np.isinf(who.e2e_at[:n])
        np.maximum(price, LATER * worth, out=price, where=can_wait)

    def _worth_of(self, rows: Rows) -> npt.NDArray[np.float64]:
        """Of each row's SLO being met: by its tier, and less where its client asks for more than its share."""
        return np.asarray(TIER_WORTH[rows["tier"]] * self._price.worth_of(rows["client"]))

    def _most_background(self, snapshot: Snapshot) -> float:
        """The largest share of time that prefills still to come can take: the policy itself will hold back more."""
        most, running, model = self._options.background_max, snapshot.running, snapshot.model
        objectives = running["tpot_s"][np.isfinite(running["tpot_s"])]
        if not len(objectives):
            return most
        context = float(np.sum(running["prompt_tokens"] + running["cached_tokens"] + running["generated_tokens"]))
        decode_s = model.step_s(0, 0, len(running), context)
        return min(most, max(0.0, 1.0 - decode_s / (self._options.tpot_share * float(np.median(objectives)))))

    def _congestion(self, n: int) -> float:
        """0 where no prefill is due, 1 where at least `congestion_s` of them are: how much the price counts now."""
        due_s = float(self._base.prefill[0] + np.sum(self._candidates.stall[:n]))
        return min(1.0, due_s / self._options.congestion_s)

    # -- the search -----------------------------------------------------------

    def _search(self, n: int, stage: Stage, snapshot: Snapshot, started_at_s: float) -> _Search:
        """Admission steps of the `n` candidates."""
        evaluations = self._budget.evaluations or 1 << 40
        nothing = np.full(n, NEVER, dtype=np.int64)
        base_score = kernel.rollout(nothing, n, *stage)
        search = _Search(nothing, base_score)
        if n == 0:
            return search
        worth, price = self._candidates.worth[:n], self._candidates.price[:n]
        share = SEARCH_SHARE if n <= snapshot.free_slots else SEARCH_SHARE_WITHOUT_SLOTS
        bound = base_score + float(np.sum(np.maximum(worth - price, 0.0))) - EPSILON

        def done() -> float:
            """The part of the budget that is spent; 1 also where nothing can score higher."""
            part = 1.0 if search.score >= bound else search.spent / evaluations
            if self._budget.time_s is not None:
                part = max(part, (self._clock.now_s() - started_at_s) / (share * self._budget.time_s))
            return part

        if self._options.search != "portfolio":
            admit, score = nothing.copy(), base_score
            for first in range(0, n, GREEDY_SLICE):
                next_few = np.arange(first, min(first + GREEDY_SLICE, n))
                score, spent = kernel.insert_greedily(admit, next_few, n, score, evaluations - search.spent, *stage)
                search.spent += spent
                if done() >= 1.0:
                    break
            search.offer("greedy", admit, score)
        # Most plans end here: at the bound everybody is expected to meet, and nothing can score higher.
        if search.score < bound:
            for name, admit in self._portfolio(n, snapshot):
                search.offer(name, admit, kernel.rollout(admit, n, *stage))
                search.spent += 1
        search.start_score = search.score
        # Cycles of cooling, each twice as long as the one before: a larger budget goes on where a smaller one ends.
        cycle = used = 0
        while self._options.search == "annealing" and done() < 1.0:
            if used >= cycle:
                cycle, used = max(FIRST_CYCLE, 2 * cycle), 0
                admit, score = search.best.copy(), search.score
            temperature = HOT * (COLD / HOT) ** (used / (cycle - SLICE))
            moves = min(SLICE, evaluations - search.spent)
            score, search.score = kernel.anneal(
                admit, search.best, n, score, search.score, temperature, temperature, moves, self._state, *stage
            )
            used += moves
            search.spent += moves
        return search

    def _portfolio(self, n: int, snapshot: Snapshot) -> list[tuple[str, Steps]]:
        """Starts by name: each rule sending its first few now, and the last plan."""
        candidates = snapshot.waiting[self._candidates.row[:n]]
        among = Snapshot(snapshot.now_s, candidates, snapshot.running, snapshot.limits, snapshot.model)
        starts = []
        for rule in PORTFOLIO_RULES:
            order = rule_order(among, rule)
            for size in PORTFOLIO_SIZES:
                if size < 2 * n:
                    admit = np.full(n, NEVER, dtype=np.int64)
                    admit[order[:size]] = 0
                    starts.append((rule, admit))
        starts.append(("last plan", self._last_plan(n, snapshot)))
        return starts

    def _last_plan(self, n: int, snapshot: Snapshot) -> Steps:
        """The last plan moved on in time; NEVER for whoever it left out or did not know."""
        step_s = max(snapshot.model.step_s(0, 0, self._batch, 0), SHORTEST_STEP_S)
        passed = int((snapshot.now_s - self._last_at_s) / step_s)
        handles = snapshot.waiting["handle"][self._candidates.row[:n]].tolist()
        last = np.array([self._last.get(h, NEVER) for h in handles], dtype=np.int64)
        return np.where(last < NEVER, np.maximum(last - passed, 0), NEVER)

    def _remember(self, waiting: Rows, rows: Steps, best: Steps, now_s: float) -> None:
        later = (best > 0) & (best < NEVER)
        self._last = dict(zip(waiting["handle"][rows[later]].tolist(), best[later].tolist(), strict=True))
        self._last_at_s = now_s

    # -- the order ------------------------------------------------------------

    def _by_response(self, snapshot: Snapshot, engine_s: npt.NDArray[np.float64], rows: Steps) -> Steps:
        """`rows` by wait over the root of engine time, highest first: between oldest first, which keeps the tail
        short, and highest response ratio (Brinch Hansen, 1971), which keeps the mean short. Higher tiers first."""
        waiting = snapshot.waiting[rows]
        response = (snapshot.now_s - waiting["arrival_at_s"]) / np.sqrt(np.maximum(engine_s[rows], SHORTEST_STEP_S))
        response *= self._price.worth_of(waiting["client"])
        return np.asarray(rows[np.lexsort((-response, -waiting["tier"]))], dtype=np.int64)

    def _any_overdue(self, snapshot: Snapshot, leftovers: Steps) -> bool:
        since_s = snapshot.now_s - OVERDUE * self._patience_s
        return len(leftovers) > 0 and bool(np.min(snapshot.waiting["arrival_at_s"][leftovers]) <= since_s)

    def _has_earned_a_slot(self, snapshot: Snapshot, leftovers: Steps) -> bool:
        """Whether the first leftover goes before those who can meet, where they want every slot: it is overdue, and the
        floor has granted the time it will hold a slot, which is used up then."""
        if not self._any_overdue(snapshot, leftovers[:1]):
            return False
        run_s = float(snapshot.waiting["output_tokens"][leftovers[0]]) * step_time_s(snapshot)
        if run_s > self._slots_granted_s:
            return False
        self._slots_granted_s -= run_s
        return True

    def _order(self, snapshot: Snapshot, groups: tuple[Steps, ...]) -> Steps:
        """Every row once: one group after the other, then the others by arrival."""
        left = np.ones(len(snapshot.waiting), dtype=np.bool_)
        parts = []
        for rows in groups:
            rows = rows[left[rows]]
            left[rows] = False
            parts.append(rows)
        others = np.flatnonzero(left)
        parts.append(others[np.argsort(snapshot.waiting["arrival_at_s"][others], kind="stable")])
        return np.concatenate(parts)


def _within_kv(snapshot: Snapshot, rows: Steps) -> Steps:
    """The head of `rows` whose predicted KV cache fits beside what runs; at least one where nothing runs."""
    limits: EngineLimits = snapshot.limits
    if limits.kv_tokens is None or not len(rows):
        return rows
    running, waiting = snapshot.running, snapshot.waiting[rows]
    used = float(np.sum(running["prompt_tokens"] + running["cached_tokens"] + running["output_tokens"]))
    after = used + np.cumsum(waiting["prompt_tokens"] + waiting["cached_tokens"] + waiting["output_tokens"])
    fits = int(np.searchsorted(after, limits.kv_tokens, side="right"))
    return rows[: max(fits, 0 if len(running) else 1)]
