"""From logits to a token, in the order TurboMind applies its settings.

repetition penalty, banned tokens, temperature, top_k, top_p, min_p, then one draw from what is left. Log-probabilities
are those of the distribution that is drawn from, as TurboMind reports them: after filtering, summing to one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """top_k 0: all; 1: greedy. temperature > 0. logprobs: candidates wanted per token, 0: none."""

    top_k: int = 1
    top_p: float = 1.0
    min_p: float = 0.0
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    logprobs: int = 0
    banned: tuple[int, ...] = ()

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the token is the largest logit, and nothing else is asked for."""
        return self.top_k == 1 and self.repetition_penalty == 1.0 and not self.banned and not self.logprobs


@dataclass(frozen=True, slots=True)
class Draw:
    """A token and its candidates (id, natural logarithm of the probability), best first; the token is among them."""

    token: int
    candidates: Sequence[tuple[int, float]] = ()


def draw(
    logits: torch.Tensor,
    settings: SamplingSettings,
    seen: Sequence[int],
    also_banned: Sequence[int],
    rng: random.Random,
) -> Draw:
    """One token from `logits` [vocabulary], float32. `seen`: prompt and output so far; `rng` gives one number."""
    scores = logits.clone()
    if settings.repetition_penalty != 1.0 and seen:
        ids = torch.tensor(sorted(set(seen)))
        old = scores[ids]
        penalty = settings.repetition_penalty
        scores[ids] = torch.where(old < 0, old * penalty, old / penalty)
    banned = [*settings.banned, *also_banned]
    if banned:
        scores[torch.tensor(banned)] = -torch.inf
    scores /= max(settings.temperature, 1e-6)
    keep = min(settings.top_k, len(scores)) if settings.top_k > 0 else len(scores)
    best, ids = torch.sort(scores, descending=True, stable=True)
    probabilities = torch.softmax(best[:keep], dim=0)
    if settings.top_p < 1.0:
        before = torch.cumsum(probabilities, dim=0) - probabilities
        keep = max(1, int((before < settings.top_p).sum()))
    if settings.min_p > 0.0:
        keep = min(keep, max(1, int((probabilities >= settings.min_p * probabilities[0]).sum())))
    kept = probabilities[:keep] / probabilities[:keep].sum()
    place = int(torch.searchsorted(torch.cumsum(kept, dim=0), rng.random())) if keep > 1 else 0
    place = min(place, keep - 1)
    token = int(ids[place])
    if not settings.logprobs:
        return Draw(token)
    places = list(range(min(keep, settings.logprobs)))
    if place not in places:
        places.append(place)
    logarithms = torch.log(kept)
    return Draw(token, [(int(ids[at]), float(logarithms[at])) for at in places])
