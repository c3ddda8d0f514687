"""The `--slo` grammar, the requests a trace turns into, their length hints, and the generated workload."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.core.slo import NO_SLO, Slo
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.offline.generated import generate_workload
from lmdeploy_slo.offline.slo_grammar import parse_slo_options, slo_of
from lmdeploy_slo.offline.traces import TraceRow
from lmdeploy_slo.offline.workload import build_workload, check_slo_tasks, draw_hints

ROWS = [
    TraceRow(0, 0.0, 10, 5, "code"),
    TraceRow(1, 1.0, 20, 300, "chat"),
    TraceRow(2, 3.0, 30, 900, "chat"),
    TraceRow(3, 6.0, 40, 7, "bulk"),
]

# -- the grammar ----------------------------------------------------------------------------------------------------


def test_slo_options() -> None:
    slos = parse_slo_options(["code=e2e:2000", "chat=ttft:1000,tpot:50", " default = e2e:30000 "])
    assert slos == {"code": Slo(e2e_s=2.0), "chat": Slo(ttft_s=1.0, tpot_s=0.05), "default": Slo(e2e_s=30.0)}
    assert slo_of(slos, "code") == Slo(e2e_s=2.0)
    assert slo_of(slos, "bulk") == Slo(e2e_s=30.0)
    assert slo_of(parse_slo_options(["code=e2e:1"]), "bulk") == NO_SLO


def test_slo_scale_multiplies_every_objective() -> None:
    assert parse_slo_options(["chat=ttft:1000,tpot:50"], 1.5) == {"chat": Slo(ttft_s=1.5, tpot_s=0.05 * 1.5)}
    with pytest.raises(ConfigError, match="--slo-scale"):
        parse_slo_options([], 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["code"], "expected TASK="),
        (["=e2e:1"], "expected TASK="),
        (["code="], "'' is no objective"),
        (["code=e2e"], "e2e must be a positive number"),
        (["code=latency:3"], "'latency:3' is no objective"),
        (["code=e2e:0"], "e2e must be a positive number of milliseconds, got '0'"),
        (["code=e2e:-1"], "positive"),
        (["code=e2e:nan"], "positive"),
        (["code=e2e:inf"], "positive"),
        (["code=e2e:1s"], "'1s'"),
        (["code=e2e:1,e2e:2"], "e2e is named twice"),
        (["code=e2e:1", "code=ttft:2"], "task 'code' is named twice"),
    ],
)
def test_slo_errors_quote_the_option(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"--slo .*{message}"):
        parse_slo_options(options)


# -- from rows to requests ------------------------------------------------------------------------------------------


def test_speedup_divides_arrivals_and_the_limit_keeps_the_traces_maximum() -> None:
    offered = build_workload(ROWS, slos={"chat": Slo(ttft_s=1.0)}, speedup=2.0, limit=2)
    assert [(r.index, r.due_s, r.prompt_tokens, r.output_tokens) for r in offered] == [
        (0, 0.0, 10, 5),
        (1, 0.5, 20, 300),
    ]
    assert [r.max_new_tokens for r in offered] == [900, 900]
    assert [r.slo for r in offered] == [NO_SLO, Slo(ttft_s=1.0)]
    assert [r.expected_output_tokens for r in offered] == [None, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speedup": 0.0}, "--speedup"),
        ({"speedup": float("nan")}, "--speedup"),
        ({"limit": 0}, "--limit"),
        ({"length_noise": -0.1}, "--length-noise"),
        ({"length_noise": 0.1, "length_bias": 0.0}, "--length-bias"),
        ({"length_noise": 0.1, "seed": -1}, "--seed"),
    ],
)
def test_options_out_of_range_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_workload(ROWS, slos={}, **arguments)  # type: ignore[arg-type]


def test_an_slo_of_a_task_that_no_row_has_is_refused() -> None:
    check_slo_tasks({"bulk": Slo(e2e_s=9.0), "default": Slo(e2e_s=9.0)}, ROWS)
    with pytest.raises(ConfigError, match=r"--slo chta=\.\.\.: .* it has bulk, chat, code"):
        check_slo_tasks({"chta": Slo(e2e_s=9.0)}, ROWS)
    with pytest.raises(ConfigError, match="name them with --task"):
        check_slo_tasks({"chat": Slo(e2e_s=9.0)}, [TraceRow(0, 0.0, 1, 1)])


# -- hints ----------------------------------------------------------------------------------------------------------


def test_without_spread_the_hint_is_exact() -> None:
    assert draw_hints(ROWS, sigma=0.0) == [5, 300, 900, 7]
    assert draw_hints(ROWS, sigma=0.0, bias=2.0) == [10, 600, 1800, 14]
    assert draw_hints([TraceRow(0, 0.0, 1, 1)], sigma=0.0, bias=0.1) == [1]
    assert draw_hints([], sigma=0.3) == []


@given(seed=st.integers(0, 2**63), sigma=st.floats(0, 2), limit=st.integers(1, len(ROWS)), speedup=st.floats(0.1, 10))
def test_a_rows_hint_depends_on_its_index_and_the_seed_alone(
    seed: int, sigma: float, limit: int, speedup: float
) -> None:
    whole = draw_hints(ROWS, sigma=sigma, seed=seed)
    assert all(hint >= 1 for hint in whole)
    offered = build_workload(ROWS, slos={}, speedup=speedup, limit=limit, length_noise=sigma, seed=seed)
    assert [r.expected_output_tokens for r in offered] == whole[:limit]
    assert draw_hints(ROWS[2:], sigma=sigma, seed=seed) == whole[2:]


def test_hints_are_lognormal_with_the_spread_asked_for() -> None:
    rows = [TraceRow(index, 0.0, 1, 1_000_000) for index in range(4000)]
    logarithms = np.log(np.array(draw_hints(rows, sigma=0.3, seed=5)) / 1e6)
    assert abs(logarithms.mean()) < 0.02
    assert abs(logarithms.std() - 0.3) < 0.02
    assert draw_hints(rows, sigma=0.3, seed=5) == draw_hints(rows, sigma=0.3, seed=5)
    assert draw_hints(rows, sigma=0.3, seed=5) != draw_hints(rows, sigma=0.3, seed=6)


# -- the generated workload -----------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), count=st.integers(1, 200), more=st.integers(0, 200))
def test_a_longer_generated_workload_begins_with_the_shorter_one(seed: int, count: int, more: int) -> None:
    rows = generate_workload(count, seed)
    assert rows == generate_workload(count + more, seed)[:count]
    assert [row.index for row in rows] == list(range(count))
    assert rows[0].arrival_s == 0.0
    assert all(earlier.arrival_s <= later.arrival_s for earlier, later in itertools.pairwise(rows))
    assert all(row.input_tokens >= 1 and row.output_tokens >= 1 and row.task in ("code", "chat") for row in rows)


def test_the_generated_workload_has_the_shape_of_the_recording() -> None:
    """Medians, means, shares and burstiness of the two Azure files of 2023, within a tenth or so."""
    rows = generate_workload(30_000, seed=0)
    assert len(rows) / rows[-1].arrival_s == pytest.approx(8.0, rel=0.1)
    by_task = {task: [row for row in rows if row.task == task] for task in ("code", "chat")}
    assert len(by_task["code"]) / len(rows) == pytest.approx(0.313, rel=0.15)
    expected = {"code": (1469, 2048, 13, 27.9), "chat": (1020, 1155, 129, 211)}
    for task, (prompt_median, prompt_mean, output_median, output_mean) in expected.items():
        prompts = [row.input_tokens for row in by_task[task]]
        outputs = [row.output_tokens for row in by_task[task]]
        assert statistics.median(prompts) == pytest.approx(prompt_median, rel=0.1)
        assert statistics.mean(prompts) == pytest.approx(prompt_mean, rel=0.1)
        assert statistics.median(outputs) == pytest.approx(output_median, rel=0.1)
        assert statistics.mean(outputs) == pytest.approx(output_mean, rel=0.15)
    dispersion = {task: _index_of_dispersion([row.arrival_s for row in by_task[task]], 10.0) for task in by_task}
    assert dispersion["code"] > 30  # 72 in the recording, where a Poisson process has 1
    assert dispersion["chat"] == pytest.approx(1.0, abs=0.3)


def _index_of_dispersion(arrivals_s: list[float], window_s: float) -> float:
    counts = np.histogram(arrivals_s, np.arange(arrivals_s[0], arrivals_s[-1], window_s))[0]
    return float(counts.var() / counts.mean())


def test_a_generated_workload_needs_a_count_and_a_seed() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        generate_workload(0)
    with pytest.raises(ConfigError, match="seed"):
        generate_workload(1, -1)
