"""LMDeploy's tokenizer and chat template, as `engine.base.Tokenizer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmdeploy_slo.engine.base import ChatMessage
from lmdeploy_slo.errors import FieldViolation, InvalidRequest


class LmdeployTokenizer:
    """`engine`: LMDeploy's AsyncEngine. Gives the token ids that LMDeploy itself would generate from."""

    def __init__(self, engine: Any) -> None:
        self._tokenizer = engine.tokenizer
        self._chat_template = engine.chat_template

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_bos=True)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.decode_text(token_ids, skip_special_tokens=True)

    def decode_text(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """Of one token by itself, special ones included."""
        return self.decode_text([token_id], skip_special_tokens=False)

    def special_token(self, text: str) -> int | None:
        """The id where `text` is exactly one token that text output may leave out; None elsewhere."""
        ids = self._tokenizer.encode(text, add_bos=False, add_special_tokens=False)
        if len(ids) == 1 and ids[0] in self._tokenizer.model.model.all_special_ids:
            return int(ids[0])
        return None

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Raises InvalidRequest where the model's template refuses the conversation, or it has none."""
        try:
            prompt = self._chat_template.messages2prompt([{"role": m.role, "content": m.content} for m in messages])
        except Exception as error:  # templates raise what they like
            raise InvalidRequest([FieldViolation("messages", f"the chat template refuses them: {error}")]) from error
        if prompt is None:
            raise InvalidRequest([FieldViolation("messages", "this model has no chat template; send text")])
        return self.encode(prompt)
