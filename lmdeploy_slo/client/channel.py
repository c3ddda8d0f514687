"""What both clients tell gRPC about a connection, and how a client shows who it is."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import grpc

from lmdeploy_slo.errors import ConfigError

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

_SCHEME = re.compile(r"(dns:(///?)?|ipv4:|ipv6:)")
_LOCAL_SCHEMES = ("unix:", "unix-abstract:")


@dataclass(frozen=True, slots=True)
class Access:
    """How a server is called. credentials: None for plain text. token: a bearer token, sent with every call.
    insecure: the token may go to another machine in plain text."""

    credentials: grpc.ChannelCredentials | None = None
    token: str | None = None
    insecure: bool = False

    def metadata_for(self, target: str) -> Metadata:
        """Of every call. Raises ConfigError where the token would be for all on the way to read."""
        if self.token is None:
            return ()
        if self.credentials is None and not self.insecure and not _is_local(target):
            raise ConfigError(f"a token would go to {target} in plain text: use TLS, or say that this is insecure")
        if not self.token.isascii() or not self.token.isprintable():
            raise ConfigError("the token is not printable ASCII")
        return (("authorization", f"Bearer {self.token}"),)


OPEN_ACCESS = Access()


def tls_credentials(
    ca: Path | str | None = None, cert: Path | str | None = None, key: Path | str | None = None
) -> grpc.ChannelCredentials:
    """For `Client(credentials=...)`, from PEM files. ca: who signed the server's certificate, None for whom gRPC trusts
    by itself. cert, key: the client's own, both or neither. Raises ConfigError where a file cannot be read."""
    if (cert is None) != (key is None):
        raise ConfigError("a client certificate and its key are given together or not at all")
    return grpc.ssl_channel_credentials(*(None if path is None else _read(Path(path)) for path in (ca, key, cert)))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


def _is_local(target: str) -> bool:
    """Whether it is on this machine; a name other than localhost may be anywhere."""
    if target.startswith(_LOCAL_SCHEMES):
        return True
    address = target[match.end() :] if (match := _SCHEME.match(target)) else target
    host = address.rpartition(":")[0].strip("[]") or address
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
