"""Synthetic output that goes on where another engine ended."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.engine.base import EngineRequest, Stopping
from lmdeploy_slo.engine.synthetic_text import TEXTS, TOKEN_IDS, synthesize


@given(st.integers(1, 40), st.integers(0, 39), st.integers(0, 5), st.booleans())
def test_synthetic_output_goes_on_where_it_ended(tokens: int, done: int, prompt: int, dictated: bool) -> None:
    request = EngineRequest(
        "r",
        prompt_token_ids=[7 + prompt, 8],
        stopping=Stopping(max_new_tokens=tokens, ignore_eos=not dictated),
        emulated_output_tokens=tokens if dictated else None,
    )
    answer = synthesize(request, max_tokens=1000, seed=1)
    ids = [TOKEN_IDS[(answer.start + k) % len(TEXTS)][0] for k in range(answer.tokens)]
    done = min(done, tokens - 1)
    if not done:
        return
    rest = EngineRequest(
        "r",
        prompt_token_ids=[7 + prompt, 8, *ids[:done]],
        generated_tokens=done,
        stopping=Stopping(max_new_tokens=tokens - done, ignore_eos=not dictated),
        emulated_output_tokens=tokens - done if dictated else None,
    )
    told = synthesize(rest, max_tokens=1000 - done, seed=1)
    assert [TOKEN_IDS[(told.start + k) % len(TEXTS)][0] for k in range(told.tokens)] == ids[done:]
    assert told.end is answer.end
