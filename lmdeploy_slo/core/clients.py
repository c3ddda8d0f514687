"""Who asks, and what the operator lets each client claim and use. Pure: nothing here knows how a client is recognised.

A claim beyond a client's policy is not refused, it is moved to the nearest value that is allowed; what it was moved to
is what the request is planned with, judged by and told back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lmdeploy_slo.core.request import ClientId, PriorityClass, RequestSpec
from lmdeploy_slo.core.slo import NO_SLO, Slo

BURST_S = 10.0
"""An unset `burst_tokens` is what the rate gives in so many seconds."""


@dataclass(frozen=True, slots=True)
class ClientPolicy:
    """What one client may claim and use; None is no bound.

    classes: priority classes it may claim, at least one. tightest_slo, loosest_slo: bounds of each objective it sets;
    an objective it does not set stays unset. sheddable: None leaves it to the request. length_hints: whether its
    `expected_output_tokens` is believed. max_queue_timeout_s: > 0, also for requests that name none.
    names_users: its `fairness_id` says whom it asks for. operator: it may look at and end other clients' requests, and
    say how many engines there are.

    Limits, each >= 1: max_streams, requests that have not ended; max_queued_requests and max_queued_tokens, those that
    wait for the engine. tokens_per_s > 0: prompt and output tokens; burst_tokens >= 1: so many may be used at once.
    """

    classes: frozenset[PriorityClass] = frozenset(PriorityClass)
    tightest_slo: Slo = NO_SLO
    loosest_slo: Slo = NO_SLO
    sheddable: bool | None = None
    length_hints: bool = True
    max_queue_timeout_s: float | None = None
    names_users: bool = False
    operator: bool = False
    max_streams: int | None = None
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    tokens_per_s: float | None = None
    burst_tokens: float | None = None

    @property
    def burst(self) -> float:
        """Tokens that may be used at once; only where there is a rate."""
        return self.burst_tokens or max(1.0, BURST_S * (self.tokens_per_s or 0.0))


FREE = ClientPolicy()
"""No bound at all."""


@dataclass(frozen=True, slots=True)
class ClientPolicies:
    """The policy of each client. A user that a client names has an entry `NAME/USER`, or that of NAME.

    Where nobody's name is checked, names are claims, and sort those alone who are honest.
    """

    default: ClientPolicy = FREE
    by_name: Mapping[str, ClientPolicy] = field(default_factory=dict)

    def of(self, client: ClientId) -> ClientPolicy:
        if client.user:
            own = self.by_name.get(str(client))
            if own is not None:
                return own
        return self.by_name.get(client.name, self.default)

    def client_of(self, name: str | None, fairness_id: str) -> ClientId:
        """Whom a request is counted to: who was recognised, and the user it asks for where it may name users; what the
        request says itself counts only where nobody is (`name` is None)."""
        if name is None:
            return ClientId(fairness_id)
        return ClientId(name, fairness_id if self.of(ClientId(name)).names_users else "")


def clamp(spec: RequestSpec, policy: ClientPolicy) -> tuple[RequestSpec, tuple[str, ...]]:
    """The request as its client may send it, and the fields of the wire protocol that were changed for that."""
    if policy is FREE:
        return spec, ()
    changes: dict[str, object] = {}
    told: list[str] = []
    priority = nearest_class(spec.priority_class, policy.classes)
    if priority is not spec.priority_class:
        changes["priority_class"] = priority
        told.append("priority_class")
    slo, clamped = _within(spec.slo, policy)
    if clamped:
        changes["slo"] = slo
        told += clamped
    if policy.sheddable is not None and policy.sheddable != spec.sheddable:
        changes["sheddable"] = policy.sheddable
        told.append("sheddable")
    longest_s, timeout_s = policy.max_queue_timeout_s, spec.queue_timeout_s
    if longest_s is not None and (timeout_s is None or timeout_s > longest_s):
        changes["queue_timeout_s"] = longest_s
        told.append("queue_timeout_ms")
    if spec.expected_output_tokens is not None and not policy.length_hints:
        changes["expected_output_tokens"] = None
        told.append("expected_output_tokens")
    return (replace(spec, **changes), tuple(told)) if changes else (spec, ())  # type: ignore[arg-type]


def nearest_class(claimed: PriorityClass, allowed: frozenset[PriorityClass]) -> PriorityClass:
    """The highest allowed one that is not above the claim; else the lowest."""
    if claimed in allowed or not allowed:
        return claimed
    below = [priority for priority in allowed if priority < claimed]
    return max(below) if below else min(allowed)


def _within(slo: Slo, policy: ClientPolicy) -> tuple[Slo, list[str]]:
    values: list[float | None] = []
    clamped: list[str] = []
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        value, least, most = (getattr(s, name) for s in (slo, policy.tightest_slo, policy.loosest_slo))
        if value is not None:
            held = value if least is None else max(value, least)
            held = held if most is None else min(held, most)
            if held != value:
                clamped.append(f"slo.{name.removesuffix('_s')}_ms")
            value = held
        values.append(value)
    return (Slo(*values) if clamped else slo), clamped
