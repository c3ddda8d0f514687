"""Bearer tokens: made here, kept by clients, known to the server by their hashes alone.

A token is `slo_ID_SECRET`. Its line in the tokens file is

    NAME ID sha256:HEX          # a comment

ID finds the line, HEX is the SHA-256 of the whole token. One name may have several lines, so that a token can be
replaced without a gap; a line that is taken out ends its token.

Why SHA-256 and not a slow hash. scrypt and its like make up for secrets that people choose. A secret from here is 256
random bits: there is nothing to guess from, however fast a guess is, and a slow hash would only let strangers burn the
server's CPU. Tokens of one's own making are not taken, for this holds only of random ones.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lmdeploy_slo.errors import ConfigError

ID_CHARS, SECRET_BYTES = 10, 32
_TOKEN = re.compile(r"slo_([a-z2-7]{10})_[A-Za-z0-9_-]{43}")
_NAME = re.compile(r"[!-\"$-~][!-~]{0,127}")
_ID = re.compile(r"[a-z2-7]{10}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_NOBODY = bytes(32)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Client name and hash by token id."""

    by_id: Mapping[str, tuple[str, bytes]]

    def client_of(self, token: str) -> str | None:
        """Whose token it is. Takes the same time for any wrong secret, and for an id that does not exist."""
        parts = _TOKEN.fullmatch(token)
        if parts is None:
            return None
        name, expected = self.by_id.get(parts[1], ("", _NOBODY))
        matches = hmac.compare_digest(_hash(token), expected)
        return name if matches and name else None


def new_token(name: str) -> tuple[str, str]:
    """A token for the client `name`, and its line for the tokens file. Raises ConfigError for a name that is none."""
    _check_name(name)
    token_id = base64.b32encode(secrets.token_bytes(7)).decode("ascii")[:ID_CHARS].lower()
    token = f"slo_{token_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
    return token, f"{name} {token_id} sha256:{_hash(token).hex()}"


def read_tokens(file: Path) -> Tokens:
    """Raises ConfigError, naming the line, for whatever is not as above; never shows what stands in it."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not UTF-8") from None
    by_id: dict[str, tuple[str, bytes]] = {}
    for number, line in enumerate(lines, start=1):
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        where = f"{file}, line {number}"
        if len(fields) != 3:
            raise ConfigError(f"{where}: NAME ID sha256:HEX is expected, as `lmdeploy_slo token new` prints it")
        name, token_id, hashed = fields
        digest = _HASH.fullmatch(hashed)
        if not _ID.fullmatch(token_id) or digest is None:
            raise ConfigError(f"{where}: not an id and a hash, as `lmdeploy_slo token new` prints them")
        if token_id in by_id:
            raise ConfigError(f"{where}: the id {token_id} stands here twice")
        _check_name(name, where)
        by_id[token_id] = (name, bytes.fromhex(digest[1]))
    return Tokens(by_id)


def _check_name(name: str, where: str = "name") -> None:
    if not _NAME.fullmatch(name) or "#" in name:
        raise ConfigError(f"{where}: {name!r} is no name: 1 to 128 printable ASCII characters, no blank and no #")


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("ascii")).digest()
