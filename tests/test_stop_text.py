"""Stop texts are found however the text is cut, and nothing of one is ever shown too early."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.engine.stop_text import StopScanner

LETTERS = "ab"


def plain(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """Letter by letter: the first end at which a stop is complete; of those, the longest."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return (text[:end] if include else text[: end - max(map(len, matches))]), True
    return text, False


def cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


@given(
    text=st.text(LETTERS, max_size=30),
    stops=st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=3),
    places=st.lists(st.integers(0, 30), max_size=6),
    include=st.booleans(),
)
def test_the_cut_does_not_matter(text: str, stops: list[str], places: list[int], include: bool) -> None:
    scanner = StopScanner(stops, include_stop=include)
    shown = ""
    expected, found = plain(text, stops, include)
    for piece in cut(text, places):
        shown += scanner.feed(piece)
        assert expected.startswith(shown)
    if not scanner.stopped:
        shown += scanner.flush()
    assert (shown, scanner.stopped) == (expected, found)


def test_only_what_could_become_a_stop_is_held_back() -> None:
    scanner = StopScanner(["###"], include_stop=False)
    assert scanner.feed("one #") == "one "
    assert scanner.feed("two ##") == "#two "
    assert scanner.flush() == "##"


@pytest.mark.parametrize("include", [False, True])
def test_nothing_comes_after_the_stop(include: bool) -> None:
    scanner = StopScanner(["."], include_stop=include)
    assert scanner.feed("a. b") == ("a." if include else "a")
    assert scanner.feed("c") == ""
    assert scanner.flush() == ""
