"""How the requests of the last minute ended, by task: what an operator looks at first. In bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, fields

SLOT_S, SLOTS = 5.0, 12
"""A minute, forgotten five seconds at a time: what is told covers the last 55 to 60 seconds."""

NO_TASK, OTHER_TASKS = "none", "other"


class TaskNames:
    """Task types as they may be counted by: those known beforehand and the first others that come, `limit` (>= 1) in
    all; whatever comes later is `other`, and requests without one are `none`."""

    def __init__(self, limit: int = 16, known: Iterable[str] = ()) -> None:
        self._known = dict.fromkeys(known)
        self._limit = max(limit, len(self._known))

    def of(self, task_type: str) -> str:
        if task_type in self._known:
            return task_type
        if not task_type:
            return NO_TASK
        if len(self._known) >= self._limit:
            return OTHER_TASKS
        self._known[task_type] = None
        return task_type


@dataclass(slots=True)
class TaskCounts:
    """Requests that ended or were refused. with_slo and slo_met leave out cancelled ones and those without objective.

    broke_*: ended, but missed that objective. unfinished: with an objective, and refused, timed out or failed. The sums
    are over `finished` requests, in seconds; `ttft_s` over those with a token, `tpot_s` over `with_tpot`.
    """

    requests: int = 0
    finished: int = 0
    with_slo: int = 0
    slo_met: int = 0
    broke_ttft: int = 0
    broke_tpot: int = 0
    broke_e2e: int = 0
    unfinished: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float = 0.0
    with_tpot: int = 0
    tpot_s: float = 0.0

    def add(self, other: TaskCounts) -> None:
        for name in _NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))


_NAMES = tuple(field.name for field in fields(TaskCounts))


class LastMinute:
    """Counts by task, forgotten as time goes by."""

    def __init__(self) -> None:
        self._slots: deque[tuple[int, dict[str, TaskCounts]]] = deque(maxlen=SLOTS)

    def counts(self, task: str, now_s: float) -> TaskCounts:
        """What is counted of a task now, to be added to."""
        number = int(now_s // SLOT_S)
        if not self._slots or self._slots[-1][0] != number:
            self._slots.append((number, {}))
        by_task = self._slots[-1][1]
        counts = by_task.get(task)
        if counts is None:
            counts = by_task[task] = TaskCounts()
        return counts

    def sums(self, now_s: float) -> dict[str, TaskCounts]:
        """By task, in order of their names."""
        first = int(now_s // SLOT_S) - SLOTS + 1
        sums: dict[str, TaskCounts] = {}
        for number, by_task in self._slots:
            if number >= first:
                for task, counts in by_task.items():
                    sums.setdefault(task, TaskCounts()).add(counts)
        return dict(sorted(sums.items()))
