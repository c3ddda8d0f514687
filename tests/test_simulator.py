"""The simulator: by hand, closed form against stepping, repeatable, and blind to the future."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.metrics import RequestRecord
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.core.slo import Slo
from lmdeploy_slo.core.snapshot import EngineLimits, Snapshot
from lmdeploy_slo.offline.simulation.instance import IDLE_REPLAN_S
from lmdeploy_slo.offline.simulator import SimulatedRequest, Simulator
from lmdeploy_slo.runtime import plan_loop
from lmdeploy_slo.scheduling.policy import Policy, SearchBudget, make_policy, policy_names
from lmdeploy_slo.testing.builders import A100, make_slo, make_spec

SECONDS = StepModel(c0=1.0, p1=0.01, p2=0.0, d1=0.1, d2=0.001)
"""Steps so slow that instants can be worked out by hand."""

SLOS = [Slo(), make_slo(e2e_ms=900), make_slo(ttft_ms=300, tpot_ms=25), make_slo(ttft_ms=2000), make_slo(tpot_ms=14)]

ALL_POLICIES = policy_names()


def request(
    name: str, arrival_s: float, prompt_tokens: int, output_tokens: int, slo: Slo | None = None, **more: Any
) -> SimulatedRequest:
    hint = more.pop("hint", float(output_tokens))
    spec = make_spec(
        name,
        arrival_at_s=arrival_s,
        prompt_tokens=prompt_tokens,
        max_new_tokens=5000,
        slo=slo or Slo(),
        expected_output_tokens=hint,
        task_type=more.pop("task", ""),
    )
    return SimulatedRequest(spec, output_tokens, **more)


def policy(name: str, seed: int = 0) -> Policy:
    return make_policy(name, seed=seed, budget=SearchBudget(time_s=None, evaluations=60))


def simulate(
    requests: Sequence[SimulatedRequest],
    name: str = "fcfs",
    *,
    model: StepModel = A100,
    limits: EngineLimits | None = None,
    **options: Any,
) -> dict[str, RequestRecord]:
    simulator = Simulator(policy(name), model=model, limits=limits or EngineLimits(), **options)
    return {record.request_id: record for record in simulator.run(requests)}


def instants(record: RequestRecord) -> tuple[float | None, ...]:
    timing = record.timing
    return timing.dispatched_at_s, timing.first_token_at_s, timing.ended_at_s


# -- by hand --------------------------------------------------------------------------------------------------------


def test_one_request_by_hand() -> None:
    """Planned on arrival, sent when the plan is there; a step of 1 + 0.01 x 100, then two of 1 + 0.1 + 0.001 ctx."""
    record = simulate([request("r", 5.0, 100, 3)], model=SECONDS, plan_latency_s=0.5)["r"]
    assert instants(record) == pytest.approx((5.5, 7.5, 7.5 + 1.1 + 0.1 + 1.1 + 0.101))
    assert (record.status, record.timing.output_tokens, record.predicted_output_tokens) == (EndStatus.FINISHED, 3, 3.0)


def test_plans_of_one_step_are_merged_and_join_the_next() -> None:
    """Two arrive while the first one's prompt is computed, until 2.5: one plan, half a second before that."""
    requests = [request("a", 0.0, 100, 2), request("b", 1.0, 10, 1), request("c", 1.9, 10, 1)]
    simulator = Simulator(policy("fcfs"), model=SECONDS, limits=EngineLimits(), plan_latency_s=0.5)
    records = {record.request_id: record for record in simulator.run(requests)}
    assert simulator.plans == 2
    assert records["a"].timing.first_token_at_s == pytest.approx(2.5)
    for name in "bc":
        assert records[name].timing.dispatched_at_s == pytest.approx(2.5)
        assert records[name].timing.first_token_at_s == pytest.approx(2.5 + 1 + 0.1 + 0.1 + 0.2)


def test_a_plan_that_comes_late_in_a_step_joins_the_one_after_the_next() -> None:
    """An arrival 0.2 s before the step's end is planned at once, and the plan is there 0.3 s into the next step."""
    requests = [request("a", 0.0, 100, 3), request("b", 2.3, 10, 1)]
    record = simulate(requests, model=SECONDS, plan_latency_s=0.5)["b"]
    next_step_ends = 2.5 + 1.1 + 0.1
    assert instants(record)[:2] == pytest.approx((2.8, next_step_ends + 1 + 0.1 + 0.1 + 0.101))


def test_what_the_end_of_a_step_asks_for_is_planned_at_once() -> None:
    """A slot is free when the shorter one ends; who waits for it is sent half a second later, though a step runs."""
    requests = [request("long", 0.0, 100, 9), request("short", 0.0, 100, 1), request("waits", 0.1, 10, 1)]
    records = simulate(requests, model=SECONDS, limits=EngineLimits(max_batch_size=2), plan_latency_s=0.5)
    assert records["short"].timing.ended_at_s == pytest.approx(0.5 + 1 + 2)
    assert records["waits"].timing.dispatched_at_s == pytest.approx(3.5 + 0.5)


def test_without_plan_latency_a_plan_is_applied_where_it_is_made() -> None:
    requests = [request("a", 0.0, 100, 3), request("b", 1.0, 10, 1)]
    records = simulate(requests, model=SECONDS, plan_latency_s=0.0)
    assert instants(records["a"])[:2] == pytest.approx((0.0, 2.0))
    assert instants(records["b"])[:2] == pytest.approx((2.0, 2.0 + 1 + 0.1 + 0.1 + 0.1))


def test_a_prompt_that_can_never_fit_fails_as_on_a_server() -> None:
    records = simulate([request("long", 0.0, 200, 1), request("short", 0.0, 50, 1)], limits=EngineLimits(kv_tokens=100))
    assert records["long"].status is EndStatus.FAILED
    assert instants(records["long"]) == (None, None, 0.0)
    assert records["short"].status is EndStatus.FINISHED


def test_an_output_is_cut_to_what_the_cache_holds() -> None:
    record = simulate([request("r", 0.0, 50, 400)], limits=EngineLimits(kv_tokens=100))["r"]
    assert (record.status, record.timing.output_tokens) == (EndStatus.FINISHED, 51)


def test_requests_go_to_the_instance_with_the_least_outstanding_work() -> None:
    """Two long ones fill both instances, the short ones follow where less is left."""
    requests = [request("big", 0.0, 4000, 400), request("small", 0.0, 100, 20)]
    requests += [request(f"next{n}", 0.1, 100, 20) for n in range(3)]
    simulator = Simulator(lambda n: policy("fcfs"), model=A100, limits=EngineLimits(1), instances=2)
    records = {record.request_id: record for record in simulator.run(requests)}
    others = [records[name] for name in ("small", "next0", "next1", "next2")]
    assert all(record.timing.ended_at_s < records["big"].timing.ended_at_s for record in others)  # type: ignore[operator]
    assert [instance.plans > 1 for instance in simulator.instances] == [False, True]


def test_the_pause_after_an_idle_plan_is_that_of_the_runtime() -> None:
    assert plan_loop.IDLE_REPLAN_S == IDLE_REPLAN_S


class Reluctant:
    """Sends nothing until it was asked `times` times."""

    name = "reluctant"
    wants_ticks = False

    def __init__(self, times: int, replan_after_s: float | None = None) -> None:
        self.times = times
        self.replan_after_s = replan_after_s
        self.asked_at_s: list[float] = []

    def plan(self, snapshot: Snapshot) -> Plan:
        self.asked_at_s.append(snapshot.now_s)
        send = len(self.asked_at_s) >= self.times
        return Plan(snapshot.waiting["handle"].copy(), len(snapshot.waiting) if send else 0, self.replan_after_s)

    def warm_up(self) -> None:
        return None


@pytest.mark.parametrize(("replan_after_s", "pause_s"), [(None, IDLE_REPLAN_S), (0.25, 0.25)])
def test_an_idle_engine_is_planned_for_again(replan_after_s: float | None, pause_s: float) -> None:
    reluctant = Reluctant(3, replan_after_s)
    Simulator(reluctant, model=A100, limits=EngineLimits(), plan_latency_s=0.002).run([request("r", 1.0, 10, 1)])
    assert reluctant.asked_at_s == pytest.approx([1.0 + n * (0.002 + pause_s) for n in range(3)])


def test_a_stream_must_be_in_order_of_arrival() -> None:
    simulator = Simulator(policy("fcfs"), model=A100, limits=EngineLimits())
    with pytest.raises(ValueError, match="order of arrival"):
        simulator.run(request(str(at), at, 10, 1) for at in (1.0, 0.5))


def test_several_instances_need_several_policies() -> None:
    with pytest.raises(ValueError, match="for one instance"):
        Simulator(policy("fcfs"), model=A100, limits=EngineLimits(), instances=2)


# -- properties -----------------------------------------------------------------------------------------------------


def _request_at(number: int, gap_s: float, drawn: tuple[int, int, int, float]) -> SimulatedRequest:
    prompt_tokens, output_tokens, kind, error = drawn
    hint = max(1.0, round(output_tokens * error))
    return request(str(number), gap_s, prompt_tokens, output_tokens, SLOS[kind], hint=hint, task="ab"[kind % 2])


SIZES = st.tuples(
    st.integers(1, 3000), st.integers(1, 120), st.integers(0, len(SLOS) - 1), st.sampled_from([0.5, 1.0, 1.7])
)
GAPS = st.one_of(st.just(0.0), st.floats(0.0, 0.2), st.floats(0.5, 3.0))


@st.composite
def workloads(draw: st.DrawFn, most: int = 14) -> list[SimulatedRequest]:
    drawn = draw(st.lists(st.tuples(GAPS, SIZES), min_size=1, max_size=most))
    at_s, requests = 0.0, []
    for number, (gap_s, size) in enumerate(drawn):
        at_s += gap_s
        requests.append(_request_at(number, at_s, size))
    return requests


LIMITS = st.builds(
    EngineLimits,
    max_batch_size=st.integers(1, 8),
    max_prefill_tokens=st.sampled_from([64, 512, 8192]),
    kv_tokens=st.none() | st.integers(3000, 6000),
)


@settings(max_examples=60)
@given(workloads(), LIMITS, st.sampled_from(ALL_POLICIES), st.sampled_from([0.0, 0.002, 0.03]))
def test_jumping_over_quiet_stretches_equals_stepping(
    requests: list[SimulatedRequest], limits: EngineLimits, name: str, plan_latency_s: float
) -> None:
    runs = [
        Simulator(policy(name), model=A100, limits=limits, plan_latency_s=plan_latency_s, jump=jump)
        for jump in (True, False)
    ]
    jumped, stepped = (run.run(requests) for run in runs)
    assert jumped == stepped  # every instant, to the last bit
    assert runs[0].evictions == runs[1].evictions
    assert sorted(record.request_id for record in jumped) == sorted(r.spec.request_id for r in requests)


class Recorder:
    """Plans as another policy, and keeps what it was shown and what it answered."""

    def __init__(self, inner: Policy) -> None:
        self._inner = inner
        self.name, self.wants_ticks = inner.name, inner.wants_ticks
        self.decisions: list[tuple[float, bytes, bytes, tuple[int, ...], int]] = []

    def plan(self, snapshot: Snapshot) -> Plan:
        plan = self._inner.plan(snapshot)
        shown = (snapshot.now_s, snapshot.waiting.tobytes(), snapshot.running.tobytes())
        self.decisions.append((*shown, tuple(plan.order.tolist()), plan.send_now))
        return plan

    def warm_up(self) -> None:
        return None


@settings(max_examples=15)
@given(st.data())
@pytest.mark.parametrize("name", ALL_POLICIES)
def test_no_policy_sees_the_future(name: str, data: st.DataObject) -> None:
    """What arrives after t, and how long outputs are that have not ended by t, changes no decision up to t."""
    requests = data.draw(workloads())
    limits = data.draw(LIMITS)
    hinted = data.draw(st.booleans())
    if not hinted:
        requests = [
            dataclasses.replace(r, spec=dataclasses.replace(r.spec, expected_output_tokens=None)) for r in requests
        ]
    first = Recorder(policy(name))
    records = {r.request_id: r for r in Simulator(first, model=A100, limits=limits).run(requests)}
    cut_s = data.draw(st.floats(0.0, 1.2 * max(r.timing.ended_at_s or 0.0 for r in records.values())))

    known = [r for r in requests if r.spec.arrival_at_s <= cut_s]
    changed = []
    for r in known:
        if records[r.spec.request_id].timing.ended_at_s > cut_s:  # type: ignore[operator]
            longer = data.draw(st.integers(0, 60))
            r = dataclasses.replace(r, output_tokens=r.output_tokens + longer)
        changed.append(r)
    at_s = cut_s
    for number, (gap_s, size) in enumerate(data.draw(st.lists(st.tuples(GAPS, SIZES), max_size=5))):
        at_s += gap_s + 1e-6
        changed.append(_request_at(1000 + number, at_s, size))

    second = Recorder(policy(name))
    others = {r.request_id: r for r in Simulator(second, model=A100, limits=limits).run(changed)}
    until = [[d for d in recorder.decisions if d[0] <= cut_s] for recorder in (first, second)]
    assert until[0] == until[1]
    for r in known:
        pair = [instants(run[r.spec.request_id]) for run in (records, others)]
        seen = [[at if at is not None and at <= cut_s else None for at in one] for one in pair]
        assert seen[0] == seen[1]


@settings(max_examples=10)
@given(workloads(), st.integers(0, 3))
@pytest.mark.parametrize("name", ["annealing", "slack-guard", "swf-feasible"])
def test_the_same_seed_gives_the_same_run(name: str, requests: list[SimulatedRequest], seed: int) -> None:
    runs = [
        Simulator(lambda n: policy(name, seed + n), model=A100, limits=EngineLimits(4), instances=2) for _ in range(2)
    ]
    assert runs[0].run(requests) == runs[1].run(requests)


@settings(max_examples=30)
@given(workloads(), LIMITS)
def test_the_scheduler_knows_the_tokens_of_everybody_who_runs(
    requests: list[SimulatedRequest], limits: EngineLimits
) -> None:
    """Counted by steps, some taken at once, some in which an evicted request stands still."""

    class Checked(Recorder):
        def plan(self, snapshot: Snapshot) -> Plan:
            (instance,) = simulator.instances
            for row in snapshot.running:
                flight = instance._flights[int(row["handle"])]
                assert flight.sequence is not None
                assert row["generated_tokens"] == instance.batch.emitted_of(flight.sequence)
            return super().plan(snapshot)

    simulator = Simulator(Checked(policy("slack-guard")), model=A100, limits=limits)
    simulator.run(requests)
