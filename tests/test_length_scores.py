"""Scores of length forecasts by hand, and the two forms of file they are taken from."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.core.snapshot import Rows
from lmdeploy_slo.offline.length_scores import LengthRow, length_scores, read_lengths, without_hints, without_repeats
from lmdeploy_slo.prediction.length_forecast import LengthForecast


class Fixed:
    """Foretells 10 tokens for sure, and remembers what it was told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []

    def predict(self, spec: RequestSpec) -> LengthForecast:
        self.heard.append(("asked", spec.prompt_tokens))
        return LengthForecast(10.0, 0.0)

    def observe(self, spec: RequestSpec, output_tokens: int) -> None:
        self.heard.append(("told", output_tokens))

    def revise(self, running: Rows) -> None:
        raise AssertionError("nothing runs")


def test_scores_by_hand() -> None:
    predictor = Fixed()
    rows = [LengthRow(1, 20), LengthRow(2, 4), LengthRow(3, 10)]
    median, upper = length_scores(rows, predictor, (0.5, 0.9))
    assert predictor.heard == [("asked", 1), ("told", 20), ("asked", 2), ("told", 4), ("asked", 3), ("told", 10)]
    # errors 10, -6, 0; the running quantiles are 10 (the forecast: nothing was seen), 20, and then of {4, 20} 20
    assert median.loss == pytest.approx((5 + 3 + 0) / 3)
    assert median.yardstick == pytest.approx((5 + 8 + 5) / 3)
    assert upper.loss == pytest.approx((9 + 0.6 + 0) / 3)
    assert upper.yardstick == pytest.approx((9 + 1.6 + 1) / 3)
    assert median.coverage == upper.coverage == pytest.approx(2 / 3)
    assert median.below == pytest.approx(1 - 8 / 18)


def test_files_of_both_forms(tmp_path: Path) -> None:
    plain, hinted = tmp_path / "plain.csv.gz", tmp_path / "hinted.csv.gz"
    plain.write_bytes(gzip.compress(b"arrival_s,input_tokens,output_tokens,task_class\n0,7,0,chat\n1,8,9,code\n"))
    names = b"num_prefill_tokens,num_decode_tokens,num_total_tokens,num_predicted_decode_tokens\n"
    hinted.write_bytes(gzip.compress(names + b"25,3,28,1.6\n"))
    assert read_lengths(plain) == [LengthRow(7, 1, "chat"), LengthRow(8, 9, "code")]
    assert read_lengths(hinted) == [LengthRow(25, 3, "", 2)]
    assert without_hints(read_lengths(hinted)) == [LengthRow(25, 3)]


def test_the_first_of_equal_pairs_is_kept() -> None:
    rows = [LengthRow(1, 2, "a"), LengthRow(1, 3), LengthRow(1, 2, "b")]
    assert without_repeats(rows) == [LengthRow(1, 2, "a"), LengthRow(1, 3)]
