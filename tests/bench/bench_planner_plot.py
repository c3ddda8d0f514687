"""Draws SLO attainment against load from the figures of `bench_planner.py`.

    python tests/bench/bench_planner_plot.py docs/results/planner.json docs/attainment.svg

An SVG of its own, without a library: text stays text, and its colours follow the reader's light or dark page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 780, 384
LEFT, RIGHT, TOP, BOTTOM = 56, 214, 44, 56
LINE_PX = 17
"""Between labels, at least."""

LINES = (
    ("annealing", "annealing", "ours"),
    ("slack-guard", "slack-guard, best cap", "guard"),
    ("rule", "best fixed rule, best cap", "rule"),
    ("fcfs", "FCFS, 128 in flight", "fcfs"),
)
"""(series, label, class), from the one in front to the one behind."""

STYLE = """
.card{fill:#ffffff} .grid{stroke:#e4e7eb;stroke-width:1}
text{font:13px system-ui,-apple-system,"Segoe UI",sans-serif;fill:#1f2933}
.faint{fill:#616e7c} .title{font-weight:600;font-size:14px} .name{font-weight:600} path{fill:none;stroke-width:2}
.ours path{stroke:#0b6bcb;stroke-width:3.5} .ours circle,.ours text{fill:#0b6bcb}
.guard path{stroke:#1b8377} .guard circle,.guard text{fill:#1b8377}
.rule path{stroke:#b85c0e} .rule circle,.rule text{fill:#b85c0e}
.fcfs path{stroke:#616e7c} .fcfs circle,.fcfs text{fill:#616e7c}
@media (prefers-color-scheme:dark){
.card{fill:#0d1117} .grid{stroke:#2b323b} text{fill:#e6edf3} .faint{fill:#9aa5b1}
.ours path{stroke:#58a6ff} .ours circle,.ours text{fill:#58a6ff}
.guard path{stroke:#4cc9b9} .guard circle,.guard text{fill:#4cc9b9}
.rule path{stroke:#f0a35e} .rule circle,.rule text{fill:#f0a35e}
.fcfs path{stroke:#9aa5b1} .fcfs circle,.fcfs text{fill:#9aa5b1}
}
"""


def series(cells: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Attainment at each load; "rule" is the best of the fixed rules there."""
    if name in ("annealing", "fcfs"):
        return [cell[name]["attainment"] for cell in cells]
    rules = [{rule["policy"]: rule["attainment"] for rule in cell["rules"]} for cell in cells]
    if name == "rule":
        return [max(value for policy, value in known.items() if policy != "slack-guard") for known in rules]
    return [known[name] for known in rules]


def draw(cells: Sequence[Mapping[str, Any]]) -> str:
    """The SVG of the cells of a main table that has annealing in it."""
    return "\n".join(_elements(sorted(cells, key=lambda cell: float(cell["rate_rps"])))) + "\n"


def _elements(cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    most_rps = cells[-1]["rate_rps"]

    def x(rate_rps: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * rate_rps / most_rps

    def y(attainment: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * attainment

    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img">'
    )
    yield "<title>SLO attainment against load</title>"
    yield f"<style>{STYLE}</style>"
    yield f'<rect class="card" width="{WIDTH}" height="{HEIGHT}" rx="8"/>'
    yield _text(LEFT, 24, "Requests that meet their SLO", "title")
    for percent in (0, 25, 50, 75, 100):
        at = y(percent / 100)
        yield f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}"/>'
        yield _text(LEFT - 8, at + 4, f"{percent}%", "faint", "end")
    for cell in cells:
        yield _text(x(cell["rate_rps"]), HEIGHT - BOTTOM + 20, f"{cell['rate_rps']:.1f}", "", "middle")
        yield _text(x(cell["rate_rps"]), HEIGHT - BOTTOM + 37, cell["name"], "faint", "middle")
    yield _text(WIDTH - RIGHT + 22, HEIGHT - BOTTOM + 20, "requests/s", "faint")
    yield _text(WIDTH - RIGHT + 22, HEIGHT - BOTTOM + 37, "of the recorded rate", "faint")
    values = {name: series(cells, name) for name, _, _ in LINES}
    labels = _apart([y(values[name][-1]) for name, _, _ in LINES])
    for (name, label, style), label_y in reversed(list(zip(LINES, labels, strict=True))):
        points = [(x(cell["rate_rps"]), y(value)) for cell, value in zip(cells, values[name], strict=True)]
        yield f'<g class="{style}">'
        yield f'<path d="M{" L".join(f"{px:.1f} {py:.1f}" for px, py in points)}"/>'
        for px, py in points:
            yield f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{4 if style == "ours" else 3}"/>'
        yield _text(
            WIDTH - RIGHT + 12, label_y + 4, f"{values[name][-1]:.0%} {label}", "name" if style == "ours" else ""
        )
        yield "</g>"
    yield "</svg>"


def _apart(heights: Sequence[float]) -> list[float]:
    """The heights moved as little as needed to be `LINE_PX` apart, in the same order, and above the axis."""
    order = sorted(range(len(heights)), key=lambda number: heights[number])
    placed: dict[int, float] = {}
    low = float("-inf")
    for number in order:
        low = placed[number] = max(heights[number], low + LINE_PX)
    most = float(HEIGHT - BOTTOM)
    for number in reversed(order):
        placed[number] = min(placed[number], most)
        most = placed[number] - LINE_PX
    return [placed[number] for number in range(len(heights))]


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    named = f' class="{style}"' if style else ""
    turned = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}"{named}{turned}>{escape(text)}</text>'


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    cells = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["main"]["cells"]
    Path(sys.argv[2]).write_text(draw(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
