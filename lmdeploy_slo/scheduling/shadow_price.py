"""What a second of engine time is worth in requests: the price of the work a plan accepts now.

When more arrives than the engine can serve, accepting one request means losing others that have not arrived yet. The
price is read off the recent past: of the requests that arrived in the last `window_s`, those worth most per second of
engine time, as many as fit into the window; what the first that does not fit would have brought per second is the
price. Where all fit the price is 0.

A client that asks for more than its share makes its own requests worth less, not those of others. Shares are max-min
fair (Bertsekas and Gallager, Data Networks, 1992, section 6.5.2): everybody gets what it asked for in the window, or
the same level. A request of a client that asked for k times the level counts 1/k^2.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import Rows, Snapshot
from lmdeploy_slo.scheduling.rules import engine_time_s, prefill_s

REFRESH_S = 0.25
"""The price is recomputed at most this often."""

YOUNG_S = 5.0
"""A history shorter than this is taken to be this long."""

LEAST_WORTH = 1e-3
"""A request of the greediest client counts this much: it goes where nobody else wants to."""

Floats = npt.NDArray[np.float64]

_ARRIVAL = np.dtype(
    [
        ("at_s", np.float64),
        ("engine_s", np.float64),
        ("stall_s", np.float64),
        ("slack_s", np.float64),  # that its first token leaves for others' prefills, on an idle engine
        ("client", np.int64),
    ]
)


class ShadowPrice:
    """Learns from snapshots alone, so equal histories give equal prices.

    price_s: requests a second of engine time is worth, >= 0. duty: share of time the accepted ones spend in prefill.
    arrivals_per_s: of requests that could meet on an idle engine; slack_s: of half of them the first token is late
    where more prefill than this is due when they arrive.
    """

    def __init__(self, window_s: float, capacity: float) -> None:
        self._window_s = window_s
        self._capacity = capacity
        self._last_handle = 0
        self._recent = np.empty(0, dtype=_ARRIVAL)
        self._fresh: list[npt.NDArray[np.void]] = []  # arrivals not yet in `_recent`
        self._first_arrival_s: float | None = None
        self._computed_at_s = -np.inf
        self._clients = np.zeros(1, dtype=np.int64)  # sorted, with the worth of each one's requests
        self._worths = np.ones(1)
        self.price_s = 0.0
        self.duty = 0.0
        self.arrivals_per_s = 0.0
        self.slack_s = 0.0

    def learn(self, snapshot: Snapshot, reference_batch: float) -> None:
        """Takes in what arrived since the last snapshot."""
        self._remember(snapshot.waiting, snapshot.model, reference_batch)
        now_s = snapshot.now_s
        if now_s - self._computed_at_s < REFRESH_S or self._first_arrival_s is None:
            return
        self._computed_at_s = now_s
        recent = np.concatenate([self._recent, *self._fresh])
        self._fresh.clear()
        self._recent = recent = recent[recent["at_s"] >= now_s - self._window_s]
        span_s = min(self._window_s, max(now_s - self._first_arrival_s, YOUNG_S))
        self._share(recent, span_s)
        engine_s = np.maximum(recent["engine_s"], 1e-9)
        density = self.worth_of(recent["client"]) / engine_s
        best_first = np.argsort(-density, kind="stable")
        fits = int(np.searchsorted(np.cumsum(engine_s[best_first]), span_s * self._capacity))
        self.price_s = float(density[best_first[fits]]) if fits < len(recent) else 0.0
        self.duty = float(np.sum(recent["stall_s"][best_first[:fits]])) / span_s
        slack_s = recent["slack_s"][recent["slack_s"] > 0.0]
        self.arrivals_per_s = len(slack_s) / span_s
        self.slack_s = float(np.median(slack_s)) if len(slack_s) else 0.0

    def worth_of(self, clients: npt.NDArray[np.int64]) -> Floats:
        """What a request of each of these clients counts, in (0, 1]; a client not heard of lately counts in full."""
        place = np.minimum(np.searchsorted(self._clients, clients), len(self._clients) - 1)
        return np.where(self._clients[place] == clients, self._worths[place], 1.0)

    def _share(self, recent: npt.NDArray[np.void], span_s: float) -> None:
        clients, who = np.unique(recent["client"], return_inverse=True)
        if len(clients) < 2:
            self._clients, self._worths = np.zeros(1, dtype=np.int64), np.ones(1)
            return
        asked = np.bincount(who, weights=recent["engine_s"]) / span_s
        worths = np.maximum(np.minimum(1.0, fair_level(asked, self._capacity) / np.maximum(asked, 1e-12)), 0.0) ** 2
        self._clients, self._worths = clients, np.maximum(worths / np.max(worths), LEAST_WORTH)

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
        arrivals = np.empty(len(new), dtype=_ARRIVAL)
        arrivals["at_s"], arrivals["client"] = new["arrival_at_s"], new["client"]
        arrivals["engine_s"] = engine_time_s(new, model, reference_batch)
        arrivals["stall_s"] = prefill_s(new, model)
        arrivals["slack_s"] = np.minimum(new["ttft_s"], new["e2e_s"]) - arrivals["stall_s"]
        self._fresh.append(arrivals)


def fair_level(asked: Floats, capacity: float) -> float:
    """The max-min fair level: everybody gets the smaller of what it asked for and this, `capacity` in all; inf where
    the capacity suffices."""
    if float(np.sum(asked)) <= capacity:
        return float("inf")
    ascending = np.sort(asked)
    left = capacity
    for taken, amount in enumerate(ascending.tolist()):
        level = left / (len(ascending) - taken)
        if amount >= level:
            return level
        left -= amount
    return float("inf")
