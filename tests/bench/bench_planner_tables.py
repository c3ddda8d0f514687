"""The figures of `bench_planner.py` as Markdown.

python tests/bench/bench_planner_tables.py docs/results/planner.json [SECTION ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = Mapping[str, Any]
MISSING = "-"


def markdown(document: Figures, sections: Sequence[str] = ()) -> Iterator[str]:
    """The lines of the sections named (none: of all) that are there."""
    for name, table in TABLES.items():
        if name in document and (not sections or name in sections):
            yield from table(document[name])
            yield from _source(document[name])
            yield ""


def _main(section: Figures) -> Iterator[str]:
    cells = section["cells"]
    rules = [rule["policy"] for rule in cells[0]["rules"]] if cells else []
    yield "SLO attainment; in brackets mean and p99 E2E relative to fcfs at 128; rules at their best cap (after @)"
    yield ""
    yield from _table(
        ["", *(cell["name"] for cell in cells)],
        [
            ["requests/s", *(f"{cell['rate_rps']:.1f}" for cell in cells)],
            ["fcfs at 128", *(_share(cell["fcfs"]["attainment"]) for cell in cells)],
            *([rule, *(_rule(cell, rule) for cell in cells)] for rule in rules),
            ["**annealing**", *(_ours(cell) for cell in cells)],
            ["lead over the best rule", *(_lead(cell) for cell in cells)],
            ["goal", *(_goal(cell) for cell in cells)],
        ],
    )


def _others(section: Figures) -> Iterator[str]:
    yield "SLO attainment; in brackets mean and p99 E2E relative to fcfs at 128; rules at their best cap (after @)"
    yield ""
    yield from _table(
        ["load", "fcfs at 128", "slack-guard", "best rule", "annealing", "lead, points"],
        [
            [
                cell["name"],
                _share(cell["fcfs"]["attainment"]),
                _rule(cell, "slack-guard"),
                f"{cell['best_rule']} {_rule(cell, cell['best_rule'])}",
                _ours(cell),
                _lead(cell),
            ]
            for cell in section["cells"]
        ],
    )


def _robust(section: Figures) -> Iterator[str]:
    yield f"annealing at x1.0 when forecasts are wrong; the goal is to keep {section['goal']:.0%}"
    yield ""
    yield from _table(
        ["", "attainment", "of that with exact knowledge", "mean E2E", "p99 E2E"],
        [
            [
                cell["name"],
                _share(cell["attainment"]),
                MISSING if cell["kept"] is None else f"{cell['kept']:.3f}",
                f"{cell['mean_e2e_ratio']:.2f}",
                f"{cell['p99_e2e_ratio']:.2f}",
            ]
            for cell in section["cells"]
        ],
    )


def _frontier(section: Figures) -> Iterator[str]:
    knob = section["knob"]
    yield f"attainment (mean E2E, p99 E2E relative to fcfs at 128) by `{knob}`, default {section['default']:g}"
    yield ""
    values = [point[knob] for point in section["cells"][0]["points"]] if section["cells"] else []
    yield from _table(
        ["", "fcfs at 128", *(f"{value:g}" for value in values)],
        [
            [cell["name"], _share(cell["fcfs"]["attainment"]), *(_bracketed(point) for point in cell["points"])]
            for cell in section["cells"]
        ],
    )


def _ablation(section: Figures) -> Iterator[str]:
    cells = section["cells"]
    parts = [part["what"] for part in cells[0]["parts"]] if cells else []
    yield "what each part gives: attainment (mean E2E, p99 E2E relative to fcfs at 128)"
    yield ""
    yield from _table(
        ["", *(cell["name"] for cell in cells)],
        [[name, *(_part(cell["parts"][number]) for cell in cells)] for number, name in enumerate(parts)],
    )
    if section["not_offered"]:
        yield ""
        yield f"Not measured, the policy has no such option: {', '.join(section['not_offered'])}."


def _time(section: Figures) -> Iterator[str]:
    sizes = section["sizes"]
    yield "a plan of annealing, warm, with its default budget"
    yield ""
    rows: list[tuple[str, Callable[[Figures], str]]] = [
        ("plans", lambda size: f"{size['plans']:,}"),
        ("wall time p50 / p99, ms", lambda size: _quantiles(size["wall_ms"])),
        ("time of its thread p50 / p99, ms", lambda size: _quantiles(size["cpu_ms"])),
        ("goal, ms", lambda size: f"{size['goal_ms']:g}"),
        ("evaluations, median", lambda size: f"{size['evaluations']:,.0f}"),
        ("sort of llf p50 / p99, ms", lambda size: _quantiles(size["llf_ms"])),
        ("times the sort of llf, median", lambda size: f"{size['times_llf']:.0f}"),
        ("score / score in 200 ms: mean, least", lambda size: _two(size["beside_long"], "mean", "least")),
        ("plans within 1 % of it", lambda size: f"{size['beside_long']['within_goal']:.0%}"),
        ("requests short of it, mean", lambda size: f"{size['beside_long']['requests_lost']:.2f}"),
    ]
    yield from _table(
        ["waiting, beside 256 running", *(f"{size['waiting']:,}" for size in sizes)],
        [[label, *(cell(size) for size in sizes)] for label, cell in rows],
    )
    yield ""
    yield "more budget on the same snapshot, from the same state: mean score (plans worse than with the budget before)"
    yield ""
    budgets = [row["evaluations"] for row in sizes[0]["by_evaluations"]]
    yield from _table(
        ["evaluations", *(f"{count:,}" for count in budgets)],
        [
            [
                f"{size['waiting']:,} waiting, {size['beside_long']['plans']} plans",
                *(f"{row['score']:.2f} ({_worse(row)})" for row in size["by_evaluations"]),
            ]
            for size in sizes
        ],
    )


TABLES: dict[str, Callable[[Figures], Iterator[str]]] = {
    "main": _main,
    "others": _others,
    "robust": _robust,
    "frontier": _frontier,
    "ablation": _ablation,
    "time": _time,
}


# -- cells ----------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _source(section: Figures) -> Iterator[str]:
    yield ""
    words = [f"commit {(section['commit'] or 'unknown')[:12]}{' with edits' if section['edited'] else ''}"]
    words += [f"{name} {version}" for name, version in section["versions"].items()]
    if "trace" in section:
        words = [section["trace"], f"{section['seeds']} seeds", *words]
    if "runs_of_other_code" in section:
        words.append(
            f"{section['runs_of_other_code']:,} runs of rules by earlier code, of which a sample came out the same"
        )
    yield f"({'; '.join(words)})"


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _bracketed(figures: Figures) -> str:
    ratios = f"{figures['mean_e2e_ratio']:.2f}, {figures['p99_e2e_ratio']:.2f}"
    return f"{_share(figures['attainment'])} ({ratios})"


def _rule(cell: Figures, name: str) -> str:
    rule = next((rule for rule in cell["rules"] if rule["policy"] == name), None)
    if rule is None:
        return MISSING
    text = f"{_bracketed(rule)} @{rule['max_batch_size']}"
    return f"*{text}*" if name == cell["best_rule"] else text


def _part(figures: Figures) -> str:
    text = _bracketed(figures)
    if figures["policy"] == "annealing":
        return text
    return f"{text} {figures['policy']}@{figures['max_batch_size']}"


def _ours(cell: Figures) -> str:
    return f"**{_bracketed(cell['annealing'])}**" if "annealing" in cell else MISSING


def _lead(cell: Figures) -> str:
    if "lead" not in cell:
        return MISSING
    lead = cell["lead"]
    reach = "" if lead["high"] is None else f" ±{100 * (lead['high'] - lead['mean']):.1f}"
    return f"{100 * lead['mean']:+.1f}{reach} {cell['verdict']}"


def _goal(cell: Figures) -> str:
    if "goal" not in cell:
        return MISSING
    goal = cell["goal"]
    verdict = f"misses {', '.join(goal['missed'])}" if goal["missed"] else "held"
    ratios = f"{goal['mean_e2e_ratio']:.2f}, {goal['p99_e2e_ratio']:.2f}"
    return f"{goal['attainment']:.3f} ({ratios}): {verdict}"


def _quantiles(values: Figures) -> str:
    return f"{values['p50']:.2f} / {values['p99']:.2f}"


def _two(values: Figures, first: str, second: str) -> str:
    return f"{values[first]:.4f}, {values[second]:.4f}"


def _worse(row: Figures) -> str:
    return f"{row['worse']}, by up to {row['worst']:.2f}" if row["worse"] else "0"


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    document = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print("\n".join(markdown(document, sys.argv[2:])))


if __name__ == "__main__":
    main()
