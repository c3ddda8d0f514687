"""The scheduler keeps its promises whatever the plan: no handle is lost, the cap holds, old plans do no harm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import PriorityClass, RequestSpec
from lmdeploy_slo.core.snapshot import ROW_DTYPE, EngineLimits, Rows, Snapshot
from lmdeploy_slo.errors import QueueFull
from lmdeploy_slo.prediction.length import TaskLengthPredictor
from lmdeploy_slo.prediction.prefix import PrefixPredictor
from lmdeploy_slo.scheduling.row_table import RowTable
from lmdeploy_slo.scheduling.rules import RulePolicy
from lmdeploy_slo.scheduling.scheduler import Scheduler
from lmdeploy_slo.testing.builders import A100, make_slo, make_spec

# -- the row table against a dict ---------------------------------------------

FIELDS = [name for name in ROW_DTYPE.names or () if ROW_DTYPE[name] == np.float64]
HANDLES = st.integers(1, 12)
VALUES = st.integers(-1000, 1000).map(float)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["insert", "remove", "set", "add", "bump"]), HANDLES, st.sampled_from(FIELDS), VALUES
        ),
        max_size=60,
    ),
    st.integers(1, 4),
)
def test_a_row_table_is_a_dict_of_rows(steps: list[tuple[str, int, str, float]], capacity: int) -> None:
    table = RowTable(capacity)
    model: dict[int, dict[str, float]] = {}
    for action, handle, field, value in steps:
        if action == "insert":
            row = dict.fromkeys(FIELDS, value)
            record = tuple(handle if name == "handle" else value for name in ROW_DTYPE.names or ())
            if handle in model:
                with pytest.raises(ValueError, match="in the table already"):
                    table.insert(record)
            else:
                table.insert(record)
                model[handle] = row
        elif action == "bump":
            table.add_where_positive(field, value)
            for row in model.values():
                row[field] += value if row[field] > 0 else 0
        elif handle not in model:
            with pytest.raises(KeyError):
                table.remove(handle)
        elif action == "remove":
            removed = table.remove(handle)
            assert {name: float(removed[name]) for name in FIELDS} == model.pop(handle)
        elif action == "set":
            table.set(handle, field, value)
            model[handle][field] = value
        else:
            table.add(handle, field, value)
            model[handle][field] += value

        assert len(table) == len(model)
        assert set(table.handles()) == set(model)
        assert all((h in table) == (h in model) for h in range(14))
        assert {h: {name: table.get(h, name) for name in FIELDS} for h in model} == model
        rows = table.copy()
        assert {int(r["handle"]): {name: float(r[name]) for name in FIELDS} for r in rows} == model
        assert not rows.flags.writeable


# -- the scheduler ------------------------------------------------------------

CAP, QUEUE = 4, 6


class RecordingPredictor(TaskLengthPredictor):
    def __init__(self) -> None:
        super().__init__()
        self.observed: list[tuple[str, int]] = []

    def observe(self, spec: RequestSpec, output_tokens: int) -> None:
        self.observed.append((spec.request_id, output_tokens))
        super().observe(spec, output_tokens)


def make_scheduler(cap: int = CAP, queue: int | None = None, lengths: Any = None) -> Scheduler:
    return Scheduler(
        limits=EngineLimits(max_batch_size=cap),
        model=A100,
        lengths=lengths or TaskLengthPredictor(),
        max_queued_requests=queue,
    )


def plan_of(*handles: int, send_now: int | None = None) -> Plan:
    return Plan(np.array(handles, dtype=np.int64), len(handles) if send_now is None else send_now)


def handles_of(rows: Rows) -> set[int]:
    return set(rows["handle"].tolist())


class Schedules(RuleBasedStateMachine):
    """A model of three sets: waiting, running, gone. Plans are drawn over all handles ever given, in any order."""

    handles = Bundle("handles")

    def __init__(self) -> None:
        super().__init__()
        self.lengths = RecordingPredictor()
        self.scheduler = make_scheduler(queue=QUEUE, lengths=self.lengths)
        self.waiting: dict[int, RequestSpec] = {}
        self.running: dict[int, int] = {}  # tokens generated
        self.all: list[int] = []
        self.refused = self.dispatched = self.plans = self.stale = self.finished = 0
        self.now_s = 0.0
        self.snapshots: list[tuple[Snapshot, bytes, bytes]] = []

    @rule(target=handles, prompt_tokens=st.integers(1, 100))
    def add(self, prompt_tokens: int) -> Any:
        spec = make_spec(f"r{len(self.all)}", prompt_tokens=prompt_tokens, arrival_at_s=self.now_s)
        if len(self.waiting) >= QUEUE:
            self.refused += 1
            with pytest.raises(QueueFull):
                self.scheduler.add(spec)
            return multiple()
        handle = self.scheduler.add(spec)
        assert handle > max(self.all, default=0), "handles grow with arrival and are never used again"
        self.all.append(handle)
        self.waiting[handle] = spec
        return handle

    @rule(data=st.data(), extra=st.lists(st.integers(-5, 200), max_size=3))
    def plan(self, data: st.DataObject, extra: list[int]) -> None:
        order = data.draw(st.lists(st.sampled_from([*self.all, *extra, 999]), max_size=12, unique=True))
        send_now = data.draw(st.integers(0, len(order)))
        self.now_s += 1.0
        dispatches = self.scheduler.apply(plan_of(*order, send_now=send_now), self.now_s)
        self.plans += 1

        expected = []
        for rank, handle in enumerate(order[:send_now]):
            if len(self.running) >= CAP:
                break
            if handle in self.waiting:
                del self.waiting[handle]
                self.running[handle] = 0
                expected.append((handle, rank))
            else:
                self.stale += 1
        self.dispatched += len(expected)
        assert [(d.handle, d.rank) for d in dispatches] == expected

    @rule(handle=handles, count=st.integers(0, 5))
    def tokens(self, handle: int, count: int) -> None:
        self.now_s += 0.5
        self.scheduler.on_tokens(handle, count, self.now_s)
        if handle in self.running:
            self.running[handle] += count

    @rule(handle=consumes(handles), output_tokens=st.integers(1, 50))
    def leave(self, handle: int, output_tokens: int) -> None:
        """Running requests finish, waiting ones are dropped, gone ones are unknown."""
        if handle in self.running:
            del self.running[handle]
            self.scheduler.finish(handle, output_tokens)
            self.finished += 1
            assert self.lengths.observed[-1] == (f"r{self.all.index(handle)}", output_tokens)
        else:
            assert self.scheduler.drop(handle) is (self.waiting.pop(handle, None) is not None)
        assert not self.scheduler.drop(handle)
        assert len(self.lengths.observed) == self.finished

    @rule(handle=consumes(handles))
    def drop_running(self, handle: int) -> None:
        known = handle in self.waiting or handle in self.running
        self.waiting.pop(handle, None)
        self.running.pop(handle, None)
        assert self.scheduler.drop(handle) is known

    @rule()
    def snapshot(self) -> None:
        snapshot = self.scheduler.snapshot(self.now_s)
        self.snapshots.append((snapshot, snapshot.waiting.tobytes(), snapshot.running.tobytes()))
        self.snapshots = self.snapshots[-3:]

    @invariant()
    def the_model_agrees(self) -> None:
        snapshot = self.scheduler.snapshot(self.now_s)
        assert handles_of(snapshot.waiting) == set(self.waiting)
        assert {int(r["handle"]): int(r["generated_tokens"]) for r in snapshot.running} == self.running
        assert np.isnan(snapshot.waiting["dispatched_at_s"]).all()
        assert not np.isnan(snapshot.running["dispatched_at_s"]).any()
        started = snapshot.running["generated_tokens"] > 0
        assert (np.isnan(snapshot.running["first_token_at_s"]) == ~started).all()
        assert snapshot.free_slots == CAP - len(self.running) >= 0
        statistics = self.scheduler.statistics()
        assert (statistics.waiting, statistics.running) == (len(self.waiting), len(self.running))
        assert statistics.waiting_prompt_tokens == sum(spec.prompt_tokens for spec in self.waiting.values())
        assert (statistics.added, statistics.refused) == (len(self.all), self.refused)
        assert (statistics.dispatched, statistics.plans_applied) == (self.dispatched, self.plans)
        assert statistics.stale_entries == self.stale

    @invariant()
    def snapshots_do_not_change(self) -> None:
        for snapshot, waiting, running in self.snapshots:
            assert snapshot.waiting.tobytes() == waiting
            assert snapshot.running.tobytes() == running

    @invariant()
    def queue_positions_are_those_of_waiting_requests(self) -> None:
        positions = [self.scheduler.queue_position(handle) for handle in self.all]
        assert [p is not None for p in positions] == [handle in self.waiting for handle in self.all]
        assert all(0 <= p < len(self.waiting) for p in positions if p is not None)


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=60, stateful_step_count=40)


def test_a_row_carries_what_the_request_said() -> None:
    scheduler = make_scheduler()
    handle = scheduler.add(
        make_spec(
            arrival_at_s=3.0,
            prompt_tokens=77,
            max_new_tokens=50,
            expected_output_tokens=80.0,
            slo=make_slo(ttft_ms=250, e2e_ms=2000),
            priority_class=PriorityClass.SYSTEM,
        )
    )
    (row,) = scheduler.snapshot(4.0).waiting
    assert row["handle"] == handle
    assert (row["tier"], row["arrival_at_s"], row["prompt_tokens"]) == (3, 3.0, 77)
    assert row["output_tokens"] == 50, "the hint is cut to what may be generated"
    assert (row["ttft_s"], row["tpot_s"], row["e2e_s"]) == (0.25, math.inf, 2.0)
    assert row["generated_tokens"] == 0


def test_snapshots_cannot_be_written_to() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_spec("a"))
    scheduler.apply(plan_of(scheduler.add(make_spec("b"))), 0.0)
    snapshot = scheduler.snapshot(0.0)
    for rows in (snapshot.waiting, snapshot.running):
        with pytest.raises(ValueError):
            rows["output_tokens"] = 0


def test_a_request_that_outlives_its_forecast_is_expected_to_go_on() -> None:
    scheduler = make_scheduler()
    handle = scheduler.add(make_spec(expected_output_tokens=10.0))
    scheduler.apply(plan_of(handle), 0.0)
    scheduler.on_tokens(handle, 25, 1.0)
    (row,) = scheduler.snapshot(1.0).running
    assert row["output_tokens"] > 25


def test_the_queue_position_is_the_last_plans() -> None:
    scheduler = make_scheduler(cap=1)
    a, b, c = (scheduler.add(make_spec(name)) for name in "abc")
    scheduler.apply(plan_of(c, a, b, send_now=0), 0.0)
    assert [scheduler.queue_position(h) for h in (a, b, c)] == [1, 2, 0]
    late = scheduler.add(make_spec("late"))
    assert scheduler.queue_position(late) == 3, "behind all that are in the plan"
    scheduler.drop(c)
    assert [scheduler.queue_position(h) for h in (a, b, c, late)] == [0, 1, None, 2]


def test_steps_count_for_those_that_have_begun() -> None:
    scheduler = make_scheduler()
    begun, not_begun = (scheduler.add(make_spec(name)) for name in "ab")
    scheduler.apply(plan_of(begun, not_begun), 0.0)
    scheduler.on_tokens(begun, 1, 1.0)
    scheduler.on_steps(4)
    generated = {int(r["handle"]): int(r["generated_tokens"]) for r in scheduler.snapshot(1.0).running}
    assert generated == {begun: 5, not_begun: 0}


def test_a_smaller_priority_number_goes_before_the_plan() -> None:
    scheduler = make_scheduler(cap=2)
    plain, last, urgent = (scheduler.add(make_spec(str(p), priority=p)) for p in (0, 9, 0))
    dispatches = scheduler.apply(plan_of(last, urgent, plain), 0.0)
    assert [d.handle for d in dispatches] == [urgent, plain]
    assert scheduler.queue_position(last) == 0


def test_the_forecast_is_the_predictors() -> None:
    spec = make_spec(expected_output_tokens=12.0)
    assert make_scheduler().forecast(spec) == TaskLengthPredictor().predict(spec)


def test_the_handle_of_a_request_that_has_left_is_nobodys() -> None:
    scheduler = make_scheduler()
    handle = scheduler.add(make_spec())
    assert scheduler.drop(handle)
    scheduler.on_tokens(handle, 3, 1.0)
    assert scheduler.apply(plan_of(handle, handle), 0.0) == []
    with pytest.raises(KeyError):
        scheduler.finish(handle, 1)


# -- what is in the prefix cache ----------------------------------------------


class KnownPrefixes(PrefixPredictor):
    """Expects a tenth of each prompt, of turns of a conversation what it was told last."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, float] = {}

    def predict(self, spec: RequestSpec) -> float:
        return self.told.get(spec.conversation_id, spec.prompt_tokens / 10)

    def observe(self, spec: RequestSpec, cached_tokens: int, at_s: float) -> None:
        self.told[spec.conversation_id] = float(cached_tokens)

    def finish(self, spec: RequestSpec, output_tokens: int, at_s: float) -> None:
        self.told[spec.conversation_id] = float(output_tokens)


def waiting_prompts(scheduler: Scheduler) -> dict[int, tuple[float, float]]:
    rows = scheduler.snapshot(0.0).waiting
    return {int(row["handle"]): (float(row["prompt_tokens"]), float(row["cached_tokens"])) for row in rows}


def test_rows_hold_the_part_of_a_prompt_that_is_not_cached() -> None:
    scheduler = Scheduler(limits=EngineLimits(1), model=A100, lengths=TaskLengthPredictor(), prefixes=KnownPrefixes())
    handle = scheduler.add(make_spec(prompt_tokens=1000))
    assert waiting_prompts(scheduler) == {handle: (900, 100)}
    assert scheduler.statistics().waiting_prompt_tokens == 1000
    scheduler.apply(RulePolicy("fcfs").plan(scheduler.snapshot(0.0)), 0.0)
    assert scheduler.cached_tokens(handle) == 100
    assert scheduler.cached_tokens(handle + 1) == 0
    plain = Scheduler(limits=EngineLimits(1), model=A100, lengths=TaskLengthPredictor())
    assert plain.expected_cached_tokens(make_spec(prompt_tokens=1000)) == 0


def test_waiting_turns_are_expected_anew_when_their_conversation_goes_on() -> None:
    prefixes = KnownPrefixes()
    scheduler = Scheduler(limits=EngineLimits(1), model=A100, lengths=TaskLengthPredictor(), prefixes=prefixes)
    first = scheduler.add(make_spec("1", conversation_id="c"))
    scheduler.apply(RulePolicy("fcfs").plan(scheduler.snapshot(0.0)), 0.0)
    second, third, other = (
        scheduler.add(make_spec(name, prompt_tokens=1000, conversation_id=conversation))
        for name, conversation in (("2", "c"), ("3", "c"), ("4", "d"))
    )
    scheduler.on_cached(first, 30, 1.0)
    assert waiting_prompts(scheduler) == {second: (970, 30), third: (970, 30), other: (900, 100)}
    scheduler.drop(third)
    scheduler.finish(first, 230, 2.0)
    assert waiting_prompts(scheduler) == {second: (770, 230), other: (900, 100)}
    scheduler.drop(second)
    scheduler.drop(other)
    assert scheduler._turns == {}
    scheduler.on_cached(first, 30, 3.0)  # long gone


def test_a_request_that_runs_on_ends_at_its_limit_at_the_latest() -> None:
    scheduler = make_scheduler()
    tight, loose = (
        scheduler.add(make_spec(name, expected_output_tokens=100.0, max_new_tokens=limit))
        for name, limit in (("tight", 130), ("loose", 10_000))
    )
    scheduler.apply(plan_of(tight, loose), 0.0)
    for handle in (tight, loose):
        scheduler.on_tokens(handle, 120, 1.0)
    rows = {int(row["handle"]): row for row in scheduler.snapshot(1.0).running}
    assert rows[loose]["output_tokens"] > 130
    assert rows[tight]["output_tokens"] <= 130
    assert rows[tight]["output_tokens"] * math.exp(0.8 * rows[tight]["length_sigma"]) <= 130 * (1 + 1e-9)
