"""What a new request may expect: a forecast from a picture of the queue that is at most milliseconds old."""

from __future__ import annotations

from collections.abc import Callable

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.request import EndStatus, RequestSpec
from lmdeploy_slo.core.slo import Timing
from lmdeploy_slo.scheduling.admission import Forecast, unmet_objectives
from lmdeploy_slo.scheduling.forecaster import Forecaster
from lmdeploy_slo.scheduling.outlook import Outlook
from lmdeploy_slo.scheduling.scheduler import Scheduler

OUTLOOK_S = 0.005
"""For so long the forecasts of new requests are made from one snapshot and the requests that came since."""


class Expectation:
    """On the loop of the runtime that owns it. forecaster: what was learnt of earlier forecasts."""

    def __init__(
        self, scheduler: Scheduler, clock: Clock, report_progress: Callable[[], None], *, keeps_order: bool
    ) -> None:
        """report_progress: brings the scheduler up to date before a snapshot. keeps_order: see `Forecaster`."""
        self._scheduler = scheduler
        self._clock = clock
        self._report_progress = report_progress
        self._outlook: Outlook | None = None
        self._until_s = 0.0
        self.forecaster = Forecaster(keeps_order=keeps_order)

    def of(self, spec: RequestSpec, *, afresh: bool = False) -> Forecast:
        """Were it submitted now. afresh: from a snapshot of this instant."""
        now_s = self._clock.now_s()
        if afresh or self._outlook is None or now_s >= self._until_s:
            self._report_progress()
            self._outlook = Outlook(self._scheduler.snapshot(now_s))
            self._until_s = now_s + OUTLOOK_S
        cached_tokens = self._scheduler.expected_cached_tokens(spec)
        return self.forecaster.forecast(spec, self._outlook, self._scheduler.forecast(spec), cached_tokens)

    def add(self, spec: RequestSpec, expected: Forecast) -> None:
        """It was taken: those that come next wait behind it."""
        if self._outlook is not None:
            self._outlook.add(spec, expected.output_tokens, self._scheduler.expected_cached_tokens(spec))

    def ended(self, spec: RequestSpec, expected: Forecast, timing: Timing, status: EndStatus) -> None:
        """What came of a request that was told `expected`. An engine's failure tells nothing of queues."""
        if status in (EndStatus.FAILED, EndStatus.REJECTED):
            return
        finished = status is EndStatus.FINISHED
        met: bool | None = None
        if spec.slo.has_objective and status is not EndStatus.CANCELLED:
            met = finished and spec.slo.met_by(timing)
        self.forecaster.ended(expected, timing, met, at_s=self._clock.now_s(), finished=finished)

    def hopeless(self, spec: RequestSpec, expected: Forecast) -> bool:
        """Whether its objectives could not be met even by an engine of its own."""
        alone = Outlook.of_nobody(self._scheduler.limits, self._scheduler.model)
        return bool(unmet_objectives(spec.slo, alone.in_turn(spec, expected.output_tokens)))
