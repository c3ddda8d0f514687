"""What remembering and telling costs: per request, per plan, per sample, per scrape, per explanation, and in memory.

    python tests/bench/bench_observability.py [--rounds 2000]

Each figure is a median over batches of calls, or a mean of single calls, in microseconds unless it says otherwise.
Nothing is done once a token: that part pushes tokens of 64 requests through a runtime with and without observers, in
alternation.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from prometheus_client import generate_latest

from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.request import EndStatus, FinishReason
from lmdeploy_slo.core.slo import Timing
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import EngineEvent
from lmdeploy_slo.observability.metrics import Metrics
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.runtime.decisions import DecisionLog
from lmdeploy_slo.runtime.observer import EndedRequest
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.scheduling.outlook import Outlook
from lmdeploy_slo.scheduling.rules import RulePolicy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import A100, make_request, make_slo, make_spec

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripted_engine import ScriptedEngine, make_runtime

BATCH = 50


def median_us(call: Callable[[], object], rounds: int) -> float:
    """Of one call."""
    took_s = []
    for _ in range(max(5, rounds // BATCH)):
        began_s = time.perf_counter()
        for _ in range(BATCH):
            call()
        took_s.append((time.perf_counter() - began_s) / BATCH)
    return statistics.median(took_s) * 1e6


def typical_us(took_s: list[float]) -> float:
    """The mean without the slowest hundredth, in which other load on the machine shows."""
    kept = sorted(took_s)[: max(1, len(took_s) * 99 // 100)]
    return statistics.mean(kept) * 1e6


def an_end() -> EndedRequest:
    spec = make_spec(slo=make_slo(ttft_ms=1000, tpot_ms=50), task_type="chat")
    snapshot = Scheduler(limits=EngineLimits(), model=A100, lengths=TaskLengthPredictor()).snapshot(0.0)
    timing = Timing(0.0, 0.1, 0.3, 4.0, 100)
    predicted = Outlook(snapshot).in_turn(spec, 100)
    return EndedRequest(spec, "chat", EndStatus.FINISHED, "stop", timing, True, predicted, 0)


def measure_metrics(rounds: int) -> None:
    metrics, ended = Metrics({"policy": "annealing"}), an_end()
    print(f"a finished request, its metrics            {median_us(lambda: metrics.on_end(ended), rounds):8.1f}")
    for tasks in (3, 18):
        for number in range(tasks):
            metrics.on_end(replace(ended, task=f"task-{number}"))
        page = generate_latest(metrics.registry)
        scrape_us = median_us(lambda: generate_latest(metrics.registry), 5 * BATCH)
        print(f"a scrape of {tasks + 1:2d} tasks, {len(page) / 1e3:3.0f} kB              {scrape_us:8.0f}")


def measure_decisions(rounds: int) -> None:
    """A plan that sends one request, with so many waiting."""
    for waiting in (10, 100, 1000):
        scheduler = Scheduler(limits=EngineLimits(max_batch_size=10**9), model=A100, lengths=TaskLengthPredictor())
        log, policy = DecisionLog(scheduler), RulePolicy("fcfs")
        now_s, accepted_s, planned_s = 0.0, [], []
        predicted = Outlook(scheduler.snapshot(now_s)).in_turn(make_spec(), 100)
        for number in range(waiting + rounds):
            spec = make_spec(f"r{number}", arrival_at_s=now_s)
            handle = scheduler.add(spec)
            began_s = time.perf_counter()
            log.accepted(handle, spec, predicted, Timing(now_s), now_s)
            accepted_s.append(time.perf_counter() - began_s)
            if number < waiting:
                continue
            now_s += 0.006  # 160 plans a second
            snapshot = scheduler.snapshot(now_s)
            plan = replace(policy.plan(snapshot), send_now=1)
            dispatches = scheduler.apply(plan, now_s)
            began_s = time.perf_counter()
            log.planned(snapshot, plan, dispatches, now_s)
            planned_s.append(time.perf_counter() - began_s)
            scheduler.drop(dispatches[0].handle)
            log.ended(dispatches[0].handle, EndStatus.FINISHED, "stop", True, now_s)
        explain_us = median_us(partial(log.explain, f"r{rounds // 2}", now_s), 5 * BATCH)
        print(f"an arrival, decisions remembered            {typical_us(accepted_s):8.1f}")
        print(f"a plan that sends one, {waiting:5d} waiting        {typical_us(planned_s):8.1f}")
        print(f"an explanation, {waiting:5d} waiting               {explain_us:8.1f}")


def measure_memory() -> None:
    """Of a log that is full."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    scheduler = Scheduler(limits=EngineLimits(max_batch_size=10**9), model=A100, lengths=TaskLengthPredictor())
    log, policy, now_s = DecisionLog(scheduler), RulePolicy("fcfs"), 0.0
    outlook = Outlook(scheduler.snapshot(now_s))
    for number in range(1000 + 20_000):
        spec = make_spec(f"request-{number:032d}", arrival_at_s=now_s)
        log.accepted(scheduler.add(spec), spec, outlook.in_turn(spec, 100), Timing(now_s), now_s)
        if number < 1000:
            continue
        now_s += 0.06
        snapshot = scheduler.snapshot(now_s)
        plan = replace(policy.plan(snapshot), send_now=1)
        dispatches = scheduler.apply(plan, now_s)
        log.planned(snapshot, plan, dispatches, now_s)
        scheduler.drop(dispatches[0].handle)
        log.ended(dispatches[0].handle, EndStatus.FINISHED, "stop", True, now_s)
    print(f"a full log of decisions, MB                {(tracemalloc.get_traced_memory()[0] - before) / 1e6:8.1f}")
    tracemalloc.stop()


async def measure_tokens(pairs: int) -> None:
    """A step of 64 requests with one token each, and the load as it is sampled."""
    runtimes = []
    for watched in (False, True):
        engine = ScriptedEngine(MonotonicClock())
        runtime: Runtime = make_runtime(engine, MonotonicClock())
        if watched:
            runtime.journal.watch(Metrics())
        await runtime.start()
        streams = [
            runtime.submit(make_spec(f"r{n}", arrival_at_s=runtime.clock.now_s()), make_request(f"r{n}"))
            for n in range(64)
        ]
        await engine.has(*(f"r{n}" for n in range(64)))
        events = [EngineEvent(f"r{n}", (97,), "a") for n in range(64)]
        runtimes.append((runtime, engine, streams, events))
    took: list[list[float]] = [[], []]
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            _, engine, streams, events = runtimes[which]
            began_s = time.perf_counter()
            for _ in range(20):
                engine.send(*events)
            took[which].append((time.perf_counter() - began_s) / 20 / 64)
            for stream in streams:
                stream._pending.clear()
    bare_us, watched_us = (statistics.median(values) * 1e6 for values in took)
    print(f"a token, without and with observers       {bare_us:9.3f} {watched_us:8.3f}")
    print(f"a sample of the load                       {median_us(runtimes[1][0].load, 1000):8.1f}")
    for runtime, engine, _, _ in runtimes:
        for n in range(64):
            engine.emit(f"r{n}", end=FinishReason.STOP)
        await runtime.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    args = parser.parse_args()
    measure_metrics(args.rounds)
    measure_decisions(args.rounds)
    asyncio.run(measure_tokens(201))
    measure_memory()


if __name__ == "__main__":
    main()
