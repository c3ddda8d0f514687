"""Limits at the door: how much one client, and all together, may have open, have waiting, and use.

    enter -> queue -> start -> leave                    leave may come at any time, and more than once

A request enters before its prompt is looked at, so that what is over a limit costs next to nothing; it queues once its
tokens are known. The tokens of a request are those of its prompt and the output expected of it; when it leaves, the
expectation is replaced by what it used, and by nothing where it never reached the engine.

Rate. Each client has a bucket of tokens that fills at its rate. A request enters while at least one token is left and
takes all of its own, so the bucket may go below zero and the next request waits until it is full enough again: over any
span of t seconds a client starts no more than burst + rate t tokens and the one request that overdrew.

Fairness. With a queue share of a, a client may queue more while what it has waiting is less than a times what is still
free of the bound, for requests and for tokens (dynamic thresholds of shared-memory switches; Choudhury and Hahne,
IEEE/ACM Transactions on Networking 6(2), 1998). n clients that all press get a / (1 + a n) of the bound each, and
a newcomer always finds 1 / (1 + a n) of it free.

What is accepted is never touched: only new requests are refused. No clock here; instants are handed in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from lmdeploy_slo.core.clients import ClientPolicies, ClientPolicy, nearest_class
from lmdeploy_slo.core.request import ClientId, PriorityClass
from lmdeploy_slo.errors import ClientQueueFull, Overloaded, QueueFull, RateLimited, Rejected, TooManyStreams

MAX_IDLE_CLIENTS = 4096
"""Clients without a request whose bucket is not full yet: of more, those that left first are forgotten."""

RETRY_AFTER_RANGE_S = (0.1, 30.0)
_MEMORY = 0.9  # weight of what was known in the mean time between dispatches


@dataclass(frozen=True, slots=True)
class Limits:
    """Of all clients together; None is no bound.

    max_streams: requests that have not ended, >= 1. max_queued_requests, max_queued_tokens: those that wait for the
    engine, >= 1. max_wait_s: > 0; while a request of the same or a higher class waits for longer, no new one is taken.
    queue_share: a of the module, > 0.
    """

    max_streams: int | None = None
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    max_wait_s: float | None = None
    queue_share: float | None = None


@dataclass(frozen=True, slots=True)
class LimiterStatistics:
    """open: entered and not left. clients: those that anything is known of."""

    open: int
    queued_requests: int
    queued_tokens: int
    clients: int


@dataclass(slots=True)
class _Client:
    id: ClientId
    open: int = 0
    queued_requests: int = 0
    queued_tokens: int = 0
    tokens_left: float | None = None  # None: full
    filled_at_s: float = 0.0


class Ticket:
    """One request on its way through. `policy` is its client's, `priority_class` the one it may have."""

    __slots__ = ("_charged", "_client", "_limiter", "open", "policy", "priority_class", "started")

    def __init__(self, limiter: Limiter, client: _Client, policy: ClientPolicy, priority_class: PriorityClass) -> None:
        self._limiter = limiter
        self._client = client
        self._charged = 0
        self.policy = policy
        self.priority_class = priority_class
        self.open = True
        self.started = False

    @property
    def client(self) -> ClientId:
        return self._client.id

    def check(self, tokens: int, now_s: float) -> None:
        """Raises Rejected where it could not queue with so many tokens now."""
        self._limiter._check(self, self._client, tokens, now_s)

    def queue(self, tokens: int, now_s: float) -> None:
        """It waits for the engine from now on; `tokens` >= 1. Raises Rejected, and then still has to leave."""
        self._limiter._queue(self, self._client, tokens, now_s)

    def start(self, now_s: float) -> None:
        """It went to the engine."""
        self.started = True
        self._limiter._stop_waiting(self, self._client, now_s)

    def wait_again(self, now_s: float) -> None:
        """The engine lost it: it waits once more, beyond any bound, and is not charged again."""
        if self.open:
            self._limiter._wait(self, self._client, self._charged, now_s)

    def leave(self, used_tokens: int, now_s: float) -> None:
        """It ended, or came no further; what it used counts only where it was started. Idempotent."""
        if self.open:
            self.open = False
            self._limiter._leave(self, self._client, used_tokens if self.started else 0, now_s)


class Limiter:
    """Counts, and refuses what is too much. Not thread-safe; every `now_s` is at least the one before."""

    def __init__(self, limits: Limits | None = None, policies: Callable[[], ClientPolicies] = ClientPolicies) -> None:
        """policies: called for each request, so that they may change."""
        self.limits = limits or Limits()
        self.policies = policies
        self._clients: dict[ClientId, _Client] = {}
        self._idle: OrderedDict[ClientId, None] = OrderedDict()
        self._open = 0
        self._queued_tokens = 0
        self._waiting: tuple[OrderedDict[Ticket, tuple[float, int]], ...] = tuple(OrderedDict() for _ in PriorityClass)
        self._queue_began_at_s = 0.0
        self._last_start_at_s = 0.0
        self._gap_s: float | None = None  # recent mean time between dispatches while something waited

    def enter(
        self,
        client: ClientId,
        now_s: float,
        priority_class: PriorityClass = PriorityClass.DEFAULT,
        *,
        queues: bool = True,
    ) -> Ticket:
        """A request came in. Raises TooManyStreams and RateLimited, and where it is to queue, QueueFull,
        ClientQueueFull and Overloaded."""
        policy = self.policies().of(client)
        known = self._clients.get(client) or _Client(client)
        ticket = Ticket(self, known, policy, nearest_class(priority_class, policy.classes))
        most, own_most = self.limits.max_streams, policy.max_streams
        if most is not None and self._open >= most:
            raise TooManyStreams(f"{self._open} requests are open, the limit is {most}", self.retry_after_s())
        if own_most is not None and known.open >= own_most:
            text = f"{known.open} requests of this client are open, the limit is {own_most}"
            raise TooManyStreams(text, self.retry_after_s())
        if queues:
            self._check(ticket, known, 0, now_s)
        else:
            self._check_rate(policy, known, now_s)
        self._clients[client] = known
        self._idle.pop(client, None)
        known.open += 1
        self._open += 1
        return ticket

    @property
    def queued_requests(self) -> int:
        return sum(map(len, self._waiting))

    def retry_after_s(self) -> float:
        """When about a tenth of the queue will be gone, within `RETRY_AFTER_RANGE_S`."""
        shortest_s, longest_s = RETRY_AFTER_RANGE_S
        return min(max(0.1 * self.queued_requests * (self._gap_s or 0.0), shortest_s), longest_s)

    def statistics(self) -> LimiterStatistics:
        return LimiterStatistics(self._open, self.queued_requests, self._queued_tokens, len(self._clients))

    # -- inside ---------------------------------------------------------------

    def _check(self, ticket: Ticket, client: _Client, tokens: int, now_s: float) -> None:
        """Raises where no request of `tokens` may queue; 0: not even the smallest."""
        self._check_rate(ticket.policy, client, now_s)
        limits, policy, waiting = self.limits, ticket.policy, self.queued_requests
        self._check_bound("requests", waiting, 1, limits.max_queued_requests, QueueFull)
        self._check_bound("tokens", self._queued_tokens, tokens or 1, limits.max_queued_tokens, QueueFull)
        self._check_bound("requests", client.queued_requests, 1, policy.max_queued_requests, ClientQueueFull)
        self._check_bound("tokens", client.queued_tokens, tokens or 1, policy.max_queued_tokens, ClientQueueFull)
        self._check_share("requests", client.queued_requests, waiting, limits.max_queued_requests)
        self._check_share("tokens", client.queued_tokens, self._queued_tokens, limits.max_queued_tokens)
        if limits.max_wait_s is not None:
            for queue in self._waiting[ticket.priority_class :]:
                if queue and now_s - next(iter(queue.values()))[0] > limits.max_wait_s:
                    text = f"a request waits for longer than {limits.max_wait_s * 1e3:g} ms already"
                    raise Overloaded(text, self.retry_after_s())

    def _check_rate(self, policy: ClientPolicy, client: _Client, now_s: float) -> None:
        if policy.tokens_per_s is None or client.tokens_left is None:
            return
        left = self._fill(client, policy, now_s)
        if left is not None and left < 1:
            text = f"this client may use {policy.tokens_per_s:g} tokens per second"
            raise RateLimited(text, (1 - left) / policy.tokens_per_s + 0.001)

    def _check_bound(self, of: str, queued: int, more: int, bound: int | None, error: type[Rejected]) -> None:
        if bound is not None and queued + more > bound:
            whose = " of this client" if error is ClientQueueFull else ""
            if more > bound:
                raise error(f"the request has {more} {of}, at most {bound}{whose} may wait")
            raise error(f"{queued} {of}{whose} are waiting, the limit is {bound}", self.retry_after_s())

    def _check_share(self, of: str, own: int, queued: int, bound: int | None) -> None:
        share = self.limits.queue_share
        if share is not None and bound is not None and own >= share * (bound - queued):
            text = f"{own} {of} of this client are waiting, and what is free is kept for others"
            raise ClientQueueFull(text, self.retry_after_s())

    def _queue(self, ticket: Ticket, client: _Client, tokens: int, now_s: float) -> None:
        self._check(ticket, client, tokens, now_s)
        policy = ticket.policy
        ticket._charged = tokens
        if policy.tokens_per_s is not None:
            if client.tokens_left is None:
                client.tokens_left, client.filled_at_s = policy.burst, now_s
            client.tokens_left -= tokens
        self._wait(ticket, client, tokens, now_s)

    def _wait(self, ticket: Ticket, client: _Client, tokens: int, now_s: float) -> None:
        if not self.queued_requests:
            self._queue_began_at_s = now_s
        self._waiting[ticket.priority_class][ticket] = (now_s, tokens)
        self._queued_tokens += tokens
        client.queued_requests += 1
        client.queued_tokens += tokens

    def _stop_waiting(self, ticket: Ticket, client: _Client, now_s: float | None) -> None:
        """now_s: when it was dispatched; None where it was not."""
        waited = self._waiting[ticket.priority_class].pop(ticket, None)
        if waited is None:
            return
        self._queued_tokens -= waited[1]
        client.queued_requests -= 1
        client.queued_tokens -= waited[1]
        if now_s is not None:
            gap_s = max(0.0, now_s - max(self._queue_began_at_s, self._last_start_at_s))
            self._gap_s = gap_s if self._gap_s is None else _MEMORY * self._gap_s + (1 - _MEMORY) * gap_s
            self._last_start_at_s = now_s

    def _leave(self, ticket: Ticket, client: _Client, used_tokens: int, now_s: float) -> None:
        self._stop_waiting(ticket, client, None)
        client.open -= 1
        self._open -= 1
        if client.tokens_left is not None:
            client.tokens_left += ticket._charged - used_tokens
            self._fill(client, ticket.policy, now_s)
        if client.open:
            return
        if client.tokens_left is None:
            del self._clients[client.id]
        else:
            self._idle[client.id] = None
        self._forget(now_s)

    def _fill(self, client: _Client, policy: ClientPolicy, now_s: float) -> float | None:
        """Adds the tokens that came since, and returns what is left; None for a full bucket, which is not kept, nor
        is that of a client that has no rate any more."""
        if client.tokens_left is not None:
            if policy.tokens_per_s is None:
                client.tokens_left = None
                return None
            client.tokens_left += policy.tokens_per_s * (now_s - client.filled_at_s)
            client.filled_at_s = now_s
            if client.tokens_left >= policy.burst:
                client.tokens_left = None
        return client.tokens_left

    def _forget(self, now_s: float) -> None:
        """Clients that left first and are as new, and those beyond what is kept."""
        while self._idle:
            first = next(iter(self._idle))
            left = self._fill(self._clients[first], self.policies().of(first), now_s)
            if left is not None and len(self._idle) <= MAX_IDLE_CLIENTS:
                return
            del self._idle[first]
            del self._clients[first]
