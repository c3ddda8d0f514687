"""A report people can look at: one HTML page that needs nothing else, and its plots as PNG files.

The page has no script and loads nothing; loads are switched by radio buttons and a style sheet. The same runs give the
same bytes.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.offline import plots
from lmdeploy_slo.offline.html_page import origin, page, section, svg_figure
from lmdeploy_slo.offline.plots import Case

PAGE = "index.html"
_PNG_DPI = 160


@dataclass(frozen=True, slots=True)
class Report:
    """What a page tells. title: of the page. subtitle: a line below. settings: name -> value, in order.
    command: what makes the same page again."""

    title: str
    subtitle: str
    cases: Sequence[Case]
    settings: Mapping[str, str]
    command: str


def check_folder(folder: Path) -> None:
    """Makes the folder; raises ConfigError where it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / PAGE
        existed = probe.exists()
        with probe.open("a", encoding="utf-8"):
            pass
        if not existed:
            probe.unlink()
    except OSError as error:
        raise ConfigError(f"--report {folder}: cannot be written: {error.strerror or error}") from error


def write_report(folder: Path, report: Report) -> Path:
    """Writes the page and its plots into `folder`, which is made; returns the page. Raises ConfigError."""
    check_folder(folder)
    with plots.style():
        text = _page(report, _Plots(folder))
    (folder / PAGE).write_text(text, encoding="utf-8")
    return folder / PAGE


class _Plots:
    """Draws each figure once, as a PNG file and as SVG for the page."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def draw(self, name: str, label: str, figure: Figure) -> str:
        try:
            figure.savefig(self._folder / f"{name}.png", dpi=_PNG_DPI, metadata={"Software": None})
        except OSError as error:
            raise ConfigError(f"{self._folder / name}.png: cannot be written: {error.strerror or error}") from error
        return svg_figure(figure, name, label)


# -- the page -------------------------------------------------------------------------------------------------------


def _page(report: Report, drawn: _Plots) -> str:
    speedups = list(dict.fromkeys(case.speedup for case in report.cases))
    several = len(speedups) > 1
    sections = [_tiles(report.cases, speedups)]
    figures = [
        drawn.draw("attainment", "SLO attainment against load", plots.attainment_against_load(report.cases)),
        drawn.draw("frontier", "SLO attainment against mean E2E", plots.attainment_against_latency(report.cases)),
    ]
    sections.append(
        section(
            "Attainment",
            f"""<div class="pair">
<figure><figcaption>{"SLO attainment against load" if several else "SLO attainment"}</figcaption>{figures[0]}</figure>
<figure><figcaption>Attainment against mean E2E: up and to the left is better</figcaption>{figures[1]}</figure>
</div>""",
            "A request counts as met when it kept every objective it carried; those without an objective are left out.",
        )
    )
    sections.append(section("Figures", _summary_table(report.cases, several), _SUMMARY_NOTE))
    sections.append(
        _by_load(
            "Latency by task",
            "Share of finished requests at or below each value; a dashed line marks the objective.",
            report.cases,
            speedups,
            lambda cases, name: drawn.draw(
                f"latency-{name}", "latency distributions", plots.latency_distributions(cases)
            ),
        )
    )
    sections.append(
        _by_load(
            "Queue and batch over time",
            "Waiting: arrived and not sent to the engine. In flight: sent and not ended.",
            report.cases,
            speedups,
            lambda cases, name: drawn.draw(
                f"load-{name}", "waiting and in flight over time", plots.load_over_time(cases)
            ),
        )
    )
    sections.append(
        _by_load(
            "The busiest moment",
            f"The {plots.GANTT_REQUESTS} requests that arrived closest together, the same under each policy.",
            report.cases,
            speedups,
            lambda cases, name: drawn.draw(f"gantt-{name}", "requests around the busiest moment", plots.gantt(cases)),
        )
    )
    sections.append(section("To get this page again", origin(report.command, report.settings)))
    return page(report.title, report.subtitle, sections, style=_switch_rules(len(speedups)), switch=_switch(speedups))


def _by_load(
    title: str, note: str, cases: Sequence[Case], speedups: Sequence[float], draw: Callable[[Sequence[Case], str], str]
) -> str:
    """One figure per load, of which the chosen one is shown."""
    panels = []
    for number, speedup in enumerate(speedups):
        own = [case for case in cases if case.speedup == speedup]
        figure = draw(own, f"x{speedup:g}".replace(".", "_"))
        panels.append(f'<figure class="load load{number}">{figure}</figure>')
    return section(title, "\n".join(panels), note)


def _switch(speedups: Sequence[float]) -> str:
    """Radio buttons, before everything they switch; a bar of labels that stays in sight. Nothing for a single load."""
    if len(speedups) == 1:
        return ""
    chosen = len(speedups) - 1
    inputs = "".join(
        f'<input class="switch" type="radio" name="load" id="load{n}"{" checked" if n == chosen else ""}>'
        for n in range(len(speedups))
    )
    labels = "".join(f'<label for="load{n}">x{speedup:g}</label>' for n, speedup in enumerate(speedups))
    return f"{inputs}<nav><span>load</span>{labels}</nav>"


def _switch_rules(count: int) -> str:
    if count == 1:
        return ""
    rules = ".load{display:none}"
    for n in range(count):
        rules += f"#load{n}:checked~main .load{n}{{display:block}}"
        rules += f"#load{n}:checked~nav label[for=load{n}]{{background:#0b6bcb;color:#fff;border-color:#0b6bcb}}"
        rules += f"#load{n}:focus-visible~nav label[for=load{n}]{{outline:2px solid #1f2933;outline-offset:2px}}"
    return rules


def _tiles(cases: Sequence[Case], speedups: Sequence[float]) -> str:
    """Attainment of each policy, a group per load."""
    colour = plots.colours([case.policy for case in cases])
    groups = []
    for number, speedup in enumerate(speedups):
        own = [case for case in cases if case.speedup == speedup]
        tiles = "".join(
            f'<div class="tile" style="border-top-color:{colour[case.policy]}"><span>{html.escape(case.policy)}</span>'
            f"<strong>{_percent(case.run['slo_attainment'])}</strong>"
            f"<small>mean E2E {_number(_seconds(case.run['e2e_ms']['mean']), 1)} s</small></div>"
            for case in own
        )
        groups.append(f'<div class="load load{number}"><div class="tiles">{tiles}</div></div>')
    return f'<section class="first">{"".join(groups)}</section>'


_SUMMARY_NOTE = (
    "The best of each load is marked. Latencies are of requests that ran to their end; means of runs with different "
    "counts of finished requests are not comparable."
)
_COLUMNS: tuple[tuple[str, Callable[[Mapping[str, Any]], float | None], int, int], ...] = (
    # heading, value, decimal places, better: 1 more, -1 less, 0 neither
    ("SLO attainment", lambda run: None if run["slo_attainment"] is None else 100 * run["slo_attainment"], 1, 1),
    ("met", lambda run: run["met"], 0, 1),
    ("goodput, 1/s", lambda run: run["goodput_rps"], 2, 1),
    ("finished", lambda run: run["finished"], 0, 0),
    ("TTFT p50, ms", lambda run: run["ttft_ms"]["p50"], 0, -1),
    ("TTFT p99, ms", lambda run: run["ttft_ms"]["p99"], 0, -1),
    ("TPOT p50, ms", lambda run: run["tpot_ms"]["p50"], 1, -1),
    ("TPOT p99, ms", lambda run: run["tpot_ms"]["p99"], 1, -1),
    ("E2E mean, s", lambda run: _seconds(run["e2e_ms"]["mean"]), 2, -1),
    ("E2E p99, s", lambda run: _seconds(run["e2e_ms"]["p99"]), 2, -1),
)


def _summary_table(cases: Sequence[Case], several: bool) -> str:
    heads = "".join(f"<th>{html.escape(label)}</th>" for label, *_ in _COLUMNS)
    lines = []
    for speedup in dict.fromkeys(case.speedup for case in cases):
        own = [case for case in cases if case.speedup == speedup]
        best = [_best([value_of(case.run) for case in own], better) for _, value_of, _, better in _COLUMNS]
        for number, case in enumerate(own):
            cells = ""
            for (_, value_of, digits, _), winner in zip(_COLUMNS, best, strict=True):
                value = value_of(case.run)
                mark = ' class="best"' if value is not None and value == winner and len(own) > 1 else ""
                cells += f"<td{mark}>{_number(value, digits)}</td>"
            load = f'<td class="name" rowspan="{len(own)}">x{speedup:g}</td>' if several and number == 0 else ""
            first = ' class="group"' if number == 0 else ""
            lines.append(f'<tr{first}>{load}<td class="name">{html.escape(case.policy)}</td>{cells}</tr>')
    load_head = '<th class="name">load</th>' if several else ""
    return (
        f'<div class="scroll"><table><thead><tr>{load_head}<th class="name">policy</th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _best(values: Sequence[float | None], better: int) -> float | None:
    known = [value for value in values if value is not None]
    if not known or not better:
        return None
    return max(known) if better > 0 else min(known)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
