"""What a new request may expect: a forecast from a picture of the queue that is at most milliseconds old."""

from __future__ import annotations

from collections.abc import Callable

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.scheduling.admission import Forecast, Outlook, unmet_objectives
from lmdeploy_slo.scheduling.scheduler import Scheduler

OUTLOOK_S = 0.005
"""For so long the forecasts of new requests are made from one snapshot and the requests that came since."""


class Expectation:
    """On the loop of the runtime that owns it."""

    def __init__(self, scheduler: Scheduler, clock: Clock, report_progress: Callable[[], None]) -> None:
        """report_progress: brings the scheduler up to date before a snapshot."""
        self._scheduler = scheduler
        self._clock = clock
        self._report_progress = report_progress
        self._outlook: Outlook | None = None
        self._until_s = 0.0

    def of(self, spec: RequestSpec, *, afresh: bool = False) -> Forecast:
        """Were it submitted now. afresh: from a snapshot of this instant."""
        now_s = self._clock.now_s()
        if afresh or self._outlook is None or now_s >= self._until_s:
            self._report_progress()
            self._outlook = Outlook(self._scheduler.snapshot(now_s))
            self._until_s = now_s + OUTLOOK_S
        cached_tokens = self._scheduler.expected_cached_tokens(spec)
        return self._outlook.forecast(spec, self._scheduler.forecast(spec).tokens, cached_tokens)

    def add(self, spec: RequestSpec, expected: Forecast) -> None:
        """It was taken: those that come next wait behind it."""
        if self._outlook is not None:
            self._outlook.add(spec, expected.output_tokens, self._scheduler.expected_cached_tokens(spec))

    def hopeless(self, spec: RequestSpec, expected: Forecast) -> bool:
        """Whether its objectives could not be met even by an engine of its own."""
        alone = Outlook.of_nobody(self._scheduler.limits, self._scheduler.model)
        return bool(unmet_objectives(spec.slo, alone.forecast(spec, expected.output_tokens)))
