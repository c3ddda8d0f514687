"""How much of a prompt the prefix cache will hold, learnt from what it held."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.core.request import ClientId, RequestSpec
from lmdeploy_slo.prediction import prefix
from lmdeploy_slo.prediction.prefix import PrefixPredictor
from lmdeploy_slo.testing.builders import make_spec


def turn(prompt: int, conversation: str = "", at_s: float = 0.0, task: str = "chat", **more: Any) -> RequestSpec:
    return make_spec(prompt_tokens=prompt, conversation_id=conversation, arrival_at_s=at_s, task_type=task, **more)


def test_nothing_is_expected_of_an_engine_that_never_said_anything() -> None:
    prefixes = PrefixPredictor()
    assert prefixes.predict(turn(1000)) == 0
    prefixes.finish(turn(1000, "c"), 200, 1.0)
    assert prefixes.predict(turn(1500, "c", 2.0)) == 0


def test_a_new_engine_has_no_conversation_in_its_cache() -> None:
    prefixes = PrefixPredictor()
    talk(prefixes, "c", 5)
    before, first = prefixes.predict(turn(2000, "c", 60.0)), prefixes.predict(turn(2000, "another", 60.0))
    prefixes.forget_conversations()
    assert prefixes.predict(turn(2000, "c", 60.0)) == first < before


def talk(prefixes: PrefixPredictor, name: str, turns: int, at_s: float = 0.0, kept: float = 1.0) -> list[float]:
    """A conversation whose cache keeps a share of what the last turn left; the forecasts made for its turns."""
    forecasts, prompt, left = [], 300, 0
    for number in range(turns):
        spec = turn(prompt, name, at_s + 10 * number)
        forecasts.append(prefixes.predict(spec))
        prefixes.observe(spec, int(kept * left), at_s + 10 * number + 1)
        prefixes.finish(spec, 200, at_s + 10 * number + 5)
        left, prompt = prompt + 200, prompt + 300
    return forecasts


def test_turns_go_on_with_what_the_last_one_left() -> None:
    prefixes = PrefixPredictor()
    for number in range(30):
        talk(prefixes, f"c{number}", 5, 100.0 * number)
    first, *others = talk(prefixes, "new", 5, 10_000.0)
    assert first == 0
    assert others == pytest.approx([500, 800, 1100, 1400], rel=0.06)


def test_the_share_that_is_kept_is_learnt_by_task_and_then_by_conversation() -> None:
    prefixes = PrefixPredictor()
    for number in range(30):
        talk(prefixes, f"c{number}", 5, 100.0 * number, kept=0.5)
    assert talk(prefixes, "usual", 3, 9000.0, kept=0.5)[1:] == pytest.approx([250, 400], rel=0.07)
    unusual = talk(prefixes, "unusual", 9, 10_000.0, kept=1.0)
    assert unusual[1] == pytest.approx(250, rel=0.1)
    assert unusual[-1] > 0.8 * (300 * 8 + 200)
    assert prefixes.predict(turn(1000, "other", task="code")) == 0


def test_what_was_left_long_ago_is_forgotten_as_the_cache_forgets() -> None:
    """Turns within seconds hit, turns after minutes miss."""
    prefixes, draw = PrefixPredictor(), random.Random(1)
    for number in range(300):
        at_s, soon = 1000.0 * number, draw.random() < 0.5
        prefixes.observe(turn(300, f"c{number}", at_s), 0, at_s)
        prefixes.finish(turn(300, f"c{number}", at_s), 200, at_s + 5)
        later = turn(600, f"c{number}", at_s + (8 if soon else 305))
        prefixes.observe(later, 500 if soon else 0, later.arrival_at_s)
    prefixes.observe(turn(300, "x", 1e6), 0, 1e6)
    prefixes.finish(turn(300, "x", 1e6), 200, 1e6)
    assert prefixes.predict(turn(600, "x", 1e6 + 3)) > 400
    assert prefixes.predict(turn(600, "x", 1e6 + 300)) < 60


def test_a_system_prompt_is_a_number_of_tokens() -> None:
    prefixes, draw = PrefixPredictor(), random.Random(0)
    for _ in range(200):
        prefixes.observe(turn(400 + draw.randint(10, 3000)), 400, 0.0)
    assert prefixes.predict(turn(500)) == pytest.approx(400, rel=0.05)
    assert prefixes.predict(turn(3000)) == pytest.approx(400, rel=0.05)
    assert prefixes.predict(turn(100)) <= 99


def test_documents_are_a_share_of_the_prompt() -> None:
    prefixes, draw = PrefixPredictor(), random.Random(0)
    for _ in range(200):
        prompt = draw.randint(100, 8000)
        prefixes.observe(turn(prompt), round(0.8 * prompt), 0.0)
    assert prefixes.predict(turn(1000)) == pytest.approx(800, rel=0.05)
    assert prefixes.predict(turn(6000)) == pytest.approx(4800, rel=0.05)


def test_equal_names_of_two_clients_are_two_conversations() -> None:
    prefixes = PrefixPredictor()
    for number in range(30):
        talk(prefixes, f"c{number}", 3, 100.0 * number)
    talk(prefixes, "same", 1, 9000.0)
    assert prefixes.predict(turn(1000, "same", 9010.0)) > 300
    assert prefixes.predict(turn(1000, "same", 9010.0, client=ClientId("somebody"))) < 50


specs = st.builds(
    turn,
    st.integers(1, 10_000),
    st.sampled_from(["", "a", "b"]),
    st.floats(0, 1e6),
    st.sampled_from(["", "chat"]),
)


@given(st.lists(st.tuples(specs, st.floats(0, 1), st.integers(1, 1000)), max_size=30), specs)
def test_a_forecast_leaves_at_least_one_token_to_compute(
    history: list[tuple[RequestSpec, float, int]], asked: RequestSpec
) -> None:
    prefixes = PrefixPredictor()
    for spec, share, output in history:
        prefixes.observe(spec, int(share * (spec.prompt_tokens - 1)), spec.arrival_at_s)
        prefixes.finish(spec, output, spec.arrival_at_s)
    assert 0 <= prefixes.predict(asked) <= asked.prompt_tokens - 1
    assert prefixes.mean_error_tokens >= 0


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "MAX_CONVERSATIONS", 10)
    monkeypatch.setattr(prefix, "MAX_TASKS", 5)
    prefixes = PrefixPredictor()
    for number in range(100):
        prefixes.observe(turn(100, f"c{number}", task=f"t{number}"), 10, 0.0)
    assert len(prefixes._conversations) == 10
    assert len(prefixes._tasks) == 5


def test_tasks_outlive_a_restart_conversations_do_not() -> None:
    prefixes = PrefixPredictor()
    for number in range(30):
        talk(prefixes, f"c{number}", 5, 100.0 * number)
    talk(prefixes, "mine", 1, 9000.0)
    again = PrefixPredictor()
    again.restore(json.loads(json.dumps(prefixes.state())))
    assert prefixes.predict(turn(700, "mine", 9010.0)) > 400
    assert again.predict(turn(700, "mine", 9010.0)) < 50
    assert talk(again, "new", 3, 10_000.0)[1:] == pytest.approx(talk(prefixes, "new", 3, 10_000.0)[1:], rel=0.02)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"tasks": []},
        {"tasks": {"chat": []}},
        {"tasks": {"chat": [[0.5, 1.0]] * 3}},
        {"tasks": {"chat": [[-0.5, 1.0]] * 16}},
        {"tasks": {"chat": [["x", 1.0]] * 16}},
        {"tasks": {"chat": [[0.5, float("nan")]] * 16}},
    ],
)
def test_what_is_no_state_is_refused(state: dict[str, Any]) -> None:
    prefixes = PrefixPredictor()
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        prefixes.restore(state)
    assert prefixes.state() == {"tasks": {}}
