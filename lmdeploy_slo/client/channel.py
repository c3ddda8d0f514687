"""What both clients tell gRPC about a connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Metadata: TypeAlias = Sequence[tuple[str, str]]
"""gRPC metadata of one call, such as ("traceparent", "00-...")."""

ChannelOptions: TypeAlias = Sequence[tuple[str, int | str]]

CHANNEL_OPTIONS: ChannelOptions = (
    # A whole answer with log-probabilities may pass gRPC's 4 MiB; the server bounds what it sends.
    ("grpc.max_receive_message_length", -1),
    # A channel refuses calls while it backs off: it must look again at least as often as a call is repeated.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5000),
)

INFO_TIMEOUT_S = 10.0
"""Time limit of the calls that ask about the server; they do no work there."""
