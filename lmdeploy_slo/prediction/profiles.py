"""Step-model profiles: what an engine on a GPU with a model costs, as JSON files with their source.

A profile is found by the name of one that ships with the package, or by the path of a file:

    {"format": 1, "name": "...", "engine": "...", "gpu": "...", "model": "...", "tensor_parallel": 1, "dtype": "...",
     "source": "where the figures come from",
     "step_ms": {"c0": ms, "p1": ms/token, "p2": ms/token^2, "d1": ms/sequence, "d2": ms/token}}

The coefficients are those of `core.latency_model.StepModel`, there in seconds.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.errors import ConfigError

FORMAT = 1
"""The version of the file format this package reads."""

_SHIPPED = Path(__file__).parent / "profiles"


class StepCoefficients(BaseModel):
    """Milliseconds, as in the file; each finite and >= 0."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    c0: float = Field(ge=0)
    p1: float = Field(ge=0)
    p2: float = Field(ge=0)
    d1: float = Field(ge=0)
    d2: float = Field(ge=0)

    def model_s(self) -> StepModel:
        """The same coefficients in seconds."""
        return StepModel(*(value_ms / 1e3 for value_ms in (self.c0, self.p1, self.p2, self.d1, self.d2)))


class Profile(BaseModel):
    """One profile file. Everything but `step_ms` says what the figures are of and where they come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    name: str = Field(min_length=1)
    engine: str = ""
    gpu: str = ""
    model: str = ""
    tensor_parallel: int = Field(default=1, ge=1)
    dtype: str = ""
    source: str = ""
    step_ms: StepCoefficients

    @property
    def step_model(self) -> StepModel:
        """The step model in seconds."""
        return self.step_ms.model_s()


def profile_names() -> list[str]:
    """Names of the profiles that ship with the package, sorted."""
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


def load_profile(name_or_file: str) -> Profile:
    """The profile of that name or, where it names a file (a path separator or `.json`), the one in that file.

    Raises ConfigError: for an unknown name it lists the known ones, for a file it says what is wrong in it.
    """
    if "/" in name_or_file or "\\" in name_or_file or name_or_file.endswith(".json"):
        path = Path(name_or_file)
        try:
            return _parse(path.read_bytes(), str(path))
        except OSError as error:
            raise ConfigError(f"profile {path}: {error.strerror or error}") from error
    names = profile_names()
    if name_or_file not in names:
        close = difflib.get_close_matches(name_or_file, names, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"profile {name_or_file!r} is unknown; {hint}known: {', '.join(names)}; or give the path of a .json file"
        )
    return _parse((_SHIPPED / f"{name_or_file}.json").read_bytes(), f"{name_or_file} (shipped)")


def _parse(content: bytes, origin: str) -> Profile:
    try:
        document = json.loads(content)
    except ValueError as error:  # also what is not UTF-8
        raise ConfigError(f"profile {origin}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"profile {origin}: a JSON object is expected, this is a {type(document).__name__}")
    # Before anything else: another version may have other fields, and their absence is not what is wrong with it.
    if document.get("format") != FORMAT:
        raise ConfigError(
            f"profile {origin}: format is {document.get('format', 'missing')!r}, this version reads format {FORMAT}"
        )
    try:
        return Profile.model_validate(document)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"profile {origin}: {'; '.join(problems)}") from error
