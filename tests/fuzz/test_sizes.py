"""Large messages full of what is wrong: told in few words, and without going through it all."""

from __future__ import annotations

import asyncio

import pytest
from google.protobuf.message import Message
from wire_targets import RECEIVABLE_BYTES

from lmdeploy_slo.clock import VirtualClock
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.errors import InvalidRequest
from lmdeploy_slo.gateway.metadata import read_aliases
from lmdeploy_slo.gateway.options import GatewayOptions
from lmdeploy_slo.gateway.status import to_status
from lmdeploy_slo.gateway.validation import MAX_TOLD, accept
from lmdeploy_slo.v1 import inference_pb2 as pb

SIZE = 1 << 20  # an element or two bytes each; a message may have sixteen times as many
TEXT = pb.GenerateRequest(text="a").SerializeToString()


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    length, size = len(content), bytearray()
    while length > 0x7F:
        size.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([number << 3 | 2]) + bytes([*size, length]) + content


FULL = {
    "empty messages": field(5, b"\x0a\x00" * (SIZE // 2)),
    "messages with unknown fields": field(5, (field(1, field(1, b"u") + b"\x78\x01")) * 9000),
    "token ids out of range": field(4, field(1, b"\xff\xff\xff\x7f" * (SIZE // 4))),
    "token ids": field(4, field(1, b"\x05" * SIZE)),
    "empty stops": TEXT + field(7, b"\x1a\x00" * (SIZE // 2)),
    "stop ids": TEXT + field(7, field(4, b"\x05" * SIZE)),
    "unknown fields": TEXT + b"\xf8\x01\x01" * (SIZE // 3),
    "a model": TEXT + field(2, b"m" * SIZE),
    "a request id": TEXT + field(1, "é".encode() * (SIZE // 2)),
    "a task type": TEXT + field(9, b"\x00" * SIZE),
}


@pytest.mark.parametrize("what", FULL)
def test_a_message_full_of_what_is_wrong_is_answered_in_few_words(what: str) -> None:
    engine = EmulatedEngine(StepModel(0, 0, 0, 0, 0), EngineLimits(), VirtualClock(), max_session_tokens=4096)
    request = pb.GenerateRequest.FromString(FULL[what])
    with pytest.raises(Exception) as refusal:
        asyncio.run(accept(request, read_aliases(()), engine, GatewayOptions(), arrival_at_s=0.0))
    if isinstance(refusal.value, InvalidRequest):
        assert len(refusal.value.violations) <= MAX_TOLD + 1
    status: Message = to_status(refusal.value)  # type: ignore[arg-type]
    assert len(status.SerializeToString()) < RECEIVABLE_BYTES / 2
