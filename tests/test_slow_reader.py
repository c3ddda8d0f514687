"""A client that takes a message a second holds up nobody else: the gateway's own calls, in virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from scripted_engine import InlineExecutor

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.gateway.options import GatewayOptions
from lmdeploy_slo.gateway.service import InferenceService
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.runtime.live import RuntimeOptions
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.scheduling.rules import RulePolicy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.virtual_time import run_virtual
from lmdeploy_slo.v1 import inference_pb2 as pb

OTHERS, TOKENS = 12, 120
MODEL = StepModel(c0=0.01, p1=5e-5, p2=0.0, d1=2e-4, d2=0.0)


class Reader:
    """The end of a call whose client takes a message in `pause_s`."""

    def __init__(self, clock: VirtualClock, pause_s: float) -> None:
        self._clock, self._pause_s = clock, pause_s
        self.tokens_at_s: list[float] = []

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def time_remaining(self) -> None:
        return None

    def set_trailing_metadata(self, trailing: Any) -> None:
        assert not trailing

    async def write(self, message: bytes) -> None:
        tokens = len(pb.GenerateStreamResponse.FromString(message).token_ids)
        self.tokens_at_s += [self._clock.now_s()] * tokens
        await asyncio.sleep(self._pause_s)

    @property
    def tpot_s(self) -> float:
        assert len(self.tokens_at_s) == TOKENS
        return (self.tokens_at_s[-1] - self.tokens_at_s[0]) / (TOKENS - 1)


def others_tpot_s(pause_s: float, flush_interval_s: float) -> tuple[list[float], Reader]:
    """Of those beside a reader with that pause; and that reader."""

    async def main(clock: VirtualClock) -> tuple[list[float], Reader]:
        limits = EngineLimits(max_batch_size=OTHERS + 1)
        runtime = Runtime(
            EmulatedEngine(MODEL, limits, clock),
            Scheduler(limits=limits, model=MODEL, lengths=TaskLengthPredictor()),
            RulePolicy("fcfs"),
            clock,
            RuntimeOptions(flush_interval_s=flush_interval_s),
            executor=InlineExecutor(),
        )
        await runtime.start()
        service: Any = InferenceService(runtime, GatewayOptions())
        request = pb.GenerateRequest(
            text="hello",
            stopping=pb.StoppingParams(max_new_tokens=TOKENS),
            emulation=pb.Emulation(output_tokens=TOKENS),
        ).SerializeToString()
        slow, others = Reader(clock, pause_s), [Reader(clock, 0.0) for _ in range(OTHERS)]
        calls = [asyncio.ensure_future(service.generate_stream(request, reader)) for reader in (slow, *others)]
        await asyncio.gather(*calls[1:])
        assert calls[0].done() == (pause_s == 0)
        await calls[0]
        await runtime.close()
        return sorted(reader.tpot_s for reader in others), slow

    return run_virtual(main)


@pytest.mark.parametrize("flush_interval_s", [0.0, 0.02])
def test_a_slow_reader_does_not_change_the_others_time_per_token(flush_interval_s: float) -> None:
    without, _ = others_tpot_s(0.0, flush_interval_s)
    beside, slow = others_tpot_s(1.0, flush_interval_s)
    assert without[-1] > 0.01  # a step takes longer than that: there is something to compare
    assert beside == pytest.approx(without, rel=1e-9)  # 5 % is what was asked for
    assert len(slow.tokens_at_s) == TOKENS  # and it misses nothing itself
