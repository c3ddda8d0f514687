"""Limits at the door: each one refuses with its own reason, in time, and touches nothing that was accepted."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmdeploy_slo.core.clients import ClientPolicies, ClientPolicy
from lmdeploy_slo.core.request import ANYONE, ClientId, PriorityClass
from lmdeploy_slo.errors import ClientQueueFull, Overloaded, QueueFull, RateLimited, Rejected, TooManyStreams
from lmdeploy_slo.scheduling.limits import MAX_IDLE_CLIENTS, Limiter, Limits, Ticket

ALICE, BOB = ClientId("alice"), ClientId("bob")


def limiter(limits: Limits | None = None, **policy: float) -> Limiter:
    policies = ClientPolicies(ClientPolicy(**policy))  # type: ignore[arg-type]
    return Limiter(limits, lambda: policies)


def queued(limiter: Limiter, client: ClientId = ALICE, tokens: int = 10, at_s: float = 0.0) -> Ticket:
    ticket = limiter.enter(client, at_s)
    try:
        ticket.queue(tokens, at_s)
    except Rejected:
        ticket.leave(0, at_s)
        raise
    return ticket


def test_without_limits_everything_enters_and_nothing_is_kept() -> None:
    free = Limiter()
    tickets = [queued(free, ClientId(f"c{i % 10}")) for i in range(1000)]
    assert free.statistics().queued_tokens == 10_000
    for ticket in tickets:
        ticket.start(1.0)
        ticket.leave(5, 2.0)
        ticket.leave(5, 2.0)
    assert free.statistics() == Limiter().statistics()


def test_streams_of_a_client_and_of_all() -> None:
    door = limiter(Limits(max_streams=3), max_streams=2)
    first = door.enter(ALICE, 0.0)
    queued(door, ALICE).start(0.0)
    with pytest.raises(TooManyStreams, match="of this client are open, the limit is 2"):
        door.enter(ALICE, 0.0)
    door.enter(BOB, 0.0)
    with pytest.raises(TooManyStreams, match="3 requests are open, the limit is 3"):
        door.enter(BOB, 0.0)
    first.leave(0, 0.0)
    door.enter(ALICE, 0.0)


def test_queued_requests_of_all() -> None:
    door = limiter(Limits(max_queued_requests=2))
    tickets = [queued(door), queued(door, BOB)]
    with pytest.raises(QueueFull, match="2 requests are waiting, the limit is 2") as refusal:
        door.enter(BOB, 0.0)
    assert refusal.value.retry_after_s == pytest.approx(0.1)
    tickets[0].start(0.0)
    queued(door, BOB)


def test_queued_tokens_of_a_client() -> None:
    door = limiter(max_queued_tokens=100)
    waiting = queued(door, tokens=60)
    with pytest.raises(ClientQueueFull, match="60 tokens of this client are waiting, the limit is 100"):
        queued(door, tokens=41)
    queued(door, BOB, tokens=100)
    queued(door, tokens=40)
    with pytest.raises(ClientQueueFull):
        door.enter(ALICE, 0.0)  # not one token more: told before its prompt is looked at
    waiting.leave(0, 0.0)
    door.enter(ALICE, 0.0)


@pytest.mark.parametrize("limits", [Limits(max_queued_tokens=100), Limits()])
def test_what_never_fits_is_not_asked_to_come_back(limits: Limits) -> None:
    door = limiter(limits, max_queued_tokens=100)
    with pytest.raises(Rejected, match="the request has 101 tokens, at most 100") as refusal:
        queued(door, tokens=101)
    assert refusal.value.retry_after_s is None


def test_the_bucket_may_be_overdrawn_once_and_then_fills_at_the_rate() -> None:
    door = limiter(tokens_per_s=100.0, burst_tokens=50.0)
    queued(door, tokens=250)  # 200 below zero
    with pytest.raises(RateLimited) as refusal:
        door.enter(ALICE, 0.0)
    assert refusal.value.retry_after_s == pytest.approx(2.01, abs=0.002)
    with pytest.raises(RateLimited):
        door.enter(ALICE, 2.0)
    door.enter(BOB, 0.0)
    door.enter(ALICE, refusal.value.retry_after_s or math.nan)


def test_what_was_not_used_comes_back_and_what_was_used_beyond_is_taken() -> None:
    door = limiter(tokens_per_s=1.0, burst_tokens=100.0)
    less, more, never = (queued(door, client, tokens=120) for client in (ALICE, BOB, ANYONE))
    less.start(0.0)
    more.start(0.0)
    less.leave(30, 0.0)
    more.leave(200, 0.0)
    never.leave(120, 0.0)
    door.enter(ALICE, 0.0)
    door.enter(ANYONE, 0.0)
    with pytest.raises(RateLimited) as refusal:
        door.enter(BOB, 0.0)
    assert refusal.value.retry_after_s == pytest.approx(101.0, abs=0.01)


@given(
    costs=st.lists(st.tuples(st.integers(1, 500), st.floats(0.0, 3.0)), max_size=60),
    rate=st.floats(1.0, 300.0),
    burst=st.floats(1.0, 1000.0),
)
def test_no_client_gets_more_than_burst_and_rate_and_one_request(
    costs: list[tuple[int, float]], rate: float, burst: float
) -> None:
    door = limiter(tokens_per_s=rate, burst_tokens=burst)
    now_s, started = 0.0, [(0.0, 0)]
    for tokens, pause_s in costs:
        now_s += pause_s
        try:
            queued(door, tokens=tokens, at_s=now_s).start(now_s)
        except RateLimited:
            continue
        started.append((now_s, tokens))
    for i, (begin_s, _) in enumerate(started):
        used, largest = 0, 0
        for at_s, tokens in started[i:]:
            used, largest = used + tokens, max(largest, tokens)
            assert used <= burst + rate * (at_s - begin_s) + largest + 1e-6


def test_a_share_of_the_queue_leaves_room_for_others() -> None:
    door = limiter(Limits(max_queued_requests=90, queue_share=4.0))
    for client, gets in ((ALICE, 72), (BOB, 15)):  # alone 4/5 of the bound; then 4/5 of the fifth that is left
        for _ in range(gets):
            queued(door, client)
        with pytest.raises(ClientQueueFull, match="what is free is kept for others"):
            queued(door, client)
    queued(door, ClientId("newcomer"))


def test_clients_that_all_press_get_equal_shares() -> None:
    door = limiter(Limits(max_queued_requests=90, queue_share=1.0))
    clients = [ClientId(f"c{i}") for i in range(8)]
    admitted = dict.fromkeys(clients, 0)
    for _ in range(90):
        for client in clients:
            try:
                queued(door, client)
                admitted[client] += 1
            except ClientQueueFull:
                pass
    assert set(admitted.values()) <= {10, 11}  # a / (1 + a n) of 90


def test_the_oldest_wait_refuses_new_ones_of_its_class_and_below() -> None:
    door = limiter(Limits(max_wait_s=2.0))
    old = door.enter(ALICE, 0.0, PriorityClass.DEFAULT)
    old.queue(10, 0.0)
    door.enter(BOB, 2.0)
    for priority in (PriorityClass.BULK, PriorityClass.DEFAULT):
        with pytest.raises(Overloaded, match="for longer than 2000 ms already"):
            door.enter(BOB, 2.1, priority)
    door.enter(BOB, 2.1, PriorityClass.INTERACTIVE)
    old.start(2.2)
    door.enter(BOB, 2.2)


def test_the_class_is_the_one_the_client_may_have() -> None:
    policies = ClientPolicies(ClientPolicy(classes=frozenset({PriorityClass.BULK})))
    door = Limiter(Limits(max_wait_s=1.0), lambda: policies)
    queued(door)
    with pytest.raises(Overloaded):  # interactive was claimed, bulk it is
        door.enter(BOB, 2.0, PriorityClass.SYSTEM)


def test_the_time_to_come_back_follows_the_queue_and_not_idle_time() -> None:
    door = Limiter()
    for at_s in (0.0, 1000.0, 2000.0):  # hours of nothing
        ticket = queued(door, at_s=at_s)
        ticket.start(at_s + 0.001)
        ticket.leave(10, at_s + 0.001)
    assert door.retry_after_s() == pytest.approx(0.1)
    tickets = [queued(door, at_s=3000.0) for _ in range(200)]
    for i, ticket in enumerate(tickets[:100]):
        ticket.start(3000.0 + i * 0.5)
    assert door.retry_after_s() == pytest.approx(0.1 * 100 * 0.5, rel=0.01)


def test_policies_may_change_between_requests() -> None:
    policies = ClientPolicies(ClientPolicy(max_streams=1))
    door = Limiter(None, lambda: policies)
    door.enter(ALICE, 0.0)
    with pytest.raises(TooManyStreams):
        door.enter(ALICE, 0.0)
    policies = ClientPolicies(by_name={"alice": ClientPolicy(max_streams=2)})
    door.enter(ALICE, 0.0)


def test_a_rate_that_is_taken_away_is_forgotten() -> None:
    policies = ClientPolicies(ClientPolicy(tokens_per_s=1.0, burst_tokens=1.0))
    door = Limiter(None, lambda: policies)
    queued(door, tokens=1000)
    policies = ClientPolicies()
    ticket = queued(door, tokens=1000)
    ticket.leave(0, 0.0)
    assert door.statistics().clients == 1


def test_names_that_come_and_go_are_forgotten() -> None:
    door = limiter(tokens_per_s=1.0, burst_tokens=10.0)
    for i in range(2 * MAX_IDLE_CLIENTS):
        ticket = queued(door, ClientId(f"c{i}"), tokens=100, at_s=i * 1e-3)
        ticket.start(i * 1e-3)
        ticket.leave(100, i * 1e-3)
    assert door.statistics().clients == MAX_IDLE_CLIENTS
    queued(door, ALICE, at_s=1e6).leave(0, 1e6)
    assert door.statistics().clients == 0


class Door(RuleBasedStateMachine):
    """Any history: bounds hold, counts are those of a plain list of tickets, and who is in stays in."""

    CLIENTS = (ALICE, BOB, ClientId("proxy", "u1"), ClientId("proxy", "u2"))
    LIMITS = Limits(max_streams=12, max_queued_requests=6, max_queued_tokens=400, max_wait_s=5.0, queue_share=2.0)
    POLICIES = ClientPolicies(
        ClientPolicy(max_streams=5, max_queued_requests=3, tokens_per_s=50.0, burst_tokens=200.0),
        {"bob": ClientPolicy(max_queued_tokens=150)},
    )

    def __init__(self) -> None:
        super().__init__()
        self.door = Limiter(self.LIMITS, lambda: self.POLICIES)
        self.now_s = 0.0
        self.entered: list[Ticket] = []
        self.waiting: dict[Ticket, int] = {}
        self.running: list[Ticket] = []
        self.told: list[float | None] = []  # when to come back

    @rule(client=st.sampled_from(CLIENTS), priority=st.sampled_from(PriorityClass))
    def enter(self, client: ClientId, priority: PriorityClass) -> None:
        try:
            self.entered.append(self.door.enter(client, self.now_s, priority))
        except Rejected as refusal:
            self.told.append(refusal.retry_after_s)

    @rule(which=st.integers(0, 99), tokens=st.integers(1, 300))
    def queue(self, which: int, tokens: int) -> None:
        if self.entered:
            ticket = self.entered.pop(which % len(self.entered))
            try:
                ticket.queue(tokens, self.now_s)
                self.waiting[ticket] = tokens
            except Rejected:
                ticket.leave(0, self.now_s)

    @rule(which=st.integers(0, 99))
    def start(self, which: int) -> None:
        if self.waiting:
            ticket = list(self.waiting)[which % len(self.waiting)]
            del self.waiting[ticket]
            ticket.start(self.now_s)
            self.running.append(ticket)

    @rule(which=st.integers(0, 99), used=st.integers(0, 600))
    def leave(self, which: int, used: int) -> None:
        everyone = [*self.entered, *self.waiting, *self.running]
        if everyone:
            ticket = everyone[which % len(everyone)]
            self.waiting.pop(ticket, None)
            self.entered = [t for t in self.entered if t is not ticket]
            self.running = [t for t in self.running if t is not ticket]
            ticket.leave(used, self.now_s)

    @rule(duration_s=st.floats(0.0, 4.0))
    def time_goes_by(self, duration_s: float) -> None:
        self.now_s += duration_s

    @invariant()
    def counts_are_right_and_bounds_hold(self) -> None:
        assert all(told is not None and told > 0 for told in self.told)
        counted = self.door.statistics()
        assert counted.open == len(self.entered) + len(self.waiting) + len(self.running) <= 12
        assert counted.queued_requests == len(self.waiting) <= 6
        assert counted.queued_tokens == sum(self.waiting.values()) <= 400
        for client in self.CLIENTS:
            own = {ticket: tokens for ticket, tokens in self.waiting.items() if ticket.client == client}
            policy = self.POLICIES.of(client)
            assert len(own) <= (policy.max_queued_requests or math.inf)
            assert sum(own.values()) <= (policy.max_queued_tokens or math.inf)

    def teardown(self) -> None:
        for ticket in [*self.entered, *self.waiting, *self.running]:
            ticket.leave(10, self.now_s)
        counted = self.door.statistics()
        assert (counted.open, counted.queued_requests, counted.queued_tokens) == (0, 0, 0)
        queued(self.door, BOB, 1, self.now_s + 1e6).leave(0, self.now_s + 1e6)
        assert self.door.statistics().clients == 0


TestDoor = Door.TestCase
