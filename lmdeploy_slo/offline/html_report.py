"""A report people can look at: one HTML page that needs nothing else, and its plots as PNG files.

The page has no script and loads nothing; loads are switched by radio buttons and a style sheet. The same runs give the
same bytes.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.offline import plots
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
        text = io.StringIO()
        with mpl.rc_context({"svg.hashsalt": name}):
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        return _inline_svg(text.getvalue(), name, label)


def _inline_svg(svg: str, name: str, label: str) -> str:
    """The <svg> element alone, with ids that no other figure on the page has, as wide as its place."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    opening = re.search(r'viewBox="[^"]*"', body)
    assert opening is not None, "matplotlib gives every figure a viewBox"
    accessible = f'<svg class="plot" role="img" aria-label="{html.escape(label)}" {opening.group()} '
    accessible += 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return accessible + body[body.index(">") + 1 :]


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
        _section(
            "Attainment",
            f"""<div class="pair">
<figure><figcaption>{"SLO attainment against load" if several else "SLO attainment"}</figcaption>{figures[0]}</figure>
<figure><figcaption>Attainment against mean E2E: up and to the left is better</figcaption>{figures[1]}</figure>
</div>""",
            "A request counts as met when it kept every objective it carried; those without an objective are left out.",
        )
    )
    sections.append(_section("Figures", _summary_table(report.cases, several), _SUMMARY_NOTE))
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
    sections.append(_section("To get this page again", _settings(report)))
    return _TEMPLATE.format(
        title=html.escape(report.title),
        subtitle=html.escape(report.subtitle),
        style=_STYLE + _switch_rules(len(speedups)),
        switch=_switch(speedups),
        sections="\n".join(sections),
    )


def _section(title: str, body: str, note: str = "") -> str:
    remark = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<section><h2>{html.escape(title)}</h2>{remark}{body}</section>"


def _by_load(
    title: str, note: str, cases: Sequence[Case], speedups: Sequence[float], draw: Callable[[Sequence[Case], str], str]
) -> str:
    """One figure per load, of which the chosen one is shown."""
    panels = []
    for number, speedup in enumerate(speedups):
        own = [case for case in cases if case.speedup == speedup]
        figure = draw(own, f"x{speedup:g}".replace(".", "_"))
        panels.append(f'<figure class="load load{number}">{figure}</figure>')
    return _section(title, "\n".join(panels), note)


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


def _settings(report: Report) -> str:
    lines = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in report.settings.items()
    )
    return f"<pre>{html.escape(report.command)}</pre><dl>{lines}</dl>"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


_STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#f5f7fa;color:#1f2933;font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header{background:#102a43;color:#fff;padding:2.2rem max(1.5rem,calc(50vw - 38rem)) 2rem}
header h1{margin:0 0 .3rem;font-size:1.7rem;font-weight:650;letter-spacing:-.01em}
header p{margin:0;color:#bcccdc}
main{max-width:79rem;margin:0 auto;padding:0 1.5rem 3rem}
section{background:#fff;border:1px solid #e4e7eb;border-radius:10px;padding:1.3rem 1.6rem 1.6rem;margin-top:1.3rem}
section.first{background:none;border:0;padding:0}
h2{margin:0 0 .2rem;font-size:1.15rem;font-weight:650}
.note{margin:0 0 1rem;color:#616e7c;font-size:.92rem;max-width:62rem}
.tiles{display:flex;flex-wrap:wrap;gap:1rem}
.tile{flex:1 1 11rem;background:#fff;border:1px solid #e4e7eb;border-top:4px solid;border-radius:8px;padding:.8rem 1rem}
.tile span,.tile small{display:block;color:#616e7c}
.tile strong{font-size:1.75rem;font-weight:650;letter-spacing:-.02em}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(27rem,1fr));gap:1.5rem}
figure{margin:0}
figcaption{font-size:.92rem;color:#3e4c59;margin-bottom:.3rem}
svg.plot{width:100%;height:auto;display:block}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.42rem .7rem;text-align:right;white-space:nowrap}
th{font-weight:600;color:#52606d;border-bottom:2px solid #cbd2d9;white-space:normal;vertical-align:bottom}
td.name,th.name{text-align:left}
td.name{vertical-align:top}
tr.group td{border-top:1px solid #e4e7eb}
td.best{font-weight:650;color:#0b6bcb}
pre{background:#f5f7fa;border:1px solid #e4e7eb;border-radius:6px;padding:.9rem 1.1rem;overflow-x:auto;font-size:.86rem;
white-space:pre-wrap;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.6rem;margin:0;font-size:.92rem}
dt{color:#616e7c}
dd{margin:0;overflow-wrap:anywhere}
.switch{position:absolute;opacity:0;pointer-events:none}
nav{position:sticky;top:0;z-index:1;background:rgba(245,247,250,.94);border-bottom:1px solid #e4e7eb;
padding:.6rem max(1.5rem,calc(50vw - 38rem));display:flex;gap:.45rem;align-items:center}
nav span{color:#616e7c;margin-right:.4rem}
nav label{border:1px solid #cbd2d9;border-radius:999px;padding:.1rem .85rem;background:#fff;cursor:pointer}
@media print{nav{display:none}section{break-inside:avoid}body{background:#fff}}
@media (max-width:34rem){.pair{grid-template-columns:1fr}}
"""

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p>{subtitle}</p></header>
{switch}
<main>
{sections}
</main>
</body>
</html>
"""
