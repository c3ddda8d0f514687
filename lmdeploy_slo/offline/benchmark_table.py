"""Tables of static benchmarks, such as those of LMDeploy's profile_generation.py: a line per batch, all of whose
requests have the same prompt and output lengths.

The time per token of a line is a decode step of its batch at the context halfway through the output. The time to first
token counts where one request runs alone: of a larger batch nobody knows which prompts shared a pass.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lmdeploy_slo.errors import TraceError
from lmdeploy_slo.offline.traces import csv_rows, text_of
from lmdeploy_slo.prediction.observations import Observation, decode_observation, prefill_observation

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "batch": ("batch", "batch_size", "concurrency"),
    "prompt_tokens": ("prompt_tokens", "input_tokens", "prompt_len"),
    "output_tokens": ("output_tokens", "completion_tokens", "output_len"),
    "token_s": ("tok_p50_s", "50%(s)", "token_s", "tpot_s"),
    "first_token_s": ("ftl_ave_s", "FTL(ave)(s)", "ftl_min_s", "FTL(min)(s)", "ttft_s"),
}
"""What a column is -> the names it is looked for under; the first of them that is there."""


@dataclass(frozen=True, slots=True)
class BenchmarkTable:
    """observations: of the lines that count. left_out: lines whose batch the KV cache cannot have held."""

    observations: tuple[Observation, ...]
    left_out: int


def read_table(
    path: Path,
    *,
    max_prefill_tokens: int,
    kv_tokens: int | None = None,
    names: Mapping[str, str | None] | None = None,
    unit_s: float = 1.0,
) -> BenchmarkTable:
    """The table in a CSV file (also gzipped). names: which column is what, by the keys of `COLUMNS`.

    kv_tokens: a batch whose prompts and half outputs are more than this did not run at once, and is left out. unit_s:
    of the times, seconds. Raises TraceError, which names the file, the line and the column.
    """
    lines = text_of(path).splitlines()
    reader = csv.DictReader(lines)
    header = next(csv_rows(path, csv.reader(lines)), [])
    columns = _find_columns(path, header, names or {})
    found: list[Observation] = []
    left_out = 0
    for record in csv_rows(path, reader):
        where = f"{path}, line {reader.line_num}"
        batch, prompt, output, token_s = (
            _number(where, columns[what], record) for what in ("batch", "prompt_tokens", "output_tokens", "token_s")
        )
        if not (batch >= 1 and prompt >= 1 and output >= 1 and token_s > 0):
            raise TraceError(f"{where}: a batch, its tokens and their time are above 0")
        context = batch * (prompt + output / 2)
        if kv_tokens is not None and context > kv_tokens:
            left_out += 1
            continue
        name = f"{batch:g} x ({prompt:g} + {output:g})"
        first = columns.get("first_token_s")
        try:
            found.append(decode_observation(batch, context, unit_s * token_s, point=f"decode {name}"))
            if batch == 1 and first is not None and record.get(first):
                seconds = unit_s * _number(where, first, record)
                found.append(
                    prefill_observation(
                        1, int(prompt), seconds, max_prefill_tokens=max_prefill_tokens, point=f"prefill {name}"
                    )
                )
        except (ValueError, OverflowError) as error:
            raise TraceError(f"{where}: {error}") from error
    if not found:
        raise TraceError(f"{path}: there is no batch in it{' that the KV cache holds' if left_out else ''}")
    return BenchmarkTable(tuple(found), left_out)


def _find_columns(path: Path, present: object, names: Mapping[str, str | None]) -> dict[str, str]:
    there = [str(name) for name in present] if isinstance(present, (list, tuple)) else []
    found = {}
    for what, usual in COLUMNS.items():
        wanted = names.get(what)
        if wanted is not None and wanted not in there:
            raise TraceError(f"{path}: it has no column {wanted!r}; it has {', '.join(there)}")
        chosen = wanted or next((name for name in usual if name in there), None)
        if chosen is not None:
            found[what] = chosen
        elif what != "first_token_s":
            raise TraceError(f"{path}: it has no column {what} (one of {', '.join(usual)}); it has {', '.join(there)}")
    return found


def _number(where: str, column: str, record: Mapping[str, str | None]) -> float:
    text = record.get(column)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise TraceError(f"{where}, {column}: must be a number, got {text!r}")
    return value
