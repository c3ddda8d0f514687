"""From what was measured to a profile: both models, what they rest on, and how far they are off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from lmdeploy_slo.errors import SloError
from lmdeploy_slo.offline.profiler.grid import Point
from lmdeploy_slo.offline.profiler.state import ProfilerState
from lmdeploy_slo.offline.profiler.target import TargetInfo
from lmdeploy_slo.prediction.fit_errors import ErrorFigures, errors_by_kind, predicted_by_bilinear, predicted_by_step
from lmdeploy_slo.prediction.least_squares import FittedModels, disturbed, fit_models
from lmdeploy_slo.prediction.observations import Kind, Observation
from lmdeploy_slo.prediction.profile_format import (
    BilinearCoefficients,
    Errors,
    FitErrors,
    Profile,
    RangeSpans,
    Samples,
    StepCoefficients,
)

_DIGITS = 4  # after the point, of fractions


@dataclass(frozen=True, slots=True)
class Notes:
    """What no engine tells of itself. date: ISO, of the measurement."""

    name: str
    date: str
    source: str
    gpu: str = ""
    model: str = ""
    dtype: str = ""
    tensor_parallel: int = 1


@dataclass(frozen=True, slots=True)
class Measured:
    """A profile with all it was made from. held_out: measured, not fitted, without what was disturbed."""

    profile: Profile
    fitted: FittedModels
    held_out: tuple[Observation, ...]


def make_profile(state: ProfilerState, points: Sequence[Point], info: TargetInfo, notes: Notes) -> Measured:
    """Raises SloError where too little was measured for a model: neither prompts nor decoding may be missing."""
    held_out_points = {point.name for point in points if point.held_out}
    own = [o for o in state.observations if o.point not in held_out_points]
    kinds = {o.kind for o in own}
    missing = [what for what, kind in (("prompts", Kind.PREFILL), ("decoding", Kind.DECODE)) if kind not in kinds]
    if missing:
        raise SloError(f"too little was measured for a model: nothing of {' and '.join(missing)}; give it more time")
    fitted = fit_models(own)
    held_out = [o for o in state.observations if o.point in held_out_points]
    spoilt = disturbed(held_out, fitted.step)
    kept = tuple(o for o, off in zip(held_out, spoilt, strict=True) if not off)
    bilinear = None if fitted.bilinear is None else BilinearCoefficients.of(fitted.bilinear)
    profile = Profile(
        name=notes.name,
        engine=info.engine,
        lmdeploy_version=info.versions.get("lmdeploy"),
        gpu=notes.gpu,
        model=notes.model or info.model,
        tensor_parallel=notes.tensor_parallel,
        dtype=notes.dtype,
        date=notes.date,
        source=notes.source,
        step_ms=StepCoefficients.of(fitted.step),
        bilinear_ms=bilinear,
        max_prefill_tokens=state.limits.max_prefill_tokens,
        range=RangeSpans.of(fitted.range),
        errors=FitErrors(
            step=in_file(errors_by_kind(fitted.kept, predicted_by_step(fitted.step, fitted.kept))),
            bilinear=in_file(errors_by_kind(fitted.kept, predicted_by_bilinear(fitted.bilinear, fitted.kept)))
            if fitted.bilinear is not None
            else {},
            held_out=in_file(errors_by_kind(kept, predicted_by_step(fitted.step, kept))),
        ),
        samples=Samples(
            count=len(state.observations),
            set_aside=len(fitted.set_aside) + int(spoilt.sum()),
            digest=state.digest,
        ),
    )
    return Measured(profile, fitted, kept)


def in_file(figures: Mapping[str, ErrorFigures]) -> dict[str, Errors]:
    """As a profile file has them."""
    return {
        kind: Errors.model_validate(
            {name: round(v, _DIGITS) if isinstance(v, float) else v for name, v in asdict(own).items()}
        )
        for kind, own in figures.items()
    }
