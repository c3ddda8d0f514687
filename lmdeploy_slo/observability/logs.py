"""Logs of a server: for people, or one JSON object a line; each line about a request has its id, none has its text.

What a foreign package says in an exception may quote a prompt. Where something failed while a request was handled, the
traceback is logged without the texts of its exceptions, unless `content` says otherwise.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any, TextIO

from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.errors import SloError
from lmdeploy_slo.runtime.observer import AppliedPlan, EndedRequest, Refusal

requests_logger = logging.getLogger("lmdeploy_slo.requests")

WITHHELD = "(its text is withheld, as it may quote a prompt: --log-content)"
_WITH_REQUESTS = tuple(f"lmdeploy_slo.{part}" for part in ("gateway", "runtime", "engine", "frontend", "slo_pipeline"))
_OF_ANY_RECORD = frozenset((*vars(logging.makeLogRecord({})), "message", "asctime"))


def set_up_logs(
    *, as_json: bool = False, level: int = logging.INFO, content: bool = False, stream: TextIO | None = None
) -> None:
    """Logs of the whole process go to `stream` (None: stderr) from now on. The level is that of this package; of others
    DEBUG is left out. content: exceptions are told in full, whatever they quote."""
    handler = _Lines(stream or sys.stderr)
    handler.setFormatter((JsonFormatter if as_json else HumanFormatter)(content=content))
    logging.basicConfig(level=max(level, logging.INFO), handlers=[handler], force=True)
    logging.getLogger("lmdeploy_slo").setLevel(level)


class _Lines(logging.StreamHandler):  # type: ignore[type-arg] # not at run time before Python 3.11
    """A class of its own: LMDeploy turns every plain StreamHandler of the process down to errors."""


class HumanFormatter(logging.Formatter):
    """`2026-01-31 12:00:00,000 INFO lmdeploy_slo.app: text key=value ...`, a traceback below it."""

    def __init__(self, *, content: bool = False) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._content = content

    def format(self, record: logging.LogRecord) -> str:
        line = f"{self.formatTime(record)} {record.levelname} {record.name}: {_one_line(record.getMessage())}"
        told = [(key, value) for key, value in _fields(record) if key != "request_id" or str(value) not in line]
        fields = " ".join(f"{key}={_plain(value)}" for key, value in told)
        error = _error_of(record, self._content)
        return line + (f" {fields}" if fields else "") + (f"\n{error[2].rstrip()}" if error else "")


class JsonFormatter(logging.Formatter):
    """One object: time (RFC 3339), level, logger, message, request_id and other fields where there are any, error."""

    def __init__(self, *, content: bool = False) -> None:
        super().__init__()
        self._content = content

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, timezone.utc)
        values: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **dict(_fields(record)),
        }
        error = _error_of(record, self._content)
        if error is not None:
            values["error"] = dict(zip(("type", "message", "stack"), error))
        return json.dumps(values, ensure_ascii=False, default=str, separators=(",", ":"))


class RequestLog:
    """An observer of the runtime: a line for each request that the engine failed; with `every`, for all of them."""

    def __init__(self, *, every: bool = False) -> None:
        self._every = every

    def on_end(self, ended: EndedRequest) -> None:
        failed = ended.status is EndStatus.FAILED
        if not failed and not self._every:
            return
        timing = ended.timing
        fields: dict[str, Any] = {
            "request_id": ended.spec.request_id,
            "task": ended.task,
            "status": ended.status.value,
            "reason": ended.reason,
            "prompt_tokens": ended.spec.prompt_tokens,
            "output_tokens": timing.output_tokens,
            "queue_ms": _ms(timing.queue_s),
            "ttft_ms": _ms(timing.ttft_s),
            "tpot_ms": _ms(timing.tpot_s),
            "e2e_ms": _ms(timing.e2e_s),
            "slo_met": ended.slo_met,
            "rank": ended.rank,
        }
        told = {name: value for name, value in fields.items() if value is not None}
        requests_logger.log(logging.WARNING if failed else logging.INFO, "request ended", extra=told)

    def on_refusal(self, refusal: Refusal) -> None:
        if self._every:
            fields = {"request_id": refusal.request_id, "task": refusal.task, "reason": refusal.reason}
            requests_logger.info("request refused", extra=fields)

    def on_plan(self, applied: AppliedPlan) -> None:
        """Plans have metrics."""


def _ms(duration_s: float | None) -> float | None:
    return None if duration_s is None else round(duration_s * 1e3, 3)


def _fields(record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
    """What was given as `extra`, the request id first."""
    given = {key: value for key, value in vars(record).items() if key not in _OF_ANY_RECORD}
    if "request_id" in given:
        yield "request_id", given.pop("request_id")
    yield from given.items()


def _plain(value: Any) -> str:
    text = str(value)
    return text if text and text.isprintable() and not set(text) & set(' ="') else json.dumps(text)


def _one_line(text: str) -> str:
    """Whatever a client put into it, a line stays a line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _error_of(record: logging.LogRecord, content: bool) -> tuple[str, str, str] | None:
    """(type, text, traceback) of the exception a record is about, None where it is about none."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return None
    quotes = not content and record.name.startswith(_WITH_REQUESTS)
    chain: list[BaseException] = []  # what was raised last comes first
    parts: list[str] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        stack = "".join(traceback.format_tb(link.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{stack}{type(link).__name__}: {_text_of(link, quotes)}\n")
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return type(error).__name__, _text_of(error, quotes), "\nwhich led to\n\n".join(reversed(parts))


def _text_of(error: BaseException, quotes: bool) -> str:
    """Ours quote nothing that a client wrote."""
    return WITHHELD if quotes and not isinstance(error, SloError) else str(error)
