"""Output lengths of recorded traces, where they are at hand: LMDEPLOY_SLO_TRACES names their folder.

One pass in order, every request predicted before it is seen, against the quantile of all outputs so far.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lmdeploy_slo.config import ENV_TRACES_DIR
from lmdeploy_slo.offline.length_scores import LengthRow, length_scores, read_lengths, without_hints, without_repeats
from lmdeploy_slo.prediction.length import TaskLengthPredictor

FOLDER = Path(os.environ.get(ENV_TRACES_DIR, "/nonexistent"))
pytestmark = pytest.mark.slow


def rows_of(name: str) -> list[LengthRow]:
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{ENV_TRACES_DIR} names no folder with {name}")
    return read_lengths(path)


def check(rows: list[LengthRow], below: tuple[float, float]) -> None:
    median, upper = length_scores(rows, TaskLengthPredictor())
    assert median.below >= below[0]
    assert upper.below >= below[1]
    assert 0.87 <= upper.coverage <= 0.93


def test_code_and_chat() -> None:
    check(rows_of("azure2023_mixed.csv.gz"), (0.70, 0.60))


def test_prompts_that_tell_next_to_nothing() -> None:
    """Of distinct pairs; docs/prediction.md says what prompt lengths could tell at best."""
    rows = without_repeats(rows_of("sharegpt_V3_lens.csv.gz"))
    assert len(rows) == 25_964
    check(rows, (0.008, 0.023))


def test_hints() -> None:
    rows = rows_of("sharegpt_val_predicted_len.csv.gz")
    check(rows, (0.88, 0.80))
    check(without_hints(rows), (0.03, 0.06))
