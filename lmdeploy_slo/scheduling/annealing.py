"""`annealing`, the default policy: order and number in flight by simulated annealing on a rollout of the engine.

Each plan starts from a portfolio (the rules of `rules` with several numbers sent at once, the last plan, a greedy
insertion), anneals from the best of them while the budget lasts, and never returns less than the best it has seen.
What the plan admits now is sent; the rest waits for the next plan, which comes with the next event or engine step.

Requests that can no longer meet their SLO, or carry none, go by response ratio into what is left over: one is admitted
when that costs the others (expected misses, and the shadow price of its engine time) no more than `leftover_loss`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.clock import Clock, MonotonicClock
from lmdeploy_slo.core.plan import Plan, PlanQuality
from lmdeploy_slo.core.snapshot import EngineLimits, Rows, Snapshot
from lmdeploy_slo.scheduling import annealing_kernel as kernel
from lmdeploy_slo.scheduling.annealing_kernel import NEVER, QUANTILES
from lmdeploy_slo.scheduling.fcfs_backlog import FcfsBacklog
from lmdeploy_slo.scheduling.policy import SearchBudget
from lmdeploy_slo.scheduling.rules import engine_time_s, rule_order
from lmdeploy_slo.scheduling.shadow_price import ShadowPrice

PORTFOLIO_RULES = ("fcfs", "edf", "llf", "swf")
PORTFOLIO_SIZES = (1, 2, 4, 8, 16)
SLICE = 64
"""Evaluations between two looks at the clock."""

HOT, COLD = 0.3, 0.01
"""Temperatures, in requests: at first a plan that loses a third of a request is often tried, at last hardly ever."""

PRICE_BATCH = 128.0
"""Sequences taken to share the fixed cost of a pass when engine time is priced: a loaded engine runs about so many."""

SHORTEST_STEP_S = 1e-6

TIER_WORTH = np.array([0.1, 1.0, 10.0, 100.0])
"""Worth of a request met, by PriorityClass."""


@dataclass(frozen=True, slots=True)
class AnnealingOptions:
    """Settings of the policy; the defaults are meant for everybody.

    max_candidates: waiting requests one search decides on, the cheapest that can still meet. length_spread: how many
    sigmas the outer length quantiles lie off the forecast. price_window_s, price_capacity, price_weight: see
    ShadowPrice; the weight scales it. background_max: largest share of time ascribed to prefills still to come, and
    tpot_share: of the median TPOT objective that decoding and those prefills may fill together.
    leftover_loss: requests one leftover may cost; larger serves hopeless requests sooner, at others' expense.
    congestion_s: prefill work that is due, submitted or still with a chance, at which a leftover pays the full price of
    its engine time; in a lull it pays less, so that lulls are used. leftovers_per_plan: how many may start at once.
    commitment: worth of a running request in terms of a waiting one; above 1, because what was spent on it is lost with
    it, and whoever takes its place may be given up in turn.
    patience: > 0, the knob between attainment and the longest waits: a leftover pays the price of its engine time in
    full at first, nothing after this many times the longest wait FCFS would have caused of late.
    """

    max_candidates: int = 48
    length_spread: float = 0.8
    price_window_s: float = 40.0
    price_capacity: float = 1.0
    price_weight: float = 0.5
    background_max: float = 0.6
    tpot_share: float = 0.9
    leftover_loss: float = 0.02
    congestion_s: float = 0.5
    commitment: float = 2.0
    patience: float = 2.0
    leftovers_per_plan: int = 4


class AnnealingPolicy:
    """See the module. Not thread-safe; one `plan` at a time. `clock` is read only where the budget is a time."""

    wants_ticks = True
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
        self._base = kernel.make_base()
        self._scratch = kernel.make_scratch()
        self._candidates = kernel.make_candidates(self._options.max_candidates)
        self._stakes = kernel.make_stakes(QUANTILES * 256)
        self._batch = PRICE_BATCH
        self._last: dict[int, int] = {}  # handle -> admission step of the last plan
        self._last_at_s = 0.0

    def warm_up(self) -> None:
        """Compiles the kernels (or loads them from the cache) by planning a made-up snapshot."""
        from lmdeploy_slo.scheduling.warm_up import example_snapshot

        AnnealingPolicy(budget=SearchBudget(time_s=None, evaluations=200)).plan(example_snapshot())

    def plan(self, snapshot: Snapshot) -> Plan:
        started_at_s = self._clock.now_s()
        waiting = snapshot.waiting
        self._batch = float(min(PRICE_BATCH, snapshot.limits.max_batch_size))  # one type: one compiled kernel
        self._price.learn(snapshot, self._batch)
        self._backlog.learn(snapshot, self._batch)
        oldest_first = rule_order(snapshot, "fcfs")
        if snapshot.free_slots == 0 or not len(waiting):
            return Plan(order=waiting["handle"][oldest_first], send_now=0)

        hopeful, n, stage = self._set_stage(snapshot)
        best, quality = self._search(n, stage, snapshot, started_at_s)
        rows = self._candidates.row[:n]
        send = rows[best == 0]
        leftovers = self._by_response(snapshot, oldest_first[~hopeful[oldest_first]])
        extra = kernel.admit_leftovers(
            waiting, leftovers, self._options.leftovers_per_plan, snapshot.now_s, self._options.leftover_loss,
            self._options.patience * self._backlog.longest_s, self._price_s * self._congestion(n), self._batch,
            best, n, *stage,
        )  # fmt: skip
        if not len(send) and not extra and not len(snapshot.running):
            # An idle engine earns nothing: whatever the price, somebody goes.
            send, extra = (rows[:1], 0) if n else (send, 1)
        later = rows[np.argsort(best, kind="stable")]
        chosen = _within_kv(snapshot, np.concatenate([send, leftovers[:extra]]))
        chosen = chosen[: snapshot.free_slots]
        order = _first_of(np.concatenate([chosen, later, leftovers, oldest_first]))
        self._remember(waiting, rows, best, snapshot.now_s)
        return Plan(order=waiting["handle"][order], send_now=len(chosen), quality=quality)

    def _by_response(self, snapshot: Snapshot, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """`rows` by wait over the root of engine time, highest first: between oldest first, which keeps the tail
        short, and highest response ratio (Brinch Hansen, 1971), which keeps the mean short. Higher tiers first."""
        waiting = snapshot.waiting[rows]
        engine_s = np.maximum(engine_time_s(waiting, snapshot.model, self._batch), SHORTEST_STEP_S)
        response = (snapshot.now_s - waiting["arrival_at_s"]) / np.sqrt(engine_s)
        return np.asarray(rows[np.lexsort((-response, -waiting["tier"]))], dtype=np.int64)

    def _most_background(self, snapshot: Snapshot) -> float:
        """The largest share of time that prefills still to come can take: the policy itself will hold back more."""
        most, running, model = self._options.background_max, snapshot.running, snapshot.model
        objectives = running["tpot_s"][np.isfinite(running["tpot_s"])]
        if not len(objectives):
            return most
        context = float(np.sum(running["prompt_tokens"] + running["generated_tokens"]))
        decode_s = model.step_s(0, 0, len(running), context)
        return min(most, max(0.0, 1.0 - decode_s / (self._options.tpot_share * float(np.median(objectives)))))

    def _congestion(self, n: int) -> float:
        """0 where no prefill is due, 1 where at least `congestion_s` of them are: how much the price counts now."""
        due_s = float(self._base.prefill[0] + np.sum(self._candidates.stall[:n]))
        return min(1.0, due_s / self._options.congestion_s)

    # -- inside ---------------------------------------------------------------

    @property
    def _price_s(self) -> float:
        return self._options.price_weight * self._price.price_s

    def _set_stage(self, snapshot: Snapshot) -> tuple[npt.NDArray[np.bool_], int, tuple[object, ...]]:
        """(which waiting rows can still meet, how many candidates, the arguments every kernel takes last)."""
        model, running = snapshot.model, snapshot.running
        if QUANTILES * len(running) > len(self._stakes.end):
            self._stakes = kernel.make_stakes(2 * QUANTILES * len(running))
        duty = min(self._price.duty, self._most_background(snapshot))
        pace = kernel.Pace(model.c0, model.p1, model.p2, model.d1, model.d2, duty / (1.0 - duty))
        at_stake, steps = kernel.look_at_running(
            running, snapshot.now_s, pace, self._spread, self._options.commitment * TIER_WORTH, self._base, self._stakes
        )
        hopeful = np.zeros(len(snapshot.waiting), dtype=np.bool_)
        cheapest_first = np.argsort(engine_time_s(snapshot.waiting, model, self._batch), kind="stable")
        n = kernel.look_at_waiting(
            snapshot.waiting, cheapest_first, snapshot.now_s, pace, self._spread, TIER_WORTH, self._price_s,
            self._batch, self._base, self._candidates, hopeful,
        )  # fmt: skip
        return hopeful, n, (pace, self._base, steps, self._stakes, at_stake, self._candidates, self._scratch)

    def _search(
        self, n: int, stage: tuple[object, ...], snapshot: Snapshot, started_at_s: float
    ) -> tuple[npt.NDArray[np.int64], PlanQuality]:
        """Admission steps of the `n` candidates."""
        evaluations = self._budget.evaluations or 1 << 40
        best = np.full(n, NEVER, dtype=np.int64)
        best_score = kernel.rollout(best, n, *stage)
        if n == 0:
            return best, PlanQuality("", best_score, best_score, 1)
        spent, start = 1, "none"
        bound = best_score + float(np.sum(np.maximum(self._candidates.worth[:n] - self._candidates.price[:n], 0.0)))
        greedy = np.empty(n, dtype=np.int64)
        score, used = kernel.insert_greedily(greedy, np.arange(n), n, evaluations, *stage)
        spent += used
        if score > best_score:
            best, best_score, start = greedy, score, "greedy"
        # Most plans end here: at the bound everybody is expected to meet, and nothing can score higher.
        starts = self._portfolio(n, snapshot) if best_score < bound - kernel.EPSILON else []
        for name, admit in starts:
            score = kernel.rollout(admit, n, *stage)
            spent += 1
            if score > best_score:
                best, best_score, start = admit, score, name
        start_score = best_score
        admit, score = best.copy(), best_score
        budget_s = self._budget.time_s
        while spent < evaluations and best_score < bound - kernel.EPSILON:
            done = spent / evaluations
            if budget_s is not None:
                done = max(done, (self._clock.now_s() - started_at_s) / budget_s)
            if done >= 1.0:
                break
            hot = HOT * (COLD / HOT) ** done
            some = min(SLICE, evaluations - spent)
            score, best_score = kernel.anneal(admit, best, n, score, best_score, hot, hot, some, self._state, *stage)
            spent += some
        return best, PlanQuality(start, start_score, best_score, spent)

    def _portfolio(self, n: int, snapshot: Snapshot) -> list[tuple[str, npt.NDArray[np.int64]]]:
        """Starts by name: each rule sending its first few now, and the last plan moved on in time."""
        rows = self._candidates.row[:n]
        place = np.full(len(snapshot.waiting), -1, dtype=np.int64)
        place[rows] = np.arange(n)
        starts = []
        for rule in PORTFOLIO_RULES:
            order = place[rule_order(snapshot, rule)]
            order = order[order >= 0]
            for size in PORTFOLIO_SIZES:
                if size < 2 * n:
                    admit = np.full(n, NEVER, dtype=np.int64)
                    admit[order[:size]] = 0
                    starts.append((rule, admit))
        step_s = max(snapshot.model.step_s(0, 0, self._batch, 0), SHORTEST_STEP_S)
        passed = int((snapshot.now_s - self._last_at_s) / step_s)
        handles = snapshot.waiting["handle"][rows].tolist()
        last = np.array([self._last.get(h, NEVER) for h in handles], dtype=np.int64)
        starts.append(("last plan", np.where(last < NEVER, np.maximum(last - passed, 0), NEVER)))
        return starts

    def _remember(self, waiting: Rows, rows: npt.NDArray[np.int64], best: npt.NDArray[np.int64], now_s: float) -> None:
        later = (best > 0) & (best < NEVER)
        self._last = dict(zip(waiting["handle"][rows[later]].tolist(), best[later].tolist(), strict=True))
        self._last_at_s = now_s


def _first_of(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rows without repeats, each at its first place."""
    _, first = np.unique(rows, return_index=True)
    return np.asarray(rows[np.sort(first)], dtype=np.int64)


def _within_kv(snapshot: Snapshot, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The head of `rows` whose predicted KV cache fits beside what runs; at least one where nothing runs."""
    limits: EngineLimits = snapshot.limits
    if limits.kv_tokens is None or not len(rows):
        return rows
    running, waiting = snapshot.running, snapshot.waiting[rows]
    used = float(np.sum(running["prompt_tokens"] + running["output_tokens"]))
    after = used + np.cumsum(waiting["prompt_tokens"] + waiting["output_tokens"])
    fits = int(np.searchsorted(after, limits.kv_tokens, side="right"))
    return rows[: max(fits, 0 if len(running) else 1)]
