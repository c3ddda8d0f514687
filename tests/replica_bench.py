"""A runtime on several scripted engines, in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from scripted_engine import InlineExecutor, ScriptedEngine

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import EngineRequest, Stopping
from lmdeploy_slo.engine.supervised import SupervisedEngine, Supervision
from lmdeploy_slo.errors import RequestError
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.runtime.live import RuntimeOptions
from lmdeploy_slo.runtime.replica import Replica
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.runtime.stream import Delta, RequestStream
from lmdeploy_slo.scheduling.fleet import Fleet
from lmdeploy_slo.scheduling.placement import make_placement
from lmdeploy_slo.scheduling.rules import RulePolicy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import NO_TIME, make_spec
from lmdeploy_slo.testing.virtual_time import run_virtual

SUPERVISION = Supervision(stall_timeout_s=10.0, restarts=1, backoff_s=5.0)
LIMITS = EngineLimits(max_batch_size=2)


class Bench:
    """A runtime on `count` scripted engines, two slots each; `engines[n]`: those replica n has had, oldest first."""

    def __init__(self, clock: VirtualClock, count: int = 2, **options: Any) -> None:
        self.clock = clock
        self.fleet = Fleet(make_placement("least-loaded"))
        self.engines: list[list[ScriptedEngine]] = []
        self.lengths = TaskLengthPredictor()
        options = {"flush_interval_s": 0.0, "plan_gap_s": 0.0} | options
        parts = self.parts()
        self.runtime = Runtime(*parts, clock, RuntimeOptions(**options), executor=InlineExecutor(), fleet=self.fleet)
        for _ in range(count - 1):
            self.add()

    def parts(self) -> tuple[SupervisedEngine, Scheduler, RulePolicy]:
        had: list[ScriptedEngine] = []
        self.engines.append(had)

        def build() -> ScriptedEngine:
            had.append(ScriptedEngine(self.clock, limits=LIMITS))
            return had[-1]

        scheduler = Scheduler(limits=LIMITS, model=NO_TIME, lengths=self.lengths, numbers=self.fleet.numbers)
        return SupervisedEngine(build, self.clock, SUPERVISION), scheduler, RulePolicy("fcfs")

    def add(self) -> Replica:
        return self.runtime.add(*self.parts())

    def engine(self, number: int) -> ScriptedEngine:
        return self.engines[number][-1]

    def where(self, request_id: str) -> int:
        (number,) = [n for n, had in enumerate(self.engines) if request_id in had[-1].requests]
        return number

    def submit(self, request_id: str, **spec: Any) -> RequestStream:
        spec = {"arrival_at_s": self.clock.now_s(), "prompt_tokens": 3} | spec
        stopping = Stopping(max_new_tokens=spec.get("max_new_tokens", 16))
        request = EngineRequest(request_id, prompt_token_ids=[1, 2, 3], stopping=stopping)
        return self.runtime.submit(make_spec(request_id, **spec), request)


def bench(count: int = 2, **options: Any) -> Callable[[Callable[[Bench], Awaitable[None]]], Any]:
    def decorate(test: Callable[[Bench], Awaitable[None]]) -> Callable[[], None]:
        def run() -> None:
            async def main(clock: VirtualClock) -> None:
                bench = Bench(clock, count, **options)
                await bench.runtime.start()
                await test(bench)
                await bench.runtime.close()
                assert not bench.runtime._live and not bench.runtime._by_handle

            run_virtual(main)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


async def outcome(stream: RequestStream) -> Delta | RequestError:
    try:
        return await stream.result()
    except RequestError as error:
        return error


async def whole(stream: RequestStream) -> Delta:
    told = await outcome(stream)
    assert isinstance(told, Delta), told
    assert told.completion is not None
    return told
