"""What the profiler talks to: something that takes prompts and tells when their tokens come.

Requests must go to the engine in the order they are sent, and at once: whatever holds them back or reorders them spoils
a measurement. Durations are those of the engine, without the way to it, as far as the target knows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lmdeploy_slo.core.snapshot import EngineLimits


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """What is measured. policy: of the gateway in front of the engine; None for an engine by itself.

    max_session_tokens: prompt plus output, None for no bound. versions: of what it runs on, by package. jitter_s: how
    far apart what happens at the same time may be seen.
    """

    engine: str
    model: str
    synthetic: bool
    limits: EngineLimits
    max_session_tokens: int | None
    vocab_size: int | None
    policy: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    jitter_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A request that ran to its end; seconds.

    ttft_s: from when it came in to its first token. prefill_s: the same from when the engine got it. decode_s: from its
    first token to its last.
    """

    output_tokens: int
    ttft_s: float
    prefill_s: float
    decode_s: float


class Call(Protocol):
    """A request on its way. Awaiting raises the SloError it failed with."""

    @property
    def sent_at_s(self) -> float:
        """When it was sent, on the profiler's clock."""
        ...

    @property
    def ended(self) -> bool:
        """Whether it runs no more, for whatever reason."""
        ...

    @property
    def generated(self) -> int | None:
        """Tokens that came so far; None where that is told at the end only."""
        ...

    async def first_token_at_s(self) -> float:
        """Waits for the first token, and tells when it came. Not of a call that is not watched."""
        ...

    async def answer(self) -> Answer:
        """Waits for the end."""
        ...

    def cancel(self) -> None:
        """Ends it, if it has not ended. Idempotent."""
        ...


class Target(Protocol):
    """See the module. All methods on one event loop."""

    @property
    def info(self) -> TargetInfo: ...

    def send(self, prompt: Sequence[int], output_tokens: int, *, watched: bool = True) -> Call:
        """Sends a prompt of token ids that generates exactly `output_tokens`, unless it is cancelled before.

        watched: whether somebody wants to know when its tokens come; if not, it costs less.
        """
        ...

    async def in_flight(self) -> tuple[int, int]:
        """(requests in the engine, requests that wait for it), of whomever they are."""
        ...
