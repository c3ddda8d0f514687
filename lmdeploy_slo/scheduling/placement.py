"""On which of several engines a request is served: what a placement is, the table of their names, and simple rules.

    slo           where it adds most to the requests expected to meet their SLO: `placement_slo`
    round-robin   each in turn
    least-loaded  the fewest requests, waiting and running
    least-work    the least engine time predicted for all requests there (rule `swf`)
    most-memory   the most KV memory left, by predicted lengths, as in Huang et al. (arXiv 2504.14966)

A simple rule places a request once, when it arrives; it moves only from a replica that is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from lmdeploy_slo.core.plan import DEFAULT_PLACEMENT as DEFAULT_PLACEMENT
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.core.snapshot import Rows
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.scheduling.policy import Policy
from lmdeploy_slo.scheduling.rules import engine_time_s
from lmdeploy_slo.scheduling.scheduler import Scheduler


@dataclass(slots=True, eq=False)
class Replica:
    """An engine as placement sees it. number: the fleet's. open: takes new requests."""

    number: int
    scheduler: Scheduler
    policy: Policy | None = None
    open: bool = True
    _totals: dict[str, tuple[tuple[int, int], float]] = field(default_factory=dict)

    def could_hold(self, spec: RequestSpec) -> bool:
        """Whether its KV cache, were it empty, would hold the prompt."""
        kv_tokens = self.scheduler.limits.kv_tokens
        return kv_tokens is None or spec.prompt_tokens <= kv_tokens

    def total(self, name: str, of: Callable[[Replica, Rows], float]) -> float:
        """A sum over waiting and running rows, computed anew where requests have come or gone; `of` is what `name`
        always stands for."""
        changes, value = self._totals.get(name, ((-1, -1), 0.0))
        if changes != self.scheduler.changes:
            changes = self.scheduler.changes
            value = sum(of(self, rows) for rows in self.scheduler.rows())
            self._totals[name] = changes, value
        return value


class Proposal(NamedTuple):
    """A waiting request that would do better elsewhere."""

    handle: int
    source: Replica
    target: Replica


class Placement(Protocol):
    """Chooses among replicas. May remember what it was told, never the clock or anything global; equal histories give
    equal choices."""

    @property
    def name(self) -> str: ...

    def choose(self, spec: RequestSpec, replicas: Sequence[Replica], now_s: float) -> Replica:
        """For a request that is nowhere yet; at least one replica, all of them open."""
        ...

    def moves(self, replicas: Sequence[Replica], now_s: float) -> list[Proposal]:
        """Moves between these, all of them open, each request once; called often, and cheap where nothing is to do."""
        ...

    def planned(self, replica: Replica, plan: Plan, now_s: float) -> None:
        """A plan was applied there."""
        ...

    def removed(self, replica: Replica) -> None:
        """It is gone for good."""
        ...

    def warm_up(self) -> None:
        """Compiles whatever the others need; may take seconds, and may be called in another thread."""
        ...


class _Rule:
    """Places once."""

    name = ""

    def moves(self, replicas: Sequence[Replica], now_s: float) -> list[Proposal]:
        return []

    def planned(self, replica: Replica, plan: Plan, now_s: float) -> None:
        return None

    def removed(self, replica: Replica) -> None:
        return None

    def warm_up(self) -> None:
        return None


class RoundRobin(_Rule):
    name = "round-robin"

    def __init__(self) -> None:
        self._last = -1

    def choose(self, spec: RequestSpec, replicas: Sequence[Replica], now_s: float) -> Replica:
        chosen = next((r for r in replicas if r.number > self._last), replicas[0])
        self._last = chosen.number
        return chosen


class Smallest(_Rule):
    """The replica where `key` is smallest, the first of equals."""

    def __init__(self, name: str, key: Callable[[Replica], float]) -> None:
        self.name = name
        self._key = key

    def choose(self, spec: RequestSpec, replicas: Sequence[Replica], now_s: float) -> Replica:
        return min(replicas, key=self._key)


def outstanding_s(replica: Replica) -> float:
    """Engine time predicted for all requests there, in full also for those that have begun, s."""
    return replica.total("work", lambda r, rows: float(np.sum(engine_time_s(rows, r.scheduler.model))))


def expected_tokens(replica: Replica) -> float:
    """KV memory that all requests there are expected to need, tokens."""
    fields = ("prompt_tokens", "cached_tokens", "output_tokens")
    return replica.total("tokens", lambda r, rows: float(sum(np.sum(rows[name]) for name in fields)))


def _memory_used(replica: Replica) -> float:
    """Less what there is, so that the smallest has the most left; a cache without a bound is like any other such."""
    return expected_tokens(replica) - (replica.scheduler.limits.kv_tokens or 0)


def placement_names() -> list[str]:
    """Every name `make_placement` takes, the default first."""
    return list(_factories())


def make_placement(name: str) -> Placement:
    """The placement called `name`; raises ConfigError, listing the names, for an unknown one."""
    factories = _factories()
    if name not in factories:
        raise ConfigError(f"placement: {name!r} is unknown; choose one of {', '.join(factories)}")
    return factories[name]()


def _factories() -> dict[str, Callable[[], Placement]]:
    from lmdeploy_slo.scheduling.placement_slo import SloPlacement

    return {
        "slo": SloPlacement,
        "round-robin": RoundRobin,
        "least-loaded": lambda: Smallest("least-loaded", lambda r: r.scheduler.held),
        "least-work": lambda: Smallest("least-work", outstanding_s),
        "most-memory": lambda: Smallest("most-memory", _memory_used),
    }
