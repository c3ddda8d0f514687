"""What a new request may expect: a forecast from a picture of the queue that is at most milliseconds old.

The length that is expected of a request is foretold when it comes; the rest, which nobody looks at so soon, a moment
later, from the picture of its arrival: so it is on its way to the engine first.
"""

from __future__ import annotations

import asyncio
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

LATER_S = 0.002
"""So long after its arrival a request's forecast is there, unless it was looked at before."""


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
        self._came: list[tuple[RequestSpec, float, float]] = []  # since the outlook: with output and cached tokens
        self._unfinished: list[Forecast] = []  # of requests that were taken
        self._timer: asyncio.TimerHandle | None = None
        self.forecaster = Forecaster(keeps_order=keeps_order)

    def of(self, spec: RequestSpec, *, afresh: bool = False) -> Forecast:
        """Were it submitted now. afresh: from a snapshot of this instant."""
        outlook = self._outlook_of_now(afresh=afresh)
        length, cached_tokens = self._scheduler.forecast(spec), self._scheduler.expected_cached_tokens(spec)
        if afresh:
            return self.forecaster.forecast(spec, outlook, length, cached_tokens)
        return Forecast.later(length.tokens, lambda: self.forecaster.forecast(spec, outlook, length, cached_tokens))

    def add(self, spec: RequestSpec, expected: Forecast) -> None:
        """It was taken: those that come next wait behind it."""
        self._came.append((spec, expected.output_tokens, self._scheduler.expected_cached_tokens(spec)))
        self._unfinished.append(expected)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LATER_S, self._finish)

    def _outlook_of_now(self, *, afresh: bool) -> Outlook:
        now_s = self._clock.now_s()
        if afresh or self._outlook is None or now_s >= self._until_s:
            self._report_progress()
            self._outlook = self._afresh(now_s)
            self._until_s = now_s + OUTLOOK_S
        elif self._came:
            self._outlook = self._outlook.copy()  # the one before is that of forecasts still to be made
            for spec, output_tokens, cached_tokens in self._came:
                self._outlook.add(spec, output_tokens, cached_tokens)
        self._came.clear()
        return self._outlook

    def _afresh(self, now_s: float) -> Outlook:
        scheduler = self._scheduler
        queue = scheduler.statistics()
        if not queue.waiting and not queue.running:
            return Outlook.of_nobody(scheduler.limits, scheduler.model)
        return Outlook(scheduler.snapshot(now_s))

    def _finish(self) -> None:
        unfinished, self._unfinished = self._unfinished, []
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for forecast in unfinished:
            forecast.finish()

    def ended(self, spec: RequestSpec, expected: Forecast, timing: Timing, status: EndStatus) -> None:
        """What came of a request that was told `expected`. An engine's failure tells nothing of queues."""
        self._finish()
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
