"""TurboMind's persistent batch in virtual time: which tokens each forward pass yields, and how long it takes.

Synchronous and without a clock: the emulated engine drives it in real time, the simulator on a virtual clock. The
caller asks for a step (`begin_step` gives its duration) and ends it (`end_step` gives who got a token); a stretch of
steps in which nothing can change may be skipped in closed form.

Prompt tokens are prefilled in order of submission, at most `max_prefill_tokens` a step; the step that ends a prompt
emits its first token. When the KV cache is short the latest submitted sequence is evicted and recomputed later. A
sequence whose tokens would not even fit alone is cut: the KV cache never holds more than its limit.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable
from dataclasses import dataclass, field

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside the engine. `output_tokens` is the true length: schedulers never see this object."""

    key: Hashable
    prompt_tokens: int  # >= 1
    output_tokens: int  # >= 1; `submit` cuts it to what the KV cache can hold
    cached_tokens: int = 0  # of the prompt, already in the prefix cache
    rank: int = 0  # smaller first; ties by submission
    # state, owned by the batch
    number: int = -1
    to_prefill: int = 0  # prompt (and, after an eviction, generated) tokens not yet in the KV cache
    context: int = 0  # tokens in the KV cache; exact while prefilling, else see PersistentBatch.context_of
    emitted: int = 0  # tokens emitted; exact while not decoding, else see PersistentBatch.emitted_of
    joined_at: int = -1  # decode epoch at which it began to decode; -1 while it does not
    queued: bool = False  # submitted or evicted, not in the batch
    done: bool = False
    evictions: int = 0


_STALE_ENTRIES = 64
"""How many outdated heap entries are kept, beyond as many as there are live ones, before a heap is rebuilt."""


def _waits(entry: tuple[int, int, Sequence]) -> bool:
    """Whether an entry of the queue still stands for its sequence."""
    rank, _, sequence = entry
    return sequence.queued and sequence.rank == rank


@dataclass(slots=True)
class _Step:
    chunks: list[tuple[Sequence, int]] = field(default_factory=list)
    decoding: int = 0
    duration_s: float = 0.0


class PersistentBatch:
    """See the module. Memory is bounded by the sequences that have not ended."""

    def __init__(self, model: StepModel, limits: EngineLimits) -> None:
        self.model = model
        self.limits = limits
        self._numbers = itertools.count()
        self._queue: list[tuple[int, int, Sequence]] = []  # not in the batch: heap of (rank, number), some stale
        self._queued = 0
        self._prefilling: list[Sequence] = []  # in order of submission
        self._decoding: dict[Hashable, Sequence] = {}
        self._finish_heap: list[tuple[int, int, Sequence]] = []  # (epoch of the last token, number), some stale
        self._epoch = 0  # decode steps run so far
        self._decode_context = 0  # tokens in the KV cache of all decoding sequences
        self._prefill_context = 0
        self._reserved = 0  # prompt tokens promised to admitted sequences but not yet in the cache
        self._step: _Step | None = None
        self._sequences: dict[Hashable, Sequence] = {}
        self.evictions = 0

    # -- what callers may ask -------------------------------------------------

    def __len__(self) -> int:
        """Sequences submitted and not ended."""
        return len(self._sequences)

    @property
    def active(self) -> int:
        """Sequences in the batch (the others wait inside the engine)."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def kv_tokens_used(self) -> int:
        return self._decode_context + self._prefill_context

    @property
    def decoding(self) -> int:
        """Sequences that emit a token in every step."""
        return len(self._decoding)

    @property
    def decode_context(self) -> int:
        """Tokens in the KV cache of those."""
        return self._decode_context

    @property
    def decode_steps(self) -> int:
        """Steps that have ended and in which somebody decoded: what each decoding sequence counts its tokens by."""
        return self._epoch

    @property
    def prefills_now(self) -> bool:
        """Whether the step that was begun has prompt tokens in it."""
        return self._step is not None and bool(self._step.chunks)

    def emitted_of(self, sequence: Sequence) -> int:
        """Tokens emitted so far."""
        return sequence.emitted + (self._epoch - sequence.joined_at if sequence.joined_at >= 0 else 0)

    def context_of(self, sequence: Sequence) -> int:
        """Tokens in the KV cache."""
        return sequence.context + (self._epoch - sequence.joined_at if sequence.joined_at >= 0 else 0)

    # -- requests -------------------------------------------------------------

    def submit(self, sequence: Sequence) -> None:
        """Takes a sequence; it joins at the next `begin_step` that has room.

        Raises ValueError where a count is out of range, the key is in use, or the prompt alone exceeds the KV cache.
        """
        kv_tokens = self.limits.kv_tokens
        if sequence.prompt_tokens < 1 or sequence.output_tokens < 1 or sequence.cached_tokens < 0:
            raise ValueError(f"{sequence.key!r} needs a prompt and an output of at least one token")
        if kv_tokens is not None and sequence.prompt_tokens > kv_tokens:
            raise ValueError(f"prompt of {sequence.prompt_tokens} tokens does not fit a KV cache of {kv_tokens} tokens")
        if sequence.key in self._sequences:
            raise ValueError(f"{sequence.key!r} is in the engine already")
        if kv_tokens is not None:
            # The last token is never written to the cache, so one more than what is left can be emitted.
            sequence.output_tokens = min(sequence.output_tokens, kv_tokens - sequence.prompt_tokens + 1)
        sequence.number = next(self._numbers)
        sequence.context = min(sequence.cached_tokens, sequence.prompt_tokens - 1)
        sequence.to_prefill = sequence.prompt_tokens - sequence.context
        self._sequences[sequence.key] = sequence
        self._enqueue(sequence)

    def cancel(self, key: Hashable) -> bool:
        """Removes a sequence at once, also in the middle of a step; False where it is not (or no longer) here."""
        sequence = self._sequences.pop(key, None)
        if sequence is None:
            return False
        sequence.done = True
        self._leave(sequence)
        return True

    def rerank(self, key: Hashable, rank: int) -> bool:
        """Gives a sequence that is not in the batch a new rank; False where it is unknown or in the batch."""
        sequence = self._sequences.get(key)
        if sequence is None or not sequence.queued:
            return False
        if sequence.rank != rank:
            sequence.rank = rank
            heapq.heappush(self._queue, (rank, sequence.number, sequence))
            self._compact_queue()
        return True

    # -- time -----------------------------------------------------------------

    def begin_step(self) -> float | None:
        """Forms the next forward pass and returns its duration in seconds; None where there is nothing to do."""
        if self._step is not None:
            raise RuntimeError("the last step was not ended")
        self._admit()
        self._evict_for_decode()
        step = _Step(decoding=len(self._decoding))
        budget = self.limits.max_prefill_tokens
        tokens = square = 0
        for sequence in self._prefilling:
            if budget <= 0:
                break
            chunk = min(budget, sequence.to_prefill)
            budget -= chunk
            tokens += chunk
            square += chunk * (chunk + 2 * sequence.context)
            step.chunks.append((sequence, chunk))
        if not step.chunks and not step.decoding:
            return None
        step.duration_s = self.model.step_s(tokens, square, step.decoding, self._decode_context)
        self._step = step
        return step.duration_s

    def end_step(self, *, every_token: bool = True) -> list[tuple[Sequence, bool]]:
        """Ends the step begun: (sequence, whether that token was its last), one entry per token emitted.

        every_token: False leaves out the tokens by which nothing changes, those of sequences that decoded before and go
        on decoding; what is left are first tokens, the first after an eviction, and last ones.
        """
        step = self._step
        if step is None:
            raise RuntimeError("no step was begun")
        self._step = None
        emitted: list[tuple[Sequence, bool]] = []
        if step.decoding and self._decoding:
            self._epoch += 1
            self._decode_context += len(self._decoding)
            finished = self._pop_finished()
            if every_token:
                emitted = [(s, False) for s in self._decoding.values()]
            emitted.extend((s, True) for s in finished)
        for sequence, chunk in step.chunks:
            if sequence.done:
                continue
            sequence.context += chunk
            sequence.to_prefill -= chunk
            self._prefill_context += chunk
            self._reserved -= chunk
            if sequence.to_prefill == 0:
                emitted.append((sequence, self._start_decoding(sequence)))
        return emitted

    def quiet_steps(self) -> int:
        """How many coming steps are pure decode in which nobody joins, ends or is evicted (the last of them
        excluded where somebody ends in it); 0 where the next step has to be taken one by one."""
        if self._step is not None or self._prefilling or not self._decoding:
            return 0
        if self._queued and self.active < self.limits.max_batch_size and self._head_fits():
            return 0
        self._drop_stale_finishes()
        steps = self._finish_heap[0][0] - self._epoch - 1
        if self.limits.kv_tokens is not None:
            steps = min(steps, (self.limits.kv_tokens - self._decode_context) // len(self._decoding))
        return max(0, steps)

    def quiet_duration_s(self, steps: int) -> float:
        """Duration of the next `steps` <= `quiet_steps()` steps, in closed form."""
        return self.model.decode_stretch_s(steps, len(self._decoding), self._decode_context)

    def skip_steps(self, steps: int) -> None:
        """Takes `steps` <= `quiet_steps()` steps at once: every decoding sequence emits one token in each."""
        self._epoch += steps
        self._decode_context += steps * len(self._decoding)

    # -- inside ---------------------------------------------------------------

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.queued = True
        heapq.heappush(self._queue, (sequence.rank, sequence.number, sequence))
        self._queued += 1

    def _peek(self) -> Sequence | None:
        while self._queue and not _waits(self._queue[0]):
            heapq.heappop(self._queue)
        return self._queue[0][2] if self._queue else None

    def _compact_queue(self) -> None:
        """Entries that were cancelled or reranked must not pile up behind a head that does not fit."""
        if len(self._queue) > 2 * self._queued + _STALE_ENTRIES:
            self._queue = sorted(entry for entry in self._queue if _waits(entry))

    def _head_fits(self) -> bool:
        head = self._peek()
        if head is None:
            return False
        kv_tokens = self.limits.kv_tokens
        if kv_tokens is None or self.active == 0:
            return True
        after = self.kv_tokens_used + self._reserved + head.context + head.to_prefill + len(self._decoding) + 1
        return after <= kv_tokens

    def _admit(self) -> None:
        while self.active < self.limits.max_batch_size and self._head_fits():
            sequence = heapq.heappop(self._queue)[2]
            sequence.queued = False
            self._queued -= 1
            self._prefill_context += sequence.context
            self._reserved += sequence.to_prefill
            self._prefilling.append(sequence)

    def _start_decoding(self, sequence: Sequence) -> bool:
        """The prompt is complete: emits a token; True where it was the last."""
        self._prefilling.remove(sequence)
        self._prefill_context -= sequence.context
        sequence.emitted += 1
        if sequence.emitted >= sequence.output_tokens:
            self._finish(sequence)
            return True
        sequence.joined_at = self._epoch
        self._decoding[sequence.key] = sequence
        self._decode_context += sequence.context
        last = self._epoch + sequence.output_tokens - sequence.emitted
        heapq.heappush(self._finish_heap, (last, sequence.number, sequence))
        if len(self._finish_heap) > 2 * len(self._decoding) + _STALE_ENTRIES:
            self._finish_heap = sorted(entry for entry in self._finish_heap if self._ends_at(entry))
        return False

    def _settle(self, sequence: Sequence) -> None:
        """Takes a decoding sequence out of the decode set, with its counters made exact."""
        sequence.emitted, sequence.context = self.emitted_of(sequence), self.context_of(sequence)
        sequence.joined_at = -1
        del self._decoding[sequence.key]
        self._decode_context -= sequence.context

    def _pop_finished(self) -> list[Sequence]:
        finished = []
        self._drop_stale_finishes()
        while self._finish_heap and self._finish_heap[0][0] <= self._epoch:
            sequence = heapq.heappop(self._finish_heap)[2]
            self._settle(sequence)
            self._finish(sequence)
            finished.append(sequence)
            self._drop_stale_finishes()
        return finished

    def _drop_stale_finishes(self) -> None:
        while self._finish_heap and not self._ends_at(self._finish_heap[0]):
            heapq.heappop(self._finish_heap)

    def _ends_at(self, entry: tuple[int, int, Sequence]) -> bool:
        """Whether an entry still tells when its sequence ends: cancelled and evicted ones leave theirs behind."""
        last_epoch, _, sequence = entry
        return sequence.joined_at >= 0 and last_epoch == sequence.joined_at + sequence.output_tokens - sequence.emitted

    def _finish(self, sequence: Sequence) -> None:
        sequence.done = True
        del self._sequences[sequence.key]

    def _leave(self, sequence: Sequence) -> None:
        """Drops a cancelled sequence from whichever set holds it."""
        if sequence.joined_at >= 0:
            self._settle(sequence)
        elif sequence.queued:
            sequence.queued = False  # its heap entry is dropped when it comes up
            self._queued -= 1
            self._compact_queue()
        else:
            self._stop_prefill(sequence)

    def _stop_prefill(self, sequence: Sequence) -> None:
        self._prefilling.remove(sequence)
        self._prefill_context -= sequence.context
        self._reserved -= sequence.to_prefill

    def _evict_for_decode(self) -> None:
        """Makes room for one more token of each decoding sequence; the latest submitted goes first.

        The last one left always fits, because `submit` cut its output to what the cache holds.
        """
        kv_tokens = self.limits.kv_tokens
        if kv_tokens is None:
            return
        while self._decoding and self.kv_tokens_used + self._reserved + len(self._decoding) > kv_tokens:
            victim = max([*self._decoding.values(), *self._prefilling], key=lambda s: s.number)
            if victim.joined_at >= 0:
                self._settle(victim)
            else:
                self._stop_prefill(victim)
            # What it generated becomes prompt; its next token comes when that has been recomputed.
            victim.to_prefill = victim.prompt_tokens + victim.emitted
            victim.context = 0
            victim.evictions += 1
            self.evictions += 1
            self._enqueue(victim)
