"""Tables of static batches become observations of decode steps and of single prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdeploy_slo.errors import TraceError
from lmdeploy_slo.offline.benchmark_table import BenchmarkTable, read_table
from lmdeploy_slo.prediction.observations import Kind

HEADER = "batch,prompt_tokens,completion_tokens,FTL(ave)(s),50%(s)"
ROWS = ("1,100,50,0.02,0.010", "16,2000,100,0.5,0.020", "1,9000,10,0.9,")


def table(path: Path, *rows: str, header: str = HEADER) -> Path:
    path.write_text("\n".join((header, *rows)) + "\n")
    return path


def read(path: Path, **options: object) -> BenchmarkTable:
    return read_table(path, max_prefill_tokens=8192, **options)  # type: ignore[arg-type]


def test_lmdeploys_columns_are_known(tmp_path: Path) -> None:
    found = read(table(tmp_path / "t.csv", *ROWS[:2]))
    decode = [o for o in found.observations if o.kind is Kind.DECODE]
    (prefill,) = (o for o in found.observations if o.kind is Kind.PREFILL)
    assert [(o.batch_size, o.context_tokens, o.seconds) for o in decode] == [(1, 125, 0.010), (16, 16 * 2050, 0.020)]
    assert (prefill.prefill_tokens, prefill.seconds, prefill.steps) == (100, 0.02, 1)
    assert found.left_out == 0


def test_batches_that_memory_cannot_hold_are_left_out(tmp_path: Path) -> None:
    found = read(table(tmp_path / "t.csv", *ROWS[:2]), kv_tokens=30_000)
    assert found.left_out == 1
    assert {o.batch_size for o in found.observations} == {1, 0}
    with pytest.raises(TraceError, match="there is no batch in it that the KV cache holds"):
        read(table(tmp_path / "t.csv", ROWS[1]), kv_tokens=30_000)


def test_columns_may_be_named_and_have_a_unit(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "2,10,4,7.5", header="n,in,out,ms")
    names = {"batch": "n", "prompt_tokens": "in", "output_tokens": "out", "token_s": "ms"}
    (only,) = read(path, names=names, unit_s=1e-3).observations
    assert (only.batch_size, only.context_tokens, only.seconds) == (2, 24, pytest.approx(7.5e-3))


@pytest.mark.parametrize(
    ("rows", "header", "names", "message"),
    [
        ((), HEADER, {}, "there is no batch in it"),
        (ROWS, HEADER, {}, r"line 4, 50%\(s\): must be a number, got ''"),
        (("1,x,50,0.02,0.010",), HEADER, {}, "line 2, prompt_tokens: must be a number, got 'x'"),
        (("0,10,50,0.02,0.010",), HEADER, {}, "line 2: a batch, its tokens and their time are above 0"),
        (ROWS, "a,b,c,d,e", {}, r"has no column batch \(one of batch, batch_size, concurrency\); it has a, b, c, d, e"),
        (ROWS, HEADER, {"token_s": "p50"}, "has no column 'p50'; it has batch, "),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, rows: tuple[str, ...], header: str, names: dict[str, str], message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        read(table(tmp_path / "t.csv", *rows, header=header), names=names)
