"""The stand-in's persistent batch: one worker thread that takes steps as long as there is something to do.

A step gives prompt tokens, in order of admission and at most `max_prefill_tokens`, to sequences that are not complete
yet, and one token to every sequence that decodes; the step that completes a prompt yields its first token. When the
KV budget is short the latest sequence is evicted and computed anew later. Waiting sequences are admitted by
(priority, number), and Python never sends more than there are handles, so that queue is short.
"""

from __future__ import annotations

import heapq
import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

import torch

from lmdeploy_slo.clock import Clock, MonotonicClock, unix_time_s
from lmdeploy_slo.engine.cpu_standin.outputs import Outputs
from lmdeploy_slo.engine.cpu_standin.prefix import PrefixCache
from lmdeploy_slo.engine.cpu_standin.rows import RowModel
from lmdeploy_slo.engine.cpu_standin.sampling import Draw, SamplingSettings, draw

logger = logging.getLogger(__name__)


class Status(IntEnum):
    """How a sequence stands, in the native module's numbers."""

    RUNNING = 0
    FAILED = 5
    FINISHED = 7
    CANCELLED = 8
    ENGINE_GONE = 10
    OUT_OF_MEMORY = 11


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """kv_blocks of block_tokens tokens each are the KV budget."""

    max_batch_size: int
    max_prefill_tokens: int
    session_tokens: int
    block_tokens: int
    kv_blocks: int
    prefix_caching: bool

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)


@dataclass(slots=True)
class Times:
    """Microseconds since 1970, 0: not yet. cached_tokens: of the prompt, from the prefix cache."""

    enqueue_time: int = 0
    scheduled_time: int = 0
    cached_tokens: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in the engine. `tokens` is prompt and output; `held` of them are in the KV cache."""

    number: int
    priority: int
    tokens: list[int]
    prompt_tokens: int
    max_new_tokens: int
    min_new_tokens: int
    stop_ids: frozenset[int]
    eos_ids: tuple[int, ...]
    settings: SamplingSettings
    rng: random.Random
    outputs: Outputs
    streams: bool
    notify: Callable[[], None]
    times: Times = field(default_factory=Times)
    held: int = 0
    status: Status = Status.RUNNING
    published: tuple[Status, int] = (Status.RUNNING, 0)
    cancel_asked: bool = False

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    def publish(self, status: Status) -> None:
        """Makes tokens and status known; after any status but RUNNING nothing follows."""
        self.status = status
        self.published = (status, len(self.tokens))
        if self.streams or status is not Status.RUNNING:
            self.notify()

    def __lt__(self, other: Sequence) -> bool:
        return (self.priority, self.number) < (other.priority, other.number)


class Pace:
    """How fast steps are taken: for benchmarks and tests. min_step_s: no step is shorter, seconds."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or MonotonicClock()
        self.min_step_s = 0.0
        self.error: Exception | None = None
        self._open = threading.Event()
        self._open.set()
        self._stepping = threading.Lock()

    def hold(self) -> None:
        """No step is begun after this returns, and none is under way."""
        self._open.clear()
        with self._stepping:
            pass

    def release(self) -> None:
        self._open.set()

    def fail(self, error: Exception) -> None:
        """The next step raises `error`: the engine is gone."""
        self.error = error

    def enter(self, closing: threading.Event) -> bool:
        """Waits until a step may begin; False where the engine closes. `leave` must follow True."""
        while not closing.is_set():
            self._open.wait(0.05)
            self._stepping.acquire()
            if self._open.is_set():
                return True
            self._stepping.release()
        return False

    def leave(self) -> None:
        self._stepping.release()


class Batch:
    """See the module. `submit`, `cancel`, `close` and the properties may be called from any thread."""

    def __init__(self, model: RowModel, limits: BatchLimits, pace: Pace) -> None:
        self.limits = limits
        self.ticks = 0
        self.prefixes = PrefixCache(limits.block_tokens, limits.kv_blocks)
        self._model = model
        self._pace = pace
        self._rows: list[Sequence] = []  # by row; all but the last are complete, and decode
        self._queue: list[Sequence] = []
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._gone = False
        self._thread = threading.Thread(target=self._run, name="cpu-standin", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def kv_usage(self) -> float:
        """Share of the KV budget that is in use, 0..1."""
        return self._used_blocks() / self.limits.kv_blocks

    def submit(self, sequence: Sequence) -> None:
        sequence.times.enqueue_time = int(unix_time_s() * 1e6)
        with self._changed:
            if not self._gone:
                heapq.heappush(self._queue, sequence)
                self._changed.notify()
                return
        sequence.publish(Status.ENGINE_GONE)

    def cancel(self, sequence: Sequence) -> None:
        """Ends it: at once where it waits, before the next step where it runs."""
        with self._changed:
            sequence.cancel_asked = True
            waits = sequence in self._queue
            if waits:
                self._queue.remove(sequence)
                heapq.heapify(self._queue)
            self._changed.notify()
        if waits:
            sequence.publish(Status.CANCELLED)

    def close(self) -> None:
        """Ends everything in it; returns when the worker has stopped. Idempotent."""
        self._closing.set()
        with self._changed:
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- the worker -----------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._rows or self._queue or self._closing.is_set())
                if not self._pace.enter(self._closing):
                    break
                try:
                    began_s = self._pace.clock.now_s()
                    with torch.inference_mode():
                        self._step()
                finally:
                    self._pace.leave()
                rest_s = self._pace.min_step_s - (self._pace.clock.now_s() - began_s)
                if rest_s > 0:
                    self._closing.wait(rest_s)
        except Exception:
            logger.exception("the CPU stand-in failed")
        with self._changed:
            self._gone = True
            left = [*self._rows, *self._queue]
            self._rows, self._queue = [], []
        for sequence in left:
            sequence.publish(Status.ENGINE_GONE)

    def _step(self) -> None:
        for sequence in [s for s in self._rows if s.cancel_asked]:
            self._leave(sequence, Status.CANCELLED)
        if self._pace.error is not None:
            raise self._pace.error
        self._make_room()
        decoding = len(self._rows) - (1 if self._partial() is not None else 0)
        drawn = self._prefill()
        if decoding:
            rows = self._rows[:decoding]
            logits = self._model.forward(0, [[s.tokens[-1]] for s in rows], [s.held for s in rows], all_logits=False)
            for sequence in rows:
                sequence.held += 1
            drawn = [*self._draw(rows, logits), *drawn]
        self.ticks += 1
        for sequence, draw_ in drawn:
            self._emit(sequence, draw_)

    def _prefill(self) -> list[tuple[Sequence, Draw]]:
        drawn: list[tuple[Sequence, Draw]] = []
        budget = self.limits.max_prefill_tokens
        while budget > 0:
            sequence = self._partial() or self._admit()
            if sequence is None:
                break
            chunk = sequence.tokens[sequence.held : sequence.held + budget]
            budget -= len(chunk)
            wants_all = sequence.outputs.wants_prompt_logits and sequence.new_tokens == 0
            row = len(self._rows) - 1
            logits = self._model.forward(row, [chunk], [sequence.held], all_logits=wants_all)
            if wants_all:
                sequence.outputs.record_prompt(sequence.held, sequence.tokens, logits[0])
                logits = logits[:, -1]
            sequence.held += len(chunk)
            if sequence.held == len(sequence.tokens):
                self._remember_prefix(sequence)
                drawn.extend(self._draw([sequence], logits))
        return drawn

    def _partial(self) -> Sequence | None:
        """The sequence that is not complete yet, always in the last row."""
        last = self._rows[-1] if self._rows else None
        # A decoding sequence has exactly one token to go, and has generated it.
        if last is not None and (len(last.tokens) - last.held > 1 or last.held < last.prompt_tokens):
            return last
        return None

    def _admit(self) -> Sequence | None:
        """The next sequence, if there is room for it, in a row of its own."""
        with self._changed:
            if not self._queue or len(self._rows) >= self.limits.max_batch_size:
                return None
            sequence = self._queue[0]
            needed = self.limits.blocks(len(sequence.tokens) + 1)
            if self._rows and self._used_blocks() + needed > self.limits.kv_blocks:
                return None
            heapq.heappop(self._queue)
            self._rows.append(sequence)
        if needed > self.limits.kv_blocks:
            self._leave(sequence, Status.OUT_OF_MEMORY)
            return self._admit()
        if not sequence.times.scheduled_time:
            sequence.times.scheduled_time = int(unix_time_s() * 1e6)
        if self.limits.prefix_caching and not sequence.outputs.wants_prompt_logits:
            for block in self.prefixes.match(sequence.tokens):
                self._model.cache.write(len(self._rows) - 1, sequence.held, block)
                sequence.held += self.limits.block_tokens
            if sequence.new_tokens == 0:
                sequence.times.cached_tokens = sequence.held
        return sequence

    def _draw(self, sequences: list[Sequence], logits: torch.Tensor) -> list[tuple[Sequence, Draw]]:
        """One token for each of `sequences` from its row of `logits`."""
        best = logits.argmax(dim=-1).tolist()
        drawn: list[tuple[Sequence, Draw]] = []
        for at, sequence in enumerate(sequences):
            sequence.outputs.record_logits(len(sequence.tokens) - 1, logits[at])
            no_end_yet = sequence.eos_ids if sequence.new_tokens < sequence.min_new_tokens else ()
            if sequence.settings.is_plain_greedy and not no_end_yet:
                drawn.append((sequence, Draw(best[at])))
            else:
                one = draw(logits[at], sequence.settings, sequence.tokens, no_end_yet, sequence.rng)
                drawn.append((sequence, one))
        return drawn

    def _emit(self, sequence: Sequence, drawn: Draw) -> None:
        sequence.tokens.append(drawn.token)
        sequence.outputs.record_token(len(sequence.tokens) - 1, drawn)
        full = sequence.new_tokens >= sequence.max_new_tokens or len(sequence.tokens) >= self.limits.session_tokens
        if full or drawn.token in sequence.stop_ids:
            self._leave(sequence, Status.FINISHED)
        else:
            sequence.publish(Status.RUNNING)

    # -- rows and memory ------------------------------------------------------

    def _leave(self, sequence: Sequence, status: Status) -> None:
        """Takes a sequence out of the batch and tells its end."""
        if status is Status.FINISHED:
            self._remember_prefix(sequence)
        self._free_row(sequence)
        sequence.publish(status)

    def _free_row(self, sequence: Sequence) -> None:
        """Keeps rows neighbours: the last complete one fills the gap, and an incomplete one stays last."""
        gap = self._rows.index(sequence)
        for last in dict.fromkeys((len(self._rows) - (2 if self._partial() else 1), len(self._rows) - 1)):
            if gap < last:
                mover = self._rows[last]
                self._model.cache.move_row(last, gap, mover.held)
                self._rows[gap] = mover
                gap = last
        self._rows.pop()

    def _used_blocks(self) -> int:
        return sum(self.limits.blocks(len(s.tokens)) for s in list(self._rows))

    def _make_room(self) -> None:
        """Evicts the latest sequences until every other one can take its next token."""
        while len(self._rows) > 1 and self._used_blocks() > self.limits.kv_blocks:
            latest = max(self._rows)
            self._free_row(latest)
            latest.held = 0
            with self._changed:
                heapq.heappush(self._queue, latest)
        if self._rows and self._used_blocks() > self.limits.kv_blocks:
            self._leave(self._rows[0], Status.OUT_OF_MEMORY)

    def _remember_prefix(self, sequence: Sequence) -> None:
        if self.limits.prefix_caching and sequence in self._rows:
            row = self._rows.index(sequence)
            for start, end in self.prefixes.missing(sequence.tokens[: sequence.held]):
                self.prefixes.add(sequence.tokens[:end], self._model.cache.read(row, start, end))
