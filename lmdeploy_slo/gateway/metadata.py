"""Call metadata read as aliases of request fields, for clients that set objectives in headers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

REQUEST_ID = "x-request-id"
TRACEPARENT = "traceparent"
TTFT_MS = "x-llm-d-slo-ttft-ms"
TPOT_MS = "x-llm-d-slo-tpot-ms"
E2E_MS = "x-slo-e2e-ms"
FAIRNESS_ID = "x-llm-d-inference-fairness-id"

CLAMPED = "x-slo-clamped"
"""In the trailing metadata: the fields of the request that its client's policy changed, separated by commas."""

_NAMES = frozenset((REQUEST_ID, TRACEPARENT, TTFT_MS, TPOT_MS, E2E_MS, FAIRNESS_ID))
_DECIMAL = re.compile(r"[0-9]+(\.[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Aliases:
    """Values as they were sent, by name; of one sent twice the first."""

    values: dict[str, str]

    def get(self, name: str) -> str | None:
        return self.values.get(name)

    def decimal(self, name: str) -> float | None:
        """The value of a decimal number; nan where it is something else, None where it was not sent."""
        value = self.values.get(name)
        if value is None:
            return None
        return float(value) if _DECIMAL.fullmatch(value.strip()) else float("nan")


def read_aliases(metadata: Iterable[tuple[str, str | bytes]] | None) -> Aliases:
    """Other metadata is left alone."""
    values: dict[str, str] = {}
    for key, value in metadata or ():
        if key in _NAMES and key not in values:
            values[key] = value if isinstance(value, str) else value.decode("ascii", "replace")
    return Aliases(values)
