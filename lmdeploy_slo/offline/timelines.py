"""Recorded request timelines: what an engine, or a benchmark of it, wrote down of each request.

CSV with a header, or JSON lines; gzipped or not. Which column is what is given by name, or found among the names that
are in use; a field that is empty, null or missing is not known.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmdeploy_slo.errors import TraceError
from lmdeploy_slo.offline.traces import csv_rows, json_of, text_of
from lmdeploy_slo.prediction.fitting import Timelines

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "arrival": ("arrival", "arrival_s", "arrival_time", "arrival_ts"),
    "queued": ("queued", "queued_s", "queued_ts", "queued_time"),
    "scheduled": ("scheduled", "scheduled_s", "scheduled_ts", "scheduled_time"),
    "first_token": ("first_token", "first_token_s", "first_token_ts", "first_token_time"),
    "last_token": ("last_token", "last_token_s", "last_token_ts", "last_token_time"),
    "prompt_tokens": ("prompt_tokens", "input_tokens", "input_toks", "prompt_len"),
    "output_tokens": ("output_tokens", "output_toks", "generated_tokens", "output_len"),
}
"""What a column is -> the names it is looked for under."""

_OPTIONAL = ("arrival", "scheduled", "last_token", "output_tokens")


@dataclass(frozen=True, slots=True)
class RecordedRequests:
    """timelines: in order of queueing. arrival_at_s: instants on a clock that may be another, nan where not known."""

    timelines: Timelines
    arrival_at_s: Sequence[float]

    def until_arrival_of(self, number: int) -> Timelines:
        """What was known of the requests before number `number` (from 0) at the moment that one arrived.

        Where arrivals are told by another clock, the two are set against each other by the request that was queued
        soonest after its arrival. Raises TraceError where there is no such request.
        """
        if not 0 < number < len(self.timelines):
            raise TraceError(f"the record has {len(self.timelines)} requests: nothing follows the first {number}")
        queued = self.timelines.queued_at_s
        arrived = np.asarray(self.arrival_at_s)
        until_s = float(queued[number])
        if math.isfinite(arrived[number]):
            until_s = min(until_s, float(arrived[number] + np.nanmin(queued - arrived)))
        return self.timelines.first(number, until_s)


def read_timelines(path: Path, names: Mapping[str, str | None] | None = None, unit_s: float = 1.0) -> RecordedRequests:
    """The requests of a file. names: which column is what, by the keys of `COLUMNS`. unit_s: of the instants, seconds.

    Raises TraceError, which names the file, the line and the column.
    """
    records = list(_records(path))
    if not records:
        raise TraceError(f"{path}: there are no requests in it")
    columns = _find_columns(path, records[0][1], names or {})
    values: dict[str, list[float]] = {what: [] for what in COLUMNS}
    for line, record in records:
        for what in COLUMNS:
            column = columns.get(what)
            scale = 1.0 if what.endswith("tokens") else unit_s
            values[what].append(math.nan if column is None else scale * _number(path, line, column, record))
    for line, (queued, prompt) in zip(
        (line for line, _ in records), zip(values["queued"], values["prompt_tokens"], strict=True), strict=True
    ):
        if math.isnan(queued) or not prompt >= 1:
            what = "queued" if math.isnan(queued) else "prompt_tokens"
            raise TraceError(f"{path}, line {line}, {columns[what]}: must be known of every request")
    order = np.argsort(values["queued"], kind="stable")
    arrays = {what: np.asarray(column)[order] for what, column in values.items()}
    # A last token whose place is not known says nothing.
    last = np.where(np.isfinite(arrays["output_tokens"]), arrays["last_token"], math.nan)
    timelines = Timelines(
        queued_at_s=arrays["queued"],
        scheduled_at_s=arrays["scheduled"],
        first_token_at_s=arrays["first_token"],
        last_token_at_s=last,
        prompt_tokens=arrays["prompt_tokens"],
        output_tokens=arrays["output_tokens"],
    )
    return RecordedRequests(timelines, arrays["arrival"].tolist())


def _records(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    lines = [(n, line) for n, line in enumerate(text_of(path).splitlines(), 1) if line.strip()]
    if lines and lines[0][1].lstrip().startswith("{"):
        for number, line in lines:
            try:
                record = json_of(line)
            except ValueError as error:
                raise TraceError(f"{path}, line {number}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise TraceError(f"{path}, line {number}: expected a JSON object")
            yield number, record
        return
    reader = csv.DictReader(line for _, line in lines)
    for record in csv_rows(path, reader):
        yield lines[reader.line_num - 1][0], record


def _find_columns(path: Path, record: Mapping[str, Any], names: Mapping[str, str | None]) -> dict[str, str]:
    found = {}
    for what, usual in COLUMNS.items():
        given = names.get(what)
        column = next((name for name in ((given,) if given else usual) if name in record), None)
        if column is not None:
            found[what] = column
        elif given or what not in _OPTIONAL:
            wanted = repr(given) if given else f"{what} (one of {', '.join(usual)})"
            raise TraceError(f"{path}: has no column {wanted}; it has {', '.join(map(str, record))}")
    return found


def _number(path: Path, line: int, column: str, record: Mapping[str, Any]) -> float:
    value = record.get(column)
    if value is None or value == "":
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise TraceError(f"{path}, line {line}, {column}: must be a number, got {value!r}")
    return number
