"""What the gateway is told by the server's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lmdeploy_slo.core.slo import Slo


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """default_max_new_tokens: for requests without `max_new_tokens`, >= 1; cut to what the session has room for.
    default_queue_timeout_s: for requests without `queue_timeout_ms`, > 0; None: they wait without bound.
    task_slos: objectives of requests that name the task and have no `slo`.
    max_queued_requests: the scheduler's bound, to be told to clients; None: no bound.
    strangers_scale: callers of whom nothing is known may say how many engines there are.
    max_message_bytes: longest message taken, > 0. version, versions: to be told to clients.
    """

    default_max_new_tokens: int = 512
    default_queue_timeout_s: float | None = None
    task_slos: Mapping[str, Slo] = field(default_factory=dict)
    max_queued_requests: int | None = None
    strangers_scale: bool = True
    max_message_bytes: int = 16 * 1024 * 1024
    version: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.default_max_new_tokens < 1:
            raise ValueError(f"default_max_new_tokens must be at least 1, got {self.default_max_new_tokens}")
        if self.default_queue_timeout_s is not None and not self.default_queue_timeout_s > 0:
            raise ValueError(f"default_queue_timeout_s must be positive, got {self.default_queue_timeout_s}")
        if self.max_message_bytes < 1:
            raise ValueError(f"max_message_bytes must be at least 1, got {self.max_message_bytes}")
