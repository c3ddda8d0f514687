"""What a latency model was fitted on, and the two models with a warning, once, for who asks about anything else.

Planners ask millions of times and inside their limits: they take the bare models of `core.latency_model`. These here
are for whoever asks seldom and about anything.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, fields
from typing import Protocol, TypeAlias

from lmdeploy_slo.core.latency_model import BilinearModel, StepModel

logger = logging.getLogger(__name__)

Span: TypeAlias = "tuple[float, float]"
"""Smallest and largest value, both included."""


@dataclass(frozen=True, slots=True)
class ModelRange:
    """Smallest and largest value of each quantity among the measurements; None where it was not measured.

    prompt_tokens: of one prompt. prefill_tokens: prompt tokens of one forward pass. batch_size: sequences that decode.
    context_tokens: in the KV cache of one of them. Raises ValueError for a span that is not 0 <= low <= high < inf.
    """

    prompt_tokens: Span | None = None
    prefill_tokens: Span | None = None
    batch_size: Span | None = None
    context_tokens: Span | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            span = getattr(self, field.name)
            if span is not None and not (len(span) == 2 and 0 <= span[0] <= span[1] < math.inf):
                raise ValueError(f"{field.name} must be two finite numbers, 0 <= low <= high, got {span!r}")

    def outside(
        self,
        *,
        prompt_tokens: float | None = None,
        prefill_tokens: float | None = None,
        batch_size: float | None = None,
        context_tokens: float | None = None,
    ) -> dict[str, str]:
        """Quantity -> in words, of each value given that was not measured."""
        asked = {
            "prompt_tokens": prompt_tokens,
            "prefill_tokens": prefill_tokens,
            "batch_size": batch_size,
            "context_tokens": context_tokens,
        }
        found = {}
        for quantity, value in asked.items():
            span = getattr(self, quantity)
            if value is not None and span is not None and not span[0] <= value <= span[1]:
                found[quantity] = f"{quantity} {value:g} is outside {span[0]:g} to {span[1]:g}"
        return found


class RangeWatch:
    """Logs a warning the first time each quantity is asked about outside the range; `name` is the profile's."""

    __slots__ = ("_name", "_told", "range")

    def __init__(self, name: str, fitted: ModelRange) -> None:
        self.range = fitted
        self._name = name
        self._told: set[str] = set()

    def note(self, **asked: float | None) -> None:
        """As `ModelRange.outside`; what was told before is not told again."""
        for quantity, words in self.range.outside(**asked).items():
            if quantity not in self._told:
                self._told.add(quantity)
                logger.warning("profile %s: %s, which it was fitted on: times are extrapolated", self._name, words)


class LatencyModel(Protocol):
    """What both forms can be asked: a static batch of equal prompts. Durations in seconds, never negative."""

    def prefill_s(self, batch_size: float, prompt_tokens: float) -> float:
        """Until all `batch_size` prompts of `prompt_tokens` each have their first token."""
        ...

    def decode_s(self, batch_size: float, prompt_tokens: float, output_tokens: float) -> float:
        """`output_tokens` decode steps of `batch_size` sequences that begin with `prompt_tokens` in their cache."""
        ...


class RangedStepModel:
    """A step model that knows its range. max_prefill_tokens: the prompt tokens an engine computes in one step."""

    __slots__ = ("max_prefill_tokens", "model", "watch")

    def __init__(self, model: StepModel, watch: RangeWatch, max_prefill_tokens: int) -> None:
        if max_prefill_tokens < 1:
            raise ValueError(f"max_prefill_tokens must be at least 1, got {max_prefill_tokens}")
        self.model = model
        self.watch = watch
        self.max_prefill_tokens = max_prefill_tokens

    def step_s(self, prefill_tokens: float, prefill_square: float, batch_size: float, context_tokens: float) -> float:
        """As `StepModel.step_s`."""
        self.watch.note(
            prefill_tokens=prefill_tokens or None,
            batch_size=batch_size or None,
            context_tokens=context_tokens / batch_size if batch_size else None,
        )
        return self.model.step_s(prefill_tokens, prefill_square, batch_size, context_tokens)

    def prefill_s(self, batch_size: float, prompt_tokens: float) -> float:
        """All prompts in as few steps as hold them, nobody decoding."""
        tokens = batch_size * prompt_tokens
        self.watch.note(prompt_tokens=prompt_tokens, prefill_tokens=min(tokens, self.max_prefill_tokens))
        steps = math.ceil(tokens / self.max_prefill_tokens)
        return steps * self.model.c0 + batch_size * self.model.prefill_stall_s(prompt_tokens)

    def decode_s(self, batch_size: float, prompt_tokens: float, output_tokens: float) -> float:
        self.watch.note(batch_size=batch_size, context_tokens=prompt_tokens + output_tokens / 2)
        return self.model.decode_stretch_s(output_tokens, batch_size, batch_size * prompt_tokens)


class RangedBilinearModel:
    """The paper's model with its range."""

    __slots__ = ("model", "watch")

    def __init__(self, model: BilinearModel, watch: RangeWatch) -> None:
        self.model = model
        self.watch = watch

    def prefill_s(self, batch_size: float, prompt_tokens: float) -> float:
        self.watch.note(prompt_tokens=prompt_tokens, prefill_tokens=batch_size * prompt_tokens)
        return self.model.prefill_s(batch_size, float(prompt_tokens))

    def decode_s(self, batch_size: float, prompt_tokens: float, output_tokens: float) -> float:
        self.watch.note(batch_size=batch_size, context_tokens=prompt_tokens + output_tokens / 2)
        return self.model.decode_s(batch_size, float(prompt_tokens), float(output_tokens))
