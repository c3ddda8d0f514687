"""What the scheduler knows of a request.

There is no field for the true output length here, and no prompt text: a policy can only use what would be known
in production when the request arrives.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum

from lmdeploy_slo.core.slo import NO_SLO, Slo


class PriorityClass(IntEnum):
    """Tiers above the SLO: fixed rules serve a higher class first, `annealing` counts one met of it as ten of the class
    below."""

    BULK = 0
    DEFAULT = 1
    INTERACTIVE = 2
    SYSTEM = 3


class EndStatus(str, Enum):
    """How a request ended; every request ends exactly once with one of these."""

    FINISHED = "finished"
    REJECTED = "rejected"
    TIMED_OUT = "timed_out"
    FAILED = "failed"
    CANCELLED = "cancelled"


class FinishReason(str, Enum):
    """Why the engine stopped generating."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class ClientId:
    """A client, as it is counted.

    name: its token's or certificate's, or its own claim where nothing is checked; empty: nobody in particular.
    user: whom it asks for, where its policy lets it name users; each is a client of its own.
    """

    name: str = ""
    user: str = ""

    def __str__(self) -> str:
        return f"{self.name}/{self.user}" if self.user else self.name


ANYONE = ClientId()
"""Who did not say."""


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One request as the scheduler sees it on arrival.

    arrival_at_s: the instant the request was due, on the server's clock.
    prompt_tokens: >= 1. max_new_tokens: >= 1, the hard cap of the output.
    expected_output_tokens: the client's hint, >= 1, None where it gave none.
    queue_timeout_s: longest wait before dispatch, None for no bound.
    priority: LMDeploy's, 0..255, 0 first: goes before whatever the policy decides. 0 for all but LMDeploy's own doors.
    client: who sent it. conversation_id: the client's name for the conversation of which it is a turn; "" for none.
    """

    request_id: str
    arrival_at_s: float
    prompt_tokens: int
    max_new_tokens: int
    slo: Slo = NO_SLO
    expected_output_tokens: float | None = None
    task_type: str = ""
    model: str = ""
    fairness_id: str = ""
    priority_class: PriorityClass = PriorityClass.DEFAULT
    sheddable: bool = False
    queue_timeout_s: float | None = None
    priority: int = 0
    client: ClientId = ANYONE
    conversation_id: str = ""
