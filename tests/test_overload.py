"""Far more work than the engine can do, in virtual time: what is accepted does as well as under mild overload, the
queue and everything that is kept stay within bounds, and a client that floods the door does not shut out another."""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from scripted_engine import InlineExecutor

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.clients import ClientPolicies
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.request import ClientId
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.errors import Rejected
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.runtime.live import RuntimeOptions
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.runtime.stream import RequestStream
from lmdeploy_slo.scheduling.limits import Limiter, Limits
from lmdeploy_slo.scheduling.rules import RulePolicy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import make_request, make_slo, make_spec
from lmdeploy_slo.testing.virtual_time import run_virtual

PLACES, STEPS, STEP_S = 16, 50, 0.010
CAPACITY = PLACES / (STEPS * STEP_S)  # requests a second
QUEUE, KEPT = 24, 64
FLOOD, POLITE = ClientId("flood"), ClientId("polite")


@dataclass
class Outcome:
    """By client, and over time."""

    offered: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    met: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    most_waiting: int = 0
    objects: list[int] = field(default_factory=list)  # alive after each quarter

    def attainment(self) -> float:
        return self.met.total() / self.accepted.total()


def overload(load: float, seconds: float, *, polite_share: float = 0.0, queue_share: float | None = None) -> Outcome:
    """Poisson arrivals at `load` times the capacity, `polite_share` times the capacity of them from a second client."""
    outcome = Outcome()

    async def main(clock: VirtualClock) -> None:
        model = StepModel(STEP_S, 0.0, 0.0, 0.0, 0.0)
        limits = EngineLimits(max_batch_size=PLACES)
        engine = EmulatedEngine(model, limits, clock)
        limiter = Limiter(Limits(max_queued_requests=QUEUE, queue_share=queue_share), ClientPolicies)
        runtime = Runtime(
            engine,
            Scheduler(limits=limits, model=model, lengths=TaskLengthPredictor()),
            RulePolicy("edf"),
            clock,
            RuntimeOptions(explain_requests=KEPT),
            limiter=limiter,
            executor=InlineExecutor(),
        )
        await runtime.start()
        draw, readers = random.Random(1), set[asyncio.Task[None]]()

        async def read(stream: RequestStream, name: str) -> None:
            completion = (await stream.result()).completion
            assert completion is not None
            outcome.met[name] += bool(completion.slo_met)

        for number in range(round(load * CAPACITY * seconds)):
            if number % round(load * CAPACITY * seconds / 4) == 0:
                gc.collect()
                outcome.objects.append(len(gc.get_objects()))
            client = POLITE if draw.random() < polite_share / load else FLOOD
            outcome.offered[client.name] += 1
            name = f"r{number}"
            spec = make_spec(
                name,
                arrival_at_s=clock.now_s(),
                max_new_tokens=STEPS,
                slo=make_slo(e2e_ms=2000),
                client=client,
            )
            work = make_request(name, output_tokens=STEPS, max_new_tokens=STEPS)
            try:
                stream = runtime.submit(spec, work)
            except Rejected as refusal:
                outcome.reasons[refusal.reason] += refusal.retry_after_s is not None
            else:
                outcome.accepted[client.name] += 1
                task = asyncio.ensure_future(read(stream, client.name))
                readers.add(task)
                task.add_done_callback(readers.discard)
            outcome.most_waiting = max(outcome.most_waiting, runtime.load().waiting)
            await asyncio.sleep(draw.expovariate(load * CAPACITY))
        await asyncio.gather(*readers)
        assert limiter.statistics().open == limiter.statistics().queued_requests == 0
        await runtime.close()

    run_virtual(main)
    return outcome


def check(seconds: float) -> None:
    mild, wild = overload(1.5, seconds), overload(10.0, seconds)
    assert wild.attainment() >= mild.attainment() > 0.99
    for outcome in (mild, wild):
        assert outcome.reasons.keys() == {"QUEUE_FULL"}
        assert outcome.most_waiting == QUEUE
        assert outcome.accepted.total() >= 0.97 * CAPACITY * seconds, "the engine is kept busy"
    before, after = wild.objects[-2:]
    assert after < 1.02 * before, "nothing is kept of what has ended or was refused"


def test_ten_times_the_capacity_for_half_a_minute() -> None:
    check(30.0)


@pytest.mark.nightly
def test_ten_times_the_capacity_for_five_minutes() -> None:
    check(300.0)


def test_a_flood_does_not_shut_out_a_polite_client() -> None:
    alone = overload(10.0, 20.0, polite_share=0.1)
    shared = overload(10.0, 20.0, polite_share=0.1, queue_share=4.0)
    kept_out, let_in = (outcome.accepted["polite"] / outcome.offered["polite"] for outcome in (alone, shared))
    assert kept_out < 0.2, "first come, first served is the flood's"
    assert let_in > 0.95
    assert shared.reasons["CLIENT_QUEUE_FULL"] > 0
    assert shared.attainment() > 0.99
