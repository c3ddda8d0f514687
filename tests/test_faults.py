"""Whatever goes wrong with engine, planner and clock: every request ends exactly once, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fault_simulation
import pytest
from fault_simulation import FAULTS, simulate

from lmdeploy_slo.engine.emulated import EmulatedEngine
from lmdeploy_slo.engine.supervised import SupervisedEngine
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.scheduling.limits import Ticket
from lmdeploy_slo.scheduling.scheduler import Scheduler


def run(first: int, seeds: int) -> None:
    outcomes = [simulate(seed) for seed in range(first, first + seeds)]
    for fault in FAULTS:
        assert sum(outcome.faults[fault] for outcome in outcomes), f"{fault}: not tried by any of these seeds"
    assert sum(outcome.retried for outcome in outcomes) > 0
    assert sum(outcome.restarts for outcome in outcomes) > 0
    assert any(outcome.lost for outcome in outcomes)
    for status in ("finished", "rejected", "timed_out", "cancelled", "failed"):
        assert sum(outcome.ends[status] for outcome in outcomes) > 0


def test_forty_histories_of_faults() -> None:
    run(0, 40)


@pytest.mark.nightly
def test_a_thousand_histories_of_faults() -> None:
    run(0, 1000)


@pytest.mark.parametrize("seed", [3, 17])
def test_a_seed_is_the_same_history_every_time(seed: int) -> None:
    first, second = simulate(seed), simulate(seed)
    assert first.log == second.log
    assert len(first.log) > 5


def forgets_to_requeue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "requeue", lambda self, handle: True)


def forgets_that_it_waits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ticket, "wait_again", lambda self, now_s: None)


def never_hears_of_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SupervisedEngine, "_look", lambda self, passed_s, now_s: None)


def ends_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    end: Callable[..., None] = Runtime.end

    def twice(self: Runtime, live: Any, status: Any, outcome: Any, **kwargs: Any) -> None:
        end(self, live, status, outcome, **kwargs)
        self.journal.ended(live, status, outcome)

    monkeypatch.setattr(Runtime, "end", twice)


def keeps_memory_of_the_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    drop = EmulatedEngine._drop

    def dropped(self: EmulatedEngine, request_id: str) -> bool:
        kept = self._batch.cancel
        monkeypatch.setattr(self._batch, "cancel", lambda key: False)
        try:
            return drop(self, request_id)
        finally:
            monkeypatch.setattr(self._batch, "cancel", kept)

    monkeypatch.setattr(EmulatedEngine, "_drop", dropped)


@pytest.mark.parametrize(
    "defect",
    [forgets_to_requeue, forgets_that_it_waits_again, never_hears_of_stalls, ends_twice, keeps_memory_of_the_aborted],
)
def test_a_defect_is_found_and_its_seed_finds_it_again(
    defect: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simulation is no better than what it finds."""
    monkeypatch.setattr(fault_simulation, "HORIZON_S", 4000.0)
    defect(monkeypatch)
    for seed in range(40):
        try:
            simulate(seed)
        except AssertionError as error:
            found = str(error)
            break
    else:
        pytest.fail("40 seeds did not find it")
    assert f"--seed {seed}" in found
    with pytest.raises(AssertionError, match=rf"^seed {seed}: ") as again:
        simulate(seed)
    assert str(again.value).splitlines()[1:] == found.splitlines()[1:], "the same history"
