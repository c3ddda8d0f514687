"""What every policy is, and the table of their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lmdeploy_slo.core.plan import DEFAULT_PATIENCE, Plan
from lmdeploy_slo.core.snapshot import Snapshot
from lmdeploy_slo.errors import ConfigError


class Policy(Protocol):
    """Decides in which order, and how many at a time, waiting requests enter the engine.

    A policy may remember earlier snapshots (recent arrivals, its last plan), never the clock or anything global.
    Equal sequences of snapshots and equal seeds give equal plans as long as no time budget cuts the search short.
    """

    @property
    def name(self) -> str: ...

    @property
    def wants_ticks(self) -> bool:
        """Whether progress of running requests alone can change its mind (a fixed rule's does not)."""
        ...

    def plan(self, snapshot: Snapshot) -> Plan:
        """Called from one thread at a time; must not keep references into `snapshot` it would write to."""
        ...

    def warm_up(self) -> None:
        """Compiles whatever `plan` needs, so that the first plan is as fast as the next."""
        ...


def few_at_once(policy: Policy) -> int:
    """So many waiting requests, or fewer, `policy` plans in well under a millisecond: its own `few_at_once`, 0 where it
    has none. Such plans may be made where a thread is not worth its while."""
    return int(getattr(policy, "few_at_once", 0))


def fills_idle_engine(policy: Policy) -> bool:
    """Whether `policy` certainly sends a request that waits alone for an engine with nothing to do: its own
    `fills_idle_engine`, False where it has none."""
    return bool(getattr(policy, "fills_idle_engine", False))


class SearchBudget:
    """How long a search may take: by the clock in production, by evaluations where runs must repeat exactly.

    time_s: seconds of wall time, None: no bound. evaluations: plans scored, None: no bound. At least one is set.
    """

    __slots__ = ("evaluations", "time_s")

    def __init__(self, time_s: float | None = 0.002, evaluations: int | None = None) -> None:
        if time_s is None and evaluations is None:
            raise ValueError("a search needs a bound: time_s or evaluations")
        if time_s is not None and time_s <= 0:
            raise ValueError(f"time_s must be positive, got {time_s}")
        if evaluations is not None and evaluations < 1:
            raise ValueError(f"evaluations must be at least 1, got {evaluations}")
        self.time_s = time_s
        self.evaluations = evaluations


PolicyFactory = Callable[[int, SearchBudget], Policy]
"""(seed, budget) -> policy; rules ignore both."""


def policy_names() -> list[str]:
    """Every name `make_policy` takes, the default first."""
    return list(_factories(DEFAULT_PATIENCE))


def make_policy(
    name: str, *, seed: int = 0, budget: SearchBudget | None = None, patience: float = DEFAULT_PATIENCE
) -> Policy:
    """The policy called `name`; raises ConfigError, listing the names, for an unknown one. patience: > 0, of
    `annealing` alone: see its options."""
    factories = _factories(patience)
    if name not in factories:
        raise ConfigError(f"policy: {name!r} is unknown; choose one of {', '.join(factories)}")
    return factories[name](seed, budget or SearchBudget())


def _factories(patience: float) -> dict[str, PolicyFactory]:
    from lmdeploy_slo.scheduling.annealing import AnnealingOptions, AnnealingPolicy
    from lmdeploy_slo.scheduling.rules import RULES, RulePolicy
    from lmdeploy_slo.scheduling.slack_guard import SlackGuardPolicy

    def rule(name: str, feasible_first: bool) -> PolicyFactory:
        return lambda seed, budget: RulePolicy(name, feasible_first=feasible_first)

    factories: dict[str, PolicyFactory] = {
        "annealing": lambda seed, budget: AnnealingPolicy(
            seed=seed, budget=budget, options=AnnealingOptions(patience=patience)
        ),
        "slack-guard": lambda seed, budget: SlackGuardPolicy(),
    }
    for name in RULES:
        factories[name] = rule(name, False)
        factories[f"{name}-feasible"] = rule(name, True)
    return factories
