"""Writes traces in the formats that `traces` reads; what a format has no place for is said by whoever calls."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from enum import Enum
from pathlib import Path

from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.offline.traces import TraceRow

_AZURE_START = datetime(2000, 1, 1, tzinfo=timezone.utc)


class TraceFormat(str, Enum):
    """plain: with tasks. mooncake: without tasks, with prompt blocks where they are known. azure: without either, one
    file for each task."""

    PLAIN = "plain"
    MOONCAKE = "mooncake"
    AZURE = "azure"


def write_trace(path: Path, rows: Sequence[TraceRow], form: TraceFormat) -> list[Path]:
    """Writes the rows, gzipped where the name ends in .gz, and returns the files written. Raises ConfigError."""
    if form is TraceFormat.PLAIN:
        return [_write(path, _plain(rows))]
    if form is TraceFormat.MOONCAKE:
        return [_write(path, _mooncake(rows))]
    tasks = list(dict.fromkeys(row.task for row in rows))
    if len(tasks) == 1:
        return [_write(path, _azure(rows))]
    return [_write(_of_task(path, task), _azure([row for row in rows if row.task == task])) for task in tasks]


def _of_task(path: Path, task: str) -> Path:
    """day.csv.gz, chat -> day.chat.csv.gz"""
    stem, dot, suffixes = path.name.partition(".")
    return path.with_name(f"{stem}.{task or 'other'}{dot}{suffixes}")


def _plain(rows: Sequence[TraceRow]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("arrival_s", "input_tokens", "output_tokens", "task_class"))
    writer.writerows((f"{row.arrival_s:.6f}", row.input_tokens, row.output_tokens, row.task) for row in rows)
    return text.getvalue()


def _mooncake(rows: Sequence[TraceRow]) -> str:
    lines = []
    for row in rows:
        record: dict[str, object] = {
            "timestamp": round(row.arrival_s * 1e3, 3),
            "input_length": row.input_tokens,
            "output_length": row.output_tokens,
        }
        if row.hash_ids is not None:
            record["hash_ids"] = list(row.hash_ids)
        lines.append(json.dumps(record))
    return "\n".join(lines) + "\n"


def _azure(rows: Sequence[TraceRow]) -> str:
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for row in rows:
        at = _AZURE_START + timedelta(microseconds=round(row.arrival_s * 1e6))
        lines.append(f"{at:%Y-%m-%d %H:%M:%S.%f},{row.input_tokens},{row.output_tokens}")
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> Path:
    data = text.encode()
    try:
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path
