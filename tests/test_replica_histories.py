"""Random histories of several engines in virtual time: they crash, stall, come and go, while requests are sent, aborted
and given up by their readers. Every request ends exactly once; who finishes has what one engine would have given."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from scripted_engine import InlineExecutor

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.core.slo import Slo
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import EngineRequest, Stopping
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.engine.supervised import EngineState, SupervisedEngine, Supervision
from lmdeploy_slo.engine.synthetic_text import TEXTS, TOKEN_IDS, synthesize
from lmdeploy_slo.errors import RequestError
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.prediction.prefix import PrefixPredictor
from lmdeploy_slo.runtime import failover
from lmdeploy_slo.runtime.live import RuntimeOptions
from lmdeploy_slo.runtime.observer import AppliedPlan, EndedRequest, Refusal
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.runtime.scaling import Parts, Scaling
from lmdeploy_slo.scheduling.fleet import Fleet
from lmdeploy_slo.scheduling.placement import make_placement
from lmdeploy_slo.scheduling.policy import SearchBudget, make_policy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import make_spec
from lmdeploy_slo.testing.virtual_time import run_virtual

MODELS = [StepModel(0.01, 1e-5, 0.0, 1e-4, 1e-7), StepModel(0.02, 3e-5, 0.0, 2e-4, 2e-7)]
LIMITS = EngineLimits(max_batch_size=6, kv_tokens=20_000)
REQUESTS = 120
HORIZON_S = 60.0


class Ends:
    """How each request ended, as observers are told."""

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()

    def on_end(self, ended: EndedRequest) -> None:
        self.ended[ended.spec.request_id] += 1

    def on_refusal(self, refusal: Refusal) -> None:
        pass

    def on_plan(self, applied: AppliedPlan) -> None:
        pass


class History:
    def __init__(self, seed: int, clock: VirtualClock) -> None:
        self.random = random.Random(seed)
        self.clock = clock
        placement = self.random.choice(["slo", "least-work", "least-loaded", "round-robin", "most-memory"])
        self.fleet = Fleet(make_placement(placement))
        self.lengths = TaskLengthPredictor()
        self.policy = self.random.choice(["annealing", "fcfs", "slack-guard"])
        self.built = 0
        options = RuntimeOptions(
            flush_interval_s=0.0, plan_gap_s=0.0, calibrate=True, retries=self.random.choice([1, 3])
        )
        self.runtime = Runtime(*self.parts(), clock, options, executor=InlineExecutor(), fleet=self.fleet)
        for _ in range(self.random.randint(0, 3)):
            self.runtime.add(*self.parts())
        self.scaling = Scaling(self.runtime, self.parts, clock, grace_s=self.random.choice([0.0, 2.0]))
        self.ends = Ends()
        self.runtime.journal.watch(self.ends)
        self.finished = self.accepted = 0

    def parts(self) -> Parts:
        model = MODELS[self.built % 2]
        self.built += 1
        scheduler = Scheduler(
            limits=LIMITS, model=model, lengths=self.lengths, prefixes=PrefixPredictor(), numbers=self.fleet.numbers
        )
        supervision = Supervision(stall_timeout_s=2.0, restarts=2, backoff_s=0.5, settled_s=5.0)
        policy = make_policy(self.policy, budget=SearchBudget(time_s=None, evaluations=60))
        engine = SupervisedEngine(lambda: EmulatedEngine(model, LIMITS, self.clock), self.clock, supervision)
        return engine, scheduler, policy

    async def request(self, number: int) -> None:
        draw = self.random
        await asyncio.sleep(draw.uniform(0.0, HORIZON_S))
        name, tokens, prompt = (
            f"r{number}",
            draw.randint(1, 400),
            [draw.randint(1, 999) for _ in range(draw.randint(1, 50))],
        )
        fate = draw.choice(["stays"] * 7 + ["aborted", "leaves", "deadline"])
        after_s = draw.uniform(0.0, 3.0)
        slo = draw.choice([Slo(), Slo(e2e_s=3.0), Slo(ttft_s=1.0, tpot_s=0.05)])
        request = EngineRequest(name, prompt, Stopping(max_new_tokens=tokens, ignore_eos=True))
        spec = make_spec(
            name,
            arrival_at_s=self.clock.now_s(),
            prompt_tokens=len(prompt),
            max_new_tokens=tokens,
            slo=slo,
            queue_timeout_s=draw.choice([None, 20.0]),
            conversation_id=draw.choice(["", "a", "b"]),
        )
        deadline_at_s = self.clock.now_s() + after_s if fate == "deadline" else None
        try:
            stream = self.runtime.submit(spec, request, deadline_at_s=deadline_at_s)
        except RequestError:
            return
        self.accepted += 1
        loop = asyncio.get_running_loop()
        if fate == "aborted":
            loop.call_later(after_s, self.runtime.abort, name)
        elif fate == "leaves":
            loop.call_later(after_s, stream.cancel)
        try:
            ids = [token_id async for delta in stream for token_id in delta.token_ids]
        except RequestError:
            return
        answer = synthesize(request, max_tokens=tokens, seed=0)
        assert ids == [TOKEN_IDS[(answer.start + k) % len(TEXTS)][0] for k in range(tokens)], name
        self.finished += 1

    async def disturb(self) -> None:
        draw = self.random
        while True:
            await asyncio.sleep(draw.expovariate(0.3))
            engines = [replica.engine for replica in self.runtime.replicas.values()]
            engine = draw.choice(engines)
            assert isinstance(engine, SupervisedEngine)
            what = draw.choice(["crash", "stall", "scale", "drain"])
            if what == "scale":
                self.scaling.scale(draw.randint(1, 5))
            elif what == "drain":
                name = draw.choice([replica.name for replica in self.runtime.replicas.values()])
                self.scaling.scale(self.scaling.wanted, [name])
            elif engine.state is EngineState.UP and isinstance(engine.inner, EmulatedEngine):
                if what == "crash":
                    engine.inner.crash("a crash")
                else:
                    engine.inner.stall()
            self.check()

    def check(self) -> None:
        runtime = self.runtime
        live = runtime._live
        held = [handle for number in self.fleet.replicas() for handle in self.fleet.scheduler(number)._specs]
        assert sorted(held) == sorted(runtime._by_handle), "each request is with one scheduler"
        for replica in runtime.replicas.values():
            assert len(replica.in_engine) == replica.scheduler.running
            assert all(live[name].replica is replica for name in replica.in_engine)
            assert replica.scheduler.running <= LIMITS.max_batch_size

    async def main(self) -> None:
        await self.runtime.start()
        self.scaling.start()
        disturbing = asyncio.ensure_future(self.disturb())
        await asyncio.wait_for(asyncio.gather(*(self.request(number) for number in range(REQUESTS))), 4000.0)
        disturbing.cancel()
        load = self.runtime.load()
        assert set(self.ends.ended.values()) <= {1}, "each ends once"
        assert len(self.ends.ended) == self.accepted == sum(load.ended.values()) - load.ended[EndStatus.REJECTED]
        assert load.ended[EndStatus.FINISHED] == self.finished
        self.check()
        assert not self.runtime._live and not self.runtime._by_handle
        await self.scaling.close()
        await self.runtime.close()


def run(seed: int) -> tuple[int, int]:
    """(finished, went on or started over)."""
    told: list[tuple[int, int]] = []

    async def main(clock: VirtualClock) -> None:
        history = History(seed, clock)
        await history.main()
        load = history.runtime.load()
        told.append((history.finished, load.resumed + load.retried))

    run_virtual(main)
    return told[0]


def run_all(seeds: int) -> list[tuple[int, int]]:
    return [run(seed) for seed in range(seeds)]


def test_five_histories() -> None:
    told = run_all(5)
    assert sum(finished for finished, _ in told) > 0.4 * 5 * REQUESTS
    assert sum(again for _, again in told) > 20


def test_a_repeated_token_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The histories are no better than what they find."""
    monkeypatch.setattr(failover, "resumed_request", lambda live: live.request)
    with pytest.raises(AssertionError):
        run_all(5)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_two_hundred_histories() -> None:
    run_all(200)
