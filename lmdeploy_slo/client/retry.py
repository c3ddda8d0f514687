"""When a failed call is sent again, and how long to wait before it.

Sent again are only calls that gave nothing back yet, and only after RESOURCE_EXHAUSTED with a RetryInfo (the server
did nothing and says when to come back) or UNAVAILABLE. A connection lost halfway may have left a request running, so
such a call is repeated only where the caller says that this is harmless.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lmdeploy_slo.client.errors import ServerUnreachable
from lmdeploy_slo.clock import Clock
from lmdeploy_slo.errors import Draining, EngineUnavailable, Rejected, SloError

LONGEST_TIMEOUT_S = 31_536_000.0
"""A year. gRPC keeps deadlines as 64-bit nanoseconds: what is far beyond would have passed at once."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how patiently a call is repeated.

    max_attempts: >= 1, the first one included; 1 turns repeating off.
    first_wait_s: > 0, after the first failure; doubles with each further one. A RetryInfo replaces it.
    longest_wait_s: > 0, the cap of the doubling; a server that asks for longer is not waited for.
    jitter: >= 0; each wait is stretched by a random share of up to this much, never shortened.
    Raises ValueError for anything else.
    """

    max_attempts: int = 4
    first_wait_s: float = 0.1
    longest_wait_s: float = 10.0
    jitter: float = 0.25

    def __post_init__(self) -> None:
        if self.max_attempts < 1 or self.first_wait_s <= 0 or self.longest_wait_s <= 0 or self.jitter < 0:
            raise ValueError(f"a retry policy out of range: {self}")


NO_RETRY = RetryPolicy(max_attempts=1)


class Attempts:
    """The tries of one call, within one time limit for all of them.

    timeout_s: for the whole call, waits included; None for no limit.
    resend_safe: whether a request that may still run somewhere may be sent once more.
    Raises ValueError for a time limit that is not above 0 and at most LONGEST_TIMEOUT_S.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        clock: Clock,
        random: Callable[[], float],
        timeout_s: float | None,
        resend_safe: bool,
    ) -> None:
        if timeout_s is not None and not 0 < timeout_s <= LONGEST_TIMEOUT_S:
            limit = f"must be a positive number of seconds, at most {LONGEST_TIMEOUT_S:.0f}"
            raise ValueError(f"timeout_s {limit}, got {timeout_s}")
        self._policy = policy
        self._clock = clock
        self._random = random
        self._ends_at_s = None if timeout_s is None else clock.now_s() + timeout_s
        self._resend_safe = resend_safe
        self._failed = 0

    def remaining_s(self) -> float | None:
        """What is left of the time limit, >= 0; None where there is none."""
        return None if self._ends_at_s is None else max(0.0, self._ends_at_s - self._clock.now_s())

    def wait_after_s(self, error: SloError) -> float | None:
        """How long to wait before the next try; None where `error` is final."""
        self._failed += 1
        if self._failed >= self._policy.max_attempts or not self._may_repeat(error):
            return None
        asked_s = error.retry_after_s if isinstance(error, Rejected) else None
        if asked_s is None:
            wait_s = min(self._policy.first_wait_s * 2.0 ** min(self._failed - 1, 60), self._policy.longest_wait_s)
        elif asked_s <= self._policy.longest_wait_s:
            wait_s = asked_s
        else:
            return None
        wait_s *= 1.0 + self._policy.jitter * self._random()
        remaining_s = self.remaining_s()
        return wait_s if remaining_s is None or wait_s < remaining_s else None

    def _may_repeat(self, error: SloError) -> bool:
        if isinstance(error, Rejected):
            return error.retry_after_s is not None
        if isinstance(error, ServerUnreachable):
            return error.not_sent or self._resend_safe
        return isinstance(error, Draining | EngineUnavailable)
