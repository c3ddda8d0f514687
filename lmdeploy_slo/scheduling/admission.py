"""What is expected of a request when it arrives, and whether that would meet its SLO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from lmdeploy_slo.core.slo import Slo

INTERVAL_SHARE = 0.8
"""Of requests that end up within the interval they were told; those below and above it are equally many."""

ENOUGH_CHANCE = 0.5
"""A request is expected to meet its SLO when that is at least as likely as not."""


class Interval(NamedTuple):
    """low <= high."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Intervals:
    """Where the figures of a forecast are expected to end up, with INTERVAL_SHARE; in their units."""

    output_tokens: Interval
    queue_s: Interval
    ttft_s: Interval
    tpot_s: Interval | None
    e2e_s: Interval


class _Later:
    """Fields that are not there yet are worked out, all of them, when one is first asked for."""

    __slots__ = ("_make",)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name not in _FIELDS:
                raise AttributeError(name)
            made = self._make()
            for each in _FIELDS:
                object.__setattr__(self, each, getattr(made, each))
            object.__setattr__(self, "_make", None)
            return getattr(self, name)


@dataclass(frozen=True, slots=True)
class Forecast(_Later):
    """What is expected of a request: medians, durations in seconds from its arrival, each >= 0.

    output_tokens: >= 1. queue_position: waiting requests that would go before it.
    tpot_s: None for an output of one token. intervals: None where nothing is known but the medians.
    chance: probability of meeting every objective, None where it carries none (or where nothing is known).
    chances: the same of each objective by itself, by name. basis: whatever the forecaster learns from it later.
    """

    output_tokens: float
    queue_position: int
    queue_s: float
    ttft_s: float
    tpot_s: float | None
    e2e_s: float
    intervals: Intervals | None = None
    chance: float | None = None
    chances: tuple[tuple[str, float], ...] = ()
    basis: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def later(cls, output_tokens: float, make: Callable[[], Forecast]) -> Forecast:
        """The forecast that `make` returns, which is called once, when more than `output_tokens` is asked for."""
        forecast = cls.__new__(cls)
        object.__setattr__(forecast, "output_tokens", output_tokens)
        object.__setattr__(forecast, "_make", make)
        return forecast

    def finish(self) -> None:
        """Has everything worked out that was left for later."""
        _ = self.e2e_s


_FIELDS = frozenset(each.name for each in fields(Forecast))


def unmet_objectives(slo: Slo, expected: Forecast) -> list[str]:
    """In words, why the forecast is that the SLO will not be met; empty where it is that it will.

    That is decided by the chance where it is known, else by the medians. Named are the objectives that are more likely
    missed than met; where it takes several together to be so, all that may be missed.
    """
    if expected.chance is not None and expected.chance >= ENOUGH_CHANCE:
        return []
    chances, within = dict(expected.chances), expected.intervals
    unknown: Interval | None = None
    pairs = (
        ("ttft", expected.ttft_s, slo.ttft_s, within.ttft_s if within else unknown),
        ("tpot", expected.tpot_s, slo.tpot_s, within.tpot_s if within else unknown),
        ("e2e", expected.e2e_s, slo.e2e_s, within.e2e_s if within else unknown),
    )
    carried = [
        (name, value, limit, reach) for name, value, limit, reach in pairs if limit is not None and value is not None
    ]
    broken = [
        f"{name} is expected to be {value * 1e3:.1f} ms{_reach(reach)}, above the objective of {limit * 1e3:g} ms"
        for name, value, limit, reach in carried
        if value > limit
    ]
    if broken or expected.chance is None:
        return broken
    return [
        f"{name} is {100 * chances[name]:.0f} % likely to be within its objective of {limit * 1e3:g} ms, "
        f"and is expected to be {value * 1e3:.1f} ms{_reach(reach)}"
        for name, value, limit, reach in carried
        if chances[name] < 0.95
    ] or [f"requests like it meet their objectives in {100 * expected.chance:.0f} % of cases"]


def _reach(interval: Interval | None) -> str:
    return "" if interval is None else f" ({interval.low * 1e3:.1f} to {interval.high * 1e3:.1f})"
