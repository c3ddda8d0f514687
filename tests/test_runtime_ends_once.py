"""Random histories: whatever happens in whatever order, every request ends exactly once and nothing is kept of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from scripted_engine import ManualExecutor, ScriptedEngine, make_runtime, turns

from lmdeploy_slo.core.clients import ClientPolicies, ClientPolicy
from lmdeploy_slo.core.plan import Plan
from lmdeploy_slo.core.request import ClientId, EndStatus, FinishReason
from lmdeploy_slo.core.snapshot import EngineLimits, Snapshot
from lmdeploy_slo.engine.base import EngineEvent
from lmdeploy_slo.errors import EngineUnavailable, RequestError, RequestIdInUse
from lmdeploy_slo.runtime.stream import Completion, RequestStream
from lmdeploy_slo.scheduling.limits import Limiter, Limits
from lmdeploy_slo.scheduling.rules import RulePolicy
from lmdeploy_slo.testing.builders import make_request, make_slo, make_spec
from lmdeploy_slo.testing.virtual_time import VirtualTimeLoop

CAP, QUEUE, OPEN = 3, 4, 6
LIMITS = Limits(max_streams=OPEN, max_queued_tokens=5000, max_wait_s=5.0, queue_share=2.0)
POLICIES = ClientPolicies(
    by_name={"slow": ClientPolicy(tokens_per_s=500.0, max_streams=3), "wide": ClientPolicy(max_queued_requests=2)}
)
IDS = st.sampled_from([f"r{i}" for i in range(8)])


class MoodyPolicy(RulePolicy):
    """A rule that raises, or holds back, when told to."""

    def __init__(self) -> None:
        super().__init__("sjf")
        self.mood = "good"

    wants_ticks = True

    def plan(self, snapshot: Snapshot) -> Plan:
        if self.mood == "raises":
            raise ZeroDivisionError
        plan = super().plan(snapshot)
        return Plan(plan.order, 0, replan_after_s=0.5) if self.mood == "holds" else plan


class Reader:
    """Reads one stream to its end; what it saw is compared with what the engine sent."""

    def __init__(self, stream: RequestStream, loop: asyncio.AbstractEventLoop) -> None:
        self.stream = stream
        self.tokens: list[int] = []
        self.outcomes: list[Completion | RequestError] = []
        self.task = loop.create_task(self.read())

    async def read(self) -> None:
        try:
            async for delta in self.stream:
                self.tokens.extend(delta.token_ids)
                if delta.completion is not None:
                    self.outcomes.append(delta.completion)
        except RequestError as error:
            self.outcomes.append(error)


class Histories(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualTimeLoop()
        asyncio.set_event_loop(self.loop)
        self.clock = self.loop.clock
        self.engine = ScriptedEngine(self.clock, limits=EngineLimits(max_batch_size=CAP))
        self.executor = ManualExecutor()
        self.policy = MoodyPolicy()
        self.runtime = make_runtime(
            self.engine,
            self.clock,
            policy=self.policy,
            executor=self.executor,
            max_queued_requests=QUEUE,
            limiter=Limiter(LIMITS, lambda: POLICIES),
            flush_interval_s=0.01,
            plan_gap_s=0.002,
        )
        self.readers: list[Reader] = []
        self.refused = self.in_use = 0
        self.next_token = 0
        self.ever_deaf = False
        self.run(self.runtime.start())

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        self.loop.run_until_complete(work)

    def act(self, act: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Calls `act` on the loop, as clients and engines do, and lets what follows from it happen."""

        async def on_loop() -> None:
            act(*args, **kwargs)
            await turns(5)

        self.run(on_loop())

    # -- clients --------------------------------------------------------------

    @rule(
        request_id=IDS,
        deadline_s=st.none() | st.floats(0.0, 3.0),
        queue_timeout_s=st.none() | st.floats(0.01, 3.0),
        slo=st.booleans(),
        client=st.sampled_from(["", "slow", "wide"]),
    )
    def submit(
        self, request_id: str, deadline_s: float | None, queue_timeout_s: float | None, slo: bool, client: str
    ) -> None:
        now_s = self.clock.now_s()
        spec = make_spec(
            request_id,
            arrival_at_s=now_s,
            queue_timeout_s=queue_timeout_s,
            slo=make_slo(e2e_ms=1000 if slo else None),
            client=ClientId(client),
        )
        deadline_at_s = None if deadline_s is None else now_s + deadline_s

        def submit() -> None:
            try:
                stream = self.runtime.submit(spec, make_request(request_id), deadline_at_s=deadline_at_s)
                self.readers.append(Reader(stream, self.loop))
            except RequestIdInUse:
                self.in_use += 1
            except RequestError:
                self.refused += 1

        self.act(submit)

    @rule(request_id=IDS)
    def abort(self, request_id: str) -> None:
        self.act(self.runtime.abort, request_id)

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def reader_leaves(self, data: st.DataObject) -> None:
        reader = data.draw(st.sampled_from(self.readers))
        self.act(reader.stream.cancel)

    # -- engine ---------------------------------------------------------------

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        events = []
        for request_id in list(self.engine.requests):
            last = data.draw(st.booleans())
            self.next_token += 1
            events.append(EngineEvent(request_id, (self.next_token,), "x", end=FinishReason.STOP if last else None))
            if last:
                del self.engine.requests[request_id]
        repeated = data.draw(st.booleans()) and events and events[-1].end is not None
        self.act(self.engine.send, *events, *(events[-1:] if repeated else []))

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data(), how=st.sampled_from(["fails", "aborts"]))
    def engine_ends_one(self, data: st.DataObject, how: str) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.engine.requests)))
        if how == "fails":
            self.act(self.engine.fail, request_id)
        else:
            self.act(self.engine.emit, request_id, end=FinishReason.ABORT, text="")

    @rule()
    def engine_crashes(self) -> None:
        self.act(self.engine.crash)

    @rule(error=st.sampled_from([None, None, EngineUnavailable("gone"), ZeroDivisionError()]))
    def engine_changes(self, error: Exception | None) -> None:
        self.engine.submit_error = error

    @rule(deaf=st.booleans())
    def engine_hears_aborts(self, deaf: bool) -> None:
        self.engine.deaf = deaf
        self.ever_deaf = self.ever_deaf or deaf

    # -- time and planning ----------------------------------------------------

    @rule(duration_s=st.floats(0.0, 2.0))
    def time_passes(self, duration_s: float) -> None:
        self.run(asyncio.sleep(duration_s))

    @rule(mood=st.sampled_from(["good", "raises", "holds"]))
    def policy_changes(self, mood: str) -> None:
        self.policy.mood = mood

    @rule(holds=st.booleans())
    def planner_hangs_or_goes_on(self, holds: bool) -> None:
        self.executor.holds = holds
        if not holds:
            self.act(self.executor.release)

    # -- what always holds ----------------------------------------------------

    @invariant()
    def the_cap_and_the_bound_hold(self) -> None:
        load = self.runtime.load()
        assert load.in_flight <= CAP
        assert load.waiting <= QUEUE

    @invariant()
    def each_request_is_counted_once(self) -> None:
        load = self.runtime.load()
        ended = sum(load.ended.values())
        assert ended + load.waiting + load.in_flight == len(self.readers) + self.refused
        assert load.refused.get("REQUEST_ID_IN_USE", 0) == self.in_use
        assert sum(load.refused.values()) == self.refused + self.in_use

    @invariant()
    def the_limiter_counts_what_is_here(self) -> None:
        load, counted = self.runtime.load(), self.runtime.limiter.statistics()
        assert (counted.open, counted.queued_requests) == (load.waiting + load.in_flight, load.waiting)
        assert counted.open <= OPEN

    @invariant()
    def the_engine_holds_nothing_that_has_ended(self) -> None:
        if not self.ever_deaf:
            assert set(self.engine.requests) <= set(self.runtime._live)

    def teardown(self) -> None:
        self.engine.deaf = False
        self.executor.holds = False
        self.act(self.executor.release)
        self.run(self.runtime.drain(1.0))
        self.act(self.engine.step)  # a token of a request whose abort was lost has it aborted again
        assert not self.engine.requests
        self.run(self.runtime.close())
        self.run(turns(50))
        for reader in self.readers:
            assert reader.task.done()
            assert len(reader.outcomes) == 1, "a request ends exactly once"
            assert reader.tokens == sorted(reader.tokens), "in order"
            outcome = reader.outcomes[0]
            if isinstance(outcome, Completion):
                assert len(reader.tokens) == outcome.timing.output_tokens
        load = self.runtime.load()
        assert load.waiting == load.in_flight == load.waiting_prompt_tokens == 0
        finished = sum(isinstance(reader.outcomes[0], Completion) for reader in self.readers)
        assert load.ended[EndStatus.FINISHED] == finished
        assert sum(load.ended.values()) == len(self.readers) + self.refused
        counted = self.runtime.limiter.statistics()
        assert (counted.open, counted.queued_requests, counted.queued_tokens) == (0, 0, 0)
        assert counted.clients <= 1, "only the one with a rate is remembered"
        assert not self.runtime.replicas[0].leaving
        assert not self.runtime._live and not self.runtime._by_handle and not self.runtime.replicas[0].in_engine
        assert not [timer for timer in self.loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
        asyncio.set_event_loop(None)
        self.loop.close()


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=40)
