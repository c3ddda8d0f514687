"""What a request promises and says of itself, beside LMDeploy's own fields; pure, and carried by a context variable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from lmdeploy_slo.core.slo import NO_SLO, Slo, seconds_of
from lmdeploy_slo.errors import FieldViolation, InvalidRequest

MAX_DURATION_MS = 86_400_000.0

HEADERS = {
    "x-llm-d-slo-ttft-ms": "ttft_ms",
    "x-llm-d-slo-tpot-ms": "tpot_ms",
    "x-slo-e2e-ms": "e2e_ms",
}
"""HTTP header -> objective."""

TASK_HEADER = "x-task-type"
FAIRNESS_HEADER = "x-llm-d-inference-fairness-id"
CONVERSATION_HEADER = "x-conversation-id"

_OBJECTIVES = ("ttft_ms", "tpot_ms", "e2e_ms")


@dataclass(frozen=True, slots=True)
class Terms:
    """slo: its objectives, NO_SLO for none. task_type: kind of work, up to 64 characters. expected_output_tokens: a
    guess, >= 1. fairness_id: whom it is counted to, conversation_id: what it is a turn of, up to 128 characters
    each."""

    slo: Slo = NO_SLO
    task_type: str = ""
    expected_output_tokens: float | None = None
    fairness_id: str = ""
    conversation_id: str = ""


NO_TERMS = Terms()

current_terms: ContextVar[Terms] = ContextVar("current_terms", default=NO_TERMS)
"""Those of the HTTP request that is being answered in this context."""


def slo_of(value: Slo | Mapping[str, Any] | None, field: str = "slo") -> Slo:
    """An Slo, or one of its objectives in milliseconds by name; raises InvalidRequest for anything else."""
    if value is None:
        return NO_SLO
    if isinstance(value, Slo):
        return value
    if not isinstance(value, Mapping):
        raise _invalid(field, f"must be an Slo or objectives by name ({', '.join(_OBJECTIVES)})")
    wrong = [_violation(f"{field}.{name}", "is no objective") for name in value if name not in _OBJECTIVES]
    seconds: list[float | None] = []
    for name in _OBJECTIVES:
        objective = value.get(name)
        if objective is None:
            seconds.append(None)
        elif _is_duration_ms(objective):
            seconds.append(seconds_of(objective))
        else:
            wrong.append(_violation(f"{field}.{name}", "must be above 0 and at most a day, in milliseconds"))
    if wrong:
        raise InvalidRequest(wrong)
    return Slo(*seconds)


def terms_of_http(headers: Mapping[str, str], body: Mapping[str, Any]) -> Terms:
    """From the headers and the body's `slo`, `task_type`, `expected_output_tokens`, `fairness_id`, `conversation_id`.

    What the body says wins, objective by objective. Raises InvalidRequest, with every wrong field.
    """
    wrong: list[FieldViolation] = []
    objectives: dict[str, Any] = {}
    for header, name in HEADERS.items():
        if header in headers:
            try:
                objectives[name] = float(headers[header])
            except ValueError:
                wrong.append(_violation(header, "must be a number of milliseconds"))
    given = body.get("slo")
    if isinstance(given, Mapping):
        objectives |= given
    elif given is not None:
        wrong.append(_violation("slo", f"must be an object with any of {', '.join(_OBJECTIVES)}"))
    slo = NO_SLO
    try:
        slo = slo_of(objectives)
    except InvalidRequest as error:
        wrong.extend(error.violations)
    texts: dict[str, str] = {}
    for name, header, longest in (
        ("task_type", TASK_HEADER, 64),
        ("fairness_id", FAIRNESS_HEADER, 128),
        ("conversation_id", CONVERSATION_HEADER, 128),
    ):
        text = body.get(name, headers.get(header, ""))
        if isinstance(text, str) and len(text) <= longest:
            texts[name] = text
        else:
            wrong.append(_violation(name, f"must be a text of at most {longest} characters"))
    hint = body.get("expected_output_tokens")
    if hint is not None and (isinstance(hint, bool) or not isinstance(hint, int) or hint < 1):
        wrong.append(_violation("expected_output_tokens", "must be a whole number of at least 1"))
    if wrong:
        raise InvalidRequest(wrong)
    return Terms(slo, texts["task_type"], hint, texts["fairness_id"], texts["conversation_id"])


def _is_duration_ms(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and 0 < value <= MAX_DURATION_MS


def _violation(field: str, description: str) -> FieldViolation:
    return FieldViolation(field, description)


def _invalid(field: str, description: str) -> InvalidRequest:
    return InvalidRequest([_violation(field, description)])
