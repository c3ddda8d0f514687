"""`slo`, the default placement: each request where it adds most to the requests expected to meet their SLO.

It is planned jointly with the order. What a request adds at a replica is told by the rollout that the replica's own
policy scores its plans with: whether it would meet there if it were sent now (its forecast lengths, the prompt tokens
that its prefix cache is expected to hold, the engine's own model, the prefills that are due), less what that takes from
those that run there, less the price of its engine time. Replicas at which it adds about as much are told apart by

    (outstanding work + its engine time) x its engine time,        both in seconds of that engine,

which sends it where it is relatively cheapest as long as no queue is longer than that is worth (Stolyar, Annals of
Applied Probability 14(1), 2004: such a rule is throughput-optimal). Where it adds nothing anywhere it waits where the
least work is.

A request is bound when it is dispatched. One that a plan has seen and left waiting is looked at again: it moves to
where it would be sent now, if there is such a replica. Requests whose SLO is lost, or that carry none, move from the
longest queue to an engine at which nobody waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.core.snapshot import ROW_DTYPE, EngineLimits, Rows
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.scheduling import placement_kernel as kernel
from lmdeploy_slo.scheduling.annealing import PRICE_BATCH, TIER_WORTH, AnnealingOptions
from lmdeploy_slo.scheduling.annealing_arrays import QUANTILES
from lmdeploy_slo.scheduling.placement import Proposal, Replica, outstanding_s
from lmdeploy_slo.scheduling.scheduler import Scheduler

LEAST_GAIN = 0.3
"""Of its worth: a request that adds less at a replica would not be sent there now."""

GRAIN = 0.05
"""Of its worth: gains closer than this are alike."""

MOVE_EVERY_S = 0.01
"""Who waits is looked at again at most this often, and each request by itself every `RETRY_S`."""

RETRY_S = 0.02

WEIGHED = 512
"""Pairs of a waiting request and a replica that are weighed in one go, so that it takes 4 ms or so however many there
are; those that were not looked at for longest go first, then the cheapest."""

AT_ONCE = 2
"""So many of them may move to one replica in one go: the next are weighed with these in place."""

LEFTOVERS_EVERY_S = 0.25
LEFTOVERS = 4
"""How often requests with nothing to gain move to an engine at which nobody waits, and how many at once."""

FRESH_S = 0.1
"""What is known of a replica is renewed when it is older than this by what the replica was told since."""

UNKNOWN_DUTY = 0.3
"""Share of time in which prefills are expected at a replica whose policy does not say."""


@dataclass(slots=True, eq=False)
class _Site:
    """What is remembered of a replica. place: its row in the arrays of the kernel. judged: the handles its last plan
    knew. settled, told_at_s: the running requests its row was filled from, and when they were last told of; promised:
    the changes after which its promises were taken in."""

    place: int
    price_s: float = 0.0
    duty: float = UNKNOWN_DUTY
    judged: frozenset[int] = frozenset()
    settled: int = -1
    told_at_s: float = -np.inf
    model: StepModel | None = None
    promised: tuple[int, int, int] = (-1, -1, -1)
    plans: int = 0
    looked_at_s: dict[int, float] = field(default_factory=dict)  # by handle


class SloPlacement:
    """See the module."""

    name = "slo"

    def __init__(self, *, moves: bool = True) -> None:
        """moves: False binds requests on arrival; for comparisons."""
        self._moves = moves
        options = AnnealingOptions()
        self._options = options
        self._spread = np.linspace(-1.0, 1.0, QUANTILES) * options.length_spread
        self._scratch, self._admit = kernel.make_scratch()
        self._known: dict[int, _Site] = {}
        self._unused: list[int] = []
        self._sites = kernel.make_sites(1, QUANTILES * 256)
        self._next_moves_s = self._next_leftovers_s = -np.inf

    # -- what it is told ------------------------------------------------------

    def planned(self, replica: Replica, plan: Plan, now_s: float) -> None:
        site = self._site(replica)
        quality = plan.quality
        site.price_s = site.price_s if quality.price_s is None else quality.price_s
        site.duty = site.duty if quality.duty is None else quality.duty
        site.judged = frozenset(plan.order.tolist())
        site.plans += 1

    def removed(self, replica: Replica) -> None:
        site = self._known.pop(replica.number, None)
        if site is not None:
            self._unused.append(site.place)

    # -- what it is asked -----------------------------------------------------

    def choose(self, spec: RequestSpec, replicas: Sequence[Replica], now_s: float) -> Replica:
        return replicas[self._best(spec, replicas, now_s)[0]]

    def moves(self, replicas: Sequence[Replica], now_s: float) -> list[Proposal]:
        if not self._moves or now_s < self._next_moves_s:
            return []
        self._next_moves_s = now_s + MOVE_EVERY_S
        proposals = self._pulled(replicas, now_s)
        if now_s >= self._next_leftovers_s:
            self._next_leftovers_s = now_s + LEFTOVERS_EVERY_S
            proposals += self._leftovers(replicas, now_s, {proposal.handle for proposal in proposals})
        return proposals

    def warm_up(self) -> None:
        def idle(number: int) -> Replica:
            model = StepModel(0.01, 1e-5, 0.0, 1e-5, 1e-8)
            return Replica(number, Scheduler(limits=EngineLimits(), model=model, lengths=TaskLengthPredictor()))

        SloPlacement().choose(RequestSpec("", 0.0, 1, 1), [idle(0), idle(1)], 0.0)

    # -- inside ---------------------------------------------------------------

    def _pulled(self, replicas: Sequence[Replica], now_s: float) -> list[Proposal]:
        """Those left waiting by the plan of their replica that would be sent now at another."""
        left: list[tuple[float, float, int, Replica]] = []
        for replica in replicas:
            if not replica.scheduler.waiting:
                continue
            site = self._site(replica)
            rows = replica.scheduler.rows()[0]
            rows = rows[_hopeful(rows, now_s)]
            before, site.looked_at_s = site.looked_at_s, {}
            for handle, tokens in zip(rows["handle"].tolist(), rows["prompt_tokens"].tolist(), strict=True):
                if handle in site.judged:
                    site.looked_at_s[handle] = looked_at_s = before.get(handle, -np.inf)
                    if looked_at_s <= now_s - RETRY_S:
                        left.append((looked_at_s, tokens, handle, replica))
        proposals: list[Proposal] = []
        left.sort(key=lambda entry: entry[:3])
        coming = dict.fromkeys((replica.number for replica in replicas), 0)
        for _, _, handle, source in left[: max(2, WEIGHED // len(replicas))]:
            self._site(source).looked_at_s[handle] = now_s
            spec = source.scheduler.spec(handle)
            others = [r for r in replicas if r is not source and coming[r.number] < AT_ONCE and r.could_hold(spec)]
            if not others:
                continue
            best, gain = self._best(spec, others, now_s)
            if gain > LEAST_GAIN:
                proposals.append(Proposal(handle, source, others[best]))
                coming[others[best].number] += 1
        return proposals

    def _leftovers(self, replicas: Sequence[Replica], now_s: float, taken: set[int]) -> list[Proposal]:
        """Those with nothing to gain, oldest first, from the most work to the least where nobody waits."""
        idle = [replica for replica in replicas if not replica.scheduler.waiting and replica.scheduler.free_slots]
        proposals: list[Proposal] = []
        while idle and len(proposals) < LEFTOVERS:
            target = min(idle, key=outstanding_s)
            idle.remove(target)
            source = max(replicas, key=outstanding_s)
            rows = source.scheduler.rows()[0]
            rows = rows[~_hopeful(rows, now_s)]
            handles = [h for h in rows["handle"][np.argsort(rows["arrival_at_s"])].tolist() if h not in taken]
            handles = [h for h in handles if target.could_hold(source.scheduler.spec(h))]
            if not handles or outstanding_s(source) <= 2.0 * outstanding_s(target):
                break
            taken.add(handles[0])
            proposals.append(Proposal(handles[0], source, target))
        return proposals

    def _best(self, spec: RequestSpec, replicas: Sequence[Replica], now_s: float) -> tuple[int, float]:
        """(the position of the best replica, what the request adds there as a part of its worth)."""
        count = len(replicas)
        which = np.empty(count, dtype=np.int64)
        prices_s, work_s = np.empty(count), np.empty(count)
        sites = None
        while sites is not self._sites:  # larger arrays, made on the way, begin empty
            sites = self._sites
            for k, replica in enumerate(replicas):
                site = self._look_at(replica, now_s)
                which[k], prices_s[k], work_s[k] = site.place, site.price_s, outstanding_s(replica)
        asks = _asks(spec, replicas)
        gains, engine_s = np.empty(count), np.empty(count)
        worth = TIER_WORTH[asks["tier"][:1]]
        kernel.weigh(
            self._sites, which, asks, worth, now_s, prices_s, PRICE_BATCH, self._spread, self._admit, self._scratch,
            gains, engine_s,
        )  # fmt: skip
        gains /= worth[0]
        for k, replica in enumerate(replicas):
            if replica.policy is not None and not replica.policy.wants_ticks and replica.scheduler.waiting:
                gains[k] = kernel.NO_ROOM  # a fixed rule sends whom it can: a newcomer waits like the others
        best = int(kernel.best_site(gains, engine_s, work_s, LEAST_GAIN, GRAIN))
        return best, float(gains[best])

    def _look_at(self, replica: Replica, now_s: float) -> _Site:
        """Brings what is known of a replica up to date."""
        site, scheduler = self._site(replica), replica.scheduler
        waiting_changes, running_changes = scheduler.changes
        told_at_s = scheduler.told_at_s
        renewed = site.settled != running_changes or told_at_s > site.told_at_s + FRESH_S
        if renewed or site.model is not scheduler.model:
            site.settled, site.told_at_s, site.model = running_changes, told_at_s, scheduler.model
            self._settle(site, replica, min(told_at_s, now_s) if told_at_s > -np.inf else now_s)
            renewed = True
        if renewed or site.promised != (waiting_changes, running_changes, site.plans):
            site.promised = waiting_changes, running_changes, site.plans
            self._promise(site, replica, now_s)
        return site

    def _settle(self, site: _Site, replica: Replica, told_at_s: float) -> None:
        scheduler, options, model = replica.scheduler, self._options, replica.scheduler.model
        running = scheduler.rows()[1]
        limits = scheduler.limits
        if QUANTILES * len(running) > self._sites.end.shape[1]:
            self._make_room(len(self._sites.spans), 2 * QUANTILES * len(running))
        kernel.look_at_site(
            self._sites, site.place, running, options.commitment * TIER_WORTH[running["tier"]], told_at_s,
            (model.c0, model.p1, model.p2, model.d1, model.d2), site.duty, options.tpot_share,
            options.background_max, limits.max_batch_size,
            float("inf") if limits.kv_tokens is None else float(limits.kv_tokens), self._spread,
        )  # fmt: skip

    def _promise(self, site: _Site, replica: Replica, now_s: float) -> None:
        """Those placed there that no plan has seen yet are taken to be sent, where they gain by it."""
        rows = replica.scheduler.rows()[0]
        new = [at for at, handle in enumerate(rows["handle"].tolist()) if handle not in site.judged]
        rows = rows[new[: 2 * kernel.PROMISED]]
        kernel.promise(
            self._sites, site.place, rows, TIER_WORTH[rows["tier"]], now_s, site.price_s, LEAST_GAIN, PRICE_BATCH,
            self._spread, self._admit, self._scratch,
        )  # fmt: skip

    def _site(self, replica: Replica) -> _Site:
        site = self._known.get(replica.number)
        if site is None:
            place = self._unused.pop() if self._unused else len(self._known)
            site = self._known[replica.number] = _Site(place)
            if place >= len(self._sites.spans):
                self._make_room(2 * place, self._sites.end.shape[1])
        return site

    def _make_room(self, replicas: int, stakes: int) -> None:
        """Larger arrays; everything is filled anew."""
        self._sites = kernel.make_sites(replicas, stakes)
        for site in self._known.values():
            site.settled = -1


def _hopeful(rows: Rows, now_s: float) -> npt.NDArray[np.bool_]:
    """Whose first token, and whose end, are not too late yet, and that carry an objective."""
    first_s = np.minimum(rows["ttft_s"], rows["e2e_s"])
    carries = np.isfinite(np.minimum(first_s, rows["tpot_s"]))
    return np.asarray(carries & (now_s - rows["arrival_at_s"] < first_s))


def _asks(spec: RequestSpec, replicas: Sequence[Replica]) -> Rows:
    """The request as each of these would plan it."""
    asks = np.empty(len(replicas), dtype=ROW_DTYPE)
    first = replicas[0].scheduler
    asks[:] = first.row_of(spec)
    for k, replica in enumerate(replicas):
        scheduler = replica.scheduler
        if scheduler.lengths is not first.lengths:
            forecast = scheduler.forecast(spec)
            asks[k]["output_tokens"], asks[k]["length_sigma"] = forecast.tokens, forecast.sigma
        if scheduler.prefixes is not None or first.prefixes is not None:
            cached_tokens = scheduler.expected_cached_tokens(spec)
            asks[k]["prompt_tokens"] = spec.prompt_tokens - cached_tokens
            asks[k]["cached_tokens"] = cached_tokens
    return asks
