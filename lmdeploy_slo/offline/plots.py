"""The plots of a report, one function each, drawn by matplotlib. How they are laid out on a page is not their business.

Everything is read off the records of requests, so the plots of a run that was measured look as those of one that was
simulated. Needs the extra `report`. Figures are drawn without a display and come out the same for the same records.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator

from lmdeploy_slo.core.metrics import RequestRecord
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.core.slo import Slo, Timing

Floats = npt.NDArray[np.float64]

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
MET, MISSED = "#2a7f62", "#c2452d"
_KNOWN_COLOURS = {"fcfs": "#7b8794", "annealing": "#0b6bcb", "slack-guard": "#2a9d8f"}
_COLOURS = ("#e07a1f", "#9b4fb5", "#c2452d", "#b8960c", "#4f7cac", "#6a994e", "#d1698f", "#5c4d7d")
"""Told apart also by people who see fewer colours; each policy keeps its own on every plot."""

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 2.0,
    "lines.markersize": 6.0,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "svg.fonttype": "path",  # looks the same whatever fonts the reader has
}

GANTT_REQUESTS = 60


@dataclass(frozen=True, slots=True)
class Case:
    """One run of a report: `run` as in a result file, `records` in any order."""

    policy: str
    speedup: float
    run: Mapping[str, Any]
    records: Sequence[RequestRecord]


@contextmanager
def style() -> Iterator[None]:
    """How all figures look; drawing and saving both belong inside."""
    with mpl.rc_context(_STYLE):
        yield


def colours(policies: Sequence[str]) -> dict[str, str]:
    """Policy -> colour."""
    free = itertools.cycle(_COLOURS)
    return {policy: _KNOWN_COLOURS.get(policy) or next(free) for policy in dict.fromkeys(policies)}


# -- the whole grid -------------------------------------------------------------------------------------------------


def attainment_against_load(cases: Sequence[Case]) -> Figure:
    """SLO attainment of each policy over the requests offered per second; bars where there is one load only."""
    figure = Figure(figsize=(7.2, 4.0))
    axes = figure.subplots()
    policies = list(dict.fromkeys(case.policy for case in cases))
    colour = colours(policies)
    if len({case.speedup for case in cases}) == 1:
        _attainment_by_task(axes, cases, colour)
        return figure
    for policy in policies:
        own = sorted((case for case in cases if case.policy == policy), key=lambda case: case.speedup)
        points = [
            (rate_rps(case), case.run["slo_attainment"]) for case in own if case.run["slo_attainment"] is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=colour[policy], label=policy, clip_on=False)
    axes.set(xlabel="offered load, requests/s", ylabel="SLO attainment", ylim=(0, 1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    loads = sorted({case.speedup: rate_rps(case) for case in cases}.items())
    top = axes.secondary_xaxis("top")
    top.set_xticks([rate for _, rate in loads], [f"x{speedup:g}" for speedup, _ in loads])
    top.tick_params(length=0, labelcolor=FAINT)
    top.spines["top"].set_visible(False)
    if axes.lines:
        axes.legend(loc="lower left")
    return figure


def _attainment_by_task(axes: Axes, cases: Sequence[Case], colour: Mapping[str, str]) -> None:
    tasks = sorted({task for case in cases for task in case.run["by_task"]})
    groups = ["all", *tasks] if len(tasks) > 1 else ["all"]
    height = 0.8 / len(cases)
    for number, case in enumerate(cases):
        values = [
            case.run["slo_attainment"],
            *(case.run["by_task"].get(t, {}).get("slo_attainment") for t in groups[1:]),
        ]
        known = [(place, value) for place, value in enumerate(values) if value is not None]
        places = [place + (number - (len(cases) - 1) / 2) * height for place, _ in known]
        bars = axes.barh(
            places, [value for _, value in known], 0.86 * height, color=colour[case.policy], label=case.policy
        )
        axes.bar_label(bars, fmt=lambda value: f"{value:.1%}", padding=4, color=INK)
    axes.set_yticks(range(len(groups)), [group or "(no task)" for group in groups])
    axes.set(xlim=(0, 1.08), xlabel="SLO attainment")
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=min(4, len(cases)))


def attainment_against_latency(cases: Sequence[Case]) -> Figure:
    """The frontier: SLO attainment over mean E2E, a point per policy and load; up and to the left is better."""
    figure = Figure(figsize=(7.2, 4.0))
    axes = figure.subplots()
    policies = list(dict.fromkeys(case.policy for case in cases))
    colour = colours(policies)
    several = len({case.speedup for case in cases}) > 1
    for policy in policies:
        own = sorted((case for case in cases if case.policy == policy), key=lambda case: case.speedup)
        points = [
            (case.run["e2e_ms"]["mean"] / 1e3, case.run["slo_attainment"], case.speedup)
            for case in own
            if case.run["slo_attainment"] is not None and case.run["e2e_ms"]["mean"] is not None
        ]
        if not points:
            continue
        x, y, speedups = zip(*points, strict=True)
        axes.plot(x, y, marker="o", color=colour[policy], label=policy, linewidth=1.2, clip_on=False)
        for at, height, speedup in zip(x, y, speedups, strict=True):
            if several:
                axes.annotate(
                    f"x{speedup:g}", (at, height), (5, 5), textcoords="offset points", color=colour[policy], fontsize=8
                )
    axes.set(xscale="log", xlabel="mean E2E, s", ylabel="SLO attainment", ylim=(0, 1))
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, (low * high / 3) ** 0.5), max(high, (low * high * 3) ** 0.5))  # a factor of 3 at least
    _plain_log(axes)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if axes.lines:
        axes.legend(loc="best")
    return figure


# -- one load, all policies -----------------------------------------------------------------------------------------

_LATENCIES: tuple[tuple[str, Callable[[Timing], float | None], Callable[[Slo], float | None], float, str], ...] = (
    ("TTFT", lambda timing: timing.ttft_s, lambda slo: slo.ttft_s, 1.0, "s"),
    ("TPOT", lambda timing: timing.tpot_s, lambda slo: slo.tpot_s, 1e3, "ms"),
    ("E2E", lambda timing: timing.e2e_s, lambda slo: slo.e2e_s, 1.0, "s"),
)


def latency_distributions(cases: Sequence[Case]) -> Figure:
    """Share of requests at or below each TTFT, TPOT and E2E, a row per task; a dashed line marks the objective."""
    tasks = sorted({record.task for case in cases for record in case.records})
    figure = Figure(figsize=(10.4, 0.9 + 2.3 * max(1, len(tasks))))
    grid = figure.subplots(max(1, len(tasks)), 3, squeeze=False)
    colour = colours([case.policy for case in cases])
    for row, task in enumerate(tasks):
        for column, (name, value_of, objective_of, scale, unit) in enumerate(_LATENCIES):
            axes = grid[row][column]
            objectives = set()
            for case in cases:
                own = [record for record in case.records if record.task == task and record.status is EndStatus.FINISHED]
                values = np.sort([scale * v for v in (value_of(r.timing) for r in own) if v is not None and v > 0])
                objectives |= {scale * o for o in (objective_of(r.slo) for r in own) if o is not None}
                if len(values):
                    _distribution(axes, values, colour[case.policy], case.policy)
            for objective in sorted(objectives)[:3]:
                axes.axvline(objective, color=INK, linestyle=(0, (4, 3)), linewidth=1.1)
            axes.set(xscale="log", ylim=(0, 1.02), xlabel=f"{name}, {unit}")
            _plain_log(axes)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            if column == 0:
                axes.set_ylabel("requests")
                axes.set_title(task or "(no task)")
    _legend_below(figure, cases, colour)
    return figure


def _distribution(axes: Axes, values: Floats, colour: str, label: str) -> None:
    """A step at each value; of many values only so many as can be seen."""
    shares = np.arange(1, len(values) + 1) / len(values)
    if len(values) > 400:
        chosen = np.unique(np.concatenate([np.linspace(0, len(values) - 1, 396).astype(int), [0, len(values) - 1]]))
        values, shares = values[chosen], shares[chosen]
    axes.step(values, shares, where="post", color=colour, label=label, linewidth=1.7)


def load_over_time(cases: Sequence[Case]) -> Figure:
    """Requests waiting (arrived, not sent) and in flight (sent, not ended) over time."""
    figure = Figure(figsize=(10.4, 4.6))
    waiting, flying = figure.subplots(2, 1, sharex=True)
    colour = colours([case.policy for case in cases])
    for case in cases:
        arrivals, sent, ended = _instants(case.records)
        end_s = float(np.max(ended, initial=1.0))
        at = np.linspace(0.0, end_s, 600)
        unsent = np.sort(np.where(np.isfinite(sent), sent, ended))
        line = {"color": colour[case.policy], "linewidth": 1.4}
        waiting.plot(at, _count(np.sort(arrivals), at) - _count(unsent, at), label=case.policy, **line)
        started, gone = np.sort(sent[np.isfinite(sent)]), np.sort(ended[np.isfinite(sent)])
        flying.plot(at, _count(started, at) - _count(gone, at), **line)
    waiting.set(ylabel="waiting", ylim=(0, None))
    flying.set(ylabel="in flight", xlabel="time, s", ylim=(0, None), xlim=(0, None))
    _legend_below(figure, cases, colour)
    return figure


def gantt(cases: Sequence[Case]) -> Figure:
    """Requests around the busiest moment, one line each, by arrival: waiting, prefill, decode; met or missed."""
    columns = min(2, len(cases))
    rows = math.ceil(len(cases) / columns)
    figure = Figure(figsize=(5.2 * columns, 0.8 + 4.6 * rows))
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    arrivals = np.sort([record.timing.arrival_at_s for record in cases[0].records])
    first = _busiest(arrivals, GANTT_REQUESTS)
    chosen = arrivals[first : first + GANTT_REQUESTS]
    start_s, until_s = float(chosen[0]), _gantt_end(cases, float(chosen[0]), float(chosen[-1]))
    for panel, case in zip(panels, cases, strict=False):
        by_arrival = sorted(case.records, key=lambda r: (r.timing.arrival_at_s, len(r.request_id), r.request_id))
        for line, record in enumerate(by_arrival[first : first + GANTT_REQUESTS]):
            _bar(panel, line, record, start_s, until_s)
        panel.set_title(case.policy)
        panel.set(xlim=(0, until_s - start_s), ylim=(len(chosen), -1))
        panel.grid(axis="y", visible=False)
        panel.tick_params(axis="y", length=0)
        panel.set_yticks([])
    for panel in panels[len(cases) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(cases) - columns) : len(cases)]:
        panel.set_xlabel(f"time from {start_s:.0f} s, s")
    for row in range(rows):
        panels[row * columns].set_ylabel("requests, by arrival")
    handles = [
        Patch(facecolor=GRID, label="waiting"),
        Patch(facecolor=MET, alpha=0.45, label="prefill, met"),
        Patch(facecolor=MET, label="decode, met"),
        Patch(facecolor=MISSED, alpha=0.45, label="prefill, missed"),
        Patch(facecolor=MISSED, label="decode, missed"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return figure


def _bar(axes: Axes, line: int, record: RequestRecord, start_s: float, until_s: float) -> None:
    timing = record.timing
    end = timing.ended_at_s if timing.ended_at_s is not None else until_s
    sent = timing.dispatched_at_s if timing.dispatched_at_s is not None else end
    first = timing.first_token_at_s if timing.first_token_at_s is not None else end
    colour = FAINT if record.slo_met is None else MET if record.slo_met else MISSED
    for begin, stop, shade, alpha in (
        (timing.arrival_at_s, sent, GRID, 1.0),
        (sent, first, colour, 0.45),
        (first, end, colour, 1.0),
    ):
        stop = min(stop, until_s)
        if stop > begin:
            axes.barh(line, stop - begin, 0.72, begin - start_s, color=shade, alpha=alpha, linewidth=0)


def _busiest(arrivals: Floats, count: int) -> int:
    """Where `count` consecutive arrivals take the least time."""
    if len(arrivals) <= count:
        return 0
    return int(np.argmin(arrivals[count:] - arrivals[:-count]))


def _gantt_end(cases: Sequence[Case], start_s: float, last_s: float) -> float:
    """Until most of the chosen requests have ended under the quickest policy, and no longer than can be read."""
    ends = []
    for case in cases:
        own = [r.timing.ended_at_s for r in case.records if start_s <= r.timing.arrival_at_s <= last_s]
        known = [end for end in own if end is not None]
        if known:
            ends.append(float(np.percentile(known, 90)))
    return max(
        last_s + 1.0, min(min(ends, default=last_s) * 1.05 - 0.05 * start_s, start_s + 8 * (last_s - start_s) + 5)
    )


# -- inside ---------------------------------------------------------------------------------------------------------


def rate_rps(case: Case) -> float:
    """Requests offered per second."""
    arrivals = [record.timing.arrival_at_s for record in case.records]
    span_s = max(arrivals) - min(arrivals) if arrivals else 0.0
    return len(arrivals) / span_s if span_s > 0 else 0.0


def _instants(records: Sequence[RequestRecord]) -> tuple[Floats, Floats, Floats]:
    """(arrival, dispatch, end) of each; nan where there was none."""

    def column(get: Callable[[Timing], float | None]) -> Floats:
        return np.array([math.nan if (at := get(r.timing)) is None else at for r in records], dtype=np.float64)

    return (
        column(lambda timing: timing.arrival_at_s),
        column(lambda timing: timing.dispatched_at_s),
        column(lambda timing: timing.ended_at_s),
    )


def _count(instants: Floats, at: Floats) -> npt.NDArray[np.int64]:
    return np.asarray(np.searchsorted(instants, at, side="right"), dtype=np.int64)


def _plain_log(axes: Axes) -> None:
    """1, 10, 100 rather than powers; 2 and 5 between where there is room."""
    low, high = axes.get_xlim()
    between = (1.0, 2.0, 5.0) if high < 150 * low else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=between))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")


def _legend_below(figure: Figure, cases: Sequence[Case], colour: Mapping[str, str]) -> None:
    handles = [Patch(facecolor=colour[case.policy], label=case.policy) for case in cases]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))
