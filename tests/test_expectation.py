"""What the runtime learns from how requests end that were told a forecast."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.core.slo import Timing
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.runtime.expectation import LATER_S, OUTLOOK_S, Expectation
from lmdeploy_slo.scheduling.admission import Forecast
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import A100, make_slo, make_spec
from lmdeploy_slo.testing.virtual_time import VirtualClock, run_virtual

SPEC = make_spec(slo=make_slo(ttft_ms=1000), expected_output_tokens=50.0)


class StillClock:
    now = 0.0

    def now_s(self) -> float:
        return self.now


class Story:
    def __init__(self) -> None:
        self.clock = StillClock()
        self.scheduler = Scheduler(limits=EngineLimits(4), model=A100, lengths=TaskLengthPredictor())
        self.reports = 0
        self.expectation = Expectation(self.scheduler, self.clock, self._report, keeps_order=True)

    def _report(self) -> None:
        self.reports += 1

    def end(self, status: EndStatus, timing: Timing, at_s: float) -> None:
        told = self.expectation.of(SPEC)
        self.clock.now = at_s
        self.expectation.ended(SPEC, told, timing, status)
        self.clock.now = 0.0


def test_forecasts_follow_how_requests_end() -> None:
    story = Story()
    before = story.expectation.of(SPEC, afresh=True)
    for _ in range(100):
        story.end(EndStatus.FINISHED, Timing(0.0, 2.0, 2.1, 4.0, 50), 4.0)
    after = story.expectation.of(SPEC)
    assert before.ttft_s < 0.1
    assert after.ttft_s == pytest.approx(2.1, rel=0.1)
    assert before.chance is not None
    assert after.chance is not None
    assert after.chance < 0.2 < 0.8 < before.chance


def test_who_times_out_waited_at_least_so_long() -> None:
    story = Story()
    for _ in range(100):
        story.end(EndStatus.TIMED_OUT, Timing(0.0), 5.0)
    after = story.expectation.of(SPEC)
    assert after.ttft_s > 2
    assert after.chance is not None
    assert after.chance < 0.2


def test_who_gives_up_says_nothing_of_the_slo() -> None:
    story = Story()
    for _ in range(100):
        story.end(EndStatus.CANCELLED, Timing(0.0), 0.01)
    after = story.expectation.of(SPEC)
    assert after.chance is not None
    assert after.chance > 0.8


@pytest.mark.parametrize("status", [EndStatus.FAILED, EndStatus.REJECTED])
def test_failures_teach_nothing(status: EndStatus) -> None:
    story = Story()
    before = story.expectation.forecaster.state()
    story.end(status, Timing(0.0, 0.1), 9.0)
    assert story.expectation.forecaster.state() == before


async def test_arrivals_of_a_few_milliseconds_share_a_snapshot_and_stand_behind_each_other() -> None:
    story = Story()
    told = []
    for _ in range(3):
        told.append(story.expectation.of(SPEC))
        story.expectation.add(SPEC, told[-1])
    assert [forecast.queue_position for forecast in told] == [0, 1, 2]
    assert story.reports == 1
    assert story.expectation.of(SPEC, afresh=True).queue_position == 0
    story.clock.now = OUTLOOK_S
    story.expectation.of(SPEC)
    assert story.reports == 3


def test_a_forecast_is_worked_out_later_and_tells_of_its_arrival() -> None:
    async def main(clock: VirtualClock) -> None:
        story = Story()
        at_once = story.expectation.of(SPEC, afresh=True)
        learnt = story.expectation.forecaster.forecast
        asked = []

        def forecast(*args: Any) -> Forecast:
            asked.append(clock.now_s())
            return learnt(*args)

        story.expectation.forecaster.forecast = forecast  # type: ignore[method-assign]
        told = [story.expectation.of(SPEC) for _ in range(3)]
        for one in told[:2]:
            story.expectation.add(SPEC, one)
        assert told[0].output_tokens == at_once.output_tokens
        assert asked == []
        await asyncio.sleep(1.0)
        assert asked == [LATER_S, LATER_S], "of those that were taken; who was refused is told nothing"
        assert told[0] == told[1] == at_once
        assert len(asked) == 2

    run_virtual(main)


async def test_a_forecast_is_there_before_its_end_is_learnt_from() -> None:
    story = Story()
    told = story.expectation.of(SPEC)
    story.expectation.add(SPEC, told)
    story.end(EndStatus.FINISHED, Timing(0.0, 2.0, 2.1, 4.0, 50), 4.0)
    after = story.expectation.of(SPEC, afresh=True)
    assert told.ttft_s < after.ttft_s


def test_hopeless_is_what_an_engine_of_its_own_could_not_do() -> None:
    story = Story()
    slow = make_spec(slo=make_slo(tpot_ms=1), expected_output_tokens=50.0)
    assert story.expectation.hopeless(slow, story.expectation.of(slow))
    assert not story.expectation.hopeless(SPEC, story.expectation.of(SPEC))
