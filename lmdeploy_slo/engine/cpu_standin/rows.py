"""The forward pass of the stand-in: a transformers model over a KV cache with one row per sequence.

Rows differ in length. A forward pass takes neighbouring rows and the same number of new tokens for each, writes their
keys and values behind what a row holds, and attends to no more than that. The last row of a row range may be moved
into another's place, so that decoding rows stay neighbours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from lmdeploy_slo.errors import ConfigError

_FIRST_LENGTH = 256


class RowCache(transformers.DynamicCache):  # type: ignore[misc]
    """Keys and values, per layer [rows, heads, length, head size]; both capacities double when they are too small.

    The model calls `update` while `RowModel.forward` has set which rows and positions the new tokens belong to.
    """

    def __init__(self) -> None:
        super().__init__()
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._first_row = 0
        self._starts = torch.zeros(1, dtype=torch.long)
        self._new_tokens = 0
        self._length = 0

    def aim(self, first_row: int, starts: torch.Tensor, new_tokens: int) -> None:
        """The next forward pass appends `new_tokens` to each row from `first_row` on, at `starts` [rows]."""
        self._first_row = first_row
        self._starts = starts
        self._new_tokens = new_tokens
        self._length = int(starts.max()) + new_tokens
        for tensors in (self._keys, self._values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = _grown(tensor, first_row + len(starts), self._length)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self._keys) <= layer_idx:
            shape = (self._first_row + len(self._starts), key_states.shape[1], max(self._length, _FIRST_LENGTH))
            self._keys.append(key_states.new_zeros(*shape, key_states.shape[3]))
            self._values.append(value_states.new_zeros(*shape, value_states.shape[3]))
        return (
            self._write(self._keys[layer_idx], key_states),
            self._write(self._values[layer_idx], value_states),
        )

    def _write(self, tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        first, count = self._first_row, len(self._starts)
        if self._new_tokens == 1:
            tensor[torch.arange(first, first + count), :, self._starts] = new[:, :, 0]
        else:
            for row, start in enumerate(self._starts.tolist()):
                tensor[first + row, :, start : start + self._new_tokens] = new[row]
        return tensor[first : first + count, :, : self._length]

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> int:
        return self._length - self._new_tokens

    def move_row(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of one row over another."""
        for tensor in (*self._keys, *self._values):
            tensor[target, :, :length] = tensor[source, :, :length]

    def read(self, row: int, start: int, end: int) -> list[torch.Tensor]:
        """A copy of keys and values of tokens [start, end) of a row: one tensor per layer and kind."""
        return [tensor[row, :, start:end].clone() for tensor in (*self._keys, *self._values)]

    def write(self, row: int, start: int, block: list[torch.Tensor]) -> None:
        """Puts what `read` gave at `start` of a row; only after a first forward pass."""
        end = start + block[0].shape[1]
        for tensors in (self._keys, self._values):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = _grown(tensor, row + 1, end)
        for tensor, part in zip((*self._keys, *self._values), block):
            tensor[row, :, start:end] = part


def _grown(tensor: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    if rows <= tensor.shape[0] and length <= tensor.shape[2]:
        return tensor
    new_rows = max(rows, 2 * tensor.shape[0]) if rows > tensor.shape[0] else tensor.shape[0]
    new_length = max(length, 2 * tensor.shape[2]) if length > tensor.shape[2] else tensor.shape[2]
    grown = tensor.new_zeros(new_rows, tensor.shape[1], new_length, tensor.shape[3])
    grown[: tensor.shape[0], :, : tensor.shape[2]] = tensor
    return grown


class RowModel:
    """A causal language model of a Hugging Face checkpoint, with a `RowCache`."""

    def __init__(self, path: Path | str, *, dtype: str, session_tokens: int, trust_remote_code: bool = False) -> None:
        """dtype: a TurbomindEngineConfig's; "auto" is float32 here. Raises ConfigError for a model it cannot run."""
        with _without_progress_bar():
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                str(path),
                dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype),
                attn_implementation="sdpa",
                trust_remote_code=trust_remote_code,
            ).eval()
        text_config = self._model.config.get_text_config()
        _check_window(text_config, session_tokens)
        self.vocab_size = int(text_config.vocab_size)
        self.cache = RowCache()
        with torch.inference_mode():
            self._check_against_plain_forward()

    @property
    def token_bytes(self) -> int:
        """Bytes of KV cache per token; known after the first forward pass, which the constructor makes."""
        return sum(
            tensor.shape[1] * tensor.shape[3] * tensor.element_size()
            for tensor in (*self.cache._keys, *self.cache._values)
        )

    def forward(self, first_row: int, tokens: list[list[int]], starts: list[int], *, all_logits: bool) -> torch.Tensor:
        """Appends `tokens` (equally many per row) to neighbouring rows that hold `starts` tokens.

        Returns logits, float32: [rows, vocabulary] after the last token, or [rows, tokens, vocabulary]. In inference
        mode, as everything that touches the cache.
        """
        ids = torch.tensor(tokens, dtype=torch.long)
        start = torch.tensor(starts, dtype=torch.long)
        positions = start[:, None] + torch.arange(ids.shape[1])
        self.cache.aim(first_row, start, ids.shape[1])
        length = int(start.max()) + ids.shape[1]
        mask = torch.arange(length)[None, None, None, :] <= positions[:, None, :, None]
        output = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=0 if all_logits else 1,
        )
        logits: torch.Tensor = output.logits.float()
        return logits if all_logits else logits[:, -1]

    def _check_against_plain_forward(self) -> None:
        """Some models keep more than keys and values; two rows of unequal length must agree with a plain pass."""
        prompt = [token % self.vocab_size for token in (7, 3, 11, 2, 5, 13)]
        self.forward(0, [prompt[:5]], [0], all_logits=False)
        self.forward(1, [prompt[:2]], [0], all_logits=False)
        rows = self.forward(0, [[prompt[5]], [prompt[2]]], [5, 2], all_logits=False)
        for row, ids in enumerate((prompt, prompt[:3])):
            plain = self._model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
            if not torch.allclose(rows[row], plain, rtol=0.05, atol=0.05 * float(plain.abs().max())):
                raise ConfigError(
                    f"model: {type(self._model).__name__} keeps state that the CPU stand-in does not know; "
                    "it runs Qwen2, Llama and other plain decoders"
                )


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _check_window(text_config: Any, session_tokens: int) -> None:
    """Sliding-window attention equals full attention as long as no session is longer than the window."""
    layer_types = getattr(text_config, "layer_types", None)
    window = getattr(text_config, "sliding_window", None)
    slides = "sliding_attention" in layer_types if layer_types else getattr(text_config, "use_sliding_window", True)
    if window is not None and slides and session_tokens > window:
        raise ConfigError(f"session_len: the CPU stand-in runs this model up to its attention window, {window} tokens")
