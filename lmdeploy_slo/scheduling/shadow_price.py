"""What a second of engine time is worth in requests: the price of the work a plan accepts now.

When more arrives than the engine can serve, accepting one request means losing others that have not arrived yet. The
price is read off the recent past: of the requests that arrived in the last `window_s`, the cheapest first, as many as
fit into the window; one over the engine time of the first that does not fit is what a second would have bought. Where
all fit the price is 0.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import Rows, Snapshot
from lmdeploy_slo.scheduling.rules import engine_time_s, prefill_s

REFRESH_S = 0.25
"""The price is recomputed at most this often."""

YOUNG_S = 5.0
"""A history shorter than this is taken to be this long."""


class ShadowPrice:
    """Learns from snapshots alone, so equal histories give equal prices.

    price_s: requests a second of engine time is worth, >= 0. duty: share of time the accepted ones spend in prefill.
    """

    def __init__(self, window_s: float, capacity: float) -> None:
        self._window_s = window_s
        self._capacity = capacity
        self._last_handle = 0
        self._recent: deque[tuple[float, float, float]] = deque()  # (arrival, engine time, prefill), s
        self._first_arrival_s: float | None = None
        self._computed_at_s = -np.inf
        self.price_s = 0.0
        self.duty = 0.0

    def learn(self, snapshot: Snapshot, reference_batch: float) -> None:
        """Takes in what arrived since the last snapshot."""
        self._remember(snapshot.waiting, snapshot.model, reference_batch)
        now_s = snapshot.now_s
        if now_s - self._computed_at_s < REFRESH_S or self._first_arrival_s is None:
            return
        self._computed_at_s = now_s
        while self._recent and self._recent[0][0] < now_s - self._window_s:
            self._recent.popleft()
        span_s = min(self._window_s, max(now_s - self._first_arrival_s, YOUNG_S))
        work = np.array(sorted((engine_s, stall_s) for _, engine_s, stall_s in self._recent)).reshape(-1, 2)
        fits = int(np.searchsorted(np.cumsum(work[:, 0]), span_s * self._capacity))
        self.price_s = 1.0 / float(work[fits, 0]) if fits < len(work) else 0.0
        self.duty = float(np.sum(work[:fits, 1])) / span_s

    def _remember(self, waiting: Rows, model: StepModel, reference_batch: float) -> None:
        new = waiting[waiting["handle"] > self._last_handle]
        if not len(new):
            return
        self._last_handle = int(np.max(new["handle"]))
        objective = np.minimum(np.minimum(new["ttft_s"], new["tpot_s"]), new["e2e_s"])
        new = new[np.isfinite(objective)]
        if not len(new):
            return
        if self._first_arrival_s is None:
            self._first_arrival_s = float(np.min(new["arrival_at_s"]))
        engine_s = engine_time_s(new, model, reference_batch)
        columns = (new["arrival_at_s"].tolist(), engine_s.tolist(), prefill_s(new, model).tolist())
        self._recent.extend(zip(*columns, strict=True))
