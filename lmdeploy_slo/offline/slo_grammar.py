"""The `--slo` options of the command line: `TASK=ttft:MS,tpot:MS,e2e:MS`, any of the three.

`default=...` holds for every task not named; a task without either has no SLO.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lmdeploy_slo.core.slo import NO_SLO, Slo, seconds_of
from lmdeploy_slo.errors import ConfigError

DEFAULT_TASK = "default"
_KINDS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2e": "e2e_s"}


def parse_slo_options(options: Sequence[str], scale: float = 1.0) -> dict[str, Slo]:
    """Task -> its SLO, every objective multiplied by `scale` (> 0).

    Raises ConfigError for what is not of the form above, for a value that is not a positive number of milliseconds,
    and for a task or objective that is named twice.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise ConfigError(f"--slo-scale: must be a positive number, got {scale}")
    slos: dict[str, Slo] = {}
    for option in options:
        task, equals, objectives = option.partition("=")
        task = task.strip()
        if not equals or not task:
            raise _wrong(option, "expected TASK=ttft:MS,tpot:MS,e2e:MS with any of the three")
        if task in slos:
            raise _wrong(option, f"task {task!r} is named twice")
        own = _parse_objectives(option, objectives)
        try:
            slos[task] = own.scaled(scale)
        except ValueError as error:
            raise _wrong(option, f"times {scale:g} it is out of range: {error}") from error
    return slos


def slo_of(slos: Mapping[str, Slo], task: str) -> Slo:
    """What a request of `task` is held to: its own SLO, else the default, else none."""
    return slos.get(task, slos.get(DEFAULT_TASK, NO_SLO))


def _parse_objectives(option: str, objectives: str) -> Slo:
    values_s: dict[str, float] = {}
    for part in objectives.split(","):
        kind, _, text = part.partition(":")
        kind = kind.strip()
        if kind not in _KINDS:
            raise _wrong(option, f"{part.strip()!r} is no objective; write one of ttft:MS, tpot:MS, e2e:MS")
        if _KINDS[kind] in values_s:
            raise _wrong(option, f"{kind} is named twice")
        try:
            milliseconds = float(text)
        except ValueError:
            milliseconds = math.nan
        if not (math.isfinite(milliseconds) and milliseconds > 0):
            raise _wrong(option, f"{kind} must be a positive number of milliseconds, got {text.strip()!r}")
        values_s[_KINDS[kind]] = seconds_of(milliseconds)
    return Slo(**values_s)


def _wrong(option: str, problem: str) -> ConfigError:
    return ConfigError(f"--slo {option!r}: {problem}")
