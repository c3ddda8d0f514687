"""Step models fitted to request timelines that a simulated engine made, whose coefficients are known."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmdeploy_slo.cli.main import main
from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.metrics import RequestRecord
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.errors import TraceError
from lmdeploy_slo.offline.simulator import SimulatedRequest, Simulator
from lmdeploy_slo.offline.timelines import RecordedRequests, read_timelines
from lmdeploy_slo.prediction.fitting import StepFit, Timelines, fit_step_model
from lmdeploy_slo.prediction.profiles import load_profile, profile_names
from lmdeploy_slo.scheduling.policy import make_policy
from lmdeploy_slo.testing.builders import A100, make_spec

LIMITS = EngineLimits(max_batch_size=64, max_prefill_tokens=2048)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The status the process would end with."""
    monkeypatch.setattr(sys, "argv", ["lmdeploy_slo", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def requests(count: int, rate_rps: float, seed: int = 0) -> list[SimulatedRequest]:
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1 / rate_rps, count))
    prompts = np.clip(random.lognormal(6.3, 0.9, count), 8, 4000).astype(int)
    outputs = np.clip(random.lognormal(5.5, 0.6, count), 2, 1000).astype(int)
    return [
        SimulatedRequest(make_spec(str(n), arrival_at_s=float(at), prompt_tokens=int(p), max_new_tokens=1000), int(o))
        for n, (at, p, o) in enumerate(zip(arrivals, prompts, outputs, strict=True))
    ]


def simulate(model: StepModel, offered: list[SimulatedRequest]) -> list[RequestRecord]:
    records = Simulator(make_policy("fcfs"), model=model, limits=LIMITS, plan_latency_s=0.0).run(offered)
    return sorted(records, key=lambda record: int(record.request_id))


def timelines_of(records: list[RequestRecord]) -> Timelines:
    def column(get: Any) -> Any:
        return np.array([float(get(record)) for record in records])

    return Timelines(
        column(lambda r: r.timing.arrival_at_s),
        column(lambda r: r.timing.dispatched_at_s),
        column(lambda r: r.timing.first_token_at_s),
        column(lambda r: r.timing.ended_at_s),
        column(lambda r: r.prompt_tokens),
        column(lambda r: r.timing.output_tokens),
    )


def means(records: list[RequestRecord]) -> tuple[float, float, float]:
    timings = [record.timing for record in records]
    return tuple(  # type: ignore[return-value]
        float(np.mean([getattr(timing, name) for timing in timings])) for name in ("ttft_s", "tpot_s", "e2e_s")
    )


@pytest.mark.parametrize("name", profile_names())
def test_what_a_fitted_model_predicts_is_what_the_true_one_does(name: str) -> None:
    """From the first half of a record, what had happened until then; judged on the second half."""
    model = load_profile(name).step_model
    offered = requests(200, rate_rps=5.0)
    truth = simulate(model, offered)
    recorded = timelines_of(truth)
    fitted = fit_step_model(recorded.first(100, float(recorded.queued_at_s[100])), LIMITS.max_prefill_tokens)
    again = simulate(fitted.model, offered)
    assert means(again[100:]) == pytest.approx(means(truth[100:]), rel=0.05)
    assert fitted.decode_error is not None
    assert fitted.decode_error < 0.02


def test_a_whole_record_gives_the_coefficients() -> None:
    model = StepModel(c0=0.02, p1=6e-5, p2=2e-9, d1=2e-4, d2=2e-7)
    offered = requests(300, rate_rps=4.0)
    fitted = fit_step_model(timelines_of(simulate(model, offered)), LIMITS.max_prefill_tokens)
    assert (fitted.requests, fitted.finished, fitted.steps_ahead) == (300, 300, 0)
    batch, context = 40, 40 * 900
    assert fitted.model.step_s(0, 0, batch, context) == pytest.approx(model.step_s(0, 0, batch, context), rel=0.01)
    assert fitted.model.step_s(0, 0, 2, 1800) == pytest.approx(model.step_s(0, 0, 2, 1800), rel=0.03)
    assert fitted.model.prefill_stall_s(1000) == pytest.approx(model.prefill_stall_s(1000), rel=0.05)


def test_the_same_record_gives_the_same_fit() -> None:
    recorded = timelines_of(simulate(A100, requests(60, rate_rps=4.0)))
    fits = [fit_step_model(recorded, 2048) for _ in range(2)]
    assert fits[0] == fits[1]
    assert all(value > 0 for value in astuple(fits[0].model))


def test_a_few_wild_instants_do_little() -> None:
    offered = requests(150, rate_rps=4.0)
    recorded = timelines_of(simulate(A100, offered))
    last = recorded.last_token_at_s.copy()
    last[::20] += 3.0  # a client that read late
    wild = Timelines(
        recorded.queued_at_s,
        recorded.scheduled_at_s,
        recorded.first_token_at_s,
        last,
        recorded.prompt_tokens,
        recorded.output_tokens,
    )
    step = [fit_step_model(t, 2048).model.step_s(0, 0, 20, 20_000) for t in (recorded, wild)]
    assert step[1] == pytest.approx(step[0], rel=0.02)


def test_too_little_is_refused() -> None:
    recorded = timelines_of(simulate(A100, requests(7, rate_rps=4.0)))
    with pytest.raises(TraceError, match="at least 8 requests with a first token, got 7"):
        fit_step_model(recorded, 2048)


# -- files ----------------------------------------------------------------------------------------------------------

HEADER = "queued_ts,scheduled_ts,first_token_ts,last_token_ts,input_toks,output_toks"


def test_a_file_may_leave_out_what_was_not_known(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text(HEADER + "\n2.0,2.5,3.0,,30,\n1.0,,1.5,9.0,10,7\n3.0,,,,20,\n")
    timelines = read_timelines(path).timelines
    assert timelines.queued_at_s.tolist() == [1.0, 2.0, 3.0]
    assert timelines.prompt_tokens.tolist() == [10, 30, 20]
    assert timelines.last_token_at_s.tolist()[0] == 9.0
    assert np.isnan(timelines.last_token_at_s[1:]).all()
    assert np.isnan(timelines.scheduled_at_s[[0, 2]]).all()


def test_columns_may_be_named_and_have_a_unit(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    rows = [{"in": 1500, "p": 10, "first": 2500, "extra": "x"}, {"in": 2500, "p": 20, "first": None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"queued": "in", "prompt_tokens": "p", "first_token": "first"}
    timelines = read_timelines(path, names, unit_s=1e-3).timelines
    assert timelines.queued_at_s.tolist() == [1.5, 2.5]
    assert timelines.first_token_at_s[0] == 2.5
    assert math.isnan(timelines.first_token_at_s[1])


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("", {}, "no requests"),
        (HEADER + "\n", {}, "no requests"),
        ("queued_ts,input_toks\n1,2\n", {}, r"has no column first_token \(one of"),
        (HEADER + "\n1,1,2,3,4,5\n", {"queued": "in"}, r"has no column 'in'; it has queued_ts"),
        (HEADER + "\n1,1,2,3,4,5\nsoon,1,2,3,4,5\n", {}, r"line 3, queued_ts: must be a number, got 'soon'"),
        (HEADER + "\n1,1,2,3,,5\n", {}, r"line 2, input_toks: must be known of every request"),
        ('{"queued_ts": 1}\n{', {}, r"line 2: not JSON"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, names: dict[str, str], message: str) -> None:
    path = tmp_path / "requests"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_timelines(path, names)


def test_only_what_was_known_when_the_next_arrived_counts() -> None:
    """Arrivals are told by a clock that is 1000 s ahead, and a request is queued 0.1 s after its arrival, or later."""
    instants = np.array([0.0, 1.0, 2.0])
    timelines = Timelines(
        instants + np.array([0.1, 0.3, 0.4]),
        instants + 0.5,
        instants + 1.2,
        instants + 5.0,
        np.full(3, 10.0),
        np.full(3, 4.0),
    )
    record = RecordedRequests(timelines, (instants + 1000.0).tolist())
    known = record.until_arrival_of(2)  # at 2.1 on the clock of the others
    assert len(known) == 2
    assert known.first_token_at_s[0] == 1.2
    assert np.isnan(known.first_token_at_s[1])
    assert np.isnan(known.last_token_at_s).all()
    assert np.isnan(record.until_arrival_of(1).first_token_at_s[0])
    without = RecordedRequests(timelines, [math.nan] * 3).until_arrival_of(1)  # until it was queued
    assert without.first_token_at_s.tolist() == [1.2]
    with pytest.raises(TraceError, match="nothing follows the first 3"):
        record.until_arrival_of(3)


def test_the_command_writes_a_profile_that_simulate_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    records = simulate(A100, requests(60, rate_rps=4.0))
    path, out = tmp_path / "requests.csv", tmp_path / "mine.json"
    lines = ["id,arrived,sent,first,end,prompt_tokens,output_tokens"]
    for record in records:
        timing = record.timing
        instants = (timing.arrival_at_s, timing.dispatched_at_s, timing.first_token_at_s, timing.ended_at_s)
        in_ms = ",".join(repr(1e3 * (instant or 0.0)) for instant in instants)
        lines.append(f"{record.request_id},{in_ms},{record.prompt_tokens},{timing.output_tokens}")
    path.write_text("\n".join(lines))
    columns = ("--queued", "arrived", "--scheduled", "sent", "--first-token", "first", "--last-token", "end")
    arguments = ("--unit", "ms", "--max-prefill-tokens", "2048", "--first", "40", "--gpu", "A100", "-o", str(out))
    assert call(monkeypatch, "profile", "fit", str(path), *columns, *arguments) == 0
    fitted = load_profile(str(out))
    assert (fitted.name, fitted.gpu) == ("mine", "A100")
    assert "requests of requests.csv" in fitted.source
    assert fitted.step_model.step_s(0, 0, 20, 18_000) == pytest.approx(A100.step_s(0, 0, 20, 18_000), rel=0.05)
    assert "median error of those of decode" in capsys.readouterr().out


def test_the_command_wants_a_json_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(monkeypatch, "profile", "fit", str(tmp_path / "r.csv"), "-o", str(tmp_path / "profile")) == 2
    assert "a profile is a .json file" in capsys.readouterr().err


def test_a_fit_says_what_it_rests_on() -> None:
    fitted: StepFit = fit_step_model(timelines_of(simulate(A100, requests(60, rate_rps=4.0))), 2048)
    assert fitted.intervals > 50
    assert 1 <= fitted.batch_range[0] < fitted.batch_range[1] <= LIMITS.max_batch_size
    assert fitted.prefill_error is not None
