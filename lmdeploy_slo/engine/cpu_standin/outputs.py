"""The tensors a request of the stand-in writes its results to, by the native module's names.

output_ids                                       [prompt + max_new_tokens], int32
logprob_vals, logprob_indexes, logprob_nums      [max_new_tokens, candidates]; the last [max_new_tokens]
logits                                           [positions, vocabulary], of all positions or of generated ones
ce_loss                                          [1]: summed negative log-likelihood of the prompt
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

from lmdeploy_slo.engine.cpu_standin.sampling import Draw


class LogitsWanted(IntEnum):
    """Which positions' logits are given out, in the native module's numbers."""

    NONE = 0
    ALL = 1
    GENERATED = 2


class Outputs:
    """See the module. Written by the worker before the tokens they belong to are published."""

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        vocab_size: int,
        logprobs: int = 0,
        logits: LogitsWanted = LogitsWanted.NONE,
        perplexity: bool = False,
    ) -> None:
        self._prompt_tokens = len(prompt)
        self._logits_wanted = logits
        self._loss_wanted = perplexity
        self.tensors: dict[str, torch.Tensor] = {
            "output_ids": torch.zeros(len(prompt) + max_new_tokens, dtype=torch.int32)
        }
        self.tensors["output_ids"][: len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
        if logprobs:
            shape = (max_new_tokens, logprobs + 1)  # the chosen token may come on top of the candidates
            self.tensors["logprob_vals"] = torch.zeros(shape)
            self.tensors["logprob_indexes"] = torch.zeros(shape, dtype=torch.int32)
            self.tensors["logprob_nums"] = torch.zeros(max_new_tokens, dtype=torch.int32)
        if logits is not LogitsWanted.NONE:
            positions = max_new_tokens + (len(prompt) if logits is LogitsWanted.ALL else 0)
            self.tensors["logits"] = torch.zeros(positions, vocab_size)
        if perplexity:
            self.tensors["ce_loss"] = torch.zeros(1)

    @property
    def wants_prompt_logits(self) -> bool:
        return self._loss_wanted or self._logits_wanted is LogitsWanted.ALL

    def record_prompt(self, start: int, tokens: Sequence[int], logits: torch.Tensor) -> None:
        """logits [chunk, vocabulary] of the prompt tokens from `start` on."""
        end = start + len(logits)
        if self._logits_wanted is LogitsWanted.ALL:
            self.tensors["logits"][start:end] = logits
        if self._loss_wanted:
            following = torch.tensor(tokens[start + 1 : end + 1], dtype=torch.long)
            losses = torch.nn.functional.cross_entropy(logits[: len(following)], following, reduction="sum")
            self.tensors["ce_loss"] += losses if len(following) else 0.0

    def record_logits(self, position: int, logits: torch.Tensor) -> None:
        """logits [vocabulary] after the token at `position`, from which the next one is drawn."""
        if self._logits_wanted is LogitsWanted.ALL:
            self.tensors["logits"][position] = logits
        elif self._logits_wanted is LogitsWanted.GENERATED:
            self.tensors["logits"][position - self._prompt_tokens + 1] = logits

    def record_token(self, position: int, drawn: Draw) -> None:
        """The token at `position` of the sequence."""
        self.tensors["output_ids"][position] = drawn.token
        if "logprob_nums" in self.tensors and drawn.candidates:
            row, count = position - self._prompt_tokens, len(drawn.candidates)
            ids, logarithms = zip(*drawn.candidates)
            self.tensors["logprob_indexes"][row, :count] = torch.tensor(ids, dtype=torch.int32)
            self.tensors["logprob_vals"][row, :count] = torch.tensor(logarithms)
            self.tensors["logprob_nums"][row] = count
