"""What becomes of a request whose engine is gone: it starts over, goes on elsewhere, or ends.

One that has shown nothing waits again, with what is left of its queue timeout, where its engine will be back or there
is another one. One that has shown tokens goes on in another engine, at once (see `runtime.resume`), where there is one
or where there are several and its own comes back first. Either happens `RuntimeOptions.retries` times at most.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.errors import EngineError, EngineUnavailable
from lmdeploy_slo.runtime.journal import Journal
from lmdeploy_slo.runtime.live import Live
from lmdeploy_slo.runtime.pool import EnginePool
from lmdeploy_slo.runtime.replica import Replica
from lmdeploy_slo.runtime.resume import can_resume, resumed_request, resumed_spec


class Failover:
    """On the loop of the runtime that owns it."""

    def __init__(
        self,
        pool: EnginePool,
        clock: Clock,
        journal: Journal,
        retries: int,
        *,
        end: Callable[[Live, EngineError], None],
        queue_timeout: Callable[[Live], None],
    ) -> None:
        """end: of a request that no engine holds. queue_timeout: called when one that waits again has waited for too
        long."""
        self._pool = pool
        self._clock = clock
        self._journal = journal
        self._retries = retries
        self._end = end
        self._queue_timeout = queue_timeout

    def failed(self, live: Live, error: EngineError) -> None:
        """Its engine failed it, and holds it no more."""
        if isinstance(error, EngineUnavailable):
            live.replica.recovery.seen(up=False)
            if live.attempts <= self._retries and self._goes_on(live):
                return
        self._end(live, error)

    def evacuate(self, replica: Replica) -> None:
        """What is left in an engine that is taken away goes on elsewhere, or ends."""
        for live in list(replica.in_engine.values()):
            live.attempts -= 1  # this engine did not fail it
            if not self._goes_on(live):
                self._end(live, EngineUnavailable("its engine was taken away"))
            replica.abort(live.spec.request_id)

    def _goes_on(self, live: Live) -> bool:
        if not self._pool.others_open(live.replica) and not live.replica.recovery.returning:
            return False
        return self._resume(live) if live.output_tokens else self._wait_again(live)

    def _wait_again(self, live: Live) -> bool:
        queue_timeout_s, now_s, replica = live.spec.queue_timeout_s, self._clock.now_s(), live.replica
        left_s = math.inf if queue_timeout_s is None else live.spec.arrival_at_s + queue_timeout_s - now_s
        if left_s <= 0:
            return False
        replica.lose(live)
        live.timing.dispatched_at_s, live.rank = None, -1
        replica.scheduler.requeue(live.handle)
        live.ticket.wait_again(now_s)
        if left_s < math.inf:
            live.queue_timer = asyncio.get_running_loop().call_later(left_s, self._queue_timeout, live)
        self._journal.requeued(live)
        self._pool.rebalance()
        live.replica.plans.mark_stale()
        return True

    def _resume(self, live: Live) -> bool:
        """Its tokens become part of its prompt, and it need not wait in line once more."""
        if not can_resume(live):
            return False
        now_s, source = self._clock.now_s(), live.replica
        source.lose(live)
        source.scheduler.drop(live.handle)
        live.request, spec = resumed_request(live), resumed_spec(live)
        live.resumed_tokens = live.reported_tokens = live.output_tokens
        live.started = False
        live.ticket.wait_again(now_s)
        self._journal.resumed(live)
        if self._pool.others_open(source):
            live.replica = self._pool.place(spec)
        live.replica.scheduler.take_in(live.handle, spec)
        if live.replica is not source:
            self._journal.moved(live, source.number)
        live.replica.send_now(live, now_s)
        return True
