"""Simulated runs in parallel processes: the answer does not depend on how many there are."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from lmdeploy_slo.offline.experiment import Fleet, Load, run_once
from lmdeploy_slo.offline.traces import TraceRow

Item = TypeVar("Item")
Answer = TypeVar("Answer")

Trace = Sequence[TraceRow]


@dataclass(frozen=True, slots=True)
class Job:
    """One run: what is offered of which trace, who serves it, and the seed."""

    trace: str
    load: Load
    fleet: Fleet
    policy: str
    seed: int

    def run(self, traces: Mapping[str, Trace]) -> dict[str, Any]:
        """An entry of a result file's `runs`."""
        return run_once(traces[self.trace], self.load, self.fleet, self.policy, self.seed).run


_traces: Mapping[str, Trace] = {}  # of a worker process, by name


def _start_worker(traces: Mapping[str, Trace]) -> None:
    global _traces
    _traces = traces


def _call(work: Callable[[Item, Mapping[str, Trace]], Answer], item: Item) -> Answer:
    return work(item, _traces)


@contextmanager
def workers(traces: Mapping[str, Trace], processes: int | None = None) -> Iterator[Workers]:
    """Up to `processes` (None: as many as there are cores) that all know the traces; one is this process itself."""
    count = processes or os.cpu_count() or 1
    if count == 1:
        yield Workers(traces, None)
        return
    context = multiprocessing.get_context("spawn")  # forking a process with threads of its own may lock up
    with ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker, initargs=(traces,)) as pool:
        try:
            yield Workers(traces, pool)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Workers:
    """See `workers`."""

    def __init__(self, traces: Mapping[str, Trace], pool: ProcessPoolExecutor | None) -> None:
        self._traces = traces
        self._pool = pool

    def map(
        self, work: Callable[[Item, Mapping[str, Trace]], Answer], items: Sequence[Item]
    ) -> Iterator[tuple[int, Answer]]:
        """(position, work(item, traces)) as they get done, in any order. `work` is a function of a module."""
        if self._pool is None:
            for position, item in enumerate(items):
                yield position, work(item, self._traces)
            return
        futures = {self._pool.submit(_call, work, item): position for position, item in enumerate(items)}
        for future in as_completed(futures):
            yield futures[future], future.result()
