"""A gateway's runtime on an engine that goes wrong in every way we know, in virtual time; one number decides it all.

    python tests/fault_simulation.py --seeds 1000          all of 0..999; the seeds that failed, at the end
    python tests/fault_simulation.py --seed 17             that run alone, and what happened in it

A run draws its engine, its policy, a few dozen requests (some with deadlines and queue timeouts, some whose clients go
away, abort or read slowly) and faults: the engine stalls for good or for a while, crashes, crashes within a step, takes
slow steps, loses aborts, sends last events twice, does not start again; the clock jumps; the policy raises. Then it
ends, and whatever must hold in the end is checked, beside what must hold always, twice a second.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import logging
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace

from scripted_engine import InlineExecutor

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.clients import ClientPolicies, ClientPolicy
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import ClientId, EndStatus
from lmdeploy_slo.core.snapshot import EngineLimits, Snapshot
from lmdeploy_slo.engine import synthetic_text
from lmdeploy_slo.engine.base import Engine
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.engine.supervised import EngineState, SupervisedEngine, Supervision
from lmdeploy_slo.errors import EngineUnavailable, RequestError
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.prediction.prefix import PrefixPredictor
from lmdeploy_slo.runtime.live import RuntimeOptions
from lmdeploy_slo.runtime.observer import AppliedPlan, EndedRequest, Refusal
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.runtime.stream import Completion, RequestStream
from lmdeploy_slo.scheduling.limits import Limiter, Limits
from lmdeploy_slo.scheduling.policy import Policy, SearchBudget, make_policy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import make_request, make_slo, make_spec
from lmdeploy_slo.testing.virtual_time import VirtualTimeLoop

POLICIES = ("fcfs", "sjf", "edf", "llf-feasible", "slack-guard", "annealing")
FAULTS = (
    "stall",
    "stall for a while",
    "crash",
    "crash within a step",
    "slow steps",
    "lost aborts",
    "duplicate ends",
    "clock jump",
    "planner raises",
    "a request fails",
)
HORIZON_S = 10_000.0
"""By then every request has ended, drained or not: what needs longer hangs."""

MAX_NEW = 60

CYCLE = 2 * [token_id for (token_id,) in synthetic_text.TOKEN_IDS]
"""Every answer is a piece of it."""


class Raising:
    """A policy that raises while it is told to."""

    def __init__(self, inner: Policy) -> None:
        self.inner, self.name, self.wants_ticks = inner, inner.name, inner.wants_ticks
        self.raises = False

    def plan(self, snapshot: Snapshot) -> Plan:
        if self.raises:
            raise ZeroDivisionError
        return self.inner.plan(snapshot)

    def warm_up(self) -> None:
        self.inner.warm_up()


@dataclass
class Ends:
    """An observer: what the runtime said of each end."""

    ended: Counter[str] = field(default_factory=Counter)
    refused: int = 0

    def on_end(self, ended: EndedRequest) -> None:
        self.ended[ended.spec.request_id] += 1

    def on_refusal(self, refusal: Refusal) -> None:
        self.refused += 1

    def on_plan(self, applied: AppliedPlan) -> None:
        pass


@dataclass
class Outcome:
    """What became of a run. log: what happened when; the same for the same seed."""

    log: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    retried: int = 0
    restarts: int = 0
    lost: bool = False

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.log).encode()).hexdigest()[:16]


class Run:
    """One seed."""

    def __init__(self, seed: int, clock: VirtualClock) -> None:
        self.clock = clock
        self.draw = draw = random.Random(seed)
        self.outcome = Outcome()
        self.engines: list[EmulatedEngine] = []
        self.limits = EngineLimits(
            max_batch_size=draw.choice([1, 2, 4, 8, 16]),
            max_prefill_tokens=draw.choice([64, 512, 8192]),
            kv_tokens=draw.choice([400, 1000, 4000]),
        )
        self.model = StepModel(draw.choice([0.0, 0.01, 0.05]), draw.choice([0.0, 2e-5]), 0.0, 1e-4, 1e-7)
        self.start_failures = draw.choice([0.0, 0.0, 0.3])
        self.supervised = SupervisedEngine(
            self.build,
            clock,
            Supervision(
                stall_timeout_s=draw.choice([2.0, 5.0, 20.0]),
                restarts=draw.choice([0, 1, 3, 5]),
                backoff_s=0.1,
                settled_s=draw.choice([5.0, 60.0]),
            ),
        )
        self.policy = Raising(make_policy(draw.choice(POLICIES), seed=seed, budget=SearchBudget(None, 50)))
        self.limiter = Limiter(
            Limits(max_streams=draw.choice([None, 30]), max_queued_tokens=draw.choice([None, 4000])),
            lambda: ClientPolicies(by_name={"slow": ClientPolicy(tokens_per_s=200.0)}),
        )
        scheduler = Scheduler(
            limits=self.limits,
            model=self.model,
            lengths=TaskLengthPredictor(),
            prefixes=PrefixPredictor(),
            max_queued_requests=draw.choice([None, 10, 40]),
        )
        options = RuntimeOptions(
            flush_interval_s=draw.choice([0.0, 0.007]),
            plan_gap_s=draw.choice([0.0, 0.005]),
            calibrate=draw.random() < 0.5,
            hold_s=draw.choice([0.0, 0.5, 30.0]),
        )
        self.runtime = Runtime(
            self.supervised,
            scheduler,
            self.policy,
            clock,
            options,
            limiter=self.limiter,
            executor=InlineExecutor(),
        )
        self.ends = Ends()
        self.runtime.journal.watch(self.ends)
        self.submitted = self.accepted = 0
        self.live: list[str] = []  # ids that may be aborted or failed
        self.readers: list[asyncio.Task[None]] = []
        self.seen: Counter[str] = Counter()
        self.drained = False

    def build(self) -> Engine:
        if self.engines and self.draw.random() < self.start_failures:
            raise EngineUnavailable("it does not start")
        self.engines.append(EmulatedEngine(self.model, self.limits, self.clock, seed=len(self.engines)))
        return self.engines[-1]

    def say(self, text: str) -> None:
        self.outcome.log.append(f"{self.clock.now_s():.6f} {text}")

    # -- clients --------------------------------------------------------------

    def submit(self, number: int) -> None:
        draw, now_s, name = self.draw, self.clock.now_s(), f"r{number}"
        prompt, output = draw.randint(1, 300), draw.randint(1, MAX_NEW)
        spec = make_spec(
            name,
            arrival_at_s=now_s,
            prompt_tokens=prompt,
            max_new_tokens=MAX_NEW,
            slo=make_slo(e2e_ms=draw.choice([None, 500, 5000])),
            queue_timeout_s=draw.choice([None, None, 0.2, 3.0]),
            client=ClientId(draw.choice(["", "slow"])),
            conversation_id=draw.choice(["", "c1", "c2"]),
        )
        work = make_request(name, prompt_tokens=prompt, output_tokens=output, max_new_tokens=MAX_NEW, ignore_eos=True)
        deadline_at_s = draw.choice([None, None, None, now_s + draw.uniform(0.01, 10.0)])
        patience = draw.choice([None, None, draw.randint(0, MAX_NEW)])
        pause_s = draw.choice([0.0, 0.0, draw.uniform(0.0, 0.5)])
        self.submitted += 1
        try:
            stream = self.runtime.submit(spec, work, deadline_at_s=deadline_at_s)
        except RequestError as refusal:
            self.say(f"{name} refused {refusal.reason}")
            return
        self.accepted += 1
        self.live.append(name)
        self.readers.append(asyncio.ensure_future(self.read(name, stream, patience, pause_s)))

    async def read(self, name: str, stream: RequestStream, patience: int | None, pause_s: float) -> None:
        tokens: list[int] = []
        try:
            async for delta in stream:
                tokens += delta.token_ids
                if delta.completion is not None:
                    self.seen[name] += 1
                    self.check_completion(name, tokens, delta.completion)
                if patience is not None and len(tokens) >= patience:
                    stream.cancel()
                if pause_s:
                    await asyncio.sleep(pause_s)
        except RequestError as error:
            self.seen[name] += 1
            self.say(f"{name} {error.reason} after {len(tokens)}")

    def check_completion(self, name: str, tokens: list[int], completion: Completion) -> None:
        assert len(tokens) == completion.timing.output_tokens <= MAX_NEW, f"{name}: tokens lost or told twice"
        whole = any(CYCLE[i : i + len(tokens)] == tokens for i in range(len(CYCLE) // 2))
        assert whole, f"{name}: tokens out of order, or of two lives"
        self.say(f"{name} finished with {len(tokens)}")

    # -- faults ---------------------------------------------------------------

    async def break_things(self) -> None:
        draw = self.draw
        for _ in range(draw.randint(1, 8)):
            await asyncio.sleep(draw.expovariate(1.0))  # while there are requests
            fault = draw.choice(FAULTS)
            self.outcome.faults[fault] += 1
            self.say(fault)
            self.inject(fault, self.engines[-1])
        if draw.random() < 0.3:
            await asyncio.sleep(draw.uniform(0.0, 20.0))
            self.drained = True
            self.say("drain")
            await self.runtime.drain(draw.choice([0.0, 1.0, 30.0]))

    def inject(self, fault: str, engine: EmulatedEngine) -> None:
        draw, faults = self.draw, engine._faults
        if fault == "stall":
            engine.stall()
        elif fault == "stall for a while":
            engine.stall()
            asyncio.get_running_loop().call_later(draw.uniform(0.0, 10.0), engine.release)
        elif fault == "crash":
            engine.crash()
        elif fault == "crash within a step":
            engine.inject(replace(faults, crash_after_steps=draw.randint(1, 5)))
        elif fault == "slow steps":
            engine.inject(replace(faults, slow_factor=draw.choice([0.5, 3.0, 20.0])))
        elif fault == "lost aborts":
            engine.inject(replace(faults, lost_aborts=draw.randint(1, 5)))
        elif fault == "duplicate ends":
            engine.inject(replace(faults, duplicate_ends=draw.randint(1, 5)))
        elif fault == "clock jump":
            self.clock.advance(draw.choice([0.1, 5.0, 3600.0]))
        elif fault == "planner raises":
            self.policy.raises = not self.policy.raises
        elif self.live:
            engine.fail(draw.choice(self.live))

    # -- the run --------------------------------------------------------------

    async def main(self) -> None:
        self.runtime.on_serving_change = lambda: self.say(f"serving {self.runtime.serving}")
        await self.runtime.start()
        watching = asyncio.ensure_future(self.check_always())
        breaking = asyncio.ensure_future(self.break_things())
        try:
            rate = self.draw.choice([1.0, 5.0, 40.0])
            for number in range(self.draw.randint(5, 60)):
                await asyncio.sleep(self.draw.expovariate(rate))
                self.submit(number)
                if self.live and self.draw.random() < 0.2:
                    name = self.draw.choice(self.live)
                    self.say(f"abort {name}: {self.runtime.abort(name)}")
            await breaking
            ended = asyncio.gather(*self.readers)
            await asyncio.wait([ended], timeout=HORIZON_S)
            assert ended.done(), f"hangs: {sorted(self.runtime._live)}"
            await ended  # raises what a reader found
        finally:
            watching.cancel()
            breaking.cancel()
        if watching.done() and not watching.cancelled():
            watching.result()
        await self.runtime.close()
        self.check_end()

    async def check_always(self) -> None:
        while True:
            self.check_now()
            await asyncio.sleep(0.5)

    def check_now(self) -> None:
        runtime, load, counted = self.runtime, self.runtime.load(), self.limiter.statistics()
        cap = self.limits.max_batch_size
        assert load.in_flight <= cap, "more in flight than there are slots"
        assert load.in_flight == len(runtime.replicas[0].in_engine), "a slot is held by nobody, or two"
        assert load.in_flight + load.waiting == len(runtime._live) == counted.open
        assert counted.queued_requests == load.waiting
        assert sum(self.ends.ended.values()) + len(runtime._live) == self.accepted
        for engine in self.engines:
            kv_tokens, used = self.limits.kv_tokens, engine.load().kv_tokens_used
            assert kv_tokens is not None
            assert used is not None
            assert 0 <= used <= kv_tokens, "more KV tokens than there are"
        if self.supervised.state is EngineState.UP:
            held = {str(key) for key in self.engines[-1]._streams}
            known = runtime.replicas[0].in_engine.keys() | runtime.replicas[0].leaving
            assert held <= known, "the engine holds what has ended"

    def check_end(self) -> None:
        runtime, load, counted = self.runtime, self.runtime.load(), self.limiter.statistics()
        assert set(self.ends.ended.values()) <= {1}, "a request ends exactly once"
        assert sum(self.ends.ended.values()) == self.accepted == len(self.seen)
        assert set(self.seen.values()) <= {1}, "its reader is told once"
        assert sum(load.ended.values()) == self.accepted + self.ends.refused == self.submitted
        assert load.waiting == load.in_flight == load.waiting_prompt_tokens == 0
        assert (counted.open, counted.queued_requests, counted.queued_tokens) == (0, 0, 0)
        assert not runtime._live and not runtime._by_handle and not runtime.replicas[0].in_engine
        assert not runtime.replicas[0].leaving, f"still leaving: {runtime.replicas[0].leaving}"
        for engine in self.engines:
            left = engine.load()
            assert (left.in_flight, left.active, left.kv_tokens_used) == (0, 0, 0), "an engine keeps something"
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not tasks, f"tasks are left: {tasks}"
        self.outcome.ends.update({status.value: count for status, count in load.ended.items() if count})
        self.outcome.retried, self.outcome.restarts = load.retried, load.engine_restarts
        self.outcome.lost = runtime.lost.is_set()
        if not self.outcome.faults.total():
            assert load.ended[EndStatus.FAILED] == 0
        self.say(f"end {sorted(self.outcome.ends.items())}")


def simulate(seed: int) -> Outcome:
    """Runs a seed; AssertionError, with the seed and what happened until then, where something does not hold."""
    loop = VirtualTimeLoop()
    asyncio.set_event_loop(loop)
    run = Run(seed, loop.clock)
    defects: list[str] = []
    loop.set_exception_handler(lambda _, context: defects.append(str(context.get("exception") or context["message"])))
    try:
        loop.run_until_complete(run.main())
        loop.run_until_complete(asyncio.sleep(0))
        timers = [timer for timer in loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
        stray = [timer for timer in timers if "release" not in repr(timer)]  # the harness's own
        assert not stray, f"timers are left: {stray}"
        assert not defects, defects
    except Exception as error:
        happened = "\n".join(run.outcome.log[-40:])
        text = f"seed {seed}: {type(error).__name__}: {error}\n{happened}"
        raise AssertionError(f"{text}\nagain: python tests/fault_simulation.py --seed {seed}") from error
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        asyncio.set_event_loop(None)
        loop.close()
    return run.outcome


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--seeds", type=int, default=1000, help="how many, from --first on")
    arguments.add_argument("--first", type=int, default=0)
    arguments.add_argument("--seed", type=int, help="this one alone, with what happened")
    options = arguments.parse_args()
    logging.disable(logging.CRITICAL)
    if options.seed is not None:
        outcome = simulate(options.seed)
        print("\n".join(outcome.log), f"digest {outcome.digest}", sep="\n")
        return
    faults: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    failed: list[int] = []
    retried = restarts = lost = 0
    began = time.perf_counter()
    gc.freeze()
    for seed in range(options.first, options.first + options.seeds):
        try:
            outcome = simulate(seed)
        except AssertionError as error:
            print(error, file=sys.stderr)
            failed.append(seed)
            continue
        faults += outcome.faults
        ends += outcome.ends
        retried, restarts, lost = retried + outcome.retried, restarts + outcome.restarts, lost + outcome.lost
    print(f"{options.seeds} seeds in {time.perf_counter() - began:.0f} s, {len(failed)} failed {failed or ''}")
    print("faults:", ", ".join(f"{name} {count}" for name, count in faults.most_common()))
    print("requests:", ", ".join(f"{name} {count}" for name, count in ends.most_common()))
    print(f"engine restarts {restarts}, requests retried {retried}, engines lost for good {lost}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
