"""The plots of a profile page: measured against fitted, and what is left over. Needs the extra `report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lmdeploy_slo.offline.plots import FAINT, INK
from lmdeploy_slo.prediction.observations import Kind, Observation, seconds_of

Floats = npt.NDArray[np.float64]

COLOURS = {Kind.PREFILL: "#0b6bcb", Kind.DECODE: "#2a9d8f", Kind.MIXED: "#e07a1f"}
HELD_OUT, SET_ASIDE = "#9b4fb5", "#c2452d"
_LABELS = {Kind.PREFILL: "prefill", Kind.DECODE: "decode", Kind.MIXED: "prefill beside decoding"}


@dataclass(frozen=True, slots=True)
class Layer:
    """Observations that are drawn alike, with what the model says of each (nan: nothing)."""

    label: str
    colour: str
    marker: str
    observations: Sequence[Observation]
    predicted_s: Floats

    @property
    def per_pass_s(self) -> tuple[Floats, Floats]:
        """(measured, predicted) per forward pass: stretches of passes are as long as somebody chose."""
        steps = np.array([o.steps for o in self.observations], dtype=np.float64)
        return seconds_of(self.observations) / steps, self.predicted_s / steps


def layers(
    kept: Sequence[Observation],
    held_out: Sequence[Observation],
    set_aside: Sequence[Observation],
    predict: Callable[[Sequence[Observation]], Floats],
) -> list[Layer]:
    """What is there to draw, the odd ones on top."""
    found = []
    for kind in Kind:
        own = [o for o in kept if o.kind is kind]
        found.append(Layer(_LABELS[kind], COLOURS[kind], "o", own, predict(own)))
    found.append(Layer("held out of the fit", HELD_OUT, "D", held_out, predict(held_out)))
    found.append(Layer("disturbed, set aside", SET_ASIDE, "x", set_aside, predict(set_aside)))
    return [layer for layer in found if np.isfinite(layer.predicted_s).any()]


def measured_against_fitted(drawn: Sequence[Layer]) -> Figure:
    """Both per forward pass, on logarithmic axes; on the line the two are equal."""
    figure = Figure(figsize=(5.6, 5.0))
    axes = figure.subplots()
    ends = []
    for layer in drawn:
        measured, predicted = layer.per_pass_s
        _scatter(axes, 1e3 * predicted, 1e3 * measured, layer)
        ends += [*measured, *predicted[np.isfinite(predicted)]]
    low, high = 0.8e3 * min(ends), 1.25e3 * max(ends)
    axes.plot([low, high], [low, high], color=FAINT, linewidth=1, zorder=0)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set(xlabel="fitted, ms per pass", ylabel="measured, ms per pass")
    for axis in (axes.xaxis, axes.yaxis):
        _plain(axis, high / low)
    axes.legend(loc="upper left", handletextpad=0.4)
    return figure


def residuals(drawn: Sequence[Layer]) -> Figure:
    """(measured - fitted) / measured over what each kind of pass mostly depends on."""
    figure = Figure(figsize=(11.4, 3.7))
    panels = figure.subplots(1, 3, sharey=True)
    quantities: tuple[tuple[str, Callable[[Observation], float]], ...] = (
        ("prompt tokens in a pass", lambda o: o.prefill_tokens / o.steps),
        ("sequences decoding", lambda o: o.batch_size),
        ("tokens in the cache of a sequence", lambda o: o.mean_context_tokens),
    )
    for axes, (label, quantity) in zip(panels, quantities, strict=True):
        for layer in drawn:
            measured, predicted = layer.per_pass_s
            where = np.array([quantity(o) for o in layer.observations])
            off = np.where(where > 0, 100 * (measured - predicted) / measured, np.nan)
            _scatter(axes, where, off, layer)
        axes.axhline(0, color=INK, linewidth=1)
        axes.set(xlabel=label, xscale="log")
        low, high = axes.get_xlim()
        _plain(axes.xaxis, high / low)
    panels[0].set_ylabel("measured beyond fitted, %")
    return figure


def _plain(axis: Axis, span: float) -> None:
    """1, 10, 100 rather than powers; 2 and 5 between where there is room."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 300 else (1.0,)))
    axis.set_major_formatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")


def _scatter(axes: Axes, x: Floats, y: Floats, layer: Layer) -> None:
    known = np.isfinite(x) & np.isfinite(y) & (x > 0)
    if known.any():
        size = 34 if layer.marker == "x" else 20
        axes.scatter(x[known], y[known], s=size, c=layer.colour, marker=layer.marker, alpha=0.75, label=layer.label)
