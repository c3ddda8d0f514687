"""From a `GenerateRequest` to what the scheduler and the engine are given, or to everything that is wrong with it.

The limits are those stated beside the fields in the .proto file. All violations are collected before any is told.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from lmdeploy_slo.core.clients import ClientPolicy, clamp
from lmdeploy_slo.core.request import ANYONE, ClientId, PriorityClass, RequestSpec
from lmdeploy_slo.core.slo import Slo, seconds_of
from lmdeploy_slo.engine.base import ChatMessage, Engine, EngineRequest, Sampling, Stopping
from lmdeploy_slo.errors import FieldViolation, InvalidRequest, ModelNotFound
from lmdeploy_slo.gateway import metadata
from lmdeploy_slo.gateway.metadata import Aliases
from lmdeploy_slo.gateway.options import GatewayOptions
from lmdeploy_slo.v1 import inference_pb2 as pb

MAX_DURATION_MS = 86_400_000
MAX_ID_CHARS = 128
MAX_TASK_CHARS = 64
MAX_STOPS, MAX_STOP_CHARS, MAX_STOP_IDS = 16, 256, 64
MAX_LOGPROBS = 20
MAX_MESSAGES = 10_000
MAX_TOLD_IDS = 8
"""Of many token ids out of range so many are named."""

MAX_TOLD = 64
"""Of many violations so many are told: a message may hold millions of wrong things."""

MAX_UNKNOWN_BYTES = 4096

OFF_LOOP_CHARS = 20_000
"""Longer texts are tokenised in a thread, so that no stream waits for them."""

_REQUEST_ID = re.compile(r"[\x20-\x7e]{1,128}")
_PRIORITIES = {
    pb.PRIORITY_CLASS_UNSPECIFIED: PriorityClass.DEFAULT,
    pb.PRIORITY_CLASS_BULK: PriorityClass.BULK,
    pb.PRIORITY_CLASS_DEFAULT: PriorityClass.DEFAULT,
    pb.PRIORITY_CLASS_INTERACTIVE: PriorityClass.INTERACTIVE,
    pb.PRIORITY_CLASS_SYSTEM: PriorityClass.SYSTEM,
}

_SAMPLING_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("temperature", lambda v: 0 <= v <= 2, "must be from 0 to 2"),
    ("top_p", lambda v: 0 < v <= 1, "must be above 0, at most 1"),
    ("top_k", lambda v: v >= 0, "must be 0 or more"),
    ("min_p", lambda v: 0 <= v <= 1, "must be from 0 to 1"),
    ("repetition_penalty", lambda v: 0 < v <= 10, "must be above 0, at most 10"),
    ("seed", lambda v: True, ""),
    ("logprobs", lambda v: 1 <= v <= MAX_LOGPROBS, f"must be from 1 to {MAX_LOGPROBS}"),
)


_Argument = TypeVar("_Argument")


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that may be submitted. clamped: fields that its client's policy changed."""

    spec: RequestSpec
    engine_request: EngineRequest
    clamped: tuple[str, ...] = ()

    def of(self, client: ClientId, policy: ClientPolicy) -> Accepted:
        """The same as this client may send it."""
        spec, clamped = clamp(self.spec if client == ANYONE else replace(self.spec, client=client), policy)
        return Accepted(spec, self.engine_request, clamped)


async def accept(
    request: pb.GenerateRequest,
    aliases: Aliases,
    engine: Engine,
    options: GatewayOptions,
    *,
    arrival_at_s: float,
    prefix: str = "",
) -> Accepted:
    """Checks all of `request`; field paths in violations start with `prefix`.

    Raises InvalidRequest with every violation, ModelNotFound.
    """
    if request.model and request.model != engine.info.model:
        raise ModelNotFound(f"model {request.model!r} is not served here; the model is {engine.info.model!r}")
    check = _Check(prefix)
    if len(request.messages.messages) <= MAX_MESSAGES:  # more are refused, without a look into each
        check.unknown_fields(request)
    prompt = await _prompt_token_ids(request, engine, check)
    spec, engine_request = _read(request, aliases, prompt, engine, options, check, arrival_at_s)
    if prompt:
        told = request.WhichOneof("prompt") or "prompt"
        for path, reason in engine.unsupported_fields(engine_request):
            check.add(told if path == "prompt" else path, reason, unless_told=True)
    check.done()
    return Accepted(spec, engine_request)


def fairness_id_of(request: pb.GenerateRequest, aliases: Aliases) -> str:
    """The field, else its header; whether it is too long is told by `accept`."""
    return request.fairness_id or aliases.get(metadata.FAIRNESS_ID) or ""


def priority_class_of(request: pb.GenerateRequest) -> PriorityClass:
    """DEFAULT for one that does not exist, which `accept` tells."""
    return _PRIORITIES.get(request.priority_class, PriorityClass.DEFAULT)


def carries_objective(request: pb.GenerateRequest, aliases: Aliases, options: GatewayOptions) -> bool:
    """Whether it would be held to one, wrong or right."""
    if request.slo.ListFields() or any(aliases.get(h) for h in (metadata.TTFT_MS, metadata.TPOT_MS, metadata.E2E_MS)):
        return True
    return not request.HasField("slo") and request.task_type in options.task_slos


class _Check:
    """Collects violations."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._violations: list[FieldViolation] = []
        self._untold = 0

    @property
    def full(self) -> bool:
        """Whether more violations would only be counted."""
        return len(self._violations) >= MAX_TOLD

    def add(self, field: str, description: str, *, header: bool = False, unless_told: bool = False) -> None:
        path = field if header else self._prefix + field
        if self.full:
            self._untold += 1
        elif not (unless_told and any(v.field == path for v in self._violations)):
            self._violations.append(FieldViolation(path, description))

    def done(self) -> None:
        if self._untold:
            self._violations.append(FieldViolation("request", f"{self._untold} or more other violations"))
        if self._violations:
            raise InvalidRequest(self._violations)

    def that(self, holds: bool, field: str, description: str) -> None:
        if not holds:
            self.add(field, description)

    def length(self, value: str, field: str, most: int) -> None:
        if len(value) > most:
            self.add(field, f"at most {most} characters, got {len(value)}")

    def duration_s(self, value_ms: float, field: str, *, header: bool = False) -> float | None:
        """Seconds; None, with a violation, where the value is out of range."""
        if 0 < value_ms <= MAX_DURATION_MS:
            return seconds_of(value_ms)
        self.add(field, f"must be a number of milliseconds above 0, at most {MAX_DURATION_MS}", header=header)
        return None

    def token_ids(self, ids: Sequence[int], field: str, vocab_size: int | None) -> None:
        if vocab_size is None or not ids or max(ids) < vocab_size:
            return
        wrong = [i for i, token_id in enumerate(ids) if token_id >= vocab_size]
        for i in wrong[:MAX_TOLD_IDS]:
            self.add(f"{field}[{i}]", f"{ids[i]} is outside the vocabulary of {vocab_size} tokens")
        if len(wrong) > MAX_TOLD_IDS:
            self.add(field, f"{len(wrong)} token ids are outside the vocabulary of {vocab_size} tokens")

    def unknown_fields(self, request: Message) -> None:
        """A field that this server's protocol does not have would otherwise be ignored in silence."""
        known = type(request)()
        known.CopyFrom(request)
        known.DiscardUnknownFields()
        unknown_bytes = request.ByteSize() - known.ByteSize()
        if unknown_bytes > MAX_UNKNOWN_BYTES:  # to name each could take seconds
            self.add("request", f"{unknown_bytes} bytes in fields that are not known to this server")
        elif unknown_bytes:
            self._tell_unknown_fields(request, "")

    def _tell_unknown_fields(self, message: Message, path: str) -> None:
        unknown = UnknownFieldSet(message)
        for i in range(len(unknown)):
            text = f"field number {unknown[i].field_number} is not known to this server"
            self.add(path.rstrip(".") or "request", text)
        for field, value in message.ListFields():
            if field.message_type is None:
                continue
            if isinstance(value, Message):
                self._tell_unknown_fields(value, f"{path}{field.name}.")
            else:
                for i, inner in enumerate(value):
                    self._tell_unknown_fields(inner, f"{path}{field.name}[{i}].")


async def _prompt_token_ids(request: pb.GenerateRequest, engine: Engine, check: _Check) -> tuple[int, ...]:
    """Empty, with a violation, where there is no usable prompt."""
    kind = request.WhichOneof("prompt")
    tokenizer = engine.tokenizer
    if kind is None:
        check.add("prompt", "one of text, token_ids and messages must be set")
        return ()
    if kind == "token_ids":
        session_tokens = engine.info.max_session_tokens
        if session_tokens is not None and len(request.token_ids.ids) >= session_tokens:
            check.add(kind, _no_room(len(request.token_ids.ids), session_tokens))
            return ()
        ids = tuple(request.token_ids.ids)
        check.that(bool(ids), "token_ids.ids", "needs at least one token")
        check.token_ids(ids, "token_ids.ids", engine.info.vocab_size)
        return ids
    try:
        if kind == "text":
            if not request.text:
                check.add("text", "must not be empty")
                return ()
            tokens = await _off_loop_if(len(request.text) > OFF_LOOP_CHARS, tokenizer.encode, request.text)
        else:
            count = len(request.messages.messages)
            if not 1 <= count <= MAX_MESSAGES:
                check.add("messages.messages", f"must be 1 to {MAX_MESSAGES} messages, got {count}")
                return ()
            messages = [ChatMessage(m.role, m.content) for m in request.messages.messages]
            nameless = [i for i, m in enumerate(messages) if not m.role]
            for i in nameless:
                check.add(f"messages.messages[{i}].role", "must not be empty")
            if nameless:
                return ()
            chars = sum(len(m.content) for m in messages)
            tokens = await _off_loop_if(chars > OFF_LOOP_CHARS, tokenizer.encode_chat, messages)
    except InvalidRequest as refused:  # the chat template does not know a role, say
        for violation in refused.violations:
            check.add(violation.field, violation.description)
        return ()
    check.that(bool(tokens), kind, "has no tokens")
    return tuple(tokens)


async def _off_loop_if(long: bool, encode: Callable[[_Argument], list[int]], argument: _Argument) -> list[int]:
    return await asyncio.to_thread(encode, argument) if long else encode(argument)


def _read(
    request: pb.GenerateRequest,
    aliases: Aliases,
    prompt: tuple[int, ...],
    engine: Engine,
    options: GatewayOptions,
    check: _Check,
    arrival_at_s: float,
) -> tuple[RequestSpec, EngineRequest]:
    """Both are well-formed only where `check` has no violation."""
    request_id = _request_id(request, aliases, check)
    stopping = _stopping(request, len(prompt), engine, options, check)
    sampling = _sampling(request.sampling, check)
    check.length(request.task_type, "task_type", MAX_TASK_CHARS)
    fairness_id = fairness_id_of(request, aliases)
    if not request.fairness_id and len(fairness_id) > MAX_ID_CHARS:
        check.add(metadata.FAIRNESS_ID, f"at most {MAX_ID_CHARS} characters", header=True)
    check.length(request.fairness_id, "fairness_id", MAX_ID_CHARS)
    check.length(request.conversation_id, "conversation_id", MAX_ID_CHARS)
    hint = request.expected_output_tokens if request.HasField("expected_output_tokens") else None
    check.that(hint is None or hint >= 1, "expected_output_tokens", "must be 1 or more")
    priority_class = _PRIORITIES.get(request.priority_class)
    if priority_class is None:
        check.add("priority_class", f"{request.priority_class} is not a class")
    queue_timeout_s = options.default_queue_timeout_s
    if request.HasField("queue_timeout_ms"):
        queue_timeout_s = check.duration_s(request.queue_timeout_ms, "queue_timeout_ms")
    spec = RequestSpec(
        request_id=request_id,
        arrival_at_s=arrival_at_s,
        prompt_tokens=len(prompt),
        max_new_tokens=stopping.max_new_tokens,
        slo=_slo(request, aliases, options, check),
        expected_output_tokens=hint,
        task_type=request.task_type,
        model=engine.info.model,
        fairness_id=fairness_id,
        priority_class=PriorityClass.DEFAULT if priority_class is None else priority_class,
        sheddable=request.sheddable,
        queue_timeout_s=queue_timeout_s,
        conversation_id=request.conversation_id or _conversation_of(request),
    )
    engine_request = EngineRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        stopping=stopping,
        sampling=sampling,
        emulated_output_tokens=_emulated_output_tokens(request, engine, check),
    )
    return spec, engine_request


def _conversation_of(request: pb.GenerateRequest) -> str:
    """Of messages that name no conversation: all turns after the first begin with the same messages, up to the first
    answer; a digest of these, "" where there is none yet."""
    if request.WhichOneof("prompt") != "messages":
        return ""
    digest = hashlib.blake2b(digest_size=12)
    for message in request.messages.messages:
        digest.update(f"{message.role}\0{message.content}\0".encode("utf-8", "surrogatepass"))
        if message.role == "assistant":
            return f"messages:{digest.hexdigest()}"
    return ""


def _request_id(request: pb.GenerateRequest, aliases: Aliases, check: _Check) -> str:
    limit = "must be 1 to 128 printable ASCII characters"
    if request.HasField("request_id"):
        check.that(_REQUEST_ID.fullmatch(request.request_id) is not None, "request_id", limit)
        return request.request_id
    alias = aliases.get(metadata.REQUEST_ID)
    if alias is None:
        return os.urandom(16).hex()
    if _REQUEST_ID.fullmatch(alias) is None:
        check.add(metadata.REQUEST_ID, limit, header=True)
    return alias


def _slo(request: pb.GenerateRequest, aliases: Aliases, options: GatewayOptions, check: _Check) -> Slo:
    """The request's own; each objective it lacks from its header; with none of these, its task's default.

    A `slo` that is there but empty is a request without objectives.
    """
    values: dict[str, float | None] = {}
    for name, header in (("ttft", metadata.TTFT_MS), ("tpot", metadata.TPOT_MS), ("e2e", metadata.E2E_MS)):
        field = f"{name}_ms"
        if request.slo.HasField(field):
            values[f"{name}_s"] = check.duration_s(getattr(request.slo, field), f"slo.{field}")
            continue
        alias_ms = aliases.decimal(header)
        if alias_ms is not None:
            values[f"{name}_s"] = check.duration_s(alias_ms, header, header=True)
    if not values and not request.HasField("slo"):
        return options.task_slos.get(request.task_type, Slo())
    return Slo(**values)


def _sampling(message: pb.SamplingParams, check: _Check) -> Sampling:
    values = {}
    for name, holds, limit in _SAMPLING_RANGES if message.ListFields() else ():
        if message.HasField(name):
            values[name] = getattr(message, name)
            check.that(holds(values[name]), f"sampling.{name}", limit)
    check.that(not message.HasField("n") or message.n == 1, "sampling.n", "only 1 is served")
    return Sampling(**values)


def _stopping(
    request: pb.GenerateRequest, prompt_tokens: int, engine: Engine, options: GatewayOptions, check: _Check
) -> Stopping:
    message = request.stopping
    max_new_tokens = message.max_new_tokens if message.HasField("max_new_tokens") else None
    check.that(max_new_tokens is None or max_new_tokens >= 1, "stopping.max_new_tokens", "must be 1 or more")
    session_tokens = engine.info.max_session_tokens
    prompt_field = request.WhichOneof("prompt") or "prompt"
    if session_tokens is not None and prompt_tokens >= session_tokens:
        check.add(prompt_field, _no_room(prompt_tokens, session_tokens))
    elif session_tokens is not None and max_new_tokens and prompt_tokens + max_new_tokens > session_tokens:
        text = (
            f"a prompt of {prompt_tokens} tokens and max_new_tokens of {max_new_tokens} are more than the "
            f"{session_tokens} tokens a session may have"
        )
        check.add(prompt_field, text)
        check.add("stopping.max_new_tokens", text)
    if max_new_tokens is None:
        max_new_tokens = options.default_max_new_tokens
        if session_tokens is not None:
            max_new_tokens = max(1, min(max_new_tokens, session_tokens - prompt_tokens))
    min_new_tokens = message.min_new_tokens if message.HasField("min_new_tokens") else 0
    if min_new_tokens > max_new_tokens:
        text = f"{min_new_tokens} is above max_new_tokens, which is {max_new_tokens}"
        check.add("stopping.min_new_tokens", text)
    if len(message.stop) > MAX_STOPS:
        check.add("stopping.stop", f"at most {MAX_STOPS}, got {len(message.stop)}")
    stops = tuple(message.stop[:MAX_STOPS])
    for i, stop in enumerate(stops):
        check.that(1 <= len(stop) <= MAX_STOP_CHARS, f"stopping.stop[{i}]", f"must be 1 to {MAX_STOP_CHARS} characters")
    stop_ids = tuple(message.stop_token_ids[:MAX_STOP_IDS])
    if len(message.stop_token_ids) > MAX_STOP_IDS:
        check.add("stopping.stop_token_ids", f"at most {MAX_STOP_IDS}, got {len(message.stop_token_ids)}")
    check.token_ids(stop_ids, "stopping.stop_token_ids", engine.info.vocab_size)
    return Stopping(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        stop=stops,
        stop_token_ids=stop_ids,
        ignore_eos=message.ignore_eos,
        include_stop=message.include_stop,
        skip_special_tokens=message.skip_special_tokens if message.HasField("skip_special_tokens") else True,
    )


def _no_room(prompt_tokens: int, session_tokens: int) -> str:
    return f"{prompt_tokens} tokens leave no room for output: a session is at most {session_tokens} tokens"


def _emulated_output_tokens(request: pb.GenerateRequest, engine: Engine, check: _Check) -> int | None:
    if not request.HasField("emulation"):
        return None
    check.that(engine.info.synthetic, "emulation", f"the engine {engine.info.name!r} is not synthetic")
    if not request.emulation.HasField("output_tokens"):
        return None
    check.that(request.emulation.output_tokens >= 1, "emulation.output_tokens", "must be 1 or more")
    return request.emulation.output_tokens
