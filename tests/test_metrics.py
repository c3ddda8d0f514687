"""The Prometheus metrics: what is counted where, bounded labels, and the port they are read from."""

from __future__ import annotations

import socket
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from runtime_bench import Bench, outcome, virtual

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.plan import Plan, PlanQuality
from lmdeploy_slo.core.request import ClientId, EndStatus
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.errors import ConfigError, InvalidRequest, QueueFull, RequestIdInUse
from lmdeploy_slo.observability.metrics import PREFIX, Metrics, MetricsServer
from lmdeploy_slo.runtime.observer import AppliedPlan
from lmdeploy_slo.testing.builders import make_slo, make_spec


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(PREFIX + name, labels)


def watched(bench: Bench) -> Metrics:
    metrics = Metrics({"policy": "fcfs"})
    bench.runtime.journal.watch(metrics)
    return metrics


async def serve(bench: Bench, request_id: str, *, ttft_s: float, gap_s: float, tokens: int = 3, **spec: object) -> None:
    """A request that is sent at once, has its first token after `ttft_s`, and then one every `gap_s`."""
    stream = bench.submit(request_id, **spec)
    await bench.engine.has(request_id)
    bench.clock.advance(ttft_s)
    bench.engine.step()
    for _ in range(tokens - 2):
        bench.clock.advance(gap_s)
        bench.engine.step()
    bench.clock.advance(gap_s)
    bench.engine.step(request_id)
    await outcome(stream)


@virtual()
async def test_a_finished_request(bench: Bench) -> None:
    metrics = watched(bench)
    slo = make_slo(ttft_ms=400, tpot_ms=50, e2e_ms=10_000)
    await serve(bench, "r", ttft_s=0.5, gap_s=0.04, task_type="chat", slo=slo, prompt_tokens=300)
    for name, expected in (
        ("time_to_first_token_seconds_sum", 0.5),
        ("time_per_output_token_seconds_sum", 0.04),
        ("e2e_request_latency_seconds_sum", 0.58),
        ("request_queue_time_seconds_sum", 0.0),
        ("slo_requests_total", 1),
        ("slo_met_total", 0),
    ):
        assert value(metrics, name, task="chat") == pytest.approx(expected), name
    for name, expected in (
        ("request_prefill_time_seconds_sum", 0.5),
        ("request_decode_time_seconds_sum", 0.08),
        ("request_prompt_tokens_sum", 300),
        ("request_generation_tokens_sum", 3),
    ):
        assert value(metrics, name) == pytest.approx(expected), name
    assert value(metrics, "time_to_first_token_seconds_bucket", task="chat", le="0.5") == 1
    assert value(metrics, "time_to_first_token_seconds_bucket", task="chat", le="0.3") == 0
    assert value(metrics, "requests_total", task="chat", status="finished") == 1
    missed = {
        name: value(metrics, "slo_violations_total", task="chat", objective=name) for name in ("ttft", "tpot", "e2e")
    }
    assert missed == {"ttft": 1, "tpot": 0, "e2e": 0}
    assert value(metrics, "requests_dispatched_total") == 1
    assert value(metrics, "plan_time_seconds_count") == 1


@virtual()
async def test_predicted_against_observed(bench: Bench) -> None:
    """Where nothing was foreseen, nothing is compared: the model of the test takes no time."""
    metrics = watched(bench)
    expected = bench.runtime.scheduler.forecast(make_spec()).tokens
    await serve(bench, "r", ttft_s=0.5, gap_s=0.1, tokens=5)
    assert value(metrics, "prediction_ratio_sum", quantity="output_tokens") == pytest.approx(5 / expected)
    assert value(metrics, "prediction_ratio_count", quantity="output_tokens") == 1
    assert value(metrics, "prediction_ratio_count", quantity="ttft") == 0


@virtual()
async def test_objectives_of_requests_that_do_not_finish(bench: Bench) -> None:
    metrics = watched(bench)
    slo = make_slo(e2e_ms=1)
    streams = await bench.running()
    for request_id in ("fails", "is-cancelled"):
        streams.append(bench.submit(request_id, slo=slo))
    await bench.engine.has("fails", "is-cancelled")
    bench.engine.fail("fails")
    bench.runtime.abort("is-cancelled")
    for stream in streams:
        await outcome(stream)
    assert value(metrics, "slo_requests_total", task="none") == 1
    assert value(metrics, "slo_violations_total", task="none", objective="unfinished") == 1
    assert value(metrics, "slo_violations_total", task="none", objective="e2e") == 0
    assert value(metrics, "request_errors_total", reason="ENGINE_ERROR") == 1
    assert value(metrics, "request_errors_total", reason="CANCELLED") == 1
    assert value(metrics, "requests_total", task="none", status="cancelled") == 1
    assert value(metrics, "e2e_request_latency_seconds_count", task="none") == 0


@virtual(EngineLimits(max_batch_size=1), max_queued_requests=1)
async def test_refusals(bench: Bench) -> None:
    metrics = watched(bench)
    await bench.running("runs")
    bench.submit("waits")
    with pytest.raises(QueueFull):
        bench.submit("r", slo=make_slo(e2e_ms=1))
    with pytest.raises(RequestIdInUse):
        bench.submit("waits")
    bench.runtime.journal.refused(InvalidRequest([]), malformed=True)
    for reason in ("QUEUE_FULL", "REQUEST_ID_IN_USE", "INVALID_REQUEST"):
        assert value(metrics, "requests_rejected_total", reason=reason) == 1
    assert value(metrics, "requests_rejected_total", reason="DRAINING") == 0  # there before anything happens
    assert value(metrics, "requests_total", task="none", status="rejected") == 1
    assert value(metrics, "slo_requests_total", task="none") == 1
    assert value(metrics, "slo_violations_total", task="none", objective="unfinished") == 1


@virtual(EngineLimits(max_batch_size=1))
async def test_what_the_server_is_doing_is_sampled(bench: Bench) -> None:
    metrics = watched(bench)
    assert value(metrics, "num_requests_waiting") is None
    await bench.running("runs")
    bench.submit("waits", prompt_tokens=40)
    bench.clock.advance(2.0)
    bench.engine.step()
    metrics.on_sample(bench.runtime.load(), 0.03)
    for name, expected in (
        ("num_requests_waiting", 1),
        ("num_requests_running", 1),
        ("max_requests_running", 1),
        ("num_prompt_tokens_waiting", 40),
        ("oldest_wait_seconds", 2.0),
        ("kv_cache_usage_ratio", 0.25),
        ("serving", 1),
        ("generation_tokens_total", 1),
        ("event_loop_lag_seconds_sum", 0.03),
    ):
        assert value(metrics, name) == pytest.approx(expected), name


@virtual()
async def test_attainment_of_the_last_minute(bench: Bench) -> None:
    metrics = watched(bench)
    for number in range(4):
        await serve(bench, f"r{number}", ttft_s=0.1 * number, gap_s=0.0, task_type="chat", slo=make_slo(ttft_ms=250))
    metrics.on_sample(bench.runtime.load(), 0.0)
    assert value(metrics, "slo_attainment_ratio", task="chat") == 0.75
    bench.clock.advance(120.0)
    metrics.on_sample(bench.runtime.load(), 0.0)
    assert value(metrics, "slo_attainment_ratio", task="chat") is None
    assert value(metrics, "slo_met_total", task="chat") == 3


def test_plans() -> None:
    metrics = Metrics()
    quality = PlanQuality("edf", start_score=2.0, score=2.5, evaluations=150, price_s=3.0)
    plan = Plan(np.array([1, 2]), 1, quality=quality)
    metrics.on_plan(AppliedPlan(0.0, plan, 0.0018, (), failed=False))
    metrics.on_plan(AppliedPlan(0.0, Plan(np.array([1]), 1), 0.0002, (), failed=True))
    assert value(metrics, "plan_time_seconds_sum") == pytest.approx(0.002)
    assert value(metrics, "plan_evaluations_sum") == 150
    assert value(metrics, "plan_evaluations_count") == 1  # a policy that scores nothing is not asked
    assert value(metrics, "plan_gain_sum") == 0.5
    assert value(metrics, "plan_starts_total", start="edf") == 1
    assert value(metrics, "plan_failures_total") == 1


@virtual()
async def test_labels_are_bounded_and_name_nobody(bench: Bench) -> None:
    metrics = watched(bench)
    bench.runtime.journal.know_tasks(["chat"])
    for number in range(100):
        who = {"fairness_id": f"who-{number}", "client": ClientId(f"who-{number}")}
        await serve(bench, f"id-{number}", ttft_s=0.1, gap_s=0.1, task_type=f"task-{number}", **who)
    await serve(bench, "last", ttft_s=0.1, gap_s=0.1, task_type="chat")
    metrics.on_sample(bench.runtime.load(), 0.0)
    page = generate_latest(metrics.registry).decode()
    samples = [s for family in text_string_to_metric_families(page) for s in family.samples]
    tasks = {sample.labels["task"] for sample in samples if "task" in sample.labels}
    assert len(tasks) == 17  # 16 and "other"
    assert {"chat", "other", "task-0"} <= tasks
    assert value(metrics, "requests_total", task="other", status="finished") == 85
    assert "who-" not in page
    assert "id-" not in page
    assert len(samples) < 3000


def test_status_and_reason_series_exist_from_the_start() -> None:
    metrics = Metrics()
    assert value(metrics, "requests_rejected_total", reason="QUEUE_FULL") == 0
    metrics._task("chat")
    for status in EndStatus:
        assert value(metrics, "requests_total", task="chat", status=status.value) == 0


def test_metrics_of_two_servers_in_one_process_do_not_meet() -> None:
    first, second = Metrics({"policy": "a"}), Metrics({"policy": "b"})
    first.failed_plans.inc()
    assert value(second, "plan_failures_total") == 0
    assert value(first, "server_info", policy="a") == 1
    assert value(second, "server_info", policy="a") is None


def test_they_are_read_over_http() -> None:
    metrics = Metrics()
    metrics.failed_plans.inc()
    server = MetricsServer(metrics.registry, "127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=20) as answer:
            page = answer.read().decode()
            assert answer.headers["Content-Type"].startswith("text/plain")
        assert "lmdeploy_slo:plan_failures_total 1.0" in page
        assert "_created" not in page
        assert "process_resident_memory_bytes" in page
    finally:
        server.close()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=20)


def test_a_taken_port_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"metrics: cannot listen on 127\.0\.0\.1:{port}"):
            MetricsServer(Metrics().registry, "127.0.0.1", port)


@virtual()
async def test_calibration(bench: Bench) -> None:
    metrics, load = watched(bench), bench.runtime.load()
    profile, model = StepModel(0.01, 1e-5, 1e-9, 2e-5, 0.0), StepModel(0.02, 1e-5, 1e-9, 2e-5, 1e-8)
    statistics = replace(
        load.calibration, model=model, profile=profile, slowness=1.9, relative_error=0.04, bias=0.01, windows=12,
        drifts=2, drifting=True,
    )  # fmt: skip
    metrics.on_sample(replace(load, calibration=statistics), 0.0)
    for name, expected in (
        ("calibration_relative_error", 0.04),
        ("calibration_bias", 0.01),
        ("calibration_slowness", 1.9),
        ("calibration_drifting", 1),
        ("calibration_windows_total", 12),
        ("calibration_drifts_total", 2),
    ):
        assert value(metrics, name) == expected, name
    assert value(metrics, "calibration_coefficient_seconds", coefficient="c0") == 0.02
    assert value(metrics, "calibration_coefficient_ratio", coefficient="c0") == 2.0
    assert value(metrics, "calibration_coefficient_ratio", coefficient="d2") is None  # 0 in the profile
