"""TLS, and mutual TLS, with certificates that are replaced while the server runs.

Every handshake uses the certificate, key and client CA that lie in the files by then. A pair that does not belong
together, which is what one finds halfway through a renewal, is left alone until it does. Connections that stand go on
with what they were made with.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.gateway.watched import Watched


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """cert: the server's chain, its own first; key: its private key; client_ca: who signs clients' certificates, None
    where clients need none. All PEM."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    @property
    def paths(self) -> list[Path]:
        return [self.cert, self.key, *([] if self.client_ca is None else [self.client_ca])]


class TlsCredentials:
    """What a port is served with. Raises ConfigError where the files cannot be used."""

    def __init__(self, files: TlsFiles, clock: Clock) -> None:
        self.files = files
        self._current = Watched("certificates", files.paths, lambda: _read(files), clock)

    def reload(self) -> bool:
        """Looks at the files now; False, with the reason in the log, where they cannot be used."""
        return self._current.reload()

    def for_grpc(self) -> grpc.ServerCredentials:
        told = self._current().grpc

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """gRPC asks on every handshake, from a thread of its own; None: as before."""
            nonlocal told
            before, told = told, self._current().grpc
            return None if told is before else told

        demands = self.files.client_ca is not None
        return grpc.dynamic_ssl_server_credentials(told, fetch, demands)  # type: ignore[arg-type] # stubs lack None

    def for_http(self) -> ssl.SSLContext:
        """A context whose handshakes go on with the newest certificate and client CA."""
        context = _context(self.files)

        def renew(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            connection.context = self._current().http

        context.sni_callback = renew
        return context


@dataclass(frozen=True, slots=True)
class _Loaded:
    grpc: grpc.ServerCertificateConfiguration
    http: ssl.SSLContext


def _read(files: TlsFiles) -> _Loaded:
    try:
        before = [path.read_bytes() for path in files.paths]
        context = _context(files)
        after = [path.read_bytes() for path in files.paths]
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror or error}") from error
    if before != after:
        raise ConfigError("they are being replaced right now")
    chain, key, *roots = before
    config = grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=roots[0] if roots else None)
    return _Loaded(config, context)


def _context(files: TlsFiles) -> ssl.SSLContext:
    """Raises ConfigError where the files do not make one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(files.cert, files.key, password="")  # an encrypted key is refused, not asked about
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{files.cert} and {files.key} are no certificate and its key: {error}") from error
    if files.client_ca is not None:
        try:
            context.load_verify_locations(files.client_ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{files.client_ca} has no certificate: {error}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context
