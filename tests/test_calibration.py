"""Calibration as a whole: it learns or only watches, tells of drift once, and harms nobody when it fails."""

from __future__ import annotations

import logging
from dataclasses import astuple, replace

import pytest

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.prediction.calibration import DRIFT, NO_DRIFT, Calibration
from lmdeploy_slo.testing.builders import A100


class Engine:
    """Requests that decode for ever, two at a time, and what a pass of them takes."""

    def __init__(self, **options: object) -> None:
        self.model = A100
        self.believed: list[StepModel] = []
        self.tokens = {1: 0, 2: 0}
        self.calibration = Calibration(
            A100,
            EngineLimits(),
            progress=self.tokens.__getitem__,
            on_model=self.believed.append,
            **options,  # type: ignore[arg-type]
        )
        self.now_s = 0.0
        for handle in self.tokens:
            self.calibration.sent(handle, 1000, 0.0, 0.0)
            self.calibration.first_token(handle)
            self.tokens[handle] = 1
        self.now_s += self.model.step_s(2000, 2e6, 0, 0)
        self.calibration.step(self.now_s, 0)

    def run(self, passes: int) -> None:
        for _ in range(passes):
            self.now_s += self.model.step_s(0, 0, 2, sum(999 + tokens for tokens in self.tokens.values()))
            for handle in self.tokens:
                self.tokens[handle] += 1
            self.calibration.step(self.now_s, 2)


def test_forecasts_are_right_where_nothing_changed() -> None:
    engine = Engine()
    engine.run(400)
    statistics = engine.calibration.statistics()
    assert statistics.windows == 51
    assert statistics.updates == 51
    assert statistics.relative_error == pytest.approx(0.0, abs=1e-9)
    assert statistics.slowness == pytest.approx(1.0)
    assert (statistics.drifts, statistics.drifting, statistics.failures) == (0, False, 0)
    assert len(engine.believed) == 51


def test_drift_is_told_once_when_it_comes_and_once_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lmdeploy_slo.prediction.calibration")
    engine = Engine()
    engine.run(400)
    engine.model = A100.scaled(1.3)
    engine.run(80)
    first = engine.calibration.statistics()
    assert first.drifting
    assert first.relative_error > NO_DRIFT
    engine.run(800)
    last = engine.calibration.statistics()
    assert (last.drifting, last.drifts) == (False, 1)
    assert last.relative_error < 0.01
    assert last.slowness == pytest.approx(1.3, rel=0.01)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "recalibrating" in caplog.messages[0]
    assert "the model is now c0 1" in caplog.messages[1]


def test_watching_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(learning=False)
    engine.model = A100.scaled(1.3)
    engine.run(400)
    statistics = engine.calibration.statistics()
    assert engine.believed == []
    assert statistics.model == A100
    assert (statistics.updates, statistics.learning) == (0, False)
    assert statistics.relative_error == pytest.approx(0.3, abs=0.01)
    assert statistics.bias == pytest.approx(0.3, abs=0.01)
    assert statistics.slowness == pytest.approx(1.3, abs=0.01)
    assert "recalibrating" not in caplog.text
    assert "has changed" in caplog.text


def test_quiet_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(quiet=True)
    engine.model = A100.scaled(2.0)
    engine.run(400)
    assert engine.calibration.statistics().drifts == 1
    assert caplog.text == ""


def test_a_pause_is_no_drift() -> None:
    engine = Engine()
    engine.run(400)
    engine.now_s += 30.0
    engine.run(80)
    statistics = engine.calibration.statistics()
    assert statistics.drifts == 0
    assert statistics.relative_error < DRIFT
    assert astuple(statistics.model) == pytest.approx(astuple(A100), rel=0.02)


def test_it_goes_on_after_a_restart() -> None:
    engine = Engine()
    engine.model = A100.scaled(1.3)
    engine.run(800)
    again = Engine()
    again.calibration.restore(engine.calibration.state())
    assert again.calibration.model == engine.calibration.model
    assert again.believed[-1] == engine.calibration.model


def test_what_was_learnt_from_another_profile_is_left(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lmdeploy_slo.prediction.calibration")
    other = Calibration(replace(A100, c0=0.02), EngineLimits(), progress=lambda handle: 0)
    engine = Engine()
    engine.calibration.restore(other.state())
    assert engine.calibration.model == A100
    assert "another profile" in caplog.text


def test_who_only_watches_restores_nothing() -> None:
    engine = Engine()
    engine.model = A100.scaled(1.3)
    engine.run(400)
    watching = Engine(learning=False)
    watching.calibration.restore(engine.calibration.state())
    assert watching.calibration.model == A100


def test_a_defect_is_logged_once_and_learning_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine()
    engine.run(80)
    tokens = dict(engine.tokens)
    for _ in range(3):
        engine.tokens.clear()  # the clock's tokens cannot be told
        engine.calibration.step(engine.now_s + 0.01, 2)
        engine.tokens.update(tokens)
        engine.calibration.sent(9, 10, 0, engine.now_s)
        engine.tokens[9] = 1
        engine.calibration.first_token(9)
        engine.calibration.step(engine.now_s + 0.02, 0)
        del engine.tokens[9]
    statistics = engine.calibration.statistics()
    assert statistics.failures == 3
    assert caplog.text.count("calibration failed") == 1
    windows = statistics.windows
    engine.calibration.left(9, 1, finished=False)
    engine.tokens[10] = 1
    engine.calibration.sent(10, 100, 0, engine.now_s + 1)
    engine.calibration.first_token(10)
    engine.calibration.step(engine.now_s + 2, 0)
    assert engine.calibration.statistics().windows == windows + 1
