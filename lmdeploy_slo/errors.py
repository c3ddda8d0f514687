"""The exceptions of the package.

    SloError
    +-- ConfigError            the operator's configuration is wrong
    |   +-- MissingExtra       an optional dependency is not installed
    +-- TraceError             a trace file cannot be read: names file, line and field
    +-- RequestError           one request ends with this; `reason` is its stable machine-readable name
        +-- InvalidRequest     the client's fault: names each field and the limit it broke
        +-- ModelNotFound      it names a model that is not served here
        +-- RequestNotFound    a question about a request that nothing is remembered of
        +-- RequestIdInUse     its id belongs to a request that has not ended
        +-- Unauthenticated    the caller did not show who it is
        +-- PermissionDenied   the caller is known, and may not do this
        +-- Rejected           not accepted; may be tried again after `retry_after_s`
        |   +-- QueueFull          too much waits, of all clients together
        |   +-- ClientQueueFull    too much of this client waits
        |   +-- TooManyStreams     too many requests are open
        |   +-- RateLimited        the client has used up its tokens for now
        |   +-- Overloaded         the oldest waiting request waits for too long
        |   +-- Unattainable       its SLO cannot be met and it allowed shedding
        +-- QueueTimeout       waited longer than its `queue_timeout_s`
        +-- DeadlineExceeded   the caller's hard deadline passed
        +-- Cancelled          the client went away or asked for an abort
        +-- Draining           the server is shutting down
        +-- EngineError        the engine failed this request
            +-- EngineUnavailable   the engine is gone; nothing of it is to blame on the request

Expected errors (everything under RequestError) are told to the client and logged at INFO at most; anything else is
a defect, logged with its traceback and told to the client as `internal` without its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


class SloError(Exception):
    """Base of every exception this package raises on purpose."""


class ConfigError(SloError):
    """The configuration cannot be used; the text names the key, the value and what is allowed."""


class MissingExtra(ConfigError):
    """A command needs an optional dependency: the text names the extra to install."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional dependency: pip install 'lmdeploy-slo[{extra}]'")
        self.extra = extra


class TraceError(SloError):
    """A trace file cannot be read; the text names the file, the line and the field."""


class RequestError(SloError):
    """One request ends with this."""

    reason: ClassVar[str] = "INTERNAL"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field: its path in the request message and what is allowed there."""

    field: str
    description: str


class InvalidRequest(RequestError):
    """The request is malformed or asks for what the server cannot do."""

    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in self.violations))


class ModelNotFound(RequestError):
    """The request names a model that is not served here."""

    reason = "MODEL_NOT_FOUND"


class RequestNotFound(RequestError):
    """A question about a request of which nothing is remembered, or which is not the caller's."""

    reason = "REQUEST_NOT_FOUND"


class RequestIdInUse(RequestError):
    """The request's id belongs to a request that has not ended."""

    reason = "REQUEST_ID_IN_USE"


class Unauthenticated(RequestError):
    """The call carries no valid token where one is needed. The text never says what was wrong with it."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(RequestError):
    """The caller is known, and its policy does not let it do this."""

    reason = "PERMISSION_DENIED"


class Rejected(RequestError):
    """Not accepted; nothing was done. `retry_after_s` is a hint, None where trying again is pointless."""

    reason = "REJECTED"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Rejected):
    """The waiting queue is at its bound, in requests or in tokens."""

    reason = "QUEUE_FULL"


class ClientQueueFull(Rejected):
    """The client's share of the waiting queue is at its bound."""

    reason = "CLIENT_QUEUE_FULL"


class TooManyStreams(Rejected):
    """As many requests as are allowed are open, of this client or of all."""

    reason = "TOO_MANY_STREAMS"


class RateLimited(Rejected):
    """The client has used more tokens than its rate allows; `retry_after_s` is exact."""

    reason = "RATE_LIMITED"


class Overloaded(Rejected):
    """The oldest waiting request waits longer than the server allows; new ones would only wait behind it."""

    reason = "OVERLOADED"


class Unattainable(Rejected):
    """A sheddable request whose SLO cannot be met any more."""

    reason = "SLO_UNATTAINABLE"


class QueueTimeout(RequestError):
    """The request was not dispatched within its queue timeout."""

    reason = "QUEUE_TIMEOUT"


class DeadlineExceeded(RequestError):
    """The caller's deadline passed before the request ended."""

    reason = "DEADLINE_EXCEEDED"


class Cancelled(RequestError):
    """The client cancelled, disconnected or aborted the request."""

    reason = "CANCELLED"


class Draining(RequestError):
    """The server takes no new requests because it is shutting down."""

    reason = "DRAINING"


class EngineError(RequestError):
    """The engine failed this request. `code` is the engine's own name for it, safe to show to clients."""

    reason = "ENGINE_ERROR"

    def __init__(self, message: str, code: str = "internal_error") -> None:
        super().__init__(message)
        self.code = code


class EngineUnavailable(EngineError):
    """The engine stopped; the request may be sent again elsewhere."""

    reason = "ENGINE_UNAVAILABLE"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="engine_unavailable")
