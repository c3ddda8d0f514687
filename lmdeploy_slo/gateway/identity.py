"""Who calls. What is configured is demanded of every call: a token, a client certificate, or both.

The client's name is its token's where there are tokens, for a certificate may be that of a proxy; else the one in its
certificate. Where neither is configured nobody is known, and a request's `fairness_id` is taken for a name.

The name in a certificate is its SPIFFE id, else its common name, else its first alternative name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lmdeploy_slo.errors import Unauthenticated
from lmdeploy_slo.gateway.tokens import Tokens

AUTHORIZATION = "authorization"
_BEARER = "bearer "
_REFUSED = "a valid bearer token is needed: `authorization: Bearer TOKEN`"


class Identifier:
    """tokens: those that are valid by now; None where calls need none. certificates: clients have shown one."""

    def __init__(self, tokens: Callable[[], Tokens] | None = None, *, certificates: bool = False) -> None:
        self._tokens = tokens
        self._certificates = certificates

    @property
    def demands_token(self) -> bool:
        return self._tokens is not None

    @property
    def certain(self) -> bool:
        """Whether names are checked."""
        return self._certificates or self.demands_token

    def name_of(self, authorization: str | None, certificate: Callable[[], str]) -> str | None:
        """The caller's name; None where nobody is known. certificate: the name in it, asked for where it counts.

        Raises Unauthenticated.
        """
        if self._tokens is not None:
            return self.token_name(authorization)
        return certificate() if self._certificates else None

    def token_name(self, authorization: str | None) -> str:
        """Raises Unauthenticated, with the same text whatever is wrong."""
        if self._tokens is None or authorization is None or not authorization[: len(_BEARER)].lower() == _BEARER:
            raise Unauthenticated(_REFUSED)
        name = self._tokens().client_of(authorization[len(_BEARER) :].strip())
        if name is None:
            raise Unauthenticated(_REFUSED)
        return name


def authorization_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """The first `authorization` of a call; None where it has none."""
    for key, value in metadata or ():
        if key == AUTHORIZATION:
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return None


def name_in_auth_context(context: Mapping[str, Iterable[bytes]]) -> str:
    """From what gRPC says of a client's certificate."""
    keys = ("peer_spiffe_id", "x509_common_name", "x509_subject_alternative_name")
    return _first_name(name.decode("utf-8", "replace") for key in keys for name in context.get(key, ()))


def name_in_peer_certificate(certificate: Mapping[str, Any]) -> str:
    """From what ssl.SSLSocket.getpeercert says."""
    alternatives = certificate.get("subjectAltName", ())
    spiffe = [value for kind, value in alternatives if kind == "URI" and value.startswith("spiffe://")]
    common = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    return _first_name((*spiffe, *common, *(value for _, value in alternatives)))


def _first_name(names: Iterable[str]) -> str:
    for name in names:
        if name:
            return name
    raise Unauthenticated("the client's certificate has no name")
