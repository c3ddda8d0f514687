"""What the emulated engine "generates": how many tokens, which, and why it stops.

All output is a cycle of a few fixed sentences, entered at the start of one of them. Nothing is sampled, so the whole
output of a request is settled when it is submitted; sampling parameters other than `seed` change nothing.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.engine.base import EngineRequest, Stopping
from lmdeploy_slo.engine.synthetic_tokenizer import SyntheticTokenizer

MEDIAN_OUTPUT_TOKENS = 128.0
OUTPUT_SIGMA = 0.7
"""Lengths nobody dictates are lognormal with this median and this sigma of the logarithm."""

_SENTENCES = (
    "These words are synthetic; no model wrote them. ",
    "The engine only keeps the time that a real one would need. ",
    "Each piece of this text stands for one token of an answer. ",
    "What matters here is when a token comes, not what it says. ",
    "The same prompt gives the same words again. ",
    "After the last sentence the first one follows. ",
)

_ENCODED = [SyntheticTokenizer().encode(sentence) for sentence in _SENTENCES]
_STARTS = (0, *accumulate(len(ids) for ids in _ENCODED[:-1]))

TOKEN_IDS: tuple[tuple[int], ...] = tuple((token_id,) for ids in _ENCODED for token_id in ids)
TEXTS: tuple[str, ...] = tuple(SyntheticTokenizer().decode(token_id) for token_id in TOKEN_IDS)
"""The cycle: id and text of each token. Token k of an output is number `start + k`, modulo the length."""


@dataclass(frozen=True, slots=True)
class SyntheticOutput:
    """One answer. texts: what each token shows where a stop cuts the text; None: each shows its own."""

    start: int
    tokens: int
    end: FinishReason
    texts: Sequence[str] | None = None


def synthesize(request: EngineRequest, *, max_tokens: int, seed: int) -> SyntheticOutput:
    """The answer to `request` when the engine can hold `max_tokens` >= 1 of it; equal arguments, equal answers.

    Its length is `emulated_output_tokens`, else a draw that depends on the prompt (its length and both its ends),
    `sampling.seed` and `seed`; at least `min_new_tokens`. `ignore_eos` makes it endless. It ends with LENGTH where
    `max_new_tokens` or `max_tokens` cuts it, else with STOP, as it does where a stop text or stop token ends it: that
    is looked for from token number `min_new_tokens` on. One that goes on gives the rest of what it would have given.
    """
    if request.generated_tokens:
        return _rest(request, max_tokens, seed)
    stopping, ids = request.stopping, request.prompt_token_ids
    draws = random.Random(f"{seed} {request.sampling.seed} {len(ids)} {[*ids[:32]]} {[*ids[-32:]]}")
    start = draws.choice(_STARTS)
    wanted: float = draws.lognormvariate(math.log(MEDIAN_OUTPUT_TOKENS), OUTPUT_SIGMA)
    if request.emulated_output_tokens is not None:
        wanted = request.emulated_output_tokens
    wanted = math.inf if stopping.ignore_eos else max(1, round(wanted), stopping.min_new_tokens)
    tokens = int(min(wanted, stopping.max_new_tokens, max_tokens))
    if stopping.stop or stopping.stop_token_ids:
        stopped = _first_stop(start, tokens, stopping)
        if stopped is not None:
            return stopped
    return SyntheticOutput(start, tokens, FinishReason.STOP if tokens == wanted else FinishReason.LENGTH)


def _rest(request: EngineRequest, max_tokens: int, seed: int) -> SyntheticOutput:
    """What is left of the answer of which the first tokens are at the end of the prompt; at least one."""
    done, stopping, emulated = request.generated_tokens, request.stopping, request.emulated_output_tokens
    whole = replace(
        request,
        prompt_token_ids=request.prompt_token_ids[:-done],
        generated_tokens=0,
        stopping=replace(
            stopping,
            max_new_tokens=stopping.max_new_tokens + done,
            min_new_tokens=stopping.min_new_tokens + done if stopping.min_new_tokens else 0,
        ),
        emulated_output_tokens=None if emulated is None else emulated + done,
    )
    answer = synthesize(whole, max_tokens=max_tokens + done, seed=seed)
    texts = None if answer.texts is None else answer.texts[done:]
    return SyntheticOutput((answer.start + done) % len(TEXTS), max(1, answer.tokens - done), answer.end, texts)


def _first_stop(start: int, tokens: int, stopping: Stopping) -> SyntheticOutput | None:
    """The answer up to its first stop text or stop token; None where none comes within `tokens` tokens."""
    allowed_from = max(0, stopping.min_new_tokens - 1)
    # One turn of the cycle, and as much as a match may hang over, shows every stop there is.
    longest = max(map(len, stopping.stop), default=0)
    seen = [(start + k) % len(TEXTS) for k in range(min(tokens, allowed_from + len(TEXTS) + longest))]
    pieces = [TEXTS[at] for at in seen]
    text = "".join(pieces)
    ends = list(accumulate(map(len, pieces)))
    stops: list[tuple[int, int]] = []  # (its last token, characters of the text that are shown)
    search_from = ends[allowed_from - 1] if 0 < allowed_from <= len(ends) else 0
    for stop in filter(None, stopping.stop):
        at = text.find(stop, max(0, search_from - len(stop) + 1)) if allowed_from < len(ends) else -1
        if at >= 0:
            stops.append((bisect_left(ends, at + len(stop)), at + len(stop) if stopping.include_stop else at))
    for token in range(allowed_from, len(seen)):
        if TOKEN_IDS[seen[token]][0] in stopping.stop_token_ids:
            stops.append((token, ends[token] if stopping.include_stop else ends[token] - len(pieces[token])))
            break
    if not stops:
        return None
    last, shown = min(stops)
    texts = [text[end - len(piece) : max(end - len(piece), min(end, shown))] for end, piece in zip(ends, pieces)]
    return SyntheticOutput(start, last + 1, FinishReason.STOP, texts[: last + 1])
