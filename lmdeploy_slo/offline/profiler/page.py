"""The page of a profile: measured against fitted, residuals, coefficients, and every point with its repeats.

One HTML file that loads nothing. Needs the extra `report`.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.offline import plots
from lmdeploy_slo.offline.html_page import origin, page, section, svg_figure
from lmdeploy_slo.offline.profiler.artifact import Measured
from lmdeploy_slo.offline.profiler.grid import Point
from lmdeploy_slo.offline.profiler.page_plots import layers, measured_against_fitted, residuals
from lmdeploy_slo.offline.profiler.precision import half_width
from lmdeploy_slo.offline.profiler.state import ProfilerState
from lmdeploy_slo.prediction.fit_errors import predicted_by_bilinear, predicted_by_step
from lmdeploy_slo.prediction.observations import Observation, seconds_of, step_rows
from lmdeploy_slo.prediction.profile_format import Errors, Profile

Floats = npt.NDArray[np.float64]
Predict = Callable[[Sequence[Observation]], Floats]

UNITS = {"c0": "ms", "p1": "ms/token", "p2": "ms/token^2", "d1": "ms/sequence", "d2": "ms/token"}
_TERMS = {
    "c0": "each pass",
    "p1": "each prompt token",
    "p2": "attention of the prompt",
    "d1": "each sequence that decodes",
    "d2": "each token in their caches",
}
_KINDS = ("prefill", "decode", "mixed", "all")


def write_page(
    path: Path,
    measured: Measured,
    state: ProfilerState,
    points: Sequence[Point],
    command: str,
    settings: Mapping[str, str],
) -> None:
    """Writes the page; raises ConfigError where that fails. command, settings: what made it."""
    with plots.style():
        text = _page(measured, state, points, command, settings)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error


def _page(
    measured: Measured, state: ProfilerState, points: Sequence[Point], command: str, settings: Mapping[str, str]
) -> str:
    profile, fitted = measured.profile, measured.fitted
    forms: list[tuple[str, str, Predict]] = [("step", "Step model", partial(predicted_by_step, fitted.step))]
    if fitted.bilinear is not None:
        forms.append(("bilinear", "Bilinear model of the paper", partial(predicted_by_bilinear, fitted.bilinear)))
    drawn = {name: layers(fitted.kept, measured.held_out, fitted.set_aside, predict) for name, _, predict in forms}
    against = "".join(
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        + svg_figure(measured_against_fitted(drawn[name]), f"against-{name}", f"measured against fitted, {title}")
        + "</figure>"
        for name, title, _ in forms
    )
    left = "".join(
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        + svg_figure(residuals(drawn[name]), f"residuals-{name}", f"residuals, {title}")
        + "</figure>"
        for name, title, _ in forms
    )
    about = ", ".join(filter(None, (profile.model, profile.gpu, profile.engine, profile.dtype, profile.date)))
    sections = [
        _tiles(measured),
        section("Measured against fitted", f'<div class="pair">{against}</div>', _AGAINST_NOTE),
        section("What is left over", left, "Above the line the engine was slower than the model says."),
        section("Coefficients", _coefficients(measured), _coefficients_note(profile)),
        section("Errors", _errors(profile), _ERRORS_NOTE),
        section("Points", _points(measured, state, points), _POINTS_NOTE),
        section("To get this page again", origin(command, settings)),
    ]
    return page(profile.name, about, sections)


_AGAINST_NOTE = (
    "Durations of forward passes; where several in a row were timed, their mean. The bilinear model says nothing of "
    "prompts that are computed beside decoding."
)
_BILINEAR_NOTE = "The bilinear model: a B l + b B + c l + d for a batch of B, prompts or contexts of l tokens."
_ERRORS_NOTE = (
    "Error: fitted / measured - 1; MAPE is the mean of its absolute value. "
    "Held out: points that were measured but not fitted."
)
_POINTS_NOTE = (
    "prefill: so many prompts of so many tokens each; decode: so many sequences that began with so many tokens each; "
    "mixed: prompts beside sequences that decode. Interval: half the 95 % confidence interval of the mean."
)


def _tiles(measured: Measured) -> str:
    errors = measured.profile.errors
    assert errors is not None, "a profile that was measured has errors"
    shown = [
        ("prefill, MAPE", errors.step.get("prefill"), "mape"),
        ("decode, MAPE", errors.step.get("decode"), "mape"),
        ("held out, median", errors.held_out.get("all"), "median"),
        ("worst of all", errors.step.get("all"), "worst"),
    ]
    tiles = "".join(
        f'<div class="tile" style="border-top-color:#0b6bcb"><span>{label}</span>'
        f"<strong>{_percent(getattr(figures, which))}</strong><small>{figures.count} repeats</small></div>"
        for label, figures, which in shown
        if figures is not None
    )
    return f'<section class="first"><div class="tiles">{tiles}</div></section>'


def _coefficients(measured: Measured) -> str:
    profile, corner = measured.profile, far_corner_ms(measured)
    total = sum(corner.values())
    rows = [
        (
            name,
            f"{getattr(profile.step_ms, name):.5g} {unit}",
            _TERMS[name],
            f"{corner[name]:.3g}",
            _percent(corner[name] / total if total else 0.0),
        )
        for name, unit in UNITS.items()
    ]
    text = _table(("", "coefficient", "paid for", "largest pass, ms", "share"), rows)
    if profile.bilinear_ms is not None:
        named = [
            (part, *(f"{value:.5g}" for value in getattr(profile.bilinear_ms, part))) for part in ("prefill", "decode")
        ]
        heads = ("", "a, ms/token", "b, ms/sequence", "c, ms/token", "d, ms")
        text += f"<p class='note'>{_BILINEAR_NOTE}</p>{_table(heads, named)}"
    return text


def _coefficients_note(profile: Profile) -> str:
    spans = profile.fitted_range
    told = [
        f"{label} {span[0]:,.0f} to {span[1]:,.0f}"
        for label, span in (
            ("prompt tokens", spans.prompt_tokens),
            ("prompt tokens in a pass", spans.prefill_tokens),
            ("sequences", spans.batch_size),
            ("tokens in the cache of each", spans.context_tokens),
        )
        if span is not None
    ]
    return f"Fitted on {'; '.join(told)}. The largest pass has the most of each in it."


def far_corner_ms(measured: Measured) -> dict[str, float]:
    """What each term adds to a pass with the most of everything that was measured."""
    per_pass = step_rows(measured.fitted.kept) / np.array([[o.steps] for o in measured.fitted.kept])
    most = dict(zip(UNITS, per_pass.max(axis=0), strict=True))
    return {name: getattr(measured.profile.step_ms, name) * float(amount) for name, amount in most.items()}


def _errors(profile: Profile) -> str:
    assert profile.errors is not None, "a profile that was measured has errors"
    rows = []
    for label, by_kind in (
        ("step model", profile.errors.step),
        ("bilinear model", profile.errors.bilinear),
        ("step model, held out", profile.errors.held_out),
    ):
        rows += [
            (label if n == 0 else "", kind, *_figures(by_kind[kind]))
            for n, kind in enumerate(k for k in _KINDS if k in by_kind)
        ]
    return _table(("", "of", "repeats", "R2", "MAPE", "median", "worst"), rows, names=2)


def _figures(figures: Errors) -> tuple[str, ...]:
    r2 = "-" if figures.r2 is None else f"{figures.r2:.4f}"
    return str(figures.count), r2, _percent(figures.mape), _percent(figures.median), _percent(figures.worst)


def _points(measured: Measured, state: ProfilerState, points: Sequence[Point]) -> str:
    repeats, model, rows = state.of_points(), measured.fitted.step, []
    for point in points:
        own = repeats.get(point.name, [])
        remark = "held out" if point.held_out else ""
        if point.name in state.given_up:
            remark = f"{remark}; {state.given_up[point.name]}".lstrip("; ")
        if not own:
            rows.append((point.name, "0", "-", "-", "-", "-", remark))
            continue
        passes = np.array([o.steps for o in own])
        measured_ms = 1e3 * float(np.median(seconds_of(own) / passes))
        fitted_ms = 1e3 * float(np.median(predicted_by_step(model, own) / passes))
        width = half_width(own, model)
        rows.append(
            (
                point.name,
                str(len(own)),
                f"{measured_ms:.3f}",
                f"{fitted_ms:.3f}",
                f"{100 * (fitted_ms / measured_ms - 1):+.1f} %",
                _percent(width) if np.isfinite(width) else "-",
                remark,
            )
        )
    return _table(("point", "repeats", "measured, ms", "fitted, ms", "error", "interval", ""), rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        marks = [' class="name"' if number < names else "" for number in range(len(cells))]
        return (
            "<tr>" + "".join(f"<{tag}{m}>{html.escape(c)}</{tag}>" for c, m in zip(cells, marks, strict=True)) + "</tr>"
        )

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table><thead>{line(heads, "th")}</thead><tbody>{body}</tbody></table></div>'


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
