"""What a run leaves behind: a result file (JSON) and a file with one line per request (CSV).

Replay and simulation both write theirs here. The bytes depend on the records alone: keys and rows have a fixed order
and numbers a fixed rounding. Missing data is null in JSON and an empty field in CSV, never 0.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lmdeploy_slo.core.metrics import RequestRecord
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.errors import ConfigError

REQUEST_COLUMNS = (
    "id",
    "arrival_ms",
    "task",
    "prompt_tokens",
    "output_tokens",
    "predicted_output_tokens",
    "dispatched_ms",
    "ttft_ms",
    "tpot_ms",
    "e2e_ms",
    "slo_met",
    "status",
)
_DIGITS = 6  # of seconds: a microsecond; of milliseconds: more than any clock here resolves


def results_json(runs: Sequence[dict[str, Any]]) -> str:
    """The text of a result file with `runs` as `core.metrics.summarize` makes them, in the order given."""
    return json_text({"runs": runs})


def json_text(document: Any) -> str:
    """JSON with the rounding of result files."""
    return json.dumps(_rounded(document), indent=2, allow_nan=False) + "\n"


def write_json(path: Path, document: Any) -> None:
    """Writes `json_text`; raises ConfigError where that fails."""
    _write(path, json_text(document))


def write_results(path: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Writes the result file; raises ConfigError where that fails."""
    _write(path, results_json(runs))


def write_requests(path: Path, records: Iterable[RequestRecord]) -> None:
    """Writes one line per request, by arrival; raises ConfigError where that fails.

    arrival_ms and dispatched_ms are instants, counted from the start of the run; ttft_ms, tpot_ms and e2e_ms are
    durations, the last two only of requests that ran to their end. slo_met is true, false, or empty where the request
    carried no objective or was cancelled by its client.
    """
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(REQUEST_COLUMNS)
            by_arrival = sorted(records, key=lambda r: (r.timing.arrival_at_s, len(r.request_id), r.request_id))
            writer.writerows(map(_request_line, by_arrival))
    except OSError as error:
        raise _cannot_write(path, error) from error


def check_writable(paths: Iterable[Path | None]) -> None:
    """Raises ConfigError for a path that could not be written, so that a run does not end in vain; skips None."""
    for path in paths:
        if path is None:
            continue
        try:
            existed = path.exists()
            with path.open("a", encoding="utf-8"):
                pass
            if not existed:
                path.unlink()
        except OSError as error:
            raise _cannot_write(path, error) from error


def _request_line(record: RequestRecord) -> list[str]:
    timing = record.timing
    finished = record.status is EndStatus.FINISHED
    met = record.slo_met
    return [
        record.request_id,
        _milliseconds(timing.arrival_at_s),
        record.task,
        str(record.prompt_tokens),
        str(timing.output_tokens) if timing.output_tokens else "",  # not counted where the request did not finish
        "" if record.predicted_output_tokens is None else f"{record.predicted_output_tokens:.3f}",
        _milliseconds(timing.dispatched_at_s),
        _milliseconds(timing.ttft_s),
        _milliseconds(timing.tpot_s if finished else None),
        _milliseconds(timing.e2e_s if finished else None),
        "" if met is None else str(met).lower(),
        record.status.value,
    ]


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return value


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path}: cannot be written: {error.strerror or error}")
