"""How much of a prompt the engine's prefix cache will hold: learnt from the `cached_tokens` that it reports.

A turn of a conversation begins with what the last one ended with, so what could be cached is known: the prompt and the
output of the last turn. Which share of that really is cached is learnt, by task and by how long ago the last turn was
(caches forget), and by conversation beside it. Requests without a conversation, and the first of one, can share no more
than what their task always begins with: a number of tokens or a share of the prompt, whichever has been nearer.

Nothing is expected of an engine that never said anything. Memory is bounded: of conversations and of tasks, those not
heard of for longest are forgotten.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmdeploy_slo.core.request import RequestSpec

MAX_CONVERSATIONS = 16_384
MAX_TASKS = 1024

MEMORY = 100.0
"""Requests of a task after which an old one counts 1/e as much as a new one; of a conversation, `OWN_MEMORY` turns."""

OWN_MEMORY = 8.0

PRIOR_WEIGHT = 2.0
"""Observations that what is believed already counts for: nothing is cached, of a task; as its task, of a conversation
and of an age."""

AGES = 11
"""Ages are told apart by factors of 2, from below 2 seconds to above 17 minutes."""


@dataclass(slots=True)
class _Mean:
    """A running mean that begins as `PRIOR_WEIGHT` observations of whatever the caller believes."""

    mean: float = 0.0
    weight: float = 0.0

    def given(self, prior: float) -> float:
        return (PRIOR_WEIGHT * prior + self.weight * self.mean) / (PRIOR_WEIGHT + self.weight)

    def learn(self, value: float, memory: float = MEMORY) -> None:
        self.weight = min(self.weight + 1.0, memory)
        self.mean += (value - self.mean) / self.weight


@dataclass(slots=True)
class _Task:
    """share: of what a conversation could have in the cache, over all ages and by age. first_*: of requests that go on
    with nothing, tokens cached and share of the prompt, and how far each has been off, in tokens."""

    share: _Mean = field(default_factory=_Mean)
    by_age: list[_Mean] = field(default_factory=lambda: [_Mean() for _ in range(AGES)])
    first_tokens: _Mean = field(default_factory=_Mean)
    first_share: _Mean = field(default_factory=_Mean)
    tokens_off: _Mean = field(default_factory=_Mean)
    share_off: _Mean = field(default_factory=_Mean)

    def means(self) -> list[_Mean]:
        return [self.share, *self.by_age, self.first_tokens, self.first_share, self.tokens_off, self.share_off]


@dataclass(slots=True)
class _Conversation:
    """tokens: what its last turn left in the cache, if all of it was kept, at `at_s`."""

    tokens: int
    at_s: float
    share: _Mean = field(default_factory=_Mean)


class PrefixPredictor:
    """See the module. Pure: equal histories give equal forecasts."""

    def __init__(self) -> None:
        self._tasks: OrderedDict[str, _Task] = OrderedDict()
        self._conversations: OrderedDict[tuple[str, str], _Conversation] = OrderedDict()  # by client and its name
        self._error = _Mean()
        self.observed = 0

    def predict(self, spec: RequestSpec) -> float:
        """Tokens of its prompt that will be found in the cache, from 0 to all but the last."""
        task = self._tasks.get(spec.task_type)
        if task is None:
            return 0.0
        most = spec.prompt_tokens - 1.0
        conversation = self._conversation(spec)
        if conversation is not None:
            share = conversation.share.given(_share(task, spec.arrival_at_s - conversation.at_s))
            return share * min(most, conversation.tokens)
        by_tokens, by_share = _first(task, most)
        return by_tokens if task.tokens_off.mean <= task.share_off.mean else by_share

    def observe(self, spec: RequestSpec, cached_tokens: int, at_s: float) -> None:
        """A request has its first token, and the engine found so much of its prompt in the cache."""
        self._error.learn(abs(self.predict(spec) - cached_tokens))
        self.observed += 1
        task = self._tasks.pop(spec.task_type, None) or _Task()
        self._tasks[spec.task_type] = task
        if len(self._tasks) > MAX_TASKS:
            self._tasks.popitem(last=False)
        conversation = self._conversation(spec)
        most = spec.prompt_tokens - 1.0
        if conversation is not None:
            possible = min(most, conversation.tokens)
            if possible > 0:
                share = min(1.0, cached_tokens / possible)
                task.share.learn(share)
                task.by_age[_age(spec.arrival_at_s - conversation.at_s)].learn(share)
                conversation.share.learn(share, OWN_MEMORY)
        elif most > 0:
            by_tokens, by_share = _first(task, most)
            task.tokens_off.learn(abs(by_tokens - cached_tokens))
            task.share_off.learn(abs(by_share - cached_tokens))
            task.first_tokens.learn(cached_tokens)
            task.first_share.learn(cached_tokens / most)
        self._remember(spec, spec.prompt_tokens, at_s)

    def finish(self, spec: RequestSpec, output_tokens: int, at_s: float) -> None:
        """A request ran to its end: the next turn of its conversation may go on with its output."""
        if self.observed:
            self._remember(spec, spec.prompt_tokens + output_tokens, at_s)

    def forget_conversations(self) -> None:
        """The cache is empty: an engine was started anew. What tasks have in common stays."""
        self._conversations.clear()

    @property
    def mean_error_tokens(self) -> float:
        """Mean |predicted - cached| of late, tokens."""
        return self._error.mean

    def state(self) -> dict[str, Any]:
        """What was learnt of tasks, for `restore`; JSON. Conversations are left out: a cache does not outlive its
        engine."""
        return {"tasks": {name: [[m.mean, m.weight] for m in task.means()] for name, task in self._tasks.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError, TypeError, KeyError or AttributeError for what is not a state; then nothing changes."""
        tasks: OrderedDict[str, _Task] = OrderedDict()
        for name, values in list(state["tasks"].items())[-MAX_TASKS:]:
            task = _Task()
            for mean, (value, weight) in zip(task.means(), values, strict=True):
                mean.mean, mean.weight = float(value), float(weight)
                if not (0 <= mean.mean < math.inf and 0 <= mean.weight <= MEMORY):
                    raise ValueError(f"task {name}: {value} with weight {weight} is no mean")
            tasks[str(name)] = task
        self._tasks = tasks

    def _conversation(self, spec: RequestSpec) -> _Conversation | None:
        return self._conversations.get((spec.client.name, spec.conversation_id)) if spec.conversation_id else None

    def _remember(self, spec: RequestSpec, tokens: int, at_s: float) -> None:
        if not spec.conversation_id:
            return
        key = (spec.client.name, spec.conversation_id)
        conversation = self._conversations.pop(key, None) or _Conversation(0, 0.0)
        conversation.tokens, conversation.at_s = tokens, at_s
        self._conversations[key] = conversation
        if len(self._conversations) > MAX_CONVERSATIONS:
            self._conversations.popitem(last=False)


def _age(seconds: float) -> int:
    return min(AGES - 1, int(math.log2(max(1.0, seconds))))


def _share(task: _Task, age_s: float) -> float:
    return task.by_age[_age(age_s)].given(task.share.given(0.0))


def _first(task: _Task, most: float) -> tuple[float, float]:
    """Cached tokens of a request that goes on with nothing, by either account."""
    return min(most, task.first_tokens.given(0.0)), most * task.first_share.given(0.0)
