"""Certificates made on the spot, and files of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc
import trustme

from lmdeploy_slo.gateway.tls import TlsFiles


@dataclass
class Authority:
    """Signs certificates; `ca` is its own, PEM."""

    authority: trustme.CA

    @property
    def ca(self) -> bytes:
        return self.authority.cert_pem.bytes()

    def issue(self, *names: str, common_name: str | None = None) -> tuple[bytes, bytes]:
        """(chain, key), PEM."""
        issued = self.authority.issue_cert(*names, common_name=common_name)
        return b"".join(pem.bytes() for pem in issued.cert_chain_pems), issued.private_key_pem.bytes()

    def credentials(
        self, name: str | None = None, *alternatives: str, of: Authority | None = None
    ) -> grpc.ChannelCredentials:
        """For a client that trusts this authority; with a name it shows a certificate, signed by `of`."""
        if name is None:
            return grpc.ssl_channel_credentials(self.ca)
        chain, key = (of or self).issue(*(alternatives or ("client.test",)), common_name=name or None)
        return grpc.ssl_channel_credentials(self.ca, key, chain)


def new_authority() -> Authority:
    return Authority(trustme.CA())


class ServerFiles:
    """A server's certificate, key and client CA in a folder."""

    def __init__(self, folder: Path, authority: Authority, clients_of: Authority | None = None) -> None:
        self.files = TlsFiles(
            folder / "server.pem", folder / "server.key", None if clients_of is None else folder / "clients.pem"
        )
        self.write(authority, clients_of)

    def write(self, authority: Authority, clients_of: Authority | None = None) -> None:
        """New ones in place of the old."""
        chain, key = authority.issue("localhost", "127.0.0.1")
        replace(self.files.cert, chain)
        replace(self.files.key, key)
        if self.files.client_ca is not None and clients_of is not None:
            replace(self.files.client_ca, clients_of.ca)


def replace(path: Path, content: bytes) -> None:
    """As tools that renew certificates do it."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.rename(path)
