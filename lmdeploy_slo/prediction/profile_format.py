"""The form of a profile file: what an engine on a GPU with a model costs, and what that is known from.

    {"format": "2.0", "name": "...", "engine": "turbomind", "lmdeploy_version": "0.18.0", "gpu": "...", "model": "...",
     "tensor_parallel": 1, "dtype": "...", "date": "2025-01-31", "source": "where the figures come from",
     "step_ms": {"c0": ms, "p1": ms/token, "p2": ms/token^2, "d1": ms/sequence, "d2": ms/token},
     "bilinear_ms": {"prefill": [a, b, c, d], "decode": [a, b, c, d]},
     "max_prefill_tokens": 8192,
     "range": {"prompt_tokens": [low, high], "prefill_tokens": ..., "batch_size": ..., "context_tokens": ...},
     "errors": {"step": {"prefill": {"count": n, "r2": 0.99, "mape": 0.02, "median": 0.01, "worst": 0.1}, "decode": ...,
                         "mixed": ..., "all": ...}, "bilinear": {...}, "held_out": {...}},
     "samples": {"count": n, "set_aside": n, "digest": "sha256:..."}}

The coefficients are those of `core.latency_model`, there in seconds; the ranges those of `core.model_range`; the errors
those of `prediction.fit_errors`, fractions. `held_out`: of the step model, on what it was not fitted to. Needed are
`format`, `name` and `step_ms`; what is absent or null is not known.

Versions are MAJOR.MINOR. Another major version is refused, but for 1, which had nothing from `bilinear_ms` on. Of a
later minor version, what this one does not know is left out with a warning; elsewhere an unknown key is an error.
"""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import astuple
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lmdeploy_slo.core.latency_model import BilinearModel, StepModel
from lmdeploy_slo.core.model_range import ModelRange, RangedBilinearModel, RangedStepModel, RangeWatch
from lmdeploy_slo.errors import ConfigError

logger = logging.getLogger(__name__)

MAJOR, MINOR = 2, 0
FORMAT = f"{MAJOR}.{MINOR}"
"""What this version writes."""

_DIGITS = 7  # significant ones, of a coefficient
_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})")
_PREFILL_UNKNOWN = 8192
"""max_prefill_tokens of a profile that does not say: LMDeploy's default."""

_Coefficient = Annotated[float, Field(ge=0)]
_FourCoefficients = tuple[_Coefficient, _Coefficient, _Coefficient, _Coefficient]
_Span = tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StepCoefficients(_Part):
    """Milliseconds, as in the file; each finite and >= 0."""

    c0: _Coefficient
    p1: _Coefficient
    p2: _Coefficient
    d1: _Coefficient
    d2: _Coefficient

    @classmethod
    def of(cls, model: StepModel) -> StepCoefficients:
        """Of a model in seconds, rounded to the digits that mean something."""
        return cls(**dict(zip(cls.model_fields, map(_rounded_ms, astuple(model)), strict=True)))

    def model_s(self) -> StepModel:
        """The same coefficients in seconds."""
        return StepModel(*(value_ms / 1e3 for value_ms in (self.c0, self.p1, self.p2, self.d1, self.d2)))


class BilinearCoefficients(_Part):
    """Milliseconds, (a, b, c, d) each; finite and >= 0."""

    prefill: _FourCoefficients
    decode: _FourCoefficients

    @classmethod
    def of(cls, model: BilinearModel) -> BilinearCoefficients:
        return cls.model_validate(
            {name: [_rounded_ms(value) for value in getattr(model, name)] for name in cls.model_fields}
        )

    def model_s(self) -> BilinearModel:
        """The same coefficients in seconds."""
        (a, b, c, d), (e, f, g, h) = ([value_ms / 1e3 for value_ms in part] for part in (self.prefill, self.decode))
        return BilinearModel((a, b, c, d), (e, f, g, h))


class RangeSpans(_Part):
    """As `core.model_range.ModelRange`."""

    prompt_tokens: _Span | None = None
    prefill_tokens: _Span | None = None
    batch_size: _Span | None = None
    context_tokens: _Span | None = None

    @model_validator(mode="after")
    def _ordered(self) -> RangeSpans:
        self.range()  # raises ValueError
        return self

    @classmethod
    def of(cls, fitted: ModelRange) -> RangeSpans:
        return cls(**{name: getattr(fitted, name) for name in cls.model_fields})

    def range(self) -> ModelRange:
        return ModelRange(self.prompt_tokens, self.prefill_tokens, self.batch_size, self.context_tokens)


class Errors(_Part):
    """As `prediction.fit_errors.ErrorFigures`."""

    count: int = Field(ge=1)
    r2: float | None
    mape: float = Field(ge=0)
    median: float = Field(ge=0)
    worst: float = Field(ge=0)


class FitErrors(_Part):
    """Kind of pass (prefill, decode, mixed, all) -> errors."""

    step: dict[str, Errors] = Field(default_factory=dict)
    bilinear: dict[str, Errors] = Field(default_factory=dict)
    held_out: dict[str, Errors] = Field(default_factory=dict)


class Samples(_Part):
    """How much was measured. set_aside: of `count`, those taken for disturbed. digest: of the file they are in."""

    count: int = Field(ge=1)
    set_aside: int = Field(ge=0)
    digest: str = Field(min_length=1)


class Profile(_Part):
    """One profile file; see the module."""

    format: str = FORMAT
    name: str = Field(min_length=1)
    engine: str = ""
    lmdeploy_version: str | None = None
    gpu: str = ""
    model: str = ""
    tensor_parallel: int = Field(default=1, ge=1)
    dtype: str = ""
    date: str | None = Field(default=None, pattern=r"^\d{4}-\d{2}-\d{2}$")
    source: str = ""
    step_ms: StepCoefficients
    bilinear_ms: BilinearCoefficients | None = None
    max_prefill_tokens: int | None = Field(default=None, ge=1)
    range: RangeSpans | None = None
    errors: FitErrors | None = None
    samples: Samples | None = None

    @property
    def step_model(self) -> StepModel:
        """The step model in seconds."""
        return self.step_ms.model_s()

    @property
    def bilinear_model(self) -> BilinearModel:
        """The paper's model in seconds. Raises ConfigError where the profile has none."""
        if self.bilinear_ms is None:
            raise ConfigError(f"profile {self.name}: it has no bilinear model, only a step model")
        return self.bilinear_ms.model_s()

    @property
    def fitted_range(self) -> ModelRange:
        """What the coefficients rest on; of an old file, nothing is known."""
        return ModelRange() if self.range is None else self.range.range()

    def ranged_step_model(self) -> RangedStepModel:
        """The step model that warns once when it is asked about what it was not fitted on."""
        most = self.max_prefill_tokens or _PREFILL_UNKNOWN
        return RangedStepModel(self.step_model, RangeWatch(self.name, self.fitted_range), most)

    def ranged_bilinear_model(self) -> RangedBilinearModel:
        """The same of the paper's model. Raises ConfigError where the profile has none."""
        return RangedBilinearModel(self.bilinear_model, RangeWatch(self.name, self.fitted_range))

    def text(self) -> str:
        """The file."""
        return self.model_dump_json(indent=2) + "\n"


def parse_profile(content: bytes, origin: str) -> Profile:
    """The profile in a file's bytes; `origin` names the file. Raises ConfigError that says what is wrong in it."""
    try:
        document = json.loads(content)
        json.dumps(document, ensure_ascii=False).encode()  # halves of characters could not be written again
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise ConfigError(f"profile {origin}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"profile {origin}: a JSON object is expected, this is a {type(document).__name__}")
    # Before anything else: another version may have other fields, and their absence is not what is wrong with it.
    newer = _check_version(document.get("format"), origin)
    if document["format"] == 1:
        document["format"] = FORMAT
    try:
        return Profile.model_validate(document)
    except ValidationError as error:
        problems = error.errors()
        if newer:
            unknown = [problem["loc"] for problem in problems if problem["type"] == "extra_forbidden"]
            if len(unknown) == len(problems):
                return _without(document, unknown, origin)
        told = (f"{'.'.join(map(str, p['loc'])) or 'it'}: {p['msg']}" for p in problems)
        raise ConfigError(f"profile {origin}: {'; '.join(told)}") from error


def _check_version(version: Any, origin: str) -> bool:
    """Whether it is a later minor version. Raises ConfigError where this package cannot read it."""
    if version == 1 and isinstance(version, int) and not isinstance(version, bool):
        return False
    parts = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if parts is None or int(parts[1]) != MAJOR:
        told = "missing" if version is None else repr(version)
        raise ConfigError(f'profile {origin}: format is {told}, this version reads "{MAJOR}.x" and 1')
    return int(parts[2]) > MINOR


def _without(document: dict[str, Any], unknown: list[tuple[int | str, ...]], origin: str) -> Profile:
    """The profile but for what a later minor version has added."""
    names = ", ".join(".".join(map(str, loc)) for loc in unknown)
    logger.warning("profile %s: format %s is newer, not read: %s", origin, document["format"], names)
    for *path, last in unknown:
        part: Any = document
        for key in path:
            part = part[key]
        del part[last]
    return Profile.model_validate(document)


def _rounded_ms(seconds: float) -> float:
    value_ms = 1e3 * seconds
    return round(value_ms, _DIGITS - 1 - math.floor(math.log10(value_ms))) if value_ms > 0 else 0.0
