"""How well output lengths are foretold: one pass over a trace in its order, each request predicted before it is seen.

Pinball loss at level q: the mean of (q if y > f else q - 1) (y - f), with f the forecast quantile and y the length.
Global running quantile, the yardstick: that of all outputs so far, whatever their task. Coverage at q: share of
requests with y <= f.
"""

from __future__ import annotations

import bisect
import csv
import gzip
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.prediction.experts import pinball_loss
from lmdeploy_slo.prediction.length_forecast import LengthPredictor

UNBOUNDED_TOKENS = 1 << 17


@dataclass(frozen=True, slots=True)
class LengthRow:
    """A request and what became of it, tokens, each >= 1. hint: None where there was none."""

    prompt_tokens: int
    output_tokens: int
    task: str = ""
    hint: int | None = None


@dataclass(frozen=True, slots=True)
class LengthScore:
    """At one level. loss, yardstick: pinball losses of the forecasts and of the global running quantile, tokens."""

    level: float
    loss: float
    yardstick: float
    coverage: float

    @property
    def below(self) -> float:
        """By which share the loss is below that of the global running quantile."""
        return 1.0 - self.loss / self.yardstick


def length_scores(
    rows: Sequence[LengthRow], predictor: LengthPredictor, levels: Sequence[float] = (0.5, 0.9)
) -> list[LengthScore]:
    """Scores of `predictor`, which learns on the way; one a level."""
    losses, yardsticks, covered = ([0.0] * len(levels) for _ in range(3))
    seen: list[int] = []
    for row in rows:
        spec = RequestSpec(
            "", 0.0, row.prompt_tokens, UNBOUNDED_TOKENS, task_type=row.task, expected_output_tokens=row.hint
        )
        forecast = predictor.predict(spec)
        for at, level in enumerate(levels):
            quantile = forecast.quantile(level)
            running = seen[min(int(level * len(seen)), len(seen) - 1)] if seen else forecast.tokens
            losses[at] += pinball_loss(row.output_tokens - quantile, level)
            yardsticks[at] += pinball_loss(row.output_tokens - running, level)
            covered[at] += row.output_tokens <= quantile
        predictor.observe(spec, row.output_tokens)
        bisect.insort(seen, row.output_tokens)
    count = len(rows)
    return [
        LengthScore(level, losses[at] / count, yardsticks[at] / count, covered[at] / count)
        for at, level in enumerate(levels)
    ]


def without_repeats(rows: Iterable[LengthRow]) -> list[LengthRow]:
    """The first row of each pair of prompt and output length."""
    first: dict[tuple[int, int], LengthRow] = {}
    for row in rows:
        first.setdefault((row.prompt_tokens, row.output_tokens), row)
    return list(first.values())


def without_hints(rows: Iterable[LengthRow]) -> list[LengthRow]:
    return [replace(row, hint=None) for row in rows]


def read_lengths(path: Path) -> list[LengthRow]:
    """The rows of a gzipped CSV in its order; it needs no arrivals. Lengths of 0 are read as 1.

    Columns: input_tokens, output_tokens and, optionally, task_class; or num_prefill_tokens, num_decode_tokens and
    num_predicted_decode_tokens, a hint. Raises KeyError for other columns.
    """
    with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
        return [_row(record) for record in csv.DictReader(file)]


def _row(record: dict[str, str]) -> LengthRow:
    if "input_tokens" in record:
        lengths = _tokens(record["input_tokens"]), _tokens(record["output_tokens"])
        return LengthRow(*lengths, task=record.get("task_class", ""))
    lengths = _tokens(record["num_prefill_tokens"]), _tokens(record["num_decode_tokens"])
    return LengthRow(*lengths, hint=_tokens(record["num_predicted_decode_tokens"]))


def _tokens(value: str) -> int:
    return max(1, round(float(value)))
