"""What requests are told on arrival, as the runtime tells them, and what is learnt when they end."""

from __future__ import annotations

from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.core.slo import Timing
from lmdeploy_slo.scheduling.admission import Forecast
from lmdeploy_slo.scheduling.forecaster import Forecaster
from lmdeploy_slo.scheduling.outlook import Outlook
from lmdeploy_slo.scheduling.scheduler import Scheduler


class Forecasts:
    """For one run, shared by all its instances. told: by request id, as each arrived; it grows with the run."""

    def __init__(self, *, keeps_order: bool) -> None:
        self.forecaster = Forecaster(keeps_order=keeps_order)
        self.told: dict[str, Forecast] = {}

    def arrived(self, spec: RequestSpec, scheduler: Scheduler, now_s: float) -> None:
        """The scheduler is up to date, and knows nothing of it yet."""
        outlook, cached_tokens = Outlook(scheduler.snapshot(now_s)), scheduler.expected_cached_tokens(spec)
        self.told[spec.request_id] = self.forecaster.forecast(spec, outlook, scheduler.forecast(spec), cached_tokens)

    def finished(self, spec: RequestSpec, timing: Timing, now_s: float) -> None:
        met = spec.slo.met_by(timing)
        self.forecaster.ended(self.told[spec.request_id], timing, met, at_s=now_s, finished=True)
