"""How many tokens a request will generate: learnt online, as a distribution, from requests like it.

Without a hint a request is like those of its (task, model), and among them those of about its prompt length: contexts
from all requests of the model down to prompts within 1 %, see `backoff`; how fine pays is learnt for each task. With a
hint it is like other hints of its client, see `length_hints`, and the two answers are blended (in the logarithm,
quantile by quantile), weighted by how either has been doing for this client and task. Before anything was seen a length
is lognormal around `PRIOR_TOKENS`, and a hint is believed.

Nothing exceeds `max_new_tokens`. An output that was cut there tells only that it would have been at least so long.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.core.snapshot import Rows
from lmdeploy_slo.prediction.backoff import JUDGED_AT, BackoffDistribution, Context, Floats, smooth_prior
from lmdeploy_slo.prediction.experts import ExpertWeights, pinball_loss
from lmdeploy_slo.prediction.length_forecast import LEVELS, LengthForecast, LengthPredictor, forecast_of
from lmdeploy_slo.prediction.length_hints import HintModel, client_of
from lmdeploy_slo.prediction.length_remaining import revise_lognormal

__all__ = ["LengthForecast", "LengthPredictor", "TaskLengthPredictor"]

PRIOR_TOKENS = 128.0
PRIOR_SIGMA = 1.0
"""Of a model nothing is known of: median, and sigma of the logarithm. Answers of chat models run from a few tokens to
about a thousand, and two sigmas either way are 17 to 950."""

HINT_PRIOR = 0.98
"""Weight of a hint of whose client nothing is known."""

IGNORED_BELOW = 0.03
"""An answer that weighs less is not asked for."""

TRUST_JUDGED_EVERY = 2
MAX_CLIENTS = 4096
LARGEST_TOKENS = 1 << 17
BIN_WIDTH = 0.08
"""Of the histograms of lengths, relative; never less than a token."""

_LEVELS = np.array(LEVELS)
_JUDGED = np.array([LEVELS.index(level) for level in JUDGED_AT])
_NOTHING = (None, LengthForecast(1.0, 0.0))


class TaskLengthPredictor:
    """See the module. Memory is bounded whatever clients send."""

    def __init__(self) -> None:
        support = _support()
        prior = smooth_prior([math.log((end + 0.5) / PRIOR_TOKENS) / PRIOR_SIGMA for end in support.tolist()])
        self._lengths = BackoffDistribution(support, prior, depth=6)
        self._hints = HintModel()
        self._trust: OrderedDict[tuple[str, str, str], ExpertWeights] = OrderedDict()  # (no hint, hint)
        self._last: tuple[RequestSpec | None, LengthForecast] = _NOTHING  # foretold since the last observation

    def predict(self, spec: RequestSpec) -> LengthForecast:
        last_spec, last_forecast = self._last
        if spec is last_spec:  # a request is asked about several times on its arrival
            return last_forecast
        cap = float(spec.max_new_tokens)
        tokens = [math.ceil(min(quantile, cap) - 1e-6) for quantile in self._quantiles(spec).tolist()]
        forecast = forecast_of([max(float(count), 1.0) for count in tokens])
        self._last = spec, forecast
        return forecast

    def observe(self, spec: RequestSpec, output_tokens: int) -> None:
        self._last = _NOTHING
        length = float(max(1, output_tokens))
        cut = output_tokens >= spec.max_new_tokens
        hint = spec.expected_output_tokens
        if hint is not None:
            hint = max(1.0, float(hint))
            trust = self._trust_in(_client(spec))
            if not cut and trust.due(TRUST_JUDGED_EVERY):
                trust.charge([_loss(self._by_prompt(spec), length), _loss(self._by_hint(spec, hint), length)])
            self._hints.observe(spec, hint, length, at_least=cut)
        path = _path(spec)
        self._lengths.observe(path, path[1], length, at_least=cut)

    def revise(self, running: Rows) -> None:
        revise_lognormal(running)

    def state(self) -> dict[str, Any]:
        """All that was learnt, as JSON can hold it."""
        trust = [[*key, weights.state()] for key, weights in self._trust.items()]
        return {"lengths": self._lengths.state(), "hints": self._hints.ratios.state(), "trust": trust}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave; raises ValueError, with nothing changed, for anything else."""
        fresh = TaskLengthPredictor()
        try:
            fresh._lengths.restore(state["lengths"])
            fresh._hints.ratios.restore(state["hints"])
            for client, task, model, losses in state["trust"]:
                fresh._trust_in((str(client), str(task), str(model))).restore(losses)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not what a length predictor learnt: {error!r}") from error
        self._lengths, self._hints, self._trust = fresh._lengths, fresh._hints, fresh._trust
        self._last = _NOTHING

    # -- inside ---------------------------------------------------------------

    def _quantiles(self, spec: RequestSpec) -> Floats:
        hint = spec.expected_output_tokens
        if hint is None:
            return self._by_prompt(spec)
        hint = max(1.0, float(hint))
        trust = self._trust.get(_client(spec))
        weight = HINT_PRIOR if trust is None else trust.weights[1]
        if weight < IGNORED_BELOW:
            return self._by_prompt(spec)
        if weight > 1.0 - IGNORED_BELOW:
            return self._by_hint(spec, hint)
        by_prompt, by_hint = np.maximum(self._by_prompt(spec), 0.5), np.maximum(self._by_hint(spec, hint), 0.5)
        return np.asarray(by_prompt * (by_hint / by_prompt) ** weight)

    def _by_prompt(self, spec: RequestSpec) -> Floats:
        path = _path(spec)
        return self._lengths.quantiles(path, path[1], _LEVELS)

    def _by_hint(self, spec: RequestSpec, hint: float) -> Floats:
        return self._hints.quantiles(spec, hint, _LEVELS)

    def _trust_in(self, key: tuple[str, str, str]) -> ExpertWeights:
        trust = self._trust.get(key)
        if trust is None:
            if len(self._trust) >= MAX_CLIENTS:
                self._trust.popitem(last=False)
            trust = self._trust[key] = ExpertWeights([1.0 - HINT_PRIOR, HINT_PRIOR])
        else:
            self._trust.move_to_end(key)
        return trust


def _client(spec: RequestSpec) -> tuple[str, str, str]:
    return client_of(spec), spec.task_type, spec.model


def _path(spec: RequestSpec) -> tuple[Context, ...]:
    task, model = spec.task_type, spec.model
    fine = int(64.0 * math.log2(spec.prompt_tokens))
    return (
        (model,),
        (model, task),
        (model, task, 1, fine >> 6),
        (model, task, 4, fine >> 4),
        (model, task, 16, fine >> 2),
        (model, task, 64, fine),
    )


def _loss(quantiles: Floats, length: float) -> float:
    judged = zip(quantiles[_JUDGED].tolist(), JUDGED_AT, strict=True)
    return sum(pinball_loss(length - quantile, level) for quantile, level in judged)


def _support() -> Floats:
    """Lengths at the ends of the bins: 0, 1, 2 ... one by one at first, then `BIN_WIDTH` apart."""
    ends = [0, 1]
    while ends[-1] < LARGEST_TOKENS:
        ends.append(max(ends[-1] + 1, round(ends[-1] * math.exp(BIN_WIDTH))))
    return np.array(ends, dtype=np.float64)
