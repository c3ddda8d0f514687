"""Engines that work as the paper's static model says: one batch after the other, nobody joins or leaves in between.

Whenever an engine is free and somebody waits for it, a planner is given all who wait, with what is known of them; the
first batch of its plan runs. Planning takes no time. Requests either go to an engine when they arrive, to the one with
the least outstanding work, as in `offline.simulator`; or they are held back in one queue, and it is settled only when
an engine is free which of them it gets. Then it is planned for all engines that are free at this time; those that are
busy are not counted on, since more will have come before they are free.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lmdeploy_slo.core.latency_model import BilinearModel
from lmdeploy_slo.core.slo import Slo
from lmdeploy_slo.offline.workload import OfferedRequest
from lmdeploy_slo.scheduling.static_model import StaticProblem, StaticRequest

Planner = Callable[[StaticProblem], Sequence[Sequence[int]]]
"""Batches of indices into the problem's requests, which are in order of arrival."""


@dataclass(frozen=True, slots=True)
class Served:
    """What became of a request: seconds from its arrival, and whether it met every objective it carried."""

    task: str
    e2e_s: float
    ttft_s: float
    met: bool


@dataclass(slots=True)
class _Engine:
    waiting: list[OfferedRequest]
    free_at_s: float = 0.0
    running: list[OfferedRequest] = field(default_factory=list)

    def outstanding_s(self, now_s: float, latency: BilinearModel) -> float:
        """Predicted time of all requests here, each alone in a batch."""
        here = self.waiting + (self.running if self.free_at_s > now_s else [])
        return sum(_run_s(latency, 1, request, _expected_tokens(request)) for request in here)


def serve(
    offered: Sequence[OfferedRequest],
    planner: Planner,
    latency: BilinearModel,
    max_batch_size: int,
    *,
    instances: int = 1,
    hold_back: bool = False,
) -> list[Served]:
    """Serves all requests, which are in order of arrival, and returns them in that order.

    The planner knows `expected_output_tokens`, or the truth where there is no hint. hold_back: one queue for all.
    """
    queue: list[OfferedRequest] = []
    engines = [_Engine(queue if hold_back else []) for _ in range(instances)]
    served: dict[int, Served] = {}
    due = [request.due_s for request in offered]
    heapq.heapify(due)  # instants at which something can begin
    arrived = 0
    while due:
        now_s = heapq.heappop(due)
        while arrived < len(offered) and offered[arrived].due_s <= now_s:
            least = engines[0] if hold_back else min(engines, key=lambda engine: engine.outstanding_s(now_s, latency))
            least.waiting.append(offered[arrived])
            arrived += 1
        for engine in engines:
            if engine.free_at_s <= now_s and engine.waiting:
                free = sum(e.free_at_s <= now_s for e in engines) if hold_back else 1
                _run_batch(engine, now_s, free, planner, latency, max_batch_size, served)
                heapq.heappush(due, engine.free_at_s)
    return [served[request.index] for request in offered]


def fcfs(problem: StaticProblem) -> Sequence[Sequence[int]]:
    """The planner of an engine without a scheduler: as many as fit, in order of arrival."""
    return [range(problem.largest_batch)]


def _run_batch(
    engine: _Engine,
    now_s: float,
    free: int,
    planner: Planner,
    latency: BilinearModel,
    max_batch_size: int,
    served: dict[int, Served],
) -> None:
    known = tuple(
        StaticRequest(r.prompt_tokens, _expected_tokens(r), r.slo, waited_s=now_s - r.due_s) for r in engine.waiting
    )
    chosen = sorted(planner(StaticProblem(known, max_batch_size, latency, (0.0,) * free))[0], reverse=True)
    engine.running = batch = [engine.waiting.pop(index) for index in chosen]
    for request in batch:
        wait_s = now_s - request.due_s
        ttft_s = wait_s + latency.prefill_s(len(batch), float(request.prompt_tokens))
        e2e_s = wait_s + _run_s(latency, len(batch), request, request.output_tokens)
        met = _meets(request.slo, ttft_s, (e2e_s - ttft_s) / request.output_tokens, e2e_s)
        served[request.index] = Served(request.task, e2e_s, ttft_s, met)
        engine.free_at_s = max(engine.free_at_s, now_s + e2e_s - wait_s)


def _meets(slo: Slo, ttft_s: float, tpot_s: float, e2e_s: float) -> bool:
    limits = ((slo.ttft_s, ttft_s), (slo.tpot_s, tpot_s), (slo.e2e_s, e2e_s))
    return slo.has_objective and all(value <= (math.inf if most is None else most) for most, value in limits)


def _expected_tokens(request: OfferedRequest) -> int:
    return request.expected_output_tokens or request.output_tokens


def _run_s(latency: BilinearModel, batch_size: int, request: OfferedRequest, output_tokens: int) -> float:
    prompt = float(request.prompt_tokens)
    return latency.prefill_s(batch_size, prompt) + latency.decode_s(batch_size, prompt, float(output_tokens))
