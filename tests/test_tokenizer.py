"""The synthetic tokenizer, and the text the emulated engine writes with it."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.engine.base import ChatMessage, EngineRequest, Sampling
from lmdeploy_slo.engine.synthetic_text import TEXTS, TOKEN_IDS, SyntheticOutput, synthesize
from lmdeploy_slo.engine.synthetic_tokenizer import VOCAB_SIZE, SyntheticTokenizer
from lmdeploy_slo.testing.builders import make_request

TOKENIZER = SyntheticTokenizer()

texts = st.text(alphabet=st.characters(exclude_categories=["Cs"])) | st.text(alphabet="ab \n\t.é漢🙂")
token_ids = st.lists(st.integers(0, VOCAB_SIZE - 1))


@given(texts)
def test_decode_reverses_encode(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= token_id < VOCAB_SIZE for token_id in ids)


@given(token_ids, token_ids)
def test_tokens_decode_one_by_one_and_always_to_text(left: list[int], right: list[int]) -> None:
    whole = TOKENIZER.decode(left + right)
    assert whole == TOKENIZER.decode(left) + TOKENIZER.decode(right)
    assert whole.encode("utf-8").decode("utf-8") == whole


@given(st.integers(0, VOCAB_SIZE - 1), st.integers(0, VOCAB_SIZE - 1))
def test_no_two_ids_mean_the_same_text(one: int, other: int) -> None:
    surrogates = range(0xD800, 0xE000)
    if one != other and one not in surrogates and other not in surrogates:
        assert TOKENIZER.decode([one]) != TOKENIZER.decode([other])


def test_spaces_begin_a_token_and_characters_stay_whole() -> None:
    pieces = [TOKENIZER.decode([token_id]) for token_id in TOKENIZER.encode("The quick\nfox: naïve 漢字🙂")]
    assert pieces == ["The", " qu", "ick", "\nfo", "x:", " na", "ï", "ve", " ", "漢", "字", "🙂"]


def test_the_vocabulary_is_as_large_as_stated() -> None:
    assert VOCAB_SIZE == TOKENIZER.vocab_size == 0x110000 + 2**14 + 2**21 == 3_227_648
    assert TOKENIZER.decode([VOCAB_SIZE - 1]) == "\x7f\x7f\x7f"
    for outside in (-1, VOCAB_SIZE):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            TOKENIZER.decode([outside])


def test_lone_surrogates_become_replacement_characters() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800b")) == "a\ufffdb"


def test_chat_template() -> None:
    ids = TOKENIZER.encode_chat([ChatMessage("system", "Be brief."), ChatMessage("user", "Hi")])
    assert TOKENIZER.decode(ids) == "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\n"


def test_a_prompt_of_english_is_two_to_four_characters_a_token() -> None:
    text = "A scheduler orders requests so that as many as possible meet what they promised. " * 10
    assert 2.0 < len(text) / len(TOKENIZER.encode(text)) < 4.0


# -- what is written ----------------------------------------------------------


def written(output: SyntheticOutput) -> tuple[list[int], str]:
    """Ids and text of an answer, as the engine would stream them."""
    numbers = [(output.start + k) % len(TEXTS) for k in range(output.tokens)]
    text = "".join(TEXTS[n] for n in numbers) if output.texts is None else "".join(output.texts)
    return [TOKEN_IDS[n][0] for n in numbers], text


def answer(
    request: EngineRequest | None = None, max_tokens: int = 10**9, seed: int = 0, **changes: Any
) -> SyntheticOutput:
    return synthesize(request or make_request(**changes), max_tokens=max_tokens, seed=seed)


@given(st.integers(1, 400))
def test_ids_and_text_agree(tokens: int) -> None:
    output = answer(output_tokens=tokens)
    ids, text = written(output)
    assert output.tokens == tokens
    assert TOKENIZER.decode(ids) == text


def test_a_length_nobody_dictates_is_a_repeatable_draw() -> None:
    requests = [make_request(prompt_tokens=n, max_new_tokens=10**6) for n in range(1, 400)]
    lengths = [answer(request).tokens for request in requests]
    assert lengths == [answer(replace(request, request_id="other")).tokens for request in requests]
    assert 100 < median(lengths) < 160
    assert min(lengths) < 40 < 400 < max(lengths)
    assert lengths != [answer(request, seed=1).tokens for request in requests]
    seeded = replace(requests[0], sampling=Sampling(seed=7))
    assert answer(seeded) == answer(seeded) != answer(requests[0])


@pytest.mark.parametrize(
    ("changes", "tokens", "end"),
    [
        ({"output_tokens": 5, "max_new_tokens": 9}, 5, FinishReason.STOP),
        ({"output_tokens": 9, "max_new_tokens": 9}, 9, FinishReason.STOP),
        ({"output_tokens": 10, "max_new_tokens": 9}, 9, FinishReason.LENGTH),
        ({"output_tokens": 5, "max_new_tokens": 9, "min_new_tokens": 7}, 7, FinishReason.STOP),
        ({"output_tokens": 5, "max_new_tokens": 9, "ignore_eos": True}, 9, FinishReason.LENGTH),
        ({"output_tokens": 50, "max_new_tokens": 90, "max_tokens": 20}, 20, FinishReason.LENGTH),
        ({"output_tokens": 20, "max_new_tokens": 90, "max_tokens": 20}, 20, FinishReason.STOP),
    ],
)
def test_length_limits(changes: dict[str, Any], tokens: int, end: FinishReason) -> None:
    output = answer(**changes)
    assert (output.tokens, output.end) == (tokens, end)


@given(
    start=st.integers(0, 300),
    length=st.integers(1, 12),
    min_new_tokens=st.integers(0, 400),
    tokens=st.integers(1, 500),
    include_stop=st.booleans(),
)
def test_a_stop_text_ends_the_answer_where_it_first_appears(
    start: int, length: int, min_new_tokens: int, tokens: int, include_stop: bool
) -> None:
    """The plain rule: token by token, is a stop in the text, and does it end within this token?"""
    free = answer(output_tokens=max(tokens, min_new_tokens), min_new_tokens=min_new_tokens)
    ids, text = written(free)
    stop = (text * 300)[start : start + length]
    stopped = answer(
        output_tokens=tokens, min_new_tokens=min_new_tokens, stop=(stop, "never there"), include_stop=include_stop
    )
    expected: tuple[int, str] | None = None
    shown = ""
    for count, token_id in enumerate(ids, start=1):
        before, shown = shown, shown + TOKENIZER.decode([token_id])
        at = shown.find(stop, max(0, len(before) - len(stop) + 1))
        if count >= min_new_tokens and at >= 0:
            expected = (count, shown[: at + len(stop)] if include_stop else shown[:at])
            break
    if expected is None:
        assert stopped == free
    else:
        assert stopped.end is FinishReason.STOP
        assert written(stopped) == (ids[: expected[0]], expected[1])


@pytest.mark.parametrize(("include_stop", "min_new_tokens"), [(False, 0), (True, 0), (False, 30)])
def test_a_stop_token_ends_the_answer(include_stop: bool, min_new_tokens: int) -> None:
    ids, _ = written(answer(output_tokens=200))
    stop_id = ids[6]
    output = answer(
        output_tokens=200, stop_token_ids=(stop_id,), include_stop=include_stop, min_new_tokens=min_new_tokens
    )
    last = ids.index(stop_id, max(0, min_new_tokens - 1))
    shown = ids[: last + 1] if include_stop else ids[:last]
    assert written(output) == (ids[: last + 1], TOKENIZER.decode(shown))
    assert output.end is FinishReason.STOP


def test_the_earliest_of_several_stops_counts() -> None:
    ids, text = written(answer(output_tokens=100))
    output = answer(output_tokens=100, stop=(text[30:36], text[12:20]), stop_token_ids=(ids[40],))
    assert written(output)[1] == text[:12]
