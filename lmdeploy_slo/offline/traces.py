"""Recorded request traces: from files of three formats to one list of rows.

    azure     CSV with TIMESTAMP, ContextTokens, GeneratedTokens; instants on the calendar, one task a file
    mooncake  JSON lines with timestamp (ms), input_length, output_length, hash_ids; instants from the trace's start
    plain     CSV with arrival_s, input_tokens, output_tokens and, optionally, task_class; instants as in mooncake

The format is told by content, never by name, and each file may be gzipped. Knows nothing of SLOs, of a server or of
how fast a trace is replayed.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lmdeploy_slo.errors import TraceError

_GZIP_MAGIC = b"\x1f\x8b"
_Row = TypeVar("_Row")
_NS = 1_000_000_000
_TIMESTAMP = re.compile(
    r"(?P<instant>\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(?P<fraction>\d{1,9}))?(?P<zone>Z|[+-]\d\d:\d\d)?"
)


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One recorded request.

    index: its place in the whole trace by arrival, from 0; it stays the same whatever part of the trace is used.
    arrival_s: seconds since the first request of the trace. input_tokens, output_tokens: >= 1.
    task: "" where the trace names none. hash_ids: prefix blocks of the prompt, None where the trace has none.
    """

    index: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    task: str = ""
    hash_ids: tuple[int, ...] | None = None


class _RawRow(NamedTuple):
    at_ns: int  # integers, so that instants on the calendar keep their last digit
    input_tokens: int
    output_tokens: int
    task: str
    hash_ids: tuple[int, ...] | None = None


class _Line(NamedTuple):
    """Where a value came from, for messages."""

    path: Path
    number: int

    def wrong(self, field: str, problem: str) -> TraceError:
        return TraceError(f"{self.path}, line {self.number}, {field}: {problem}")


def read_traces(paths: Sequence[str | Path], tasks: Sequence[str] = ()) -> list[TraceRow]:
    """All rows of all files, by arrival; the earliest is at 0.

    tasks: none, or one per file in the same order: the task of every row of that file ("" keeps the file's own).
    Several files are merged on the instants they recorded; equal instants keep the order of files and lines. A file
    with calendar instants cannot be merged with one that counts from its own start. A recorded length of 0 is read
    as 1, the least an engine can serve; a negative one is an error.
    Raises TraceError, which names the file, the line and the field.
    """
    if not paths:
        raise TraceError("no trace was named")
    if tasks and len(tasks) != len(paths):
        raise TraceError(
            f"{len(tasks)} tasks were given for {len(paths)} traces: name one per trace, in the same order"
        )
    raw: list[_RawRow] = []
    calendar: dict[bool, Path] = {}
    for position, path in enumerate(map(Path, paths)):
        rows, on_calendar = _read_file(path)
        calendar.setdefault(on_calendar, path)
        task = tasks[position] if tasks else ""
        raw.extend(row._replace(task=task) if task else row for row in rows)
    if len(calendar) > 1:
        raise TraceError(
            f"{calendar[True]} has calendar instants and {calendar[False]} counts from its own start: "
            "they cannot be merged"
        )
    raw.sort(key=lambda row: row.at_ns)
    first_ns = raw[0].at_ns
    return [
        TraceRow(index, (row.at_ns - first_ns) / _NS, row.input_tokens, row.output_tokens, row.task, row.hash_ids)
        for index, row in enumerate(raw)
    ]


def _read_file(path: Path) -> tuple[list[_RawRow], bool]:
    """The rows of one file in its own order, and whether their instants are on the calendar."""
    lines = text_of(path).splitlines()
    start = next((n for n, line in enumerate(lines) if line.strip()), None)
    if start is None:
        raise TraceError(f"{path}: the trace is empty")
    numbered = [(n, line) for n, line in enumerate(lines[start:], start + 1) if line.strip()]
    on_calendar = False
    if numbered[0][1].lstrip().startswith("{"):
        rows = list(_mooncake(path, numbered))
    else:
        header = [name.strip() for name in next(csv_rows(path, csv.reader([numbered[0][1]])))]
        body = numbered[1:]
        if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= set(header):
            on_calendar = True
            rows = list(_azure(path, header, body))
        elif {"arrival_s", "input_tokens", "output_tokens"} <= set(header):
            rows = list(_plain(path, header, body))
        else:
            raise TraceError(
                f"{path}, line {numbered[0][0]}: not a trace this program reads; expected the columns "
                "TIMESTAMP,ContextTokens,GeneratedTokens or arrival_s,input_tokens,output_tokens[,task_class], "
                "or JSON lines with timestamp, input_length, output_length"
            )
    if not rows:
        raise TraceError(f"{path}: the trace has no rows")
    return rows, on_calendar


def text_of(path: Path) -> str:
    """The text of a file, gzipped or not; raises TraceError where it cannot be read."""
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP_MAGIC):
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}") from error
    except (EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: neither text nor a whole gzip file: {error}") from error


def csv_rows(path: Path, reader: Iterable[_Row]) -> Iterator[_Row]:
    """The rows of a reader of the module csv; raises TraceError where that gives up, on a field of 128 KiB say."""
    try:
        yield from reader
    except csv.Error as error:
        raise TraceError(f"{path}: not CSV: {error}") from error


def json_of(text: str) -> Any:
    """What the text says as JSON; raises ValueError, also where it is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


# -- one generator per format ---------------------------------------------------------------------------------------


def _azure(path: Path, header: list[str], body: list[tuple[int, str]]) -> Iterator[_RawRow]:
    for line, record in _csv_records(path, header, body):
        yield _RawRow(
            _calendar_ns(line, record["TIMESTAMP"]),
            _tokens(line, "ContextTokens", record["ContextTokens"]),
            _tokens(line, "GeneratedTokens", record["GeneratedTokens"]),
            "",
        )


def _plain(path: Path, header: list[str], body: list[tuple[int, str]]) -> Iterator[_RawRow]:
    for line, record in _csv_records(path, header, body):
        yield _RawRow(
            _instant_ns(line, "arrival_s", record["arrival_s"], _NS),
            _tokens(line, "input_tokens", record["input_tokens"]),
            _tokens(line, "output_tokens", record["output_tokens"]),
            record.get("task_class", ""),
        )


def _mooncake(path: Path, numbered: list[tuple[int, str]]) -> Iterator[_RawRow]:
    for number, text in numbered:
        line = _Line(path, number)
        try:
            record = json_of(text)
        except ValueError as error:
            raise TraceError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise TraceError(f"{path}, line {number}: expected a JSON object, got {text[:40]!r}")
        for field in ("timestamp", "input_length", "output_length"):
            if field not in record:
                raise line.wrong(field, "is missing")
        hash_ids = record.get("hash_ids")
        if hash_ids is not None and not (isinstance(hash_ids, list) and all(isinstance(h, int) for h in hash_ids)):
            raise line.wrong("hash_ids", "must be a list of integers")
        yield _RawRow(
            _instant_ns(line, "timestamp", record["timestamp"], _NS // 1000),
            _tokens(line, "input_length", record["input_length"]),
            _tokens(line, "output_length", record["output_length"]),
            "",
            None if hash_ids is None else tuple(hash_ids),
        )


# -- values ---------------------------------------------------------------------------------------------------------


def _csv_records(path: Path, header: list[str], body: list[tuple[int, str]]) -> Iterator[tuple[_Line, dict[str, str]]]:
    reader = csv.reader(text for _, text in body)
    for values in csv_rows(path, reader):
        line = _Line(path, body[reader.line_num - 1][0])
        if len(values) != len(header):
            raise TraceError(f"{path}, line {line.number}: {len(values)} fields where the header names {len(header)}")
        yield line, dict(zip(header, map(str.strip, values), strict=True))


def _tokens(line: _Line, field: str, value: object) -> int:
    try:
        tokens = int(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None
    except ValueError:
        tokens = None
    if tokens is None or tokens < 0:
        raise line.wrong(field, f"must be a whole number of tokens, 0 or more, got {value!r}")
    return max(1, tokens)


def _instant_ns(line: _Line, field: str, value: object, unit_ns: int) -> int:
    try:
        return round(float(value) * unit_ns)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):  # the last two: nan and infinity
        raise line.wrong(field, f"must be a finite number, got {value!r}") from None


def _calendar_ns(line: _Line, value: str) -> int:
    match = _TIMESTAMP.fullmatch(value)
    try:
        if match is None:
            raise ValueError
        zone = (match["zone"] or "Z").replace("Z", "+00:00")  # an instant without a zone is taken as UTC
        instant = datetime.fromisoformat(match["instant"] + zone)
    except ValueError:
        raise line.wrong("TIMESTAMP", f"must be like 2023-11-16 18:15:46.6805900, got {value!r}") from None
    since = instant - datetime(1970, 1, 1, tzinfo=timezone.utc)
    return (since.days * 86_400 + since.seconds) * _NS + int((match["fraction"] or "0").ljust(9, "0"))
