"""Keeps the step model true while serving: what the engine was seen to need refines what is believed of it.

    sent, first_token, step, left -> StepObserver -> windows -> StepEstimator -> model

Synchronous and without a clock: the runtime calls it in real time, the simulator in virtual time. The model before each
window is compared with what the window took, so that the error told is that of forecasts, not of a fit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.prediction.calibration_estimator import StepEstimator, Work
from lmdeploy_slo.prediction.calibration_windows import StepObserver

logger = logging.getLogger(__name__)

DRIFT, NO_DRIFT = 0.10, 0.05
"""The engine counts as drifted when its slowness has changed by so much, or when errors of forecasts pass that and
twice what is usual; no longer when the mean error has been below the second for `SETTLED` windows."""

SETTLED = 60

USUAL_PACE = 0.005
"""Weight of the newest window in what errors usually are."""

ERROR_PACE = 0.05
"""Weight of the newest window in the mean relative error."""

LARGEST_ERROR = 1.0
"""A window's error counts as this much at most: a pause is not a change of the engine."""

_TOLD = 20
"""Windows before the first word about drift: until then a wrong profile is only being corrected."""


@dataclass(frozen=True, slots=True)
class CalibrationStatistics:
    """model, profile: coefficients now and at first. slowness: how many times as long as by the profile the engine has
    needed lately. relative_error, bias: running means of |expected - seen| / expected and of (seen - expected) /
    expected, of forecasts made before each window was seen. windows: observed; dropped: those whose work could not be
    known. updates: of the coefficients, over all runs. drifting: the engine has changed, and forecasts have not been
    right again for long; drifts: how often that was. learning: whether the model is refined at all. failures: of the
    code here, anything but 0 is a defect."""

    model: StepModel
    profile: StepModel
    slowness: float
    relative_error: float
    bias: float
    windows: int
    dropped: int
    updates: int
    drifting: bool
    drifts: int
    learning: bool
    failures: int


class Calibration:
    """One engine's. prior: of its profile. limits: those of its batch.

    progress: tokens that a running request has got so far, by handle. on_model: called with each new model.
    learning: False only watches: the error is told, the model stays the prior. quiet: drift is not logged.
    """

    def __init__(
        self,
        prior: StepModel,
        limits: EngineLimits,
        *,
        progress: Callable[[int], int],
        on_model: Callable[[StepModel], None] | None = None,
        learning: bool = True,
        quiet: bool = False,
    ) -> None:
        self._estimator = StepEstimator(prior)
        self._observer = StepObserver(
            max_prefill_tokens=limits.max_prefill_tokens,
            max_batch_size=limits.max_batch_size,
            progress=progress,
            on_window=self._learn,
        )
        self._on_model = on_model
        self._learning = learning
        self._quiet = quiet
        self._error = self._bias = 0.0
        self._usual_error = NO_DRIFT
        self._windows = self._drifts = 0
        self._drifting = False
        self._told_slowness = 1.0  # when drift was last over
        self._settled_since = 0  # the window from which on the mean error was small
        self._failures = 0

    # -- what happens, as in `StepObserver` -----------------------------------

    def sent(self, handle: int, prompt_tokens: int, cached_tokens: float, at_s: float) -> None:
        self._observer.sent(handle, prompt_tokens, cached_tokens, at_s)

    def first_token(
        self, handle: int, tokens: int = 1, cached_tokens: int | None = None, scheduled_at_s: float | None = None
    ) -> None:
        self._observer.first_token(handle, tokens, cached_tokens, scheduled_at_s)

    def left(self, handle: int, output_tokens: int, *, finished: bool) -> None:
        self._observer.left(handle, output_tokens, finished=finished)

    def step(self, at_s: float, tokens: int) -> None:
        """Does not raise: where something is wrong here, what is in flight is forgotten, and requests go on."""
        try:
            self._observer.step(at_s, tokens)
        except Exception:
            self._failures += 1
            if self._failures == 1:
                logger.exception("calibration failed; later failures are only counted")
            self._observer = self._observer.renewed()

    # -- what came of it ------------------------------------------------------

    @property
    def model(self) -> StepModel:
        """What is believed now."""
        return self._estimator.model

    def statistics(self) -> CalibrationStatistics:
        estimator = self._estimator
        return CalibrationStatistics(
            model=estimator.model,
            profile=estimator.prior,
            slowness=self._slowness,
            relative_error=self._error,
            bias=self._bias,
            windows=self._windows,
            dropped=self._observer.dropped,
            updates=estimator.updates,
            drifting=self._drifting,
            drifts=self._drifts,
            learning=self._learning,
            failures=self._failures,
        )

    def state(self) -> dict[str, Any]:
        """What was learnt, for `restore`; JSON."""
        return self._estimator.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what was learnt before, unless that began from another profile or nothing is to be learnt.

        Raises ValueError, TypeError or KeyError for what is not a state; then nothing is changed.
        """
        if not self._learning:
            return
        if not self._estimator.restore(state):
            logger.info("the calibration that was kept began from another profile: starting afresh")
        elif self._on_model is not None:
            self._on_model(self.model)

    # -- inside ---------------------------------------------------------------

    def _learn(self, work: Work) -> None:
        expected_s = self._estimator.expected_s(work)
        self._windows += 1
        if self._learning:
            self._estimator.update(work)
            if self._on_model is not None:
                self._on_model(self._estimator.model)
        if expected_s > 0:
            self._judge((work.duration_s - expected_s) / expected_s)

    @property
    def _slowness(self) -> float:
        return self._estimator.slowness if self._learning else max(0.01, 1 + self._bias)

    def _judge(self, error: float) -> None:
        error = min(max(error, -LARGEST_ERROR), LARGEST_ERROR)
        pace = max(ERROR_PACE, 1 / self._windows)
        self._error += pace * (abs(error) - self._error)
        self._bias += pace * (error - self._bias)
        self._usual_error += max(USUAL_PACE, 1 / self._windows) * (self._error - self._usual_error)
        if abs(self._bias) >= NO_DRIFT:
            self._settled_since = self._windows
        if self._windows < _TOLD:
            return
        if not self._drifting:
            changed = abs(self._slowness / self._told_slowness - 1) > DRIFT
            self._drifting = changed or self._error > max(DRIFT, 2 * self._usual_error)
            if self._drifting:
                self._drifts += 1
                self._settled_since = self._windows
                self._tell_drift()
        elif self._windows - self._settled_since >= SETTLED:
            self._drifting = False
            self._told_slowness = self._slowness
            self._tell_settled()

    def _tell_drift(self) -> None:
        logger.log(
            logging.DEBUG if self._quiet else logging.WARNING,
            "the engine has changed: its steps take %.2f times what the profile says (%.2f before), forecasts of late "
            "were %.0f %% off%s",
            self._slowness,
            self._told_slowness,
            100 * self._error,
            "; recalibrating" if self._learning else "",
        )

    def _tell_settled(self) -> None:
        logger.log(
            logging.DEBUG if self._quiet else logging.INFO,
            "forecasts are right again, %.1f %% off: steps take %.2f times what the profile says, the model is now %s",
            100 * self._error,
            self._slowness,
            self,
        )

    def __str__(self) -> str:
        names = ("c0", "p1", "p2", "d1", "d2")
        return (
            ", ".join(f"{name} {1e3 * value:.4g}" for name, value in zip(names, astuple(self.model), strict=True))
            + " ms"
        )
