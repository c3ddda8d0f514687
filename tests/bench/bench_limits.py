"""What the door costs a request: limits, a token, a client's policy.

    python tests/bench/bench_limits.py

Prints microseconds of one thread, the median of 7 rounds each.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

from lmdeploy_slo.core.clients import FREE, ClientPolicies, ClientPolicy, clamp
from lmdeploy_slo.core.request import ClientId, PriorityClass
from lmdeploy_slo.errors import TooManyStreams
from lmdeploy_slo.gateway.tokens import Tokens, new_token
from lmdeploy_slo.scheduling.limits import Limiter, Limits
from lmdeploy_slo.testing.builders import make_spec

ROUNDS, TIMES = 7, 20_000
ALICE = ClientId("alice")
MANY = 10**9


def median_us(what: Callable[[], object]) -> float:
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(TIMES):
            what()
        rounds.append((time.perf_counter() - began) / TIMES * 1e6)
    return statistics.median(rounds)


def passing(limiter: Limiter) -> Callable[[], None]:
    """A request that comes in, waits, runs and ends."""
    instants = itertools.count()

    def passes() -> None:
        now_s = next(instants) * 1e-3
        ticket = limiter.enter(ALICE, now_s)
        ticket.queue(100, now_s)
        ticket.start(now_s)
        ticket.leave(90, now_s)

    return passes


def refused() -> Callable[[], None]:
    policies = ClientPolicies(ClientPolicy(max_streams=1))
    limiter = Limiter(None, lambda: policies)
    limiter.enter(ALICE, 0.0)

    def enters() -> None:
        try:
            limiter.enter(ALICE, 1.0)
        except TooManyStreams:
            return
        raise AssertionError

    return enters


def main() -> None:
    policy = ClientPolicy(
        max_streams=MANY, max_queued_requests=MANY, max_queued_tokens=MANY, tokens_per_s=float(MANY), sheddable=True
    )
    policies = ClientPolicies(policy)
    every = Limiter(Limits(MANY, MANY, MANY, 60.0, 4.0), lambda: policies)
    token, line = new_token("alice")
    _, token_id, digest = line.split()
    tokens = Tokens({token_id: ("alice", bytes.fromhex(digest.removeprefix("sha256:")))})
    spec, bulk = make_spec(), ClientPolicy(classes=frozenset({PriorityClass.BULK}))
    for what, act in (
        ("a request through no limits", passing(Limiter())),
        ("a request through every limit", passing(every)),
        ("a refusal", refused()),
        ("a token checked", lambda: tokens.client_of(token)),
        ("claims without a policy", lambda: clamp(spec, FREE)),
        ("claims clamped", lambda: clamp(spec, bulk)),
    ):
        print(f"{what:<32} {median_us(act):6.1f} us")


if __name__ == "__main__":
    main()
