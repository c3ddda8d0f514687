"""The persistent batch in virtual time, against its plain twin and by hand."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_batch import PlainBatch

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.batch import PersistentBatch, Sequence

MODEL = StepModel(c0=1.0, p1=0.01, p2=1e-4, d1=0.1, d2=1e-3)

limits_strategy = st.builds(
    EngineLimits,
    max_batch_size=st.integers(1, 5),
    max_prefill_tokens=st.integers(1, 40),
    kv_tokens=st.none() | st.integers(30, 120),
)
submit_strategy = st.tuples(
    st.just("submit"), st.integers(1, 30), st.integers(1, 40), st.integers(0, 20), st.integers(-2, 2)
)
other_strategy = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 12)),
    st.tuples(st.sampled_from(["cancel", "cancel within step"]), st.integers(0, 30)),
    st.tuples(st.just("rerank"), st.integers(0, 30), st.integers(-2, 2)),
)
script_strategy = st.lists(submit_strategy | other_strategy, max_size=40)


class Pair:
    """The batch and its twin, stepped together and compared at every step."""

    def __init__(self, limits: EngineLimits) -> None:
        self.batch, self.plain = PersistentBatch(MODEL, limits), PlainBatch(MODEL, limits)
        self.sequences: list[Sequence] = []
        self.tokens: Counter[int] = Counter()
        self.ended: set[int] = set()
        self.cancelled: set[int] = set()

    def submit(self, prompt: int, output: int, cached: int, rank: int) -> None:
        key = len(self.sequences)
        self.sequences.append(Sequence(key, prompt, output, cached, rank))
        self.batch.submit(self.sequences[-1])
        self.plain.submit(key, prompt, output, cached, rank)

    def cancel(self, key: int) -> None:
        known = self.batch.cancel(key)
        assert known == self.plain.cancel(key)
        if known:
            self.cancelled.add(key)
        self.check()

    def step(self, cancel_within: int | None = None) -> bool:
        duration_s, expected_s = self.batch.begin_step(), self.plain.begin_step()
        if duration_s is None or expected_s is None:
            assert duration_s is expected_s is None
            return False
        assert duration_s == pytest.approx(expected_s, rel=1e-12)
        if cancel_within is not None:
            self.cancel(cancel_within)
        emitted = [(sequence.key, last) for sequence, last in self.batch.end_step()]
        assert sorted(emitted) == sorted(self.plain.end_step())
        for key, last in emitted:
            assert key not in self.ended | self.cancelled
            self.tokens[key] += 1
            if last:
                self.ended.add(key)
        self.check()
        return True

    def check(self) -> None:
        batch, plain = self.batch, self.plain
        assert batch.kv_tokens_used == plain.kv_tokens()
        assert batch.active == len(plain.active)
        assert len(batch) == len(plain.active) + len(plain.waiting)
        assert batch.evictions == plain.evictions
        assert batch.limits.kv_tokens is None or batch.kv_tokens_used <= batch.limits.kv_tokens
        assert batch.active <= batch.limits.max_batch_size
        for twin in plain.active:
            sequence = self.sequences[twin.key]
            assert (batch.emitted_of(sequence), batch.context_of(sequence)) == (twin.emitted, twin.context)


@settings(max_examples=300, deadline=None)
@given(limits_strategy, script_strategy)
def test_equals_the_plain_twin_and_loses_nobody(limits: EngineLimits, script: list[Any]) -> None:
    pair = Pair(limits)
    for action, *values in script:
        if action in ("cancel", "cancel within step", "rerank") and pair.sequences:
            values[0] %= len(pair.sequences)
        if action == "submit":
            pair.submit(*values)
        elif action == "step":
            for _ in range(values[0]):
                pair.step()
        elif action == "cancel":
            pair.cancel(values[0])
        elif action == "cancel within step":
            pair.step(cancel_within=values[0])
        else:
            assert pair.batch.rerank(*values) == pair.plain.rerank(*values)
    steps = 0
    while pair.step():
        steps += 1
        assert steps < 20_000, "somebody starves"
    assert len(pair.batch) == pair.batch.active == pair.batch.kv_tokens_used == 0
    for key, sequence in enumerate(pair.sequences):
        assert (key in pair.ended) != (key in pair.cancelled)
        if key in pair.ended:
            assert pair.tokens[key] == sequence.output_tokens


@settings(max_examples=200, deadline=None)
@given(limits_strategy, st.lists(submit_strategy, min_size=1, max_size=12), st.data())
def test_skipping_a_quiet_stretch_equals_stepping_through_it(
    limits: EngineLimits, submits: list[Any], data: st.DataObject
) -> None:
    stepped, skipping = PersistentBatch(MODEL, limits), PersistentBatch(MODEL, limits)
    pairs = []
    for key, (_, *values) in enumerate(submits):
        pairs.append((Sequence(key, *values), Sequence(key, *values)))
        stepped.submit(pairs[-1][0])
        skipping.submit(pairs[-1][1])
    while len(skipping):
        quiet = skipping.quiet_steps()
        if quiet:
            steps = data.draw(st.integers(1, quiet))
            duration_s = skipping.quiet_duration_s(steps)
            skipping.skip_steps(steps)
            durations = []
            for _ in range(steps):
                durations.append(stepped.begin_step())
                assert all(not last for _, last in stepped.end_step())
            assert duration_s == pytest.approx(math.fsum(durations), abs=1e-9)
        else:
            assert skipping.begin_step() == pytest.approx(stepped.begin_step(), abs=1e-9)
            assert [(s.key, last) for s, last in skipping.end_step()] == [
                (s.key, last) for s, last in stepped.end_step()
            ]
        for one, other in pairs:
            assert stepped.emitted_of(one) == skipping.emitted_of(other)
            assert stepped.context_of(one) == skipping.context_of(other)
        assert stepped.kv_tokens_used == skipping.kv_tokens_used
        assert (stepped.evictions, len(stepped)) == (skipping.evictions, len(skipping))


def run(batch: PersistentBatch) -> list[tuple[float, list[tuple[Any, bool]]]]:
    """All steps to the end: (duration, tokens)."""
    steps = []
    while (duration_s := batch.begin_step()) is not None:
        steps.append((duration_s, [(s.key, last) for s, last in batch.end_step()]))
    return steps


def test_one_request_by_hand() -> None:
    batch = PersistentBatch(MODEL, EngineLimits(max_prefill_tokens=8))
    batch.submit(Sequence("a", prompt_tokens=10, output_tokens=3))
    (first, second, third, fourth) = run(batch)
    assert first == (pytest.approx(1.0 + 0.08 + 1e-4 * 64), [])
    assert second == (pytest.approx(1.0 + 0.02 + 1e-4 * 2 * (2 + 16)), [("a", False)])
    assert third == (pytest.approx(1.0 + 0.1 + 1e-3 * 10), [("a", False)])
    assert fourth == (pytest.approx(1.0 + 0.1 + 1e-3 * 11), [("a", True)])


def test_prompts_are_prefilled_in_order_of_submission_beside_decodes() -> None:
    batch = PersistentBatch(MODEL, EngineLimits(max_prefill_tokens=10))
    for key, prompt_tokens in (("a", 6), ("b", 6)):
        batch.submit(Sequence(key, prompt_tokens, output_tokens=2))
    (first, second, third) = run(batch)
    assert first == (pytest.approx(1.0 + 0.1 + 1e-4 * (36 + 16)), [("a", False)])
    assert second == (pytest.approx(1.0 + 0.02 + 1e-4 * 2 * (2 + 8) + 0.1 + 1e-3 * 6), [("a", True), ("b", False)])
    assert third == (pytest.approx(1.0 + 0.1 + 1e-3 * 6), [("b", True)])


def test_cached_prompt_tokens_cost_no_prefill() -> None:
    batch = PersistentBatch(MODEL, EngineLimits())
    batch.submit(Sequence("a", prompt_tokens=10, output_tokens=1, cached_tokens=7))
    assert run(batch) == [(pytest.approx(1.0 + 0.03 + 1e-4 * 3 * (3 + 14)), [("a", True)])]


def test_a_full_cache_evicts_the_latest_and_recomputes_it() -> None:
    batch = PersistentBatch(MODEL, EngineLimits(kv_tokens=12))
    early, late = Sequence("early", 4, 6), Sequence("late", 4, 6)
    batch.submit(early)
    batch.submit(late)
    while batch.evictions == 0:
        assert batch.begin_step() is not None
        batch.end_step()
    assert (late.evictions, early.evictions) == (1, 0)
    assert batch.context_of(late) == 0
    assert late.emitted == 3
    steps = run(batch)
    ends = [key for _, tokens in steps for key, last in tokens if last]
    assert ends == ["early", "late"]
    assert (early.emitted, late.emitted) == (6, 6)
    recomputed = next(duration_s for duration_s, tokens in steps if ("late", False) in tokens)
    assert recomputed == pytest.approx(1.0 + 0.07 + 1e-4 * 49)


def test_an_output_that_does_not_fit_alone_is_cut() -> None:
    batch = PersistentBatch(MODEL, EngineLimits(kv_tokens=10))
    sequence = Sequence("a", prompt_tokens=8, output_tokens=100)
    batch.submit(sequence)
    peak = 0
    while batch.begin_step() is not None:
        peak = max(peak, batch.kv_tokens_used)
        batch.end_step()
    assert sequence.emitted == sequence.output_tokens == 3
    assert peak <= 10


def test_smaller_ranks_go_first_and_ranks_change_only_while_waiting() -> None:
    batch = PersistentBatch(MODEL, EngineLimits(max_batch_size=1))
    for key, rank in (("runs", 5), ("b", 2), ("c", 1), ("d", 2), ("e", 0)):
        batch.submit(Sequence(key, 1, 2, rank=rank))
        if key == "runs":
            batch.begin_step()
    assert batch.rerank("d", 0)
    assert batch.rerank("e", 3)
    assert not batch.rerank("runs", 0)
    assert not batch.rerank("nobody", 0)
    batch.end_step()
    ends = [key for _, tokens in run(batch) for key, last in tokens if last]
    assert ends == ["runs", "d", "c", "b", "e"]


def test_cancelled_and_reranked_entries_do_not_pile_up() -> None:
    batch = PersistentBatch(MODEL, EngineLimits(max_batch_size=1))
    batch.submit(Sequence("runs", 1, 1_000_000))
    batch.begin_step()
    batch.end_step()
    batch.submit(Sequence("waits", 1, 1))
    for number in range(5000):
        batch.submit(Sequence(number, 1, 1, rank=number))
        batch.rerank("waits", number % 3)
        assert batch.cancel(number)
    assert len(batch._queue) < 200
    assert len(batch) == 2

    for number in range(5000):
        batch.cancel("runs" if number == 0 else f"runs {number - 1}")
        batch.submit(Sequence(f"runs {number}", 1, 1_000_000, rank=-1))
        batch.begin_step()
        batch.end_step()
    assert len(batch._finish_heap) < 200


@pytest.mark.parametrize(
    "sequence",
    [Sequence("a", 0, 1), Sequence("a", 1, 0), Sequence("a", 1, 1, cached_tokens=-1), Sequence("a", 11, 1)],
    ids=["no prompt", "no output", "negative cache", "prompt exceeds the cache"],
)
def test_impossible_sequences_are_refused(sequence: Sequence) -> None:
    batch = PersistentBatch(MODEL, EngineLimits(kv_tokens=10))
    with pytest.raises(ValueError, match=r"at least one token|does not fit"):
        batch.submit(sequence)
    assert len(batch) == 0
    assert batch.begin_step() is None


def test_a_key_in_use_is_refused_and_free_again_after_its_end() -> None:
    batch = PersistentBatch(MODEL, EngineLimits())
    batch.submit(Sequence("a", 1, 1))
    with pytest.raises(ValueError, match="already"):
        batch.submit(Sequence("a", 1, 1))
    run(batch)
    batch.submit(Sequence("a", 1, 1))
    assert len(run(batch)) == 1


def test_a_cancelled_sequence_no_longer_ends_a_quiet_stretch() -> None:
    batch = PersistentBatch(MODEL, EngineLimits())
    batch.submit(Sequence("short", 1, 5))
    batch.submit(Sequence("long", 1, 50))
    batch.begin_step()
    batch.end_step()
    assert batch.quiet_steps() == 3
    batch.cancel("short")
    assert batch.quiet_steps() == 48


def test_steps_must_be_begun_and_ended_in_turn() -> None:
    batch = PersistentBatch(MODEL, EngineLimits())
    with pytest.raises(RuntimeError):
        batch.end_step()
    batch.submit(Sequence("a", 1, 2))
    batch.begin_step()
    assert batch.quiet_steps() == 0
    with pytest.raises(RuntimeError):
        batch.begin_step()


def test_leaving_out_tokens_that_change_nothing_changes_nothing_else() -> None:
    """First tokens, first ones after an eviction and last ones are told in either case."""
    limits = EngineLimits(3, 16, kv_tokens=40)
    whole, brief = PersistentBatch(MODEL, limits), PersistentBatch(MODEL, limits)
    sizes = [(10, 12), (8, 9), (12, 1), (9, 14)]
    for batch in (whole, brief):
        for key, (prompt, output) in enumerate(sizes):
            batch.submit(Sequence(key, prompt, output))
    while len(whole):
        assert whole.begin_step() == brief.begin_step()
        assert whole.prefills_now is brief.prefills_now
        decoding = set(whole._decoding)
        told = [(s.key, last) for s, last in whole.end_step()]
        assert [(s.key, last) for s, last in brief.end_step(every_token=False)] == [
            (key, last) for key, last in told if last or key not in decoding
        ]
        assert (whole.decode_steps, whole.decoding, whole.decode_context) == (
            brief.decode_steps,
            brief.decoding,
            brief.decode_context,
        )
    assert whole.evictions == brief.evictions > 0
    assert len(brief) == 0
