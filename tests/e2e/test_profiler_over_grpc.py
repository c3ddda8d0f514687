"""The profiler against a gateway over gRPC: what it measures is what the engine did, however tokens are streamed."""

from __future__ import annotations

import pytest
from served import served, soon

from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.errors import InvalidRequest, SloError
from lmdeploy_slo.offline.profiler.bench import Bench
from lmdeploy_slo.offline.profiler.client_target import TASK, ClientTarget, client_target
from lmdeploy_slo.offline.profiler.grid import GridLimits, Point
from lmdeploy_slo.offline.profiler.profiler import limits_of
from lmdeploy_slo.prediction.fit_errors import predicted_by_step

SLOW = StepModel(c0=0.012, p1=5e-5, p2=0.0, d1=1e-3, d2=0.0)
"""Passes so long that a busy machine can be told from a wrong measurement."""

LIMITS = EngineLimits(max_batch_size=6, max_prefill_tokens=512)
POINTS = (
    Point(1, 100),
    Point(1, 500),
    Point(3, 100),
    Point(decoding=1, context_tokens=64),
    Point(decoding=4, context_tokens=64),
    Point(1, 200, 3, 64),
)


@pytest.mark.parametrize("flush_interval_s", [0.0, 0.05], ids=["each token", "many tokens a message"])
async def test_what_is_measured_is_what_the_engine_did(flush_interval_s: float) -> None:
    clock = MonotonicClock()
    engine = EmulatedEngine(SLOW, LIMITS, clock, max_session_tokens=512)
    async with (
        served(engine=engine, flush_interval_s=flush_interval_s) as server,
        client_target(server.target, clock) as target,
    ):
        limits = limits_of(target.info)
        assert limits == GridLimits(6, 512, 512)
        assert target.info.policy == "fcfs"
        bench = Bench(target, limits, clock)
        for point in POINTS:
            shots = await soon(bench.measure(point, 3, SLOW))
            assert shots.observations, f"{point.name}: {shots.why}"
            for observation, expected_s in zip(
                shots.observations, predicted_by_step(SLOW, shots.observations), strict=True
            ):
                # A busy machine makes passes seem longer; nothing makes them seem much shorter.
                assert 0.6 * expected_s < observation.seconds < 5 * expected_s, point.name
        assert await target.in_flight() == (0, 0)
        assert server.runtime.load().waiting == 0


async def test_its_requests_are_a_task_of_their_own() -> None:
    async with served(engine=EmulatedEngine(SLOW, LIMITS, MonotonicClock())) as server:
        seen: list[tuple[str, int]] = []
        submit = server.runtime.submit
        server.runtime.submit = lambda spec, *rest, **more: (  # type: ignore[method-assign]
            seen.append((spec.task_type, spec.max_new_tokens)),
            submit(spec, *rest, **more),
        )[1]
        async with client_target(server.target, MonotonicClock()) as target:
            answer = await soon(target.send([300] * 20, 3).answer())
            assert answer.output_tokens == 3
            assert answer.prefill_s <= answer.ttft_s
            quiet = target.send([300] * 20, 4, watched=False)
            assert (await soon(quiet.answer())).output_tokens == 4
            assert quiet.ended and quiet.generated is None
        assert seen == [(TASK, 3), (TASK, 4)]


async def until_in_flight(target: ClientTarget, count: int) -> None:
    while await target.in_flight() != (count, 0):
        pass  # each question is a call to the server


async def test_a_call_that_is_cancelled_leaves_the_engine() -> None:
    async with (
        served(engine=EmulatedEngine(SLOW, LIMITS, MonotonicClock())) as server,
        client_target(server.target, MonotonicClock()) as target,
    ):
        for watched in (True, False):
            call = target.send([300] * 20, 10_000, watched=watched)
            await soon(until_in_flight(target, 1))
            call.cancel()
            await soon(until_in_flight(target, 0))
            assert call.ended


async def test_what_the_gateway_refuses_is_told() -> None:
    async with (
        served(engine=EmulatedEngine(SLOW, LIMITS, MonotonicClock(), max_session_tokens=64)) as server,
        client_target(server.target, MonotonicClock()) as target,
    ):
        for watched in (True, False):
            call = target.send([300] * 64, 1, watched=watched)
            with pytest.raises(InvalidRequest, match="64 tokens leave no room"):
                await soon(call.answer())
            with pytest.raises(SloError):
                await soon(call.first_token_at_s())


async def test_a_target_that_is_not_there_is_named() -> None:
    with pytest.raises(SloError, match=r"--target 127\.0\.0\.1:1: "):
        async with client_target("127.0.0.1:1", MonotonicClock()):
            pass
