"""A tokenizer without a model: small, deterministic, reversible for any text.

A token is one character, or a run of two or three ASCII characters of which only the first may be a space or a control
character (`"the quick"` becomes `"the"`, `" qu"`, `"ick"`). No token cuts a character, so the text of any list of ids
is the concatenation of the texts of its parts.

Ids: one character is its code point; a run packs its characters, seven bits each, above the code points.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lmdeploy_slo.engine.base import ChatMessage

_CODE_POINTS = 0x110000
_PAIRS_FROM = _CODE_POINTS
_TRIPLES_FROM = _PAIRS_FROM + (1 << 14)

VOCAB_SIZE = _TRIPLES_FROM + (1 << 21)
"""3,227,648: every id is below."""

_TOKEN = re.compile(r"[\x00-\x7f][!-\x7f]{0,2}|[^\x00-\x7f]")


class SyntheticTokenizer:
    """See the module. Stateless."""

    __slots__ = ()

    vocab_size = VOCAB_SIZE

    def encode(self, text: str) -> list[int]:
        """`decode` gives `text` back, whatever it is (surrogates, which are no text, become U+FFFD)."""
        return [_id_of(piece) for piece in _TOKEN.findall(text)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Raises ValueError for an id outside the vocabulary."""
        return "".join(map(_piece_of, token_ids))

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Template: `<|role|>`, newline, content, newline for each message, then `<|assistant|>` and a newline."""
        turns = "".join(f"<|{message.role}|>\n{message.content}\n" for message in messages)
        return self.encode(f"{turns}<|assistant|>\n")


def _id_of(piece: str) -> int:
    codes = [ord(character) for character in piece]
    if len(codes) == 1:
        return codes[0]
    if len(codes) == 2:
        return _PAIRS_FROM + (codes[0] << 7 | codes[1])
    return _TRIPLES_FROM + (codes[0] << 14 | codes[1] << 7 | codes[2])


def _piece_of(token_id: int) -> str:
    if 0 <= token_id < _CODE_POINTS:
        return "\ufffd" if 0xD800 <= token_id < 0xE000 else chr(token_id)
    if _PAIRS_FROM <= token_id < _TRIPLES_FROM:
        packed = token_id - _PAIRS_FROM
        return chr(packed >> 7) + chr(packed & 0x7F)
    if _TRIPLES_FROM <= token_id < VOCAB_SIZE:
        packed = token_id - _TRIPLES_FROM
        return chr(packed >> 14) + chr(packed >> 7 & 0x7F) + chr(packed & 0x7F)
    raise ValueError(f"token id {token_id} is outside the vocabulary of {VOCAB_SIZE}")
