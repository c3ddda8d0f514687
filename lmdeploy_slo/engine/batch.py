"""TurboMind's persistent batch in virtual time: which tokens each forward pass yields, and how long it takes.

Synchronous and without a clock: the emulated engine drives it in real time, the simulator on a virtual clock. The
caller asks for a step (`begin_step` gives its duration) and ends it (`end_step` gives who got a token); a stretch of
steps in which nothing can change may be skipped in closed form.

Prompt tokens are prefilled in order of submission, at most `max_prefill_tokens` a step; the step that ends a prompt
emits its first token. When the KV cache is short the latest submitted sequence is evicted and recomputed later.
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
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0  # of the prompt, already in the prefix cache
    rank: int = 0  # smaller first; ties by submission
    # state, owned by the batch
    number: int = -1
    to_prefill: int = 0  # prompt (and, after an eviction, generated) tokens not yet in the KV cache
    context: int = 0  # tokens in the KV cache; exact while prefilling, else see PersistentBatch.context_of
    emitted: int = 0  # tokens emitted; exact while not decoding, else see PersistentBatch.emitted_of
    joined_at: int = -1  # decode epoch at which it began to decode; -1 while it does not
    done: bool = False
    evictions: int = 0


@dataclass(slots=True)
class _Step:
    chunks: list[tuple[Sequence, int]] = field(default_factory=list)
    decoding: int = 0
    duration_s: float = 0.0


class PersistentBatch:
    """See the module. `submit` raises ValueError for a prompt that cannot fit into the KV cache at all."""

    def __init__(self, model: StepModel, limits: EngineLimits) -> None:
        self.model = model
        self.limits = limits
        self._numbers = itertools.count()
        self._queue: list[tuple[int, int, Sequence]] = []  # submitted, not admitted: heap of (rank, number)
        self._queued = 0
        self._prefilling: list[Sequence] = []  # in order of submission
        self._decoding: dict[Hashable, Sequence] = {}
        self._finish_heap: list[tuple[int, int, Sequence]] = []  # (epoch of the last token, number)
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

    def emitted_of(self, sequence: Sequence) -> int:
        """Tokens emitted so far."""
        return sequence.emitted + (self._epoch - sequence.joined_at if sequence.joined_at >= 0 else 0)

    def context_of(self, sequence: Sequence) -> int:
        """Tokens in the KV cache."""
        return sequence.context + (self._epoch - sequence.joined_at if sequence.joined_at >= 0 else 0)

    # -- requests -------------------------------------------------------------

    def submit(self, sequence: Sequence) -> None:
        """Takes a sequence; it joins at the next `begin_step` that has room."""
        kv_tokens = self.limits.kv_tokens
        if kv_tokens is not None and sequence.prompt_tokens + 1 > kv_tokens:
            raise ValueError(f"prompt of {sequence.prompt_tokens} tokens does not fit a KV cache of {kv_tokens} tokens")
        if sequence.key in self._sequences:
            raise ValueError(f"{sequence.key!r} is in the engine already")
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

    def end_step(self) -> list[tuple[Sequence, bool]]:
        """Ends the step begun: (sequence, whether that token was its last), one entry per token emitted."""
        step = self._step
        if step is None:
            raise RuntimeError("no step was begun")
        self._step = None
        emitted: list[tuple[Sequence, bool]] = []
        if step.decoding and self._decoding:
            self._epoch += 1
            self._decode_context += len(self._decoding)
            finished = self._pop_finished()
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
        heapq.heappush(self._queue, (sequence.rank, sequence.number, sequence))
        self._queued += 1

    def _peek(self) -> Sequence | None:
        while self._queue and self._queue[0][2].done:
            heapq.heappop(self._queue)
        return self._queue[0][2] if self._queue else None

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
        heap = self._finish_heap
        while heap and (heap[0][2].joined_at < 0 or heap[0][0] != self._last_epoch_of(heap[0][2])):
            heapq.heappop(heap)

    def _last_epoch_of(self, sequence: Sequence) -> int:
        return sequence.joined_at + sequence.output_tokens - sequence.emitted

    def _finish(self, sequence: Sequence) -> None:
        sequence.done = True
        del self._sequences[sequence.key]

    def _leave(self, sequence: Sequence) -> None:
        """Drops a cancelled sequence from whichever set holds it."""
        if sequence.joined_at >= 0:
            self._settle(sequence)
        elif sequence in self._prefilling:
            self._prefilling.remove(sequence)
            self._prefill_context -= sequence.context
            self._reserved -= sequence.to_prefill
        else:
            self._queued -= 1  # its heap entry is dropped when it comes up

    def _evict_for_decode(self) -> None:
        """Makes room for one more token of each decoding sequence; the latest submitted goes first.

        A sequence alone in the cache is not evicted: it ends there, its output cut at what fits.
        """
        kv_tokens = self.limits.kv_tokens
        if kv_tokens is None:
            return
        while self._decoding and self.kv_tokens_used + self._reserved + len(self._decoding) > kv_tokens:
            members = [*self._decoding.values(), *self._prefilling]
            victim = max(members, key=lambda s: s.number)
            if len(members) == 1:
                victim.output_tokens = self.emitted_of(victim) + 1
                heapq.heappush(self._finish_heap, (self._epoch + 1, victim.number, victim))
                return
            if victim.joined_at >= 0:
                self._settle(victim)
            else:
                self._prefilling.remove(victim)
                self._prefill_context -= victim.context
                self._reserved -= victim.to_prefill
            # What it generated becomes prompt; its next token comes when that has been recomputed.
            victim.to_prefill = victim.prompt_tokens + victim.emitted
            victim.context = 0
            victim.evictions += 1
            self.evictions += 1
            self._enqueue(victim)
