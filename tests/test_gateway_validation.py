"""Every limit stated in the protocol is checked, all that is wrong is told at once, and what is right arrives."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import pytest
from google.protobuf import text_format
from scripted_engine import ScriptedEngine

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.request import PriorityClass
from lmdeploy_slo.core.slo import SHORTEST_S, Slo
from lmdeploy_slo.engine.base import ChatMessage, Sampling, Stopping
from lmdeploy_slo.errors import FieldViolation, InvalidRequest, ModelNotFound
from lmdeploy_slo.gateway import validation
from lmdeploy_slo.gateway.metadata import read_aliases
from lmdeploy_slo.gateway.options import GatewayOptions
from lmdeploy_slo.gateway.validation import Accepted, accept
from lmdeploy_slo.testing.builders import make_slo
from lmdeploy_slo.v1 import inference_pb2 as pb

VOCAB = 1000
SESSION = 100
TASK_SLO = make_slo(ttft_ms=1000)
OPTIONS = GatewayOptions(default_max_new_tokens=20, task_slos={"chat": TASK_SLO})


def check(
    text: str | bytes | pb.GenerateRequest,
    headers: Mapping[str, str] | None = None,
    *,
    prompt: str = "token_ids { ids: [1, 2, 3] }",
    options: GatewayOptions = OPTIONS,
    engine: ScriptedEngine | None = None,
    prefix: str = "",
    **info: Any,
) -> Accepted:
    """`text` is the request in text format, beside a prompt of three tokens."""
    if isinstance(text, str):
        request = text_format.Parse(f"{prompt} {text}", pb.GenerateRequest())
    else:
        request = pb.GenerateRequest.FromString(text) if isinstance(text, bytes) else text
    engine = engine or ScriptedEngine(VirtualClock(), **({"vocab_size": VOCAB, "max_session_tokens": SESSION} | info))
    aliases = read_aliases(tuple((headers or {}).items()))
    return asyncio.run(accept(request, aliases, engine, options, arrival_at_s=7.0, prefix=prefix))


def violations(*args: Any, **kwargs: Any) -> list[FieldViolation]:
    with pytest.raises(InvalidRequest) as refusal:
        check(*args, **kwargs)
    return list(refusal.value.violations)


def fields(*args: Any, **kwargs: Any) -> list[str]:
    return [violation.field for violation in violations(*args, **kwargs)]


# -- what is right ------------------------------------------------------------


def test_a_bare_request_gets_the_defaults() -> None:
    accepted = check("")
    spec, request = accepted.spec, accepted.engine_request
    assert spec.request_id == request.request_id
    assert len(spec.request_id) == 32
    assert spec.arrival_at_s == 7.0
    assert (spec.prompt_tokens, spec.max_new_tokens) == (3, 20)
    assert spec.slo == Slo()
    assert (spec.expected_output_tokens, spec.queue_timeout_s) == (None, None)
    assert (spec.task_type, spec.fairness_id, spec.sheddable, spec.conversation_id) == ("", "", False, "")
    assert spec.priority_class is PriorityClass.DEFAULT
    assert spec.model == "scripted-model"
    assert list(request.prompt_token_ids) == [1, 2, 3]
    assert request.sampling == Sampling()
    assert request.stopping == Stopping(max_new_tokens=20)
    assert request.emulated_output_tokens is None
    assert check("").spec.request_id != spec.request_id


def test_every_field_arrives() -> None:
    accepted = check(
        """
        request_id: "mine" model: "scripted-model" task_type: "code" fairness_id: "team" sheddable: true
        conversation_id: "c-1"
        expected_output_tokens: 7 queue_timeout_ms: 1500 priority_class: PRIORITY_CLASS_INTERACTIVE
        slo { ttft_ms: 100 tpot_ms: 20 e2e_ms: 3000 }
        sampling {
          temperature: 0.5 top_p: 0.25 top_k: 40 min_p: 0.125 repetition_penalty: 1.5 seed: 99 logprobs: 3 n: 1
        }
        stopping {
          max_new_tokens: 50 min_new_tokens: 5 stop: ["x", "END"] stop_token_ids: [7, 8]
          ignore_eos: true include_stop: true skip_special_tokens: false
        }
        emulation { output_tokens: 11 }
        """
    )
    spec, request = accepted.spec, accepted.engine_request
    assert spec.request_id == "mine"
    assert (spec.task_type, spec.fairness_id, spec.sheddable, spec.conversation_id) == ("code", "team", True, "c-1")
    assert (spec.expected_output_tokens, spec.queue_timeout_s) == (7, 1.5)
    assert spec.priority_class is PriorityClass.INTERACTIVE
    assert spec.slo == make_slo(ttft_ms=100, tpot_ms=20, e2e_ms=3000)
    assert spec.max_new_tokens == 50
    assert request.sampling == Sampling(0.5, 0.25, 40, 0.125, 1.5, 99, 3)
    assert request.stopping == Stopping(50, 5, ("x", "END"), (7, 8), True, True, False)
    assert request.emulated_output_tokens == 11


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        ("UNSPECIFIED", PriorityClass.DEFAULT),
        ("BULK", PriorityClass.BULK),
        ("DEFAULT", PriorityClass.DEFAULT),
        ("INTERACTIVE", PriorityClass.INTERACTIVE),
        ("SYSTEM", PriorityClass.SYSTEM),
    ],
)
def test_priority_classes(wire: str, expected: PriorityClass) -> None:
    assert check(f"priority_class: PRIORITY_CLASS_{wire}").spec.priority_class is expected


def test_values_on_the_edges_are_taken() -> None:
    stop = " ".join(f'stop: "{i:0256}"' for i in range(16))
    ids = ", ".join(["999"] * 64)
    accepted = check(
        f"""
        request_id: "{"~" * 128}" task_type: "{"t" * 64}" fairness_id: "{"f" * 128}"
        queue_timeout_ms: 86400000 slo {{ e2e_ms: 86400000 ttft_ms: 1e-9 }} expected_output_tokens: 1
        sampling {{ temperature: 2 top_p: 1 top_k: 0 min_p: 1 repetition_penalty: 10 logprobs: 20 seed: 0 }}
        stopping {{ max_new_tokens: {SESSION - 3} min_new_tokens: {SESSION - 3} {stop} stop_token_ids: [{ids}] }}
        emulation {{ output_tokens: 1 }}
        """
    )
    assert accepted.spec.queue_timeout_s == 86400.0
    check('request_id: " " sampling { temperature: 0 min_p: 0 logprobs: 1 } stopping { max_new_tokens: 1 stop: "x" }')


# -- prompts ------------------------------------------------------------------


class WatchedTokenizer:
    """One token a character, so that prompts have a length one can see; keeps in which thread it worked."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def encode(self, text: str) -> list[int]:
        self.threads.append(threading.current_thread())
        return [ord(c) % VOCAB for c in text]

    def encode_chat(self, messages: list[ChatMessage]) -> list[int]:
        if any(m.role == "tool" for m in messages):
            raise InvalidRequest([FieldViolation("messages", "the template knows no role 'tool'")])
        return self.encode("".join(f"{m.role}:{m.content};" for m in messages))


def watched_engine(**info: Any) -> tuple[ScriptedEngine, WatchedTokenizer]:
    engine = ScriptedEngine(VirtualClock(), **({"vocab_size": VOCAB} | info))
    engine.tokenizer = tokenizer = WatchedTokenizer()  # type: ignore[assignment]
    return engine, tokenizer


def test_text_is_tokenised_once() -> None:
    engine, tokenizer = watched_engine()
    accepted = check("", prompt='text: "abc"', engine=engine)
    assert list(accepted.engine_request.prompt_token_ids) == [97, 98, 99]
    assert len(tokenizer.threads) == 1


def test_messages_are_rendered_by_the_template() -> None:
    engine, _ = watched_engine()
    accepted = check(
        "",
        prompt='messages { messages { role: "user" content: "hi" } messages { role: "x" } }',
        engine=engine,
    )
    assert accepted.spec.prompt_tokens == len("user:hi;x:;")


def test_long_texts_are_tokenised_beside_the_loop() -> None:
    engine, tokenizer = watched_engine()
    check(pb.GenerateRequest(text="x" * validation.OFF_LOOP_CHARS), engine=engine)
    check(pb.GenerateRequest(text="x" * (validation.OFF_LOOP_CHARS + 1)), engine=engine)
    assert [thread is threading.main_thread() for thread in tokenizer.threads] == [True, False]


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ("", "prompt"),
        ('text: ""', "text"),
        ("token_ids {}", "token_ids.ids"),
        ("messages {}", "messages.messages"),
        ('messages { messages { role: "user" } messages { content: "x" } }', "messages.messages[1].role"),
        ('messages { messages { role: "tool" content: "x" } }', "messages"),
        ("token_ids { ids: [1, 1000, 2, 4294967295] }", "token_ids.ids[1]"),
    ],
)
def test_prompts_that_are_none(prompt: str, field: str) -> None:
    engine, _ = watched_engine()
    assert fields("", prompt=prompt, engine=engine)[0] == field


def test_every_token_outside_the_vocabulary_is_told_up_to_a_point() -> None:
    told = violations("", prompt="token_ids { ids: [1000, 5, 1001] }")
    assert [v.field for v in told] == ["token_ids.ids[0]", "token_ids.ids[2]"]
    assert "1000 is outside the vocabulary of 1000 tokens" in told[0].description
    many = violations("", prompt=f"token_ids {{ ids: [{', '.join(['5000'] * 50)}] }}")
    assert len(many) == validation.MAX_TOLD_IDS + 1
    assert "50 token ids" in many[-1].description


def test_without_a_known_vocabulary_any_token_is_taken() -> None:
    assert check("", prompt="token_ids { ids: [4294967295] }", vocab_size=None).spec.prompt_tokens == 1


# -- the session --------------------------------------------------------------


def test_prompt_and_output_beyond_the_session_name_both() -> None:
    told = violations("stopping { max_new_tokens: 98 }")
    assert [v.field for v in told] == ["token_ids", "stopping.max_new_tokens"]
    assert told[0].description == told[1].description
    assert all(figure in told[0].description for figure in ("3", "98", "100"))


def test_a_prompt_without_room_for_output_is_refused() -> None:
    engine, _ = watched_engine(max_session_tokens=SESSION)
    assert fields(pb.GenerateRequest(text="x" * SESSION), engine=engine) == ["text"]
    assert check(pb.GenerateRequest(text="x" * (SESSION - 1)), engine=engine).spec.max_new_tokens == 1


def test_the_default_output_is_cut_to_the_room_there_is() -> None:
    assert check("", max_session_tokens=10).spec.max_new_tokens == 7
    assert check("", max_session_tokens=None).spec.max_new_tokens == 20


# -- every field --------------------------------------------------------------

WRONG = [
    ('request_id: ""', "request_id"),
    (f'request_id: "{"x" * 129}"', "request_id"),
    (r'request_id: "tab\t"', "request_id"),
    ('request_id: "\u00e4"', "request_id"),
    (f'task_type: "{"x" * 65}"', "task_type"),
    (f'fairness_id: "{"x" * 129}"', "fairness_id"),
    (f'conversation_id: "{"x" * 129}"', "conversation_id"),
    ("expected_output_tokens: 0", "expected_output_tokens"),
    ("priority_class: 17", "priority_class"),
    *((f"queue_timeout_ms: {value}", "queue_timeout_ms") for value in ("0", "-1", "nan", "inf", "86400001")),
    *(
        (f"slo {{ {name}: {value} }}", f"slo.{name}")
        for name in ("ttft_ms", "tpot_ms", "e2e_ms")
        for value in ("0", "-5", "nan", "inf", "86400001")
    ),
    *((f"sampling {{ temperature: {value} }}", "sampling.temperature") for value in ("-0.1", "2.1", "nan", "inf")),
    *((f"sampling {{ top_p: {value} }}", "sampling.top_p") for value in ("0", "-1", "1.1", "nan")),
    *((f"sampling {{ min_p: {value} }}", "sampling.min_p") for value in ("-0.1", "1.1", "nan")),
    *(
        (f"sampling {{ repetition_penalty: {value} }}", "sampling.repetition_penalty")
        for value in ("0", "-1", "10.1", "nan", "inf")
    ),
    *((f"sampling {{ logprobs: {value} }}", "sampling.logprobs") for value in ("0", "21")),
    *((f"sampling {{ n: {value} }}", "sampling.n") for value in ("0", "2")),
    ("stopping { max_new_tokens: 0 }", "stopping.max_new_tokens"),
    ("stopping { min_new_tokens: 9 max_new_tokens: 8 }", "stopping.min_new_tokens"),
    ("stopping { min_new_tokens: 21 }", "stopping.min_new_tokens"),
    ("stopping { " + 'stop: "x" ' * 17 + "}", "stopping.stop"),
    ('stopping { stop: "x" stop: "" }', "stopping.stop[1]"),
    (f'stopping {{ stop: "{"x" * 257}" }}', "stopping.stop[0]"),
    ("stopping { " + "stop_token_ids: 1 " * 65 + "}", "stopping.stop_token_ids"),
    ("stopping { stop_token_ids: [1, 1000] }", "stopping.stop_token_ids[1]"),
    ("emulation { output_tokens: 0 }", "emulation.output_tokens"),
]


@pytest.mark.parametrize(("text", "field"), WRONG, ids=[f"{text[:50]}" for text, _ in WRONG])
def test_a_value_out_of_range_is_refused_by_the_name_of_its_field(text: str, field: str) -> None:
    (violation,) = violations(text)
    assert violation.field == field
    assert violation.description


def test_all_that_is_wrong_is_told_at_once() -> None:
    told = fields(
        """
        task_type: "%s" slo { e2e_ms: -1 ttft_ms: 0 } sampling { n: 2 temperature: 9 } stopping { max_new_tokens: 0 }
        queue_timeout_ms: 0 expected_output_tokens: 0 priority_class: 9 request_id: ""
        """
        % ("x" * 65),
        {"x-slo-e2e-ms": "ignored: the field is set"},
        prompt='text: ""',
    )
    assert sorted(told) == sorted(
        [
            "text",
            "task_type",
            "slo.e2e_ms",
            "slo.ttft_ms",
            "sampling.n",
            "sampling.temperature",
            "stopping.max_new_tokens",
            "queue_timeout_ms",
            "expected_output_tokens",
            "priority_class",
            "request_id",
        ]
    )


def test_durations_that_would_be_zero_seconds_are_the_shortest_there_are() -> None:
    accepted = check("slo { ttft_ms: 5e-324 tpot_ms: 1e-320 } queue_timeout_ms: 5e-324")
    assert (accepted.spec.slo, accepted.spec.queue_timeout_s) == (Slo(SHORTEST_S, SHORTEST_S), SHORTEST_S)


def test_of_thousands_of_violations_the_first_are_told_and_the_rest_counted() -> None:
    nameless = " ".join(["messages {}"] * 1000)
    told = violations("", prompt=f"messages {{ {nameless} }}")
    assert [v.field for v in told] == [
        *(f"messages.messages[{i}].role" for i in range(validation.MAX_TOLD)),
        "request",
    ]
    assert told[-1].description == f"{1000 - validation.MAX_TOLD} or more other violations"


def test_a_request_of_unknown_fields_is_refused_without_naming_each() -> None:
    request = pb.GenerateRequest(text="a").SerializeToString() + b"\xf8\x01\x01" * 2000
    (told,) = violations(request)
    assert (told.field, told.description) == ("request", "6000 bytes in fields that are not known to this server")


def test_nested_requests_are_told_with_their_path() -> None:
    told = fields("sampling { n: 2 }", {"x-slo-e2e-ms": "x"}, prefix="request.")
    assert told == ["request.sampling.n", "x-slo-e2e-ms"]


def test_a_model_that_is_not_served() -> None:
    with pytest.raises(ModelNotFound, match=r"'other'.*'scripted-model'"):
        check('model: "other" sampling { n: 2 }')


def test_emulation_is_for_synthetic_engines() -> None:
    assert fields("emulation {}", synthetic=False) == ["emulation"]
    assert fields("emulation { output_tokens: 5 }", synthetic=False) == ["emulation"]
    assert check("emulation {}").engine_request.emulated_output_tokens is None


def test_what_the_engine_cannot_do_is_refused_by_field() -> None:
    engine = ScriptedEngine(VirtualClock())
    engine.unsupported = [("sampling.logprobs", "no probabilities"), ("prompt", "too long"), ("sampling.n", "again")]
    told = violations("sampling { n: 3 }", engine=engine)
    assert [(v.field, v.description) for v in told] == [
        ("sampling.n", "only 1 is served"),
        ("sampling.logprobs", "no probabilities"),
        ("token_ids", "too long"),
    ]


def test_fields_this_server_does_not_know_are_refused() -> None:
    known = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(top_k=1), stopping=pb.StoppingParams(stop=["a"]))
    unknown_number_90 = bytes([0xD0, 0x05, 0x01])
    assert fields(known.SerializeToString() + unknown_number_90) == ["request"]
    nested = pb.GenerateRequest(text="x")
    nested.sampling.MergeFromString(unknown_number_90)
    (violation,) = violations(nested.SerializeToString())
    assert violation.field == "sampling"
    assert "90" in violation.description
    chat = pb.GenerateRequest()
    chat.messages.messages.add(role="user", content="x").MergeFromString(unknown_number_90)
    assert fields(chat.SerializeToString()) == ["messages.messages[0]"]


# -- headers ------------------------------------------------------------------


def test_headers_stand_in_for_fields_that_are_not_set() -> None:
    headers = {
        "x-llm-d-slo-ttft-ms": "150",
        "x-llm-d-slo-tpot-ms": "25.5",
        "x-slo-e2e-ms": "4000",
        "x-llm-d-inference-fairness-id": "tenant",
        "x-request-id": "from-the-proxy",
        "other": "ignored",
    }
    spec = check("", headers).spec
    assert spec.slo == make_slo(150, 25.5, 4000)
    assert (spec.fairness_id, spec.request_id) == ("tenant", "from-the-proxy")
    spec = check('request_id: "mine" fairness_id: "f" slo { tpot_ms: 10 }', headers).spec
    assert spec.slo == make_slo(150, 10, 4000)
    assert (spec.fairness_id, spec.request_id) == ("f", "mine")


@pytest.mark.parametrize("name", ["x-llm-d-slo-ttft-ms", "x-llm-d-slo-tpot-ms", "x-slo-e2e-ms"])
@pytest.mark.parametrize("value", ["", "abc", "-1", "0", "1e3", "nan", "inf", "1_0", "86400001", "1,5"])
def test_a_bad_objective_in_a_header_is_refused_by_its_name(name: str, value: str) -> None:
    assert fields("", {name: value}) == [name]


def test_bad_ids_in_headers_are_refused_by_their_names() -> None:
    assert fields("", {"x-request-id": ""}) == ["x-request-id"]
    assert fields("", {"x-request-id": "x" * 129}) == ["x-request-id"]
    assert fields("", {"x-llm-d-inference-fairness-id": "x" * 129}) == ["x-llm-d-inference-fairness-id"]


def test_of_a_header_sent_twice_the_first_counts() -> None:
    aliases = read_aliases((("x-request-id", "first"), ("x-request-id", b"second"), ("traceparent", b"00-ab")))
    assert aliases.get("x-request-id") == "first"
    assert aliases.get("traceparent") == "00-ab"
    assert aliases.get("x-slo-e2e-ms") is None


# -- default objectives and times ---------------------------------------------


def test_a_task_without_objectives_of_its_own_gets_its_default() -> None:
    assert check('task_type: "chat"').spec.slo == TASK_SLO
    assert check('task_type: "code"').spec.slo == Slo()
    assert check('task_type: "chat" slo { e2e_ms: 5 }').spec.slo == make_slo(e2e_ms=5)
    assert check('task_type: "chat"', {"x-slo-e2e-ms": "5"}).spec.slo == make_slo(e2e_ms=5)
    assert check('task_type: "chat" slo {}').spec.slo == Slo(), "an empty one says: none"


def test_the_default_queue_timeout() -> None:
    options = GatewayOptions(default_queue_timeout_s=3.0)
    assert check("", options=options).spec.queue_timeout_s == 3.0
    assert check("queue_timeout_ms: 500", options=options).spec.queue_timeout_s == 0.5


@pytest.mark.parametrize(
    "wrong",
    [{"default_max_new_tokens": 0}, {"default_queue_timeout_s": 0.0}, {"max_message_bytes": 0}],
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GatewayOptions(**wrong)


# -- conversations ------------------------------------------------------------


def messages(*turns: str, conversation_id: str = "") -> str:
    roles = ["user", "assistant"]
    said = " ".join(f'messages {{ role: "{roles[n % 2]}" content: "{text}" }}' for n, text in enumerate(turns))
    return f'messages {{ {said} }} conversation_id: "{conversation_id}"'


def test_turns_that_begin_alike_are_one_conversation() -> None:
    first, second, third, other = (
        check(messages(*turns), prompt="").spec.conversation_id
        for turns in (["Hi"], ["Hi", "Hello", "A"], ["Hi", "Hello", "A", "B", "C"], ["Hi", "Yes", "A"])
    )
    assert first == ""
    assert second == third
    assert second != other
    assert 0 < len(second) <= 128
    assert check(messages("Hi", "Hello", "A", conversation_id="mine"), prompt="").spec.conversation_id == "mine"
    assert check(messages("Hi", "Hel", "loA"), prompt="").spec.conversation_id not in (second, other)
