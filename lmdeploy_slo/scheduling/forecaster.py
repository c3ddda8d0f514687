"""Forecasts that know how forecasts like them turned out: medians, intervals that hold, chances that come true.

    outlook -> base -> ratios observed / base in this context -> Forecast -> ... -> `ended` learns

Base. Of the two models of `outlook` the one that has been nearer to the truth, in TTFT and TPOT, with about as much
prefill waiting (`prediction.experts`): policies that keep an order are described by the one, those that choose by the
other, and which one matters when there is a queue.

Ratios. Of each duration the distribution of observed / base is learnt (`prediction.calibrated`). Contexts go from all
requests with this base to those of a kind (task, class, with an SLO or not), and on to what decides that duration: for
queue and TTFT the request's own prefill, then the prefill that could still go before it, then the one that is pending;
for TPOT the pace of running requests, then the prefill that waits, then the output length; for E2E the length, the own
prefill, and the one that could go before it. The long waits of those whom a policy gives up are in there: the
distribution has two humps then, and the chance tells how large the second one is.

Chances. The product of the objectives' chances is corrected by how often requests that were told so met
(`prediction.reliability`).

Synchronous, knows no clock; memory is bounded. Not thread-safe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.core.slo import Timing
from lmdeploy_slo.prediction.backoff import Context
from lmdeploy_slo.prediction.calibrated import SIDE, CalibratedDuration
from lmdeploy_slo.prediction.experts import ExpertWeights
from lmdeploy_slo.prediction.length_forecast import LengthForecast
from lmdeploy_slo.prediction.reliability import Reliability
from lmdeploy_slo.scheduling.admission import Forecast, Interval, Intervals
from lmdeploy_slo.scheduling.outlook import Outlook

SHORT_S, SHORT_TPOT_S = 0.005, 0.0005
"""Times much shorter than these are all one."""

ORDERED_PRIOR, CHOOSING_PRIOR = 0.9, 0.1
"""Weight of the model that keeps the order, at first, for policies that do and for those that do not."""

_IN_TURN, _OVERTAKING = 0, 1
_DEPTH = 5


@dataclass(frozen=True, slots=True)
class _Basis:
    """What a forecast was made from, to learn from how it turns out. In the order of `Forecaster._durations`."""

    kind: Context
    bases_s: tuple[float, ...]
    paths: tuple[Sequence[Context], ...]
    models_s: tuple[tuple[float, ...], tuple[float, ...]]  # what either model said
    load: int  # which of their weights it was
    chance: float | None  # before it was corrected


class Forecaster:
    """See the module. keeps_order: whether the policy is taken to serve requests in turn before anything was seen."""

    def __init__(self, *, keeps_order: bool = True) -> None:
        self._prior = ORDERED_PRIOR if keeps_order else CHOOSING_PRIOR
        self._models: dict[int, ExpertWeights] = {}  # by the prefill that waits: in turn, overtaking
        shorts_s = {"queue": SHORT_S, "ttft": SHORT_S, "tpot": SHORT_TPOT_S, "e2e": SHORT_S}
        self._durations = {name: CalibratedDuration(short_s, _DEPTH) for name, short_s in shorts_s.items()}
        self._reliability = Reliability()

    def forecast(
        self, spec: RequestSpec, outlook: Outlook, length: LengthForecast, cached_tokens: float = 0.0
    ) -> Forecast:
        """For a request that arrives now; so much of its prompt is expected in the prefix cache."""
        in_turn = outlook.in_turn(spec, length.tokens, cached_tokens)
        overtaking = outlook.overtaking(spec, length.tokens, cached_tokens)
        models_s = _durations_of(in_turn, outlook), _durations_of(overtaking, outlook)
        load = _bucket(outlook.waiting_s + 0.1)
        weights = self._models[load].weights if load in self._models else (self._prior, 1.0 - self._prior)
        model = _IN_TURN if weights[_IN_TURN] >= 0.5 else _OVERTAKING
        bases_s = models_s[model]
        kind: Context = (model, spec.task_type, int(spec.priority_class), int(spec.slo.has_objective))
        paths = _paths(kind, outlook, outlook.own_s(spec, cached_tokens), length.tokens)
        slo = spec.slo
        limits_s = (None, slo.ttft_s, slo.tpot_s if length.tokens > 1 else None, slo.e2e_s)
        queue, ttft, tpot, e2e = (
            duration.forecast(path, kind, base_s, limit_s)
            for duration, path, base_s, limit_s in zip(self._durations.values(), paths, bases_s, limits_s, strict=True)
        )
        ttft_s, e2e_s = max(ttft[1], queue[1]), max(e2e[1], ttft[1], queue[1])  # nothing ends before it begins
        chances = tuple(
            (name, each[3]) for name, each in (("ttft", ttft), ("tpot", tpot), ("e2e", e2e)) if each[3] is not None
        )
        chance = math.prod(chance for _, chance in chances) if slo.has_objective else None
        several = length.tokens > 1
        return Forecast(
            output_tokens=length.tokens,
            queue_position=(in_turn, overtaking)[model].queue_position,
            queue_s=queue[1],
            ttft_s=ttft_s,
            tpot_s=tpot[1] if several else None,
            e2e_s=e2e_s,
            intervals=Intervals(
                output_tokens=Interval(length.quantile(SIDE), length.quantile(1.0 - SIDE)),
                queue_s=Interval(queue[0], queue[2]),
                ttft_s=Interval(ttft[0], max(ttft[2], ttft_s)),
                tpot_s=Interval(tpot[0], tpot[2]) if several else None,
                e2e_s=Interval(e2e[0], max(e2e[2], e2e_s)),
            ),
            chance=None if chance is None else self._reliability.calibrated(kind, chance),
            chances=chances,
            basis=_Basis(kind, bases_s, paths, models_s, load, chance),
        )

    def ended(self, told: Forecast, timing: Timing, met: bool | None, *, at_s: float, finished: bool) -> None:
        """A request that was told a forecast of `forecast` ended at `at_s`.

        finished: it ran to its end; else what had not happened by then would have taken longer. met: whether it met its
        SLO; None where it carried none, or where nobody knows.
        """
        basis, reaches = told.basis, told.intervals
        if not isinstance(basis, _Basis) or reaches is None:
            return
        waited_s = at_s - timing.arrival_at_s
        tpot_s, e2e_s = (timing.tpot_s, timing.e2e_s) if finished else (None, None)
        observed = {
            "queue": (timing.queue_s, waited_s, reaches.queue_s),
            "ttft": (timing.ttft_s, waited_s, reaches.ttft_s),
            "tpot": (tpot_s, None, reaches.tpot_s),
            "e2e": (e2e_s, waited_s, reaches.e2e_s),
        }
        for (name, duration), path, base_s in zip(self._durations.items(), basis.paths, basis.bases_s, strict=True):
            value_s, so_far_s, reach = observed[name]
            if value_s is not None:
                duration.observe(path, basis.kind, base_s, max(0.0, value_s), reach)
            elif so_far_s is not None and not finished:
                duration.observe(path, basis.kind, base_s, max(0.0, so_far_s), reach, at_least=True)
        if finished and timing.ttft_s is not None:
            self._judge(basis, (timing.ttft_s, timing.tpot_s))
        if met is not None and basis.chance is not None:
            self._reliability.observe(basis.kind, basis.chance, met)

    def state(self) -> dict[str, Any]:
        """All that was learnt, as JSON can hold it."""
        durations = {name: duration.state() for name, duration in self._durations.items()}
        models = [[load, weights.state()] for load, weights in self._models.items()]
        return {"models": models, "durations": durations, "reliability": self._reliability.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave; raises ValueError, with nothing changed, for anything else."""
        fresh = Forecaster()
        try:
            for load, losses in state["models"]:
                fresh._weights(int(load)).restore(losses)
            for name, duration in fresh._durations.items():
                duration.restore(state["durations"][name])
            fresh._reliability.restore(state["reliability"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not what a forecaster learnt: {error!r}") from error
        self._models, self._durations, self._reliability = fresh._models, fresh._durations, fresh._reliability

    # -- inside ---------------------------------------------------------------

    def _judge(self, basis: _Basis, observed_s: tuple[float, float | None]) -> None:
        """By TTFT and TPOT: a slot that is free hides in the one what the other shows."""
        losses = [0.0, 0.0]
        for place, value_s in zip((1, 2), observed_s, strict=True):
            if value_s is not None:
                for model, durations_s in enumerate(basis.models_s):
                    losses[model] += abs(math.log((max(0.0, value_s) + SHORT_S) / (durations_s[place] + SHORT_S)))
        if abs(losses[0] - losses[1]) > 0.01:  # else there is nothing to tell them apart by
            self._weights(basis.load).charge(losses)

    def _weights(self, load: int) -> ExpertWeights:
        weights = self._models.get(load)
        if weights is None:
            weights = self._models[load] = ExpertWeights([self._prior, 1.0 - self._prior])
        return weights


def _durations_of(forecast: Forecast, outlook: Outlook) -> tuple[float, ...]:
    """The output may turn out longer than the one token it is expected to have: there is a TPOT for that."""
    tpot_s = outlook.pace_s if forecast.tpot_s is None else forecast.tpot_s
    return forecast.queue_s, forecast.ttft_s, tpot_s, forecast.e2e_s


def _paths(kind: Context, outlook: Outlook, own_s: float, output_tokens: float) -> tuple[Sequence[Context], ...]:
    """Contexts of each duration, from coarse to fine."""
    own, ahead, pending = _bucket(own_s), _bucket(outlook.hopeful_s + 0.01), _bucket(outlook.pending_s + 0.01)
    pace, waiting = _bucket(outlook.pace_s, 4), _bucket(outlook.waiting_s + 0.1)
    length = _bucket(output_tokens)
    start = _nested(kind, own, ahead, pending)
    return start, start, _nested(kind, pace, waiting, length), _nested(kind, length, own, ahead)


def _nested(kind: Context, *parts: int) -> tuple[Context, ...]:
    return kind[:1], kind, *((*kind, *parts[:depth]) for depth in range(1, len(parts) + 1))


def _bucket(value: float, per_doubling: int = 1) -> int:
    return math.floor(per_doubling * math.log2(max(value, 1e-6)))
