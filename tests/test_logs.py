"""The log: a line stays a line, JSON stays JSON, the request id is there, and a prompt never is."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runtime_bench import Bench, outcome, virtual

from lmdeploy_slo.errors import EngineError, InvalidRequest, SloError
from lmdeploy_slo.observability.logs import WITHHELD, HumanFormatter, JsonFormatter, RequestLog, set_up_logs
from lmdeploy_slo.testing.builders import make_slo

PROMPT = "my secret prompt"


def record(
    message: str = "text", name: str = "lmdeploy_slo.app", error: BaseException | None = None, **extra: Any
) -> Any:
    info = None if error is None else (type(error), error, error.__traceback__)
    made = logging.LogRecord(name, logging.INFO, "file.py", 1, message, (), info)
    made.__dict__.update(extra)
    return made


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


def test_a_line_for_people() -> None:
    line = HumanFormatter().format(record("it runs", request_id="r1", task="a b", queue_ms=1.5))
    assert line.endswith(' INFO lmdeploy_slo.app: it runs request_id=r1 task="a b" queue_ms=1.5')


def test_an_id_that_is_in_the_text_is_not_repeated() -> None:
    line = HumanFormatter().format(record("request r1 failed", request_id="r1"))
    assert line.endswith("lmdeploy_slo.app: request r1 failed")


def test_an_object_for_programs() -> None:
    told = json.loads(JsonFormatter().format(record("it runs", request_id="r1", rank=3)))
    time = told.pop("time")
    assert time.endswith("Z")
    assert "T" in time
    assert told == {
        "level": "info",
        "logger": "lmdeploy_slo.app",
        "message": "it runs",
        "request_id": "r1",
        "rank": 3,
    }
    assert list(json.loads(JsonFormatter().format(record("x", b=1, request_id="r", a=2)))) == [
        "time", "level", "logger", "message", "request_id", "b", "a",
    ]  # fmt: skip


@given(st.text(), st.text())
def test_whatever_is_logged_a_line_stays_a_line(message: str, request_id: str) -> None:
    written = record(message.replace("%", "%%"), request_id=request_id)
    written.args = ()
    assert len(HumanFormatter().format(written).splitlines()) == 1
    line = JsonFormatter().format(written)
    assert "\n" not in line
    assert json.loads(line)["request_id"] == request_id


@pytest.mark.parametrize(
    "logger", ["lmdeploy_slo.gateway.service", "lmdeploy_slo.runtime.runtime", "lmdeploy_slo.engine.lmdeploy"]
)
@pytest.mark.parametrize("formatter", [HumanFormatter, JsonFormatter])
def test_what_an_exception_quotes_is_withheld(logger: str, formatter: Any) -> None:
    """The exception's own text and that of what caused it; where it happened and of what kind it was stays."""
    error = raised(RuntimeError(f"bad: {PROMPT}"), cause=raised(ValueError(f"cannot encode {PROMPT}")))
    line = formatter().format(record(name=logger, error=error))
    assert PROMPT not in line
    assert WITHHELD in line
    assert "RuntimeError" in line
    assert "ValueError" in line
    assert "test_logs.py" in line
    assert PROMPT in formatter(content=True).format(record(name=logger, error=error))


def test_our_own_errors_and_other_parts_are_told_in_full() -> None:
    told = HumanFormatter().format(record(name="lmdeploy_slo.gateway", error=raised(SloError("the port is taken"))))
    assert "SloError: the port is taken" in told
    told = HumanFormatter().format(record(name="lmdeploy_slo.scheduling", error=raised(ValueError("send_now is 7"))))
    assert "ValueError: send_now is 7" in told


def test_json_has_the_exception_apart() -> None:
    told = json.loads(JsonFormatter().format(record(error=raised(ValueError("x"), cause=raised(KeyError("y"))))))
    assert (told["error"]["type"], told["error"]["message"]) == ("ValueError", "x")
    assert told["error"]["stack"].index("KeyError: 'y'") < told["error"]["stack"].index("ValueError: x")


def test_an_endless_chain_of_exceptions_ends() -> None:
    error = raised(ValueError("x"))
    other = raised(KeyError("y"), cause=error)
    error.__context__, error.__suppress_context__ = other, False
    assert "which led to" in HumanFormatter().format(record(error=error))


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("lmdeploy_slo")
    before = (root.handlers[:], root.level, ours.level)
    yield
    root.handlers[:], root.level = before[0], before[1]
    ours.setLevel(before[2])
    root.setLevel(before[1])


@pytest.mark.usefixtures("_logging_as_before")
@pytest.mark.parametrize(("level", "ours", "others"), [("DEBUG", 3, 2), ("INFO", 2, 2), ("WARNING", 1, 1)])
def test_levels(level: str, ours: int, others: int) -> None:
    stream = io.StringIO()
    set_up_logs(as_json=True, level=getattr(logging, level), stream=stream)
    for name in ("lmdeploy_slo.x", "foreign"):
        for number in (logging.DEBUG, logging.INFO, logging.WARNING):
            logging.getLogger(name).log(number, "text")
    lines = [json.loads(line)["logger"] for line in stream.getvalue().splitlines()]
    assert (lines.count("lmdeploy_slo.x"), lines.count("foreign")) == (ours, others)


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.told: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(json.loads(JsonFormatter().format(record)))


@pytest.fixture
def kept() -> Iterator[Kept]:
    handler, logger = Kept(), logging.getLogger("lmdeploy_slo.requests")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


async def some_requests(bench: Bench, *, every: bool) -> None:
    bench.runtime.journal.watch(RequestLog(every=every))
    streams = [bench.submit("good", task_type="chat", slo=make_slo(e2e_ms=5000)), bench.submit("bad")]
    await bench.engine.has("good", "bad")
    bench.clock.advance(0.5)
    bench.engine.step("good")
    bench.engine.emit("bad", error=EngineError(f"no memory for {PROMPT}", "oom"), text="")
    for stream in streams:
        await outcome(stream)
    bench.runtime.journal.refused(InvalidRequest([]), request_id="worse", malformed=True)


def test_failed_requests_are_logged(kept: Kept) -> None:
    virtual()(lambda bench: some_requests(bench, every=False))()
    (told,) = kept.told
    assert (told["level"], told["request_id"], told["reason"]) == ("warning", "bad", "ENGINE_ERROR")
    assert PROMPT not in str(told)


def test_every_request_is_logged_where_that_is_asked(kept: Kept) -> None:
    virtual()(lambda bench: some_requests(bench, every=True))()
    good, bad, worse = kept.told
    assert (good["request_id"], good["status"], good["reason"]) == ("good", "finished", "stop")
    assert (good["ttft_ms"], good["e2e_ms"], good["slo_met"], good["task"]) == (500.0, 500.0, True, "chat")
    assert "slo_met" not in bad
    assert (worse["message"], worse["reason"]) == ("request refused", "INVALID_REQUEST")
