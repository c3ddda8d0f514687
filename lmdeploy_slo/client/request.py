"""From a prompt and keyword arguments to the wire's request.

The server judges values; only what cannot be put into the message at all is refused here, in the server's own terms.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from lmdeploy_slo.core.request import PriorityClass
from lmdeploy_slo.errors import FieldViolation, InvalidRequest
from lmdeploy_slo.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.message import Message


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation; `role` is what the model's chat template takes (system, user, assistant ...)."""

    role: str
    content: str


Prompt: TypeAlias = "str | Sequence[int] | Sequence[ChatMessage | Mapping[str, str]]"
"""Text, token ids of the model's vocabulary, or a conversation (dicts have the keys role and content)."""


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of a request; None is the same as leaving it out.

    Every one is a field of `GenerateRequest`; see docs/protocol.md for ranges and for what unset means.
    """

    # What this request promises its user, from its arrival at the server.
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float | None
    # What the scheduler should know of it.
    task_type: str | None
    expected_output_tokens: int | None
    queue_timeout_ms: float | None
    fairness_id: str | None
    priority_class: PriorityClass | None
    sheddable: bool | None
    conversation_id: str | None
    # What to generate.
    request_id: str | None
    model: str | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    include_stop: bool | None
    skip_special_tokens: bool | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    logprobs: int | None
    # For benchmarks against a synthetic engine: how many tokens it generates.
    emulated_output_tokens: int | None


OPTION_PATHS: Mapping[str, str] = {
    **{name: f"slo.{name}" for name in ("ttft_ms", "tpot_ms", "e2e_ms")},
    **{
        name: name
        for name in (
            "request_id",
            "model",
            "task_type",
            "expected_output_tokens",
            "queue_timeout_ms",
            "fairness_id",
            "priority_class",
            "sheddable",
            "conversation_id",
        )
    },
    **{
        name: f"stopping.{name}"
        for name in (
            "max_new_tokens",
            "min_new_tokens",
            "stop",
            "stop_token_ids",
            "ignore_eos",
            "include_stop",
            "skip_special_tokens",
        )
    },
    **{
        name: f"sampling.{name}"
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logprobs")
    },
    "emulated_output_tokens": "emulation.output_tokens",
}
"""Where each option goes in `GenerateRequest`."""


def build_request(prompt: Prompt, options: Mapping[str, Any]) -> pb.GenerateRequest:
    """The wire's request. Raises TypeError for an option that does not exist, InvalidRequest for a value that its
    field cannot hold (a negative count, a wrong type)."""
    request = pb.GenerateRequest()
    violations = _set_prompt(request, prompt)
    for name, value in options.items():
        if name not in OPTION_PATHS:
            raise TypeError(f"a request has no option {name!r}")
        if value is not None:
            violations += _set(request, OPTION_PATHS[name], value)
    if violations:
        raise InvalidRequest(violations)
    return request


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> list[FieldViolation]:
    if isinstance(prompt, str):
        return _set(request, "text", prompt)
    if len(prompt) == 0 or not isinstance(prompt[0], ChatMessage | Mapping):
        request.token_ids.SetInParent()  # an empty list is the server's to refuse
        return _set(request, "token_ids.ids", prompt)
    violations = []
    for index, turn in enumerate(prompt):
        fields = {"role": turn.role, "content": turn.content} if isinstance(turn, ChatMessage) else turn
        if isinstance(fields, Mapping) and set(fields) == {"role", "content"}:
            message = request.messages.messages.add()
            violations += _set(message, "role", fields["role"], f"messages.messages[{index}].role")
            violations += _set(message, "content", fields["content"], f"messages.messages[{index}].content")
        else:
            violations.append(FieldViolation(f"messages.messages[{index}]", "takes a role and a content, nothing else"))
    return violations


def _set(message: Message, path: str, value: Any, shown_path: str | None = None) -> list[FieldViolation]:
    *parents, leaf = path.split(".")
    target: Any = message
    for parent in parents:
        target = getattr(target, parent)
    if isinstance(value, PriorityClass):
        value = pb.PriorityClass.Value(f"PRIORITY_CLASS_{value.name}")
    try:
        if hasattr(getattr(target, leaf), "extend"):
            getattr(target, leaf).extend([value] if isinstance(value, str) else value)
        else:
            setattr(target, leaf, value)
    except (TypeError, ValueError) as error:
        return [FieldViolation(shown_path or path, f"cannot hold {reprlib.repr(value)} ({error})")]
    return []
