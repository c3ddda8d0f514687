"""The dashboard and the alert rules under examples/ load, and name nothing that the server does not export."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from runtime_bench import Bench, virtual

from lmdeploy_slo.core.plan import Plan, PlanQuality
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.errors import RequestError
from lmdeploy_slo.observability.metrics import OBJECTIVES, PREFIX, Metrics, _reasons
from lmdeploy_slo.runtime.observer import AppliedPlan
from lmdeploy_slo.testing.builders import A100, make_slo

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "monitoring"
PAGE = ROOT / "docs" / "observability.md"

SELECTED = re.compile(r"\b(lmdeploy_slo:\w+|process_\w+|up)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)(=~|=|!=|!~)"([^"]*)"')
SCRAPED = {"job", "instance", "le"}
"""Labels that Prometheus, or the histogram, adds."""


def metrics_with_everything() -> Metrics:
    """Every series that there can be has a sample."""
    found: list[Metrics] = []

    @virtual()
    async def collect(bench: Bench) -> None:
        metrics = Metrics({"version": "1", "policy": "p", "engine": "e", "model": "m"})
        bench.runtime.journal.watch(metrics)
        stream = bench.submit("r", slo=make_slo(ttft_ms=1, tpot_ms=1, e2e_ms=1), task_type="chat")
        await bench.engine.has("r")
        bench.clock.advance(1.0)
        bench.engine.step()
        bench.clock.advance(1.0)
        bench.engine.step("r")
        await stream.result()
        quality = PlanQuality("edf", 1.0, 2.0, 10, 3.0)
        plan = AppliedPlan(0.0, Plan(np.array([1]), 1, quality=quality), 0.001, (), failed=True)
        metrics.on_plan(plan)
        load = bench.runtime.load()
        calibration = replace(load.calibration, profile=A100, model=A100)
        metrics.on_sample(replace(load, last_plan=plan, calibration=calibration), 0.0)
        found.append(metrics)

    collect()
    return found[0]


@pytest.fixture(scope="module")
def samples() -> dict[str, set[str]]:
    """Labels by the name of a sample."""
    labels: dict[str, set[str]] = {"up": set()}
    for family in metrics_with_everything().registry.collect():
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load((EXAMPLES / "alerts.yml").read_text())
    assert document.keys() == {"groups"}
    names = [group["name"] for group in document["groups"]]
    assert len(set(names)) == len(names)
    return [rule for group in document["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    document = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
    assert isinstance(document, dict)
    return document


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = dashboard()["panels"]
    return found


def expressions() -> Iterator[tuple[str, str]]:
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


@pytest.mark.parametrize(("place", "expression"), list(expressions()))
def test_what_is_asked_for_is_exported(place: str, expression: str, samples: dict[str, set[str]]) -> None:
    """Names, labels that are matched or grouped by, and values of labels with a fixed set of them."""
    values = {
        "reason": _reasons(RequestError),
        "status": {status.value for status in EndStatus},
        "objective": set(OBJECTIVES),
        "quantity": {"ttft", "tpot", "e2e", "output_tokens"},
    }
    selected = SELECTED.findall(expression)
    assert selected
    known: set[str] = set(SCRAPED)
    for name, matchers in selected:
        assert name in samples, f"{place}: nothing is called {name}"
        known |= samples[name]
        for label, _, value in MATCHER.findall(matchers):
            assert label in samples[name] | SCRAPED, f"{place}: {name} has no label {label}"
            if label in values:
                assert set(value.split("|")) <= values[label]
    for grouped in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression):
        assert {label.strip() for label in grouped.split(",")} <= known, place
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing), place


def test_histograms_are_read_as_histograms() -> None:
    for place, expression in expressions():
        for bucket in re.findall(r"histogram_quantile\([\d.]+, (.*?)\[", expression):
            assert "_bucket" in bucket, place
            assert re.search(r"by \([^)]*\ble\b", bucket), place


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert rule["annotations"].keys() == {"summary", "description"}, rule["alert"]
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s")), rule["alert"]


def test_the_scrape_configuration_reads_the_rules() -> None:
    document = yaml.safe_load((EXAMPLES / "prometheus.yml").read_text())
    assert [(EXAMPLES / name).exists() for name in document["rule_files"]] == [True]
    assert document["scrape_configs"][0]["job_name"] == "lmdeploy_slo"


def test_panels_are_whole_and_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["targets"]
            assert all(target["legendFormat"] for target in panel["targets"])
            assert panel["fieldConfig"]["defaults"]["unit"]


def test_variables_of_the_dashboard_exist() -> None:
    variables = {variable["name"] for variable in dashboard()["templating"]["list"]} | {"__rate_interval"}
    text = json.dumps(panels())
    assert set(re.findall(r"\$\{?(\w+)\}?", text)) <= variables
    assert {"job", "instance", "task", "datasource"} <= variables


def test_the_page_names_every_metric_with_its_labels(samples: dict[str, set[str]]) -> None:
    rows = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and re.match(r"(histogram|counter|gauge)", cells[1]):
            kind, *labels = re.split(r"[,;]\s*", cells[1])
            rows[cells[0].strip("`")] = (kind, set(labels))
    for name, labels in samples.items():
        if not name.startswith(PREFIX):
            continue
        base = name.removeprefix(PREFIX)
        plain = re.sub(r"_(bucket|count|sum)$", "", base)
        kind, told = rows[plain] if plain in rows else rows[base]
        assert (kind == "counter") == name.endswith("_total"), name
        assert labels - {"le"} == told, name
    exported = {re.sub(r"_(bucket|count|sum)$", "", name.removeprefix(PREFIX)) for name in samples}
    assert rows.keys() <= exported
