"""The static model of Huang et al. (arXiv 2504.14966): all requests are there, and run in batches in a row.

With b the size of a request's batch, t_p and t_d its prefill and decode times there (`BilinearModel`) and l_o its
output tokens:

    t_exec = t_p + t_d            E2E  = t_wait + t_exec
    TTFT   = t_wait + t_p         TPOT = t_d / l_o, in this model only
    t_wait = until the batch begins: on one engine, the sum over the earlier batches of their longest t_exec
    G      = requests that meet their SLO / sum of all E2E; where nobody meets, the shorter sum is the better plan

With several engines each batch in turn begins on the one that is free first, which is free again when the longest of
the batch has ended. A request without an objective counts in the sum, and never as met. One that has waited before the
plan begins has this in its t_wait, so that plans can be made again while requests come and go.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.core.latency_model import BilinearModel
from lmdeploy_slo.core.slo import NO_SLO, Slo

MAX_REQUESTS = 4096
MAX_BATCH_SIZE = 1024
MAX_ENGINES = 64

_FINEST_TICK_S = 1e-9
_LONGEST_TICKS = 2.0**60  # no sum of times is longer, so that 64 bits hold it


@dataclass(frozen=True, slots=True)
class StaticRequest:
    """prompt_tokens, output_tokens: >= 1, predicted or known. waited_s: since its arrival, >= 0. Else ValueError."""

    prompt_tokens: int
    output_tokens: int
    slo: Slo = NO_SLO
    waited_s: float = 0.0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ValueError(f"a request has at least one token in and out, got {self}")
        if not (math.isfinite(self.waited_s) and self.waited_s >= 0):
            raise ValueError(f"waited_s must be a finite number of 0 or more, got {self.waited_s}")


@dataclass(frozen=True, slots=True)
class StaticProblem:
    """What to plan: 1..MAX_REQUESTS requests in order of arrival, 1..MAX_BATCH_SIZE a batch, on 1..MAX_ENGINES engines.

    engines_free_s: for each engine, how long from now it is busy, >= 0. Raises ValueError for anything else.
    """

    requests: tuple[StaticRequest, ...]
    max_batch_size: int
    latency: BilinearModel
    engines_free_s: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        if not 1 <= len(self.requests) <= MAX_REQUESTS:
            raise ValueError(f"a plan is for 1 to {MAX_REQUESTS} requests, got {len(self.requests)}")
        if not 1 <= self.max_batch_size <= MAX_BATCH_SIZE:
            raise ValueError(f"max_batch_size must be 1 to {MAX_BATCH_SIZE}, got {self.max_batch_size}")
        if not 1 <= len(self.engines_free_s) <= MAX_ENGINES:
            raise ValueError(f"a plan is for 1 to {MAX_ENGINES} engines, got {len(self.engines_free_s)}")
        if not all(math.isfinite(free_s) and free_s >= 0 for free_s in self.engines_free_s):
            raise ValueError(f"engines_free_s must be finite numbers of 0 or more, got {self.engines_free_s}")

    @property
    def largest_batch(self) -> int:
        """The largest batch there can be."""
        return min(self.max_batch_size, len(self.requests))

    @property
    def with_slo(self) -> int:
        """Requests with an objective."""
        return sum(request.slo.has_objective for request in self.requests)


@dataclass(frozen=True, slots=True)
class StaticPlan:
    """Batches of indices into the problem's requests, first to run first, and what they come to.

    evaluations: plans that were scored to find it. elapsed_s: the search itself, compiled code only.
    """

    batches: tuple[tuple[int, ...], ...]
    met: int
    sum_e2e_s: float
    evaluations: int
    elapsed_s: float

    @property
    def objective(self) -> float:
        """G, per second."""
        return self.met / self.sum_e2e_s


@dataclass(frozen=True, slots=True)
class Columns:
    """The requests of a problem as arrays of length n; objectives in seconds, inf for none."""

    prompt_tokens: npt.NDArray[np.float64]
    output_tokens: npt.NDArray[np.float64]
    ttft_s: npt.NDArray[np.float64]
    tpot_s: npt.NDArray[np.float64]
    e2e_s: npt.NDArray[np.float64]
    waited_s: npt.NDArray[np.float64]

    @classmethod
    def of(cls, requests: Sequence[StaticRequest]) -> Columns:
        rows = [
            (
                request.prompt_tokens,
                request.output_tokens,
                *(math.inf if v is None else v for v in (request.slo.ttft_s, request.slo.tpot_s, request.slo.e2e_s)),
                request.waited_s,
            )
            for request in requests
        ]
        return cls(*np.array(rows, dtype=np.float64).T.copy())


@dataclass(frozen=True, slots=True)
class Tables:
    """`run_time` and `limit` as `static_kernel` takes them, shape (largest_batch + 1, n + 1), in ticks of `tick_s`.

    waited: the sum of what all requests have waited before the plan begins; part of the sum of E2E. free: when each
    engine is free, soonest first.

    A tick is a nanosecond; longer only where sums of times would not fit into 64 bits. All times are compared as whole
    ticks, so that an objective that is met exactly is met.
    """

    run_time: npt.NDArray[np.int64]
    limit: npt.NDArray[np.int64]
    waited: int
    free: npt.NDArray[np.int64]
    tick_s: float


def weigh(problem: StaticProblem) -> Tables:
    """What the batch size means for each request."""
    columns = Columns.of(problem.requests)
    prompt, output = columns.prompt_tokens, columns.output_tokens
    latency, n = problem.latency, len(problem.requests)
    free_s = np.sort(np.array(problem.engines_free_s))
    waited_s = float(columns.waited_s.sum())
    slowest_s = latency.prefill_s(problem.largest_batch, prompt) + latency.decode_s(
        problem.largest_batch, prompt, output
    )
    tick_s = max(_FINEST_TICK_S, (n * float(slowest_s.sum() + free_s[-1]) + waited_s) / _LONGEST_TICKS)
    run_time = np.zeros((problem.largest_batch + 1, n + 1), dtype=np.int64)
    limit = np.full((problem.largest_batch + 1, n + 1), -1, dtype=np.int64)
    has_slo = np.array([request.slo.has_objective for request in problem.requests])
    for b in range(1, problem.largest_batch + 1):
        prefill_s, decode_s = latency.prefill_s(b, prompt), latency.decode_s(b, prompt, output)
        run_time[b, :n] = np.maximum(1, np.rint((prefill_s + decode_s) / tick_s))
        wait_s = np.minimum(columns.ttft_s - prefill_s, columns.e2e_s - (prefill_s + decode_s)) - columns.waited_s
        wait = np.minimum(np.rint(wait_s / tick_s), _LONGEST_TICKS)
        fast = np.rint(decode_s / output / tick_s) <= np.rint(columns.tpot_s / tick_s)
        limit[b, :n] = np.where(has_slo & fast & (wait >= 0), wait, -1)
    free = np.rint(free_s / tick_s).astype(np.int64)
    return Tables(run_time, limit, round(waited_s / tick_s), free, tick_s)


def score(tables: Tables, batches: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(requests that meet, sum of E2E in ticks) of a plan."""
    free = tables.free.tolist()
    total, met = tables.waited, 0
    for batch in batches:
        wait = heapq.heappop(free)
        run_times = tables.run_time[len(batch), list(batch)]
        total += int(run_times.sum()) + wait * len(batch)
        met += int((tables.limit[len(batch), list(batch)] >= wait).sum())
        heapq.heappush(free, wait + int(run_times.max()))
    return met, total
