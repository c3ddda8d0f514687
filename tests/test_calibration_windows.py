"""Windows of known work are cut out of tokens and instants: exactly, or not at all."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.batch import PersistentBatch, Sequence
from lmdeploy_slo.prediction.calibration_estimator import Work
from lmdeploy_slo.prediction.calibration_windows import WINDOW_STEPS, StepObserver
from lmdeploy_slo.testing.builders import A100

SECONDS = StepModel(c0=1.0, p1=0.01, p2=1e-5, d1=0.1, d2=0.001)


def seconds(model: StepModel, work: Work) -> float:
    return (
        model.c0 * work.steps
        + model.p1 * work.prefill_tokens
        + model.p2 * work.prefill_square
        + model.d1 * work.sequence_steps
        + model.d2 * work.context_tokens
    )


@dataclass
class Watched:
    """A batch in virtual time, and the observer of its tokens. Whatever reaches the observer goes through here.

    parts: the tokens of a pass are told in so many steps, these `lag_s` apart. merge: those of so many passes in one.
    """

    limits: EngineLimits
    model: StepModel = A100
    parts: int = 1
    merge: int = 1
    lag_s: float = 0.0
    works: list[Work] = field(default_factory=list)
    now_s: float = 0.0

    def __post_init__(self) -> None:
        self.batch = PersistentBatch(self.model, self.limits)
        self.sequences: dict[int, Sequence] = {}
        self.tokens: dict[int, int] = {}  # as told
        self.observer = StepObserver(
            max_prefill_tokens=self.limits.max_prefill_tokens,
            max_batch_size=self.limits.max_batch_size,
            progress=self.tokens.__getitem__,
            on_window=self.works.append,
        )
        self._untold: list[list[tuple[int, bool]]] = []
        self._shuffle = random.Random(0)

    def send(self, handle: int, prompt: int, output: int, *, cached: int = 0, expected: float | None = None) -> None:
        self.sequences[handle] = Sequence(handle, prompt, output, cached)
        self.batch.submit(self.sequences[handle])
        self.observer.sent(handle, prompt, cached if expected is None else expected, self.now_s)

    def abort(self, handle: int) -> None:
        if self.batch.cancel(handle):
            del self.sequences[handle]
            self.observer.left(handle, self.tokens.pop(handle, 0), finished=False)

    def step(self) -> bool:
        """One pass; False where there is nothing to do."""
        duration_s = self.batch.begin_step()
        if duration_s is None:
            return False
        self.now_s += duration_s
        self._untold.append([(int(s.key), last) for s, last in self.batch.end_step()])  # type: ignore[call-overload]
        if len(self._untold) >= self.merge or not self.batch.decoding:
            self.tell()
        return True

    def tell(self) -> None:
        events = [event for told in self._untold for event in told if event[0] in self.sequences]
        self._untold.clear()
        self._shuffle.shuffle(events) if self.parts > 1 else None
        size = -(-len(events) // self.parts) or 1
        at_s = self.now_s
        for start in range(0, len(events), size):
            self._tell(events[start : start + size], at_s)
            at_s += self.lag_s

    def _tell(self, events: list[tuple[int, bool]], at_s: float) -> None:
        others = 0
        firsts: dict[int, int] = {}
        ended = []
        for handle, last in events:
            if handle in self.tokens:
                others += handle not in firsts
            else:
                self.tokens[handle] = 0
                firsts[handle] = 0
            self.tokens[handle] += 1
            if handle in firsts:
                firsts[handle] += 1
            if last:
                ended.append(handle)
        for handle, tokens in firsts.items():
            self.observer.first_token(handle, tokens, self.sequences[handle].cached_tokens)
        for handle in ended:
            del self.sequences[handle]
            self.observer.left(handle, self.tokens[handle], finished=True)
        self.observer.step(at_s, others)

    def run(self) -> None:
        while self.step():
            pass
        self.tell()

    def check(self, rel: float = 1e-9) -> None:
        assert self.works
        for work in self.works:
            assert work.duration_s == pytest.approx(seconds(self.model, work), rel=rel)


def test_one_request_by_hand() -> None:
    """A prompt of 100 in one pass, then eight passes at contexts 100 to 107, then four more until its end."""
    watched = Watched(EngineLimits(), SECONDS)
    watched.now_s = 5.0
    watched.send(1, 100, 13)
    watched.run()
    assert watched.works == [
        Work(pytest.approx(2.1), 1, 100, 10_000, 0, 0),
        Work(pytest.approx(8 * 1.1 + 0.828), WINDOW_STEPS, 0, 0, 8, sum(range(100, 108))),
        Work(pytest.approx(4 * 1.1 + 0.438), 4, 0, 0, 4, sum(range(108, 112))),
    ]


def test_a_prompt_longer_than_a_pass_is_taken_apart() -> None:
    """Beside a decoding request, 250 tokens at 100 a pass: three windows, with half a pass for the next prompt."""
    watched = Watched(EngineLimits(max_prefill_tokens=100), SECONDS)
    watched.send(1, 50, 30)
    watched.step()
    watched.send(2, 250, 5)
    watched.send(3, 60, 5)
    watched.run()
    prompts = [(w.steps, w.prefill_tokens, w.prefill_square) for w in watched.works if w.prefill_tokens]
    assert prompts == [
        (1, 50, 2500),
        (1, 100, 10_000),
        (1, 100, 30_000),
        (1, 100, 250**2 - 200**2 + 50**2),
        (1, 10, 60**2 - 50**2),
    ]
    watched.check()


def test_an_idle_engine_is_not_timed() -> None:
    watched = Watched(EngineLimits(), SECONDS)
    watched.send(1, 10, 2)
    watched.run()
    watched.now_s += 1000.0
    watched.send(2, 10, 2)
    watched.run()
    watched.check()
    assert watched.observer.dropped == 0


def test_when_the_engine_began_may_be_told() -> None:
    observer = StepObserver(
        max_prefill_tokens=8192, max_batch_size=8, progress={1: 1}.__getitem__, on_window=(works := []).append
    )
    observer.sent(1, 100, 0, 1.0)
    observer.first_token(1, 1, None, scheduled_at_s=1.5)
    observer.step(2.0, 0)
    assert works == [Work(0.5, 1, 100, 10_000, 0, 0)]


def test_cached_tokens_are_not_computed_whatever_was_expected() -> None:
    for expected in (0, 100, 190):
        watched = Watched(EngineLimits(max_prefill_tokens=100), SECONDS)
        watched.send(1, 200, 3, cached=50, expected=expected)
        watched.run()
        watched.check()
        assert sum(work.prefill_tokens for work in watched.works) in (150, 0)  # all of it, or it is dropped


requests = st.lists(
    st.tuples(
        st.integers(0, 30),  # passes before it is sent
        st.integers(1, 700),  # prompt
        st.integers(1, 40),  # output
        st.integers(0, 300),  # cached
    ),
    min_size=1,
    max_size=25,
)


def play(watched: Watched, history: list[tuple[int, int, int, int]], *, aborted: int = 0) -> None:
    for handle, (gap, prompt, output, cached) in enumerate(history):
        for _ in range(gap):
            if not watched.step():
                break
        if aborted and handle % aborted == aborted - 1:
            watched.abort(handle - 2)
        watched.send(handle, prompt, output, cached=min(cached, prompt - 1))
    watched.run()


@settings(max_examples=150)
@given(requests, st.sampled_from([64, 100, 512, 8192]), st.sampled_from([3, 256]))
def test_windows_are_exact(history: list[tuple[int, int, int, int]], prefill: int, batch: int) -> None:
    """Whatever is sent when, chunked or not, waiting inside the engine or not. Where something had to be dropped, how
    much of a prompt was in it is not known, and so not how much was left for the next."""
    watched = Watched(EngineLimits(batch, prefill))
    play(watched, history)
    if not watched.observer.dropped:
        for work in watched.works:
            assert work.duration_s == pytest.approx(seconds(A100, work), rel=1e-9)


@settings(max_examples=50)
@given(requests)
def test_all_time_and_work_is_accounted_for(history: list[tuple[int, int, int, int]]) -> None:
    """Where prompts are shorter than a pass nothing is dropped, and every prompt token is there once."""
    watched = Watched(EngineLimits(max_prefill_tokens=100_000))
    play(watched, history)
    assert watched.observer.dropped == 0
    assert sum(w.prefill_tokens for w in watched.works) == sum(p - min(c, p - 1) for _, p, _, c in history)


@settings(max_examples=50)
@given(requests, st.integers(2, 5))
def test_aborts_leave_the_rest_right(history: list[tuple[int, int, int, int]], aborted: int) -> None:
    watched = Watched(EngineLimits(max_prefill_tokens=512))
    play(watched, history, aborted=aborted)
    for work in watched.works:
        assert work.duration_s == pytest.approx(seconds(A100, work), rel=0.1)


@pytest.mark.parametrize(
    ("told", "dropped"),
    [
        ({"parts": 3, "lag_s": 0.001}, 0.25),
        ({"merge": 2}, 0.5),
        ({"merge": 5}, 1.0),
    ],
)
def test_passes_that_are_told_in_parts_or_together_are_counted(told: dict[str, float], dropped: float) -> None:
    """As from LMDeploy: the tokens of a pass in three parts, in any order, a millisecond apart; and from a loop that
    is late, those of several passes together."""
    watched = Watched(EngineLimits(), **told)  # type: ignore[arg-type]
    draw = random.Random(4)
    for handle in range(150):
        watched.send(handle, draw.randint(10, 2000), draw.randint(5, 150))
        for _ in range(draw.randint(0, 12)):
            watched.step()
    watched.run()
    errors = sorted(abs(work.duration_s / seconds(A100, work) - 1) for work in watched.works)
    assert len(errors) > 50
    assert watched.observer.dropped < dropped * len(errors)
    assert errors[len(errors) // 2] < 0.03
    assert errors[int(0.9 * len(errors))] < 0.2


def test_evictions_are_noticed() -> None:
    """Where memory is short, windows in which somebody pauses or is computed anew are left out."""
    watched = Watched(EngineLimits(32, 512, kv_tokens=6000))
    draw = random.Random(2)
    for handle in range(80):
        watched.send(handle, draw.randint(10, 700), draw.randint(50, 300))
        for _ in range(draw.randint(0, 25)):
            watched.step()
    watched.run()
    assert watched.batch.evictions > 20
    assert watched.observer.dropped > 20
    wrong = [w for w in watched.works if abs(w.duration_s / seconds(A100, w) - 1) > 0.01]
    assert len(watched.works) > 60
    assert len(wrong) < 0.05 * len(watched.works)


def test_nothing_is_kept_of_requests_that_have_left() -> None:
    watched = Watched(EngineLimits(max_prefill_tokens=64))
    play(watched, [(1, 300, 9, 20)] * 40, aborted=3)
    observer = watched.observer
    assert (observer._prompts, observer._decoding, observer._ended, observer._firsts) == ({}, {}, [], [])
    assert observer._context == 0
    assert observer._window is None


def test_requests_it_was_never_told_of_are_ignored() -> None:
    observer = StepObserver(max_prefill_tokens=1, max_batch_size=1, progress={}.__getitem__, on_window=[].append)
    observer.first_token(7)
    observer.step(1.0, 5)
    observer.left(8, 3, finished=True)
    observer.left(9, 3, finished=False)
    observer.step(2.0, 5)
    assert observer._window is None
    assert observer._ended == []
