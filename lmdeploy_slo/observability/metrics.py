"""Prometheus metrics of one server, under the field's names with the prefix `lmdeploy_slo:`; docs/observability.md.

Nothing is done once a token: a request is counted at its end, a plan when it is applied, and what the server is doing
is read off the last sample of `observability.sampler`. Label values are bounded: tasks as `runtime.last_minute` names
them, reasons and objectives are fixed sets. No client, no request and no text is ever in a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics import disable_created_metrics
from prometheus_client.registry import Collector

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.errors import ConfigError, RequestError
from lmdeploy_slo.prediction.calibration import CalibrationStatistics
from lmdeploy_slo.runtime.observer import AppliedPlan, EndedRequest, Refusal
from lmdeploy_slo.runtime.statistics import ReplicaLoad, RuntimeLoad

PREFIX = "lmdeploy_slo:"

_SHORT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 60, 180)
_LONG_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120, 300, 900)
_PER_TOKEN_S = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_PLAN_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0015, 0.002, 0.0025, 0.003, 0.004, 0.006, 0.01, 0.02, 0.05, 0.1, 0.5)
_EVALUATIONS = (1, 10, 25, 50, 100, 200, 400, 800, 1600, 3200, 6400)
_GAIN = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 25, 50, 100)
_RATIO = (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2, 3, 5, 10)
_LAG_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

OBJECTIVES = ("ttft", "tpot", "e2e", "unfinished")
QUANTITIES = ("ttft", "tpot", "e2e", "output_tokens")
SMALLEST_FORECAST_S = 0.001
"""Ratios to a shorter forecast would say nothing."""


class Metrics:
    """An observer of the runtime; and where it is sampled, `on_sample`. `registry` is its own.

    info: labels of the metric `server_info`.
    """

    def __init__(self, info: Mapping[str, str] | None = None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for each, that nobody asks for
        self.registry = CollectorRegistry(auto_describe=True)
        self._load: RuntimeLoad | None = None
        self._of_task: dict[str, _TaskMetrics] = {}
        ProcessCollector(registry=self.registry)
        self.registry.register(_LoadCollector(lambda: self._load))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(PREFIX + name, text, labels, buckets=buckets, registry=self.registry)

        if info:
            told = Gauge(
                PREFIX + "server_info", "Always 1; its labels say what runs.", list(info), registry=self.registry
            )
            told.labels(**info).set(1)
        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", _SHORT_S, "task")
        self.tpot = histogram(
            "time_per_output_token_seconds", "(E2E - TTFT) / (output tokens - 1), per request.", _PER_TOKEN_S, "task"
        )
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", _LONG_S, "task")
        self.queue = histogram("request_queue_time_seconds", "Arrival to dispatch into the engine.", _SHORT_S, "task")
        self.prefill = histogram("request_prefill_time_seconds", "Dispatch to first token.", _SHORT_S)
        self.decode = histogram("request_decode_time_seconds", "First to last token.", _LONG_S)
        self.prompt = histogram("request_prompt_tokens", "Prompt tokens of a finished request.", _TOKENS)
        self.output = histogram("request_generation_tokens", "Output tokens of a finished request.", _TOKENS)
        self.requests = counter("requests", "Requests that ended, by how; refused ones included.", "task", "status")
        self.with_slo = counter("slo_requests", "Ended requests with an objective; not those cancelled.", "task")
        self.met = counter("slo_met", "Of slo_requests, those that met every objective.", "task")
        self.violations = counter(
            "slo_violations", "Objectives missed; unfinished: refused, timed out or failed.", "task", "objective"
        )
        self.rejected = counter("requests_rejected", "Requests that were not accepted, by why.", "reason")
        self.errors = counter("request_errors", "Accepted requests that did not finish, by why.", "reason")
        self.ratio = histogram("prediction_ratio", "Observed over what was predicted on arrival.", _RATIO, "quantity")
        self.plan_time = histogram("plan_time_seconds", "Wall time of a plan.", _PLAN_S)
        self.evaluations = histogram("plan_evaluations", "Candidate plans scored for a plan.", _EVALUATIONS)
        self.gain = histogram("plan_gain", "What the search added to its start, in requests met.", _GAIN)
        self.starts = counter("plan_starts", "Plans by the rule their search started from.", "start")
        self.failed_plans = counter("plan_failures", "Plans where the policy failed and arrival order stood in.")
        self.dispatched = counter("requests_dispatched", "Requests that were sent to the engine.")
        self.lag = histogram("event_loop_lag_seconds", "How late a timer of the event loop fired.", _LAG_S)

        for reason in _reasons(RequestError):  # a series that appears with its first event hides it from rate()
            self.rejected.labels(reason)
            self.errors.labels(reason)
        self._ratios = {quantity: self.ratio.labels(quantity) for quantity in QUANTITIES}

    # -- the runtime ----------------------------------------------------------

    def on_end(self, ended: EndedRequest) -> None:
        task = self._task(ended.task)
        task.by_status[ended.status].inc()
        if ended.slo_met is not None:
            task.count_slo(ended.slo_met)
        if ended.status is not EndStatus.FINISHED:
            self.errors.labels(ended.reason).inc()
            if ended.slo_met is not None:
                task.violations["unfinished"].inc()
            return
        timing = ended.timing
        for name in ended.spec.slo.broken_by(timing):
            task.violations[name].inc()
        task.observe(ended)
        self.prompt.observe(ended.spec.prompt_tokens)
        self.output.observe(timing.output_tokens)
        if timing.ttft_s is not None and timing.queue_s is not None and timing.e2e_s is not None:
            self.prefill.observe(timing.ttft_s - timing.queue_s)
            self.decode.observe(timing.e2e_s - timing.ttft_s)
        predicted = ended.predicted
        self._compare("ttft", timing.ttft_s, predicted.ttft_s)
        self._compare("tpot", timing.tpot_s, predicted.tpot_s)
        self._compare("e2e", timing.e2e_s, predicted.e2e_s)
        self._compare("output_tokens", timing.output_tokens, predicted.output_tokens)

    def on_refusal(self, refusal: Refusal) -> None:
        self.rejected.labels(refusal.reason).inc()
        if not refusal.counted:
            return
        task = self._task(refusal.task)
        task.by_status[refusal.status].inc()
        if refusal.with_slo:
            task.count_slo(met=False)
            task.violations["unfinished"].inc()

    def on_plan(self, applied: AppliedPlan) -> None:
        quality = applied.plan.quality
        self.plan_time.observe(applied.took_s)
        if applied.dispatches:
            self.dispatched.inc(len(applied.dispatches))
        if applied.failed:
            self.failed_plans.inc()
        if quality.evaluations:
            self.evaluations.observe(quality.evaluations)
        if quality.start:
            self.starts.labels(quality.start).inc()
            self.gain.observe(quality.score - quality.start_score)

    def on_sample(self, load: RuntimeLoad, lag_s: float) -> None:
        """What the server is doing, and how late its loop is."""
        self._load = load
        self.lag.observe(lag_s)

    # -- inside ---------------------------------------------------------------

    def _task(self, name: str) -> _TaskMetrics:
        task = self._of_task.get(name)
        if task is None:
            task = self._of_task[name] = _TaskMetrics(self, name)
        return task

    def _compare(self, quantity: str, observed: float | None, predicted: float | None) -> None:
        if observed is not None and predicted is not None and predicted >= SMALLEST_FORECAST_S:
            self._ratios[quantity].observe(observed / predicted)


class _TaskMetrics:
    """The series of one task, looked up once."""

    def __init__(self, metrics: Metrics, task: str) -> None:
        self.ttft, self.tpot = metrics.ttft.labels(task), metrics.tpot.labels(task)
        self.e2e, self.queue = metrics.e2e.labels(task), metrics.queue.labels(task)
        self.with_slo, self.met = metrics.with_slo.labels(task), metrics.met.labels(task)
        self.by_status = {status: metrics.requests.labels(task, status.value) for status in EndStatus}
        self.violations = {name: metrics.violations.labels(task, name) for name in OBJECTIVES}

    def count_slo(self, met: bool) -> None:
        self.with_slo.inc()
        if met:
            self.met.inc()

    def observe(self, ended: EndedRequest) -> None:
        """The latencies of a finished request."""
        timing = ended.timing
        if timing.e2e_s is not None:
            self.e2e.observe(timing.e2e_s)
        if timing.queue_s is not None:
            self.queue.observe(timing.queue_s)
        if timing.tpot_s is not None:
            self.tpot.observe(timing.tpot_s)
        if timing.ttft_s is not None:
            self.ttft.observe(timing.ttft_s)


_GAUGES: tuple[tuple[str, str, Callable[[RuntimeLoad], float | None]], ...] = (
    ("num_requests_waiting", "Accepted, not in the engine.", lambda load: load.waiting),
    ("num_requests_running", "In the engine, not ended.", lambda load: load.in_flight),
    ("max_requests_running", "Most requests in the engine at a time.", lambda load: load.max_in_flight),
    ("num_prompt_tokens_waiting", "Prompt tokens of the waiting requests.", lambda load: load.waiting_prompt_tokens),
    ("oldest_wait_seconds", "Since the arrival of whoever waits longest.", lambda load: load.oldest_wait_s or 0.0),
    ("kv_cache_usage_ratio", "Of the KV cache, 0 to 1; absent where unknown.", lambda load: load.kv_usage),
    ("serving", "1 where new requests are taken; 0 while draining, or without an engine.", lambda load: load.serving),
    (
        "predicted_attainment_ratio",
        "Mean chance of meeting their SLO that requests of the last minute were told.",
        lambda load: load.predicted_attainment,
    ),
    ("engine_second_price", "What a second of engine time is worth, in requests met.", lambda load: load.price_s),
)


_CALIBRATION: tuple[tuple[str, str, Callable[[CalibrationStatistics], float]], ...] = (
    (
        "calibration_relative_error",
        "Mean |expected - seen| / expected of engine steps, lately.",
        lambda c: c.relative_error,
    ),
    ("calibration_bias", "Mean (seen - expected) / expected of engine steps, lately.", lambda c: c.bias),
    ("calibration_slowness", "How many times as long as by its profile the engine needs.", lambda c: c.slowness),
    ("calibration_drifting", "1 where the engine is not as it is believed to be.", lambda c: float(c.drifting)),
)
_COEFFICIENTS = tuple(field.name for field in fields(StepModel))


class _LoadCollector(Collector):
    """What the server was doing when it was last sampled; nothing before the first sample."""

    def __init__(self, load: Callable[[], RuntimeLoad | None]) -> None:
        self._load = load

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        load = self._load()
        for name, text, read in _GAUGES:
            family = GaugeMetricFamily(PREFIX + name, text)
            value = None if load is None else read(load)
            if value is not None:
                family.add_metric((), value)
            yield family
        attainment = GaugeMetricFamily(
            PREFIX + "slo_attainment_ratio", "slo_met / slo_requests of the last minute.", labels=("task",)
        )
        generated = CounterMetricFamily(PREFIX + "generation_tokens", "Tokens generated.")
        restarts = CounterMetricFamily(PREFIX + "engine_restarts", "How often the engine was replaced.")
        retried = CounterMetricFamily(PREFIX + "requests_retried", "Requests that waited again: their engine was gone.")
        if load is not None:
            generated.add_metric((), load.output_tokens)
            restarts.add_metric((), load.engine_restarts)
            retried.add_metric((), load.retried)
            for task, counts in load.last_minute.items():
                if counts.with_slo:
                    attainment.add_metric((task,), counts.slo_met / counts.with_slo)
        resumed = CounterMetricFamily(
            PREFIX + "requests_resumed", "Requests that went on in another engine: theirs was gone."
        )
        if load is not None:
            resumed.add_metric((), load.resumed)
        yield attainment
        yield from (generated, restarts, retried, resumed)
        yield from _replicas(() if load is None else load.replicas)
        yield from _calibration(None if load is None else load.calibration)


_REPLICAS: tuple[tuple[str, str, Callable[[ReplicaLoad], float | None]], ...] = (
    ("replica_up", "1 where the engine takes requests.", lambda one: one.up and not one.draining),
    ("replica_requests_waiting", "Accepted, waiting for this engine.", lambda one: one.waiting),
    ("replica_requests_running", "In this engine, not ended.", lambda one: one.in_flight),
    ("replica_kv_cache_usage_ratio", "Of its KV cache, 0 to 1; absent where unknown.", lambda one: one.kv_usage),
    (
        "replica_calibration_relative_error",
        "Mean |expected - seen| / expected of its steps, lately.",
        lambda one: one.calibration.relative_error,
    ),
)


def _replicas(replicas: Sequence[ReplicaLoad]) -> Iterator[GaugeMetricFamily]:
    """By instance; engines come and go, and so do their series."""
    for name, text, read in _REPLICAS:
        family = GaugeMetricFamily(PREFIX + name, text, labels=("instance",))
        for one in replicas:
            value = read(one)
            if value is not None:
                family.add_metric((one.name,), value)
        yield family


def _calibration(now: CalibrationStatistics | None) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
    for name, text, read in _CALIBRATION:
        family = GaugeMetricFamily(PREFIX + name, text)
        if now is not None:
            family.add_metric((), read(now))
        yield family
    value = GaugeMetricFamily(
        PREFIX + "calibration_coefficient_seconds", "Of the step model, as it is believed now.", labels=("coefficient",)
    )
    ratio = GaugeMetricFamily(
        PREFIX + "calibration_coefficient_ratio", "The same over that of the profile.", labels=("coefficient",)
    )
    windows = CounterMetricFamily(PREFIX + "calibration_windows", "Stretches of engine time that were compared.")
    drifts = CounterMetricFamily(PREFIX + "calibration_drifts", "How often the engine was found to have drifted.")
    if now is not None:
        windows.add_metric((), now.windows)
        drifts.add_metric((), now.drifts)
        for name in _COEFFICIENTS:
            believed, at_first = getattr(now.model, name), getattr(now.profile, name)
            value.add_metric((name,), believed)
            if at_first > 0:
                ratio.add_metric((name,), believed / at_first)
    yield from (value, ratio, windows, drifts)


class MetricsServer:
    """Serves a registry over HTTP, from threads of its own."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Listens when it returns; port 0 takes a free one. Raises ConfigError where the address cannot be bound."""
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigError(f"metrics: cannot listen on {host}:{port}: {error.strerror or error}") from error

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def close(self) -> None:
        """Returns when the port is closed."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _reasons(kind: type[RequestError]) -> set[str]:
    """Of an error and all more special ones."""
    return {kind.reason}.union(*(_reasons(special) for special in kind.__subclasses__()))
