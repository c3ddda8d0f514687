"""The slow plain twin of `engine.batch.PersistentBatch`: every sequence stepped by itself, every sum done anew."""

from __future__ import annotations

from dataclasses import dataclass

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits


@dataclass(eq=False)
class PlainSequence:
    key: int
    number: int
    prompt_tokens: int
    output_tokens: int
    rank: int
    context: int
    emitted: int = 0
    where: str = "waiting"  # waiting | prefilling | decoding

    @property
    def to_prefill(self) -> int:
        return self.prompt_tokens + self.emitted - self.context


class PlainBatch:
    def __init__(self, model: StepModel, limits: EngineLimits) -> None:
        self.model, self.limits = model, limits
        self.waiting: list[PlainSequence] = []
        self.active: list[PlainSequence] = []  # in order of admission
        self.submitted = 0
        self.evictions = 0
        self.step: list[tuple[PlainSequence, int]] | None = None

    def prefilling(self) -> list[PlainSequence]:
        return [s for s in self.active if s.where == "prefilling"]

    def decoding(self) -> list[PlainSequence]:
        return [s for s in self.active if s.where == "decoding"]

    def kv_tokens(self) -> int:
        return sum(s.context for s in self.active)

    def promised(self) -> int:
        return sum(s.to_prefill for s in self.prefilling())

    def submit(self, key: int, prompt_tokens: int, output_tokens: int, cached_tokens: int, rank: int) -> None:
        if self.limits.kv_tokens is not None:
            output_tokens = min(output_tokens, self.limits.kv_tokens - prompt_tokens + 1)
        context = min(cached_tokens, prompt_tokens - 1)
        self.waiting.append(PlainSequence(key, self.submitted, prompt_tokens, output_tokens, rank, context))
        self.submitted += 1

    def cancel(self, key: int) -> bool:
        before = len(self.waiting) + len(self.active)
        self.waiting = [s for s in self.waiting if s.key != key]
        self.active = [s for s in self.active if s.key != key]
        return len(self.waiting) + len(self.active) < before

    def rerank(self, key: int, rank: int) -> bool:
        for s in self.waiting:
            if s.key == key:
                s.rank = rank
                return True
        return False

    def begin_step(self) -> float | None:
        kv_limit = self.limits.kv_tokens
        while self.waiting and len(self.active) < self.limits.max_batch_size:
            head = min(self.waiting, key=lambda s: (s.rank, s.number))
            needed = self.kv_tokens() + self.promised() + head.context + head.to_prefill + len(self.decoding()) + 1
            if kv_limit is not None and self.active and needed > kv_limit:
                break
            self.waiting.remove(head)
            self.active.append(head)
            head.where = "prefilling"
        while kv_limit is not None and self.decoding():
            if self.kv_tokens() + self.promised() + len(self.decoding()) <= kv_limit:
                break
            victim = max(self.active, key=lambda s: s.number)
            self.active.remove(victim)
            victim.where, victim.context = "waiting", 0
            self.waiting.append(victim)
            self.evictions += 1
        if not self.active:
            return None
        budget = self.limits.max_prefill_tokens
        self.step = []
        square = 0
        for s in self.prefilling():
            chunk = min(budget, s.to_prefill)
            if chunk > 0:
                self.step.append((s, chunk))
                square += chunk * (chunk + 2 * s.context)
                budget -= chunk
        for s in self.decoding():
            self.step.append((s, 0))
        prefilled = sum(chunk for _, chunk in self.step)
        contexts = sum(s.context for s in self.decoding())
        m = self.model
        return m.c0 + m.p1 * prefilled + m.p2 * square + m.d1 * len(self.decoding()) + m.d2 * contexts

    def end_step(self) -> list[tuple[int, bool]]:
        assert self.step is not None
        step, self.step = [(s, chunk) for s, chunk in self.step if s in self.active], None
        emitted: list[tuple[int, bool]] = []
        for s, chunk in step:
            s.context += chunk or 1
        if self.limits.kv_tokens is not None:
            assert self.kv_tokens() <= self.limits.kv_tokens, "the KV cache overflowed within a step"
        for s, chunk in step:
            if chunk and s.to_prefill > 0:
                continue
            s.where = "decoding"
            s.emitted += 1
            last = s.emitted == s.output_tokens
            emitted.append((s.key, last))
            if last:
                self.active.remove(s)
        return emitted
