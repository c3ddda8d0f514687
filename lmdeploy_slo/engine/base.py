"""The seam between the runtime and whatever generates tokens.

An engine is driven from one event loop. The runtime submits requests; the engine calls its sink with batches of
events. Between `submit` and the event that ends it, a request is "in flight"; it ends exactly once, with the event
whose `end` is set, or, after `abort`, with an event whose `end` is ABORT (sent before `abort` returns or on the
next turn of the loop). After that event the engine holds nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.errors import EngineError


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation; `role` is what the model's chat template takes (system, user, assistant ...)."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; None leaves the engine's default. temperature 0 is greedy."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Stopping:
    """When generation ends; `max_new_tokens` >= 1."""

    max_new_tokens: int
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False
    skip_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """What the engine needs to generate. `emulated_output_tokens` is read by the emulated engine alone.

    prepared: the request as the engine's own code has prepared it; then it alone says what is generated and how, and
    the fields beside it are what the scheduler is told. generated_tokens: of the prompt's ids, so many at the end are
    output of an engine that is gone: this one goes on where that one ended.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    stopping: Stopping
    sampling: Sampling = field(default_factory=Sampling)
    emulated_output_tokens: int | None = None
    prepared: Any = None
    generated_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one token id, with its text."""

    token_id: int
    logprob: float
    text: str = ""


@dataclass(slots=True)
class EngineEvent:
    """What became of one request in one step.

    token_ids and text are new since its last event (text may be empty while a character is incomplete).
    end: set on its last event. error: set instead of `end` where the engine failed it.
    logprobs: per new token, the candidates asked for, the chosen one first; None where none were asked for.
    cached_tokens: prompt tokens found in the prefix cache, on the first event where the engine knows it.
    queued_at_s, scheduled_at_s: when the engine took the request and when it began to work on it, on the clock of the
    sink, with its first tokens; None where the engine does not say.
    """

    request_id: str
    token_ids: Sequence[int] = ()
    text: str = ""
    end: FinishReason | None = None
    error: EngineError | None = None
    logprobs: Sequence[Sequence[TokenLogprob]] | None = None
    cached_tokens: int | None = None
    queued_at_s: float | None = None
    scheduled_at_s: float | None = None


EventSink: TypeAlias = Callable[[Sequence[EngineEvent], float], None]
"""Called on the engine's loop with the events of one step and the instant they became known (the engine's clock).
Must not block and must not raise."""


class Tokenizer(Protocol):
    """The engine's own tokenizer; pure and fast enough for the event loop."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Applies the model's chat template, generation prompt included."""
        ...


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is. synthetic: its tokens mean nothing. max_session_tokens: prompt + output, None: unbounded.

    look_ahead: how many requests beyond `limits.max_batch_size` are best submitted as well: they wait inside, ranked,
    and a slot that becomes free is taken without asking anyone.
    """

    name: str
    model: str
    synthetic: bool
    limits: EngineLimits
    max_session_tokens: int | None
    vocab_size: int | None
    details: Mapping[str, str] = field(default_factory=dict)
    look_ahead: int = 0


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine is doing now. gone: why it takes no more requests, None where it does. steps: a number that grows
    while it works, also on what shows no token yet; None where it counts none."""

    in_flight: int
    active: int
    kv_tokens_used: int | None
    kv_usage: float | None  # 0..1
    gone: str | None = None
    steps: int | None = None


class Engine(Protocol):
    """See the module. All methods are called on the loop that called `start`."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    async def start(self, sink: EventSink) -> None:
        """Ready to generate when it returns. Raises EngineUnavailable where that fails."""
        ...

    def submit(self, request: EngineRequest, rank: int) -> None:
        """Takes a request; never blocks. rank: the plan's, smaller first, any int.

        Raises EngineUnavailable after `close` or a crash, InvalidRequest for what it cannot do; then no event follows.
        """
        ...

    def rerank(self, ranks: Mapping[str, int]) -> None:
        """New ranks of requests that are submitted but not started; ids it does not know are ignored."""
        ...

    def abort(self, request_id: str) -> None:
        """Ends a request and frees what it held at once; an id it does not know is ignored."""
        ...

    def load(self) -> EngineLoad: ...

    async def close(self) -> None:
        """Stops; requests in flight end with EngineUnavailable. Idempotent."""
        ...

    def unsupported_fields(self, request: EngineRequest) -> Sequence[tuple[str, str]]:
        """(field path, reason) for everything in `request` this engine cannot honour; empty where it can."""
        ...
