"""From an EngineRequest to LMDeploy's GenerationConfig, and from its outputs to ours.

Greedy requests that want log-probabilities take them from the logits: TurboMind's own are those of the filtered
distribution, which under greedy decoding is one token with probability 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmdeploy_slo.engine.base import EngineInfo, EngineRequest, Sampling, TokenLogprob

LOGITS_BYTES_LIMIT = 1 << 30
"""Most memory of one request's logits: max_new_tokens x vocabulary x 4 bytes."""


def is_greedy(sampling: Sampling) -> bool:
    """Temperature 0, or nothing asked for that needs a draw."""
    if sampling.temperature is not None:
        return sampling.temperature == 0
    return sampling.top_p is None and sampling.top_k is None and sampling.min_p is None


def wants_logits(sampling: Sampling) -> bool:
    """Whether log-probabilities are computed here, from logits."""
    return bool(sampling.logprobs) and is_greedy(sampling)


def generation_fields(request: EngineRequest) -> dict[str, Any]:
    """Fields of GenerationConfig. Stop texts are not among them (see `stop_text`); the priority is not, either:
    the scheduler's rank orders all requests."""
    sampling, stopping = request.sampling, request.stopping
    fields: dict[str, Any] = {
        "max_new_tokens": stopping.max_new_tokens,
        "min_new_tokens": stopping.min_new_tokens or None,
        "stop_token_ids": list(stopping.stop_token_ids) or None,
        "ignore_eos": stopping.ignore_eos and not stopping.stop_token_ids,
        "include_stop_str_in_output": stopping.include_stop,
        "skip_special_tokens": stopping.skip_special_tokens,
    }
    if sampling.repetition_penalty is not None:
        fields["repetition_penalty"] = sampling.repetition_penalty
    if not is_greedy(sampling):
        fields["do_sample"] = True
        fields["temperature"] = 1.0 if sampling.temperature is None else sampling.temperature
        for name in ("top_p", "top_k", "min_p", "logprobs"):
            value = getattr(sampling, name)
            if value is not None:
                fields[name] = value
        if sampling.seed is not None:
            fields["random_seed"] = sampling.seed
    else:
        if sampling.repetition_penalty not in (None, 1.0):
            # LMDeploy drops the penalty of a request that does not sample; one candidate is greedy all the same.
            fields |= {"do_sample": True, "temperature": 1.0, "top_k": 1}
        if wants_logits(sampling):
            fields["output_logits"] = "generation"
    return fields


def unsupported_fields(request: EngineRequest, vocab_size: int | None) -> list[tuple[str, str]]:
    """(field path, reason) for what LMDeploy cannot do."""
    sampling = request.sampling
    wrong: list[tuple[str, str]] = []
    if request.emulated_output_tokens is not None:
        wrong.append(("emulation", "only the emulated engine takes it"))
    if sampling.temperature is not None and not 0 <= sampling.temperature <= 2:
        wrong.append(("sampling.temperature", "LMDeploy takes 0 to 2"))
    if wants_logits(sampling) and vocab_size is not None:
        most = LOGITS_BYTES_LIMIT // (4 * vocab_size)
        if request.stopping.max_new_tokens > most:
            reason = f"greedy decoding with log-probabilities takes max_new_tokens up to {most} for this model"
            wrong.append(("sampling.logprobs", reason))
    return wrong


def wrong_fields(request: EngineRequest, info: EngineInfo) -> list[tuple[str, str]]:
    """(field path, reason) for that, and for a prompt the model cannot have."""
    wrong = unsupported_fields(request, info.vocab_size)
    prompt, longest, vocabulary = request.prompt_token_ids, info.max_session_tokens, info.vocab_size
    if not prompt:
        wrong.append(("prompt", "must have at least one token"))
    elif longest is not None and len(prompt) >= longest:
        wrong.append(("prompt", f"has {len(prompt)} tokens; prompt and output together may have {longest}"))
    elif vocabulary is not None and not 0 <= min(prompt) <= max(prompt) < vocabulary:
        wrong.append(("token_ids", f"must be below {vocabulary}, the size of the vocabulary"))
    return wrong


def token_logprobs(
    token_ids: Sequence[int], candidates: Sequence[dict[int, float]], text_of: Callable[[int], str]
) -> list[list[TokenLogprob]]:
    """Per token its candidates, the chosen one first, then the best."""
    return [
        [
            TokenLogprob(i, min(0.0, by_id[i]), text_of(i))
            for i in sorted(by_id, key=lambda i: (i != chosen, -by_id[i], i))
        ]
        for chosen, by_id in zip(token_ids, candidates)
    ]


def candidates_of_logits(logits: Any, token_ids: Sequence[int], count: int) -> list[dict[int, float]]:
    """Per row of `logits` [tokens, vocabulary] the `count` best log-probabilities, and the chosen token's."""
    import torch

    logarithms = torch.log_softmax(logits.float(), dim=-1)
    best = torch.topk(logarithms, min(count, logarithms.shape[-1]), dim=-1)
    rows: list[dict[int, float]] = []
    for row, chosen in enumerate(token_ids):
        by_id = dict(zip(best.indices[row].tolist(), best.values[row].tolist()))
        by_id.setdefault(chosen, float(logarithms[row, chosen]))
        rows.append(by_id)
    return rows
