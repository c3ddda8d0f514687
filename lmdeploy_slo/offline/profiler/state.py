"""What was measured so far, in a file that is whole at every moment: an interrupted run goes on from it.

    {"format": "1.0", "target": {...}, "limits": {...}, "elapsed_s": s, "spoiled": {point: n}, "given_up": {point: why},
     "observations": [{"point": "...", "steps": n, "seconds": s, ...}]}

`target` and `limits` say what was measured within what: a run goes on only with the same. The fields of an observation
are those of `prediction.observations.Observation`. The file is written anew beside the old one and put in its place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.offline.profiler.grid import GridLimits
from lmdeploy_slo.offline.profiler.target import TargetInfo
from lmdeploy_slo.prediction.observations import Observation

FORMAT = "1.0"

_OBSERVATIONS = TypeAdapter(list[Observation])


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    format: str
    target: dict[str, Any]
    limits: dict[str, Any]
    elapsed_s: float = Field(ge=0)
    spoiled: dict[str, int]
    given_up: dict[str, str]
    observations: list[Any]


@dataclass(slots=True)
class ProfilerState:
    """See the module. path: None keeps it in memory alone.

    target: what is compared when a run goes on. spoiled: shots that told nothing, by point. given_up: why a point is
    not measured any more. digest: of the file that was written last.
    """

    target: Mapping[str, str]
    limits: GridLimits
    path: Path | None = None
    elapsed_s: float = 0.0
    observations: list[Observation] = field(default_factory=list)
    spoiled: dict[str, int] = field(default_factory=dict)
    given_up: dict[str, str] = field(default_factory=dict)

    def of_points(self) -> dict[str, list[Observation]]:
        """Point -> its repeats."""
        found: dict[str, list[Observation]] = {}
        for observation in self.observations:
            found.setdefault(observation.point, []).append(observation)
        return found

    @property
    def text(self) -> str:
        """The file: an observation a line."""
        head = {
            "format": FORMAT,
            "target": dict(self.target),
            "limits": asdict(self.limits),
            "elapsed_s": round(self.elapsed_s, 3),
            "spoiled": self.spoiled,
            "given_up": self.given_up,
        }
        lines = ",\n".join("  " + json.dumps(_as_read(observation)) for observation in self.observations)
        return json.dumps(head, indent=1)[:-2] + f',\n "observations": [\n{lines}\n]}}\n'

    @property
    def digest(self) -> str:
        """As `sha256sum` prints it of the file."""
        return "sha256:" + hashlib.sha256(self.text.encode()).hexdigest()

    def save(self) -> None:
        """Raises ConfigError where the file cannot be written."""
        if self.path is None:
            return
        beside = self.path.with_name(self.path.name + ".new")
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.write(self.text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written: {error.strerror or error}") from error


def _as_read(observation: Observation) -> dict[str, Any]:
    """With floats where it will be read with floats, so that what is read is written as it was."""
    return {
        name: value if isinstance(value, str) or name in ("steps", "prompts") else float(value)
        for name, value in asdict(observation).items()
    }


def identity_of(info: TargetInfo) -> dict[str, str]:
    """What makes two targets the same to a profiler that goes on."""
    shown = {
        "engine": info.engine,
        "model": info.model,
        "policy": info.policy or "",
        "max_batch_size": info.limits.max_batch_size,
        "max_prefill_tokens": info.limits.max_prefill_tokens,
        "kv_tokens": info.limits.kv_tokens,
        "max_session_tokens": info.max_session_tokens,
        **{name: info.versions[name] for name in ("lmdeploy", "profile", "device") if name in info.versions},
    }
    return {name: str(value) for name, value in shown.items()}


def load_state(path: Path, target: Mapping[str, str], limits: GridLimits) -> ProfilerState:
    """What the file holds of the same measurement, or a new one where there is no file.

    Raises ConfigError for a file that is broken, or of another target or other limits.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return ProfilerState(target, limits, path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    try:
        known = _File.model_validate_json(content)
        if known.format != FORMAT:
            raise ValueError(f"its format is {known.format!r}, this version reads {FORMAT}")
        observations = _OBSERVATIONS.validate_python(known.observations)
    except (ValidationError, ValueError) as error:
        told = str(error).splitlines()[0]
        raise ConfigError(f"{path}: not what a profiler has written ({told}); --fresh measures anew") from error
    for what, wanted, found in (("target", dict(target), known.target), ("limits", asdict(limits), known.limits)):
        different = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        if different:
            told = ", ".join(f"{key} {found.get(key)!r} rather than {wanted.get(key)!r}" for key in different)
            raise ConfigError(f"{path} is of another {what}: {told}; --fresh measures anew")
    return ProfilerState(target, limits, path, known.elapsed_s, observations, known.spoiled, known.given_up)
