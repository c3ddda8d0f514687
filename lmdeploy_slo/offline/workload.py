"""From trace rows to the requests that are offered: which rows, when, with which SLO and which length hint.

The replayer and the simulator both take their requests from here, so that the same options mean the same requests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lmdeploy_slo.core.slo import Slo
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.offline.slo_grammar import DEFAULT_TASK, slo_of
from lmdeploy_slo.offline.traces import TraceRow

_HINT_STREAM = 0x48494E54  # keeps these draws apart from others that start from the same seed


@dataclass(frozen=True, slots=True)
class OfferedRequest:
    """One request of a run.

    due_s: when it is to be sent, seconds from the start of the run. output_tokens: the true length, which only the
    emulated engine may see. expected_output_tokens: the hint the scheduler gets, >= 1, None for no hint.
    prefix_blocks: ids of the prompt's blocks, for a simulated prefix cache; empty where the trace names none.
    """

    index: int
    due_s: float
    prompt_tokens: int
    output_tokens: int
    max_new_tokens: int
    task: str
    slo: Slo
    expected_output_tokens: int | None = None
    prefix_blocks: tuple[int, ...] = ()


def build_workload(
    rows: Sequence[TraceRow],
    *,
    slos: Mapping[str, Slo],
    speedup: float = 1.0,
    limit: int | None = None,
    length_noise: float | None = None,
    length_bias: float = 1.0,
    seed: int = 0,
) -> list[OfferedRequest]:
    """The first `limit` rows (None: all), their arrivals divided by `speedup`, in order of arrival.

    slos: as `parse_slo_options` gives them. length_noise, length_bias, seed: see `draw_hints`; without a noise there
    are no hints. Every request's `max_new_tokens` is the longest output of the whole trace, whatever the limit.
    Raises ConfigError for a speedup that is not positive and a limit below 1.
    """
    if not (math.isfinite(speedup) and speedup > 0):
        raise ConfigError(f"--speedup: must be a positive number, got {speedup}")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit: must be at least 1, got {limit}")
    max_new_tokens = max((row.output_tokens for row in rows), default=1)
    used = rows[:limit]
    hints: Sequence[int | None] = [None] * len(used)
    if length_noise is not None:
        hints = draw_hints(used, sigma=length_noise, bias=length_bias, seed=seed)
    return [
        OfferedRequest(
            index=row.index,
            due_s=row.arrival_s / speedup,
            prompt_tokens=row.input_tokens,
            output_tokens=row.output_tokens,
            max_new_tokens=max_new_tokens,
            task=row.task,
            slo=slo_of(slos, row.task),
            expected_output_tokens=hint,
            prefix_blocks=row.hash_ids or (),
        )
        for row, hint in zip(used, hints, strict=True)
    ]


def check_slo_tasks(slos: Mapping[str, Slo], rows: Sequence[TraceRow]) -> None:
    """Raises ConfigError for an SLO of a task that no row has: it would hold for nobody, most likely by a slip."""
    tasks = {row.task for row in rows}
    for task in slos:
        if task != DEFAULT_TASK and task not in tasks:
            named = ", ".join(sorted(filter(None, tasks))) or "no tasks; name them with --task"
            raise ConfigError(f"--slo {task}=...: no request of the trace has this task; it has {named}")


def draw_hints(rows: Sequence[TraceRow], *, sigma: float, bias: float = 1.0, seed: int = 0) -> list[int]:
    """What a length predictor would have said of each row: true length x bias x lognormal(0, sigma), whole, >= 1.

    Row i takes the i-th standard normal of a generator seeded by `seed` alone, so its draw depends on nothing else:
    not on the limit, the policy, the speedup, and, but for its factor, not on sigma. sigma 0 is exact (times bias).
    Raises ConfigError for a negative sigma and a bias that is not positive.
    """
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ConfigError(f"--length-noise: must be 0 or more, got {sigma}")
    if not (math.isfinite(bias) and bias > 0):
        raise ConfigError(f"--length-bias: must be a positive number, got {bias}")
    if seed < 0:
        raise ConfigError(f"--seed: must be 0 or more, got {seed}")
    if not rows:
        return []
    indices = np.array([row.index for row in rows])
    normals = np.random.default_rng([_HINT_STREAM, seed]).standard_normal(int(indices.max()) + 1)
    true_lengths = np.array([row.output_tokens for row in rows])
    hints = np.maximum(1, np.rint(true_lengths * bias * np.exp(sigma * normals[indices])))
    return [int(hint) for hint in hints]
