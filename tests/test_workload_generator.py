"""Made-up workloads, conversations in the form of ShareGPT, and the files they are written to."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.cli.main import main
from lmdeploy_slo.cli.workload import preset_rows, rows_of_conversations
from lmdeploy_slo.errors import ConfigError, TraceError
from lmdeploy_slo.offline.sharegpt import Turn, Turns, estimate_tokens, read_conversations
from lmdeploy_slo.offline.simulation.prefix_cache import BLOCK_TOKENS
from lmdeploy_slo.offline.trace_files import TraceFormat, write_trace
from lmdeploy_slo.offline.traces import TraceRow, read_traces
from lmdeploy_slo.offline.workload_generator import (
    PRESETS,
    Arrivals,
    Lognormal,
    TaskMix,
    generate,
    parse_arrivals,
    parse_task,
)

TASKS = {
    "a": TaskMix(3.0, Lognormal(100, 0.5), Lognormal(20, 1.0)),
    "b": TaskMix(1.0, Lognormal(900, 0), Lognormal(5, 0)),
}


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The status the process would end with."""
    monkeypatch.setattr(sys, "argv", ["lmdeploy_slo", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


# -- drawn ----------------------------------------------------------------------------------------------------------


def test_shares_lengths_and_rate_are_as_asked() -> None:
    rows = generate(TASKS, Arrivals(5.0), 20_000, seed=1)
    first = [row for row in rows if row.task == "a"]
    assert len(first) / len(rows) == pytest.approx(0.75, abs=0.01)
    assert {(row.input_tokens, row.output_tokens) for row in rows if row.task == "b"} == {(900, 5)}
    logarithms = np.log([row.input_tokens for row in first])
    assert np.exp(np.median(logarithms)) == pytest.approx(100, rel=0.02)
    assert np.std(logarithms) == pytest.approx(0.5, rel=0.02)
    assert np.mean(np.diff([row.arrival_s for row in rows])) == pytest.approx(0.2, rel=0.03)
    assert [row.index for row in rows] == list(range(20_000))
    assert rows[0].arrival_s == 0.0


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gaps_vary_as_asked(cv: float) -> None:
    gaps = np.diff(Arrivals(2.0, cv).draw(50_000, np.random.default_rng(1)))
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(cv, rel=0.05)
    assert np.mean(gaps) == pytest.approx(0.5, rel=0.05)


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 5))
def test_a_longer_workload_begins_with_the_shorter_one(requests: int, more: int, seed: int) -> None:
    assert generate(TASKS, Arrivals(1.0, 2.0), requests + more, seed)[:requests] == generate(
        TASKS, Arrivals(1.0, 2.0), requests, seed
    )


def test_a_preset_has_the_lengths_its_source_has() -> None:
    """Medians of the recorded lengths, and what share is in between."""
    rows = preset_rows("paper", None, None, 30_000, 0)
    for task, prompt, output in (("code", 101, 350), ("chat", 53, 304)):
        own = [row for row in rows if row.task == task]
        assert np.median([row.input_tokens for row in own]) == pytest.approx(prompt, rel=0.06)
        assert np.median([row.output_tokens for row in own]) == pytest.approx(output, rel=0.06)
    labels = preset_rows("classification", None, None, 2000, 0)
    assert {row.output_tokens for row in labels} == {1, 2, 3, 4}
    azure = preset_rows("azure", "gamma:2", 4.0, 30_000, 0)
    assert sum(row.task == "code" for row in azure) / len(azure) == pytest.approx(0.31, abs=0.02)
    assert azure[-1].arrival_s == pytest.approx(30_000 / 4.0, rel=0.05)


def test_the_azure_preset_keeps_its_bursts_at_another_rate() -> None:
    as_recorded, slower = preset_rows("azure", None, None, 300, 0), preset_rows("azure", None, 2.0, 300, 0)
    assert [row.arrival_s for row in slower] == pytest.approx([4 * row.arrival_s for row in as_recorded])
    assert all(preset.source for preset in PRESETS.values())


def test_options_are_read() -> None:
    assert parse_task("x=share:2,prompt:100/0.5,output:20/1") == (
        "x",
        TaskMix(2.0, Lognormal(100, 0.5), Lognormal(20, 1.0)),
    )
    assert parse_task("x=prompt:100/0,output:20/0")[1].share == 1.0
    assert parse_arrivals("poisson", 3.0) == Arrivals(3.0, 1.0)
    assert parse_arrivals("gamma:2.5", 3.0) == Arrivals(3.0, 2.5)


@pytest.mark.parametrize(
    "text", ["x", "x=prompt:1/1", "x=prompt:1,output:1/1", "x=prompt:1/1,output:1/1,more:1", "=prompt:1/1,output:1/1"]
)
def test_a_task_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--task .*: expected NAME=share"):
        parse_task(text)


def test_what_is_out_of_range_is_refused() -> None:
    for make in (
        lambda: Lognormal(0.5, 1),
        lambda: Lognormal(10, -1),
        lambda: Arrivals(0),
        lambda: Arrivals(1, 0),
        lambda: generate(TASKS, Arrivals(1), 0),
        lambda: generate(TASKS, Arrivals(1), 1, seed=-1),
        lambda: generate({}, Arrivals(1), 1),
        lambda: generate({"x": TaskMix(0.0, Lognormal(1, 0), Lognormal(1, 0))}, Arrivals(1), 1),
        lambda: parse_arrivals("weibull:1", 1.0),
        lambda: parse_arrivals("gamma:often", 1.0),
    ):
        with pytest.raises(ConfigError):
            make()


# -- conversations --------------------------------------------------------------------------------------------------


def says(side: str, tokens: int) -> dict[str, str]:
    return {"from": side, "value": "x" * 4 * tokens}


def write_conversations(path: Path, *conversations: list[dict[str, str]]) -> Path:
    path.write_text(json.dumps([{"id": str(n), "conversations": c} for n, c in enumerate(conversations)]))
    return path


def test_a_turn_is_a_question_and_its_answer(tmp_path: Path) -> None:
    path = write_conversations(
        tmp_path / "c.json",
        [says("human", 10), says("gpt", 20), says("human", 5), says("gpt", 7)],
        [says("system", 3), says("user", 4), says("assistant", 6)],
        [says("gpt", 9), says("human", 2), says("gpt", 8)],  # begins in the middle
        [says("human", 1)],
        [],
    )
    first = read_conversations(path)
    assert [[(t.prompt_tokens, t.output_tokens) for t in turns] for turns in first] == [[(10, 20)], [(7, 6)], [(11, 8)]]
    every = read_conversations(path, Turns.ALL)
    assert [(t.prompt_tokens, t.output_tokens) for t in every[0]] == [(10, 20), (35, 7)]


def test_empty_sides_are_no_turns(tmp_path: Path) -> None:
    path = write_conversations(
        tmp_path / "c.json", [says("human", 0), says("gpt", 5), says("human", 3), says("gpt", 0), says("gpt", 4)]
    )
    with pytest.raises(TraceError, match="no conversation with a turn"):
        read_conversations(path)


def test_turns_of_a_conversation_share_their_full_blocks(tmp_path: Path) -> None:
    path = write_conversations(
        tmp_path / "c.json",
        [says("human", 600), says("gpt", 500), says("human", 10), says("gpt", 1)],
        [says("human", BLOCK_TOKENS), says("gpt", 1)],
    )
    (one, two), (other,) = read_conversations(path, Turns.ALL)
    assert [len(turn.prefix_blocks) for turn in (one, two, other)] == [2, 3, 1]
    assert one.prefix_blocks[0] == two.prefix_blocks[0]
    assert len({*one.prefix_blocks, *two.prefix_blocks, *other.prefix_blocks}) == 5


def test_lines_are_read_and_a_counter_may_be_given(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"conversations": [says("human", 3), says("gpt", 2)]}) + "\n")
    assert read_conversations(path, count_tokens=len) == [[Turn(12, 8, read_conversations(path)[0][0].prefix_blocks)]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not JSON"),
        ('[{"messages": []}]', "conversation 1: expected an object with a list named conversations"),
        ('[{"conversations": [{"from": "human"}]}]', "conversation 1: expected messages with from and value"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_conversations(path)


def test_the_estimate_counts_scripts_apart() -> None:
    assert estimate_tokens("The quick brown fox jumps over the lazy dog.") == 11
    assert estimate_tokens("快速的棕色狐狸") == 5
    assert estimate_tokens("x") == 1


def test_conversations_are_used_once_each_before_they_start_again() -> None:
    turns = {"chat": [[Turn(n, 1, ())] for n in range(1, 6)], "code": [[Turn(100, 1, ())]]}
    rows = rows_of_conversations(turns, Arrivals(1.0), 40, seed=3)
    chat = [row.input_tokens for row in rows if row.task == "chat"]
    assert sorted(chat[:5]) == [1, 2, 3, 4, 5]
    assert chat[5:10] == chat[:5]
    assert {row.task for row in rows} == {"chat", "code"}
    assert rows_of_conversations(turns, Arrivals(1.0), 40, seed=3) == rows


# -- files ----------------------------------------------------------------------------------------------------------

ROWS = [
    TraceRow(0, 0.0, 10, 20, "code", (1, 2)),
    TraceRow(1, 0.25, 30, 40, "chat", (1,)),
    TraceRow(2, 1.5, 50, 60, "code", None),
]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_what_is_written_is_read_back(tmp_path: Path, suffix: str) -> None:
    (plain,) = write_trace(tmp_path / f"t.csv{suffix}", ROWS, TraceFormat.PLAIN)
    assert [(r.arrival_s, r.input_tokens, r.output_tokens, r.task) for r in read_traces([plain])] == [
        (r.arrival_s, r.input_tokens, r.output_tokens, r.task) for r in ROWS
    ]
    (mooncake,) = write_trace(tmp_path / f"t.jsonl{suffix}", ROWS, TraceFormat.MOONCAKE)
    assert [(r.arrival_s, r.input_tokens, r.hash_ids) for r in read_traces([mooncake])] == [
        (r.arrival_s, r.input_tokens, r.hash_ids) for r in ROWS
    ]
    azure = write_trace(tmp_path / f"day.csv{suffix}", ROWS, TraceFormat.AZURE)
    assert [path.name for path in azure] == [f"day.code.csv{suffix}", f"day.chat.csv{suffix}"]
    merged = read_traces(azure, ["code", "chat"])
    assert [(r.arrival_s, r.input_tokens, r.task) for r in merged] == [
        (r.arrival_s, r.input_tokens, r.task) for r in ROWS
    ]
    assert [path.name for path in write_trace(tmp_path / "one.csv", ROWS[:1], TraceFormat.AZURE)] == ["one.csv"]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    paths = [write_trace(tmp_path / f"{name}.csv.gz", ROWS, TraceFormat.PLAIN)[0] for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_papers_workload_from_its_datasets_with_one_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = write_conversations(tmp_path / "code.json", [says("human", 100), says("gpt", 300)])
    chat = write_conversations(tmp_path / "chat.json", [says("human", 50), says("gpt", 200)])
    out = tmp_path / "paper.csv"
    files = ("--conversations", f"code={code}", "--conversations", f"chat={chat}")
    assert call(monkeypatch, "workload", str(out), *files, "--rate", "2", "--requests", "50") == 0
    rows = read_traces([out])
    assert {(row.task, row.input_tokens, row.output_tokens) for row in rows} == {("code", 100, 300), ("chat", 50, 200)}
    assert len(rows) == 50
    assert "tokens are estimated" in capsys.readouterr().out


def test_a_tokenizer_counts_where_transformers_is_at_hand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Words:
        @classmethod
        def from_pretrained(cls, model: str) -> Words:
            if model != "words":
                raise OSError("no such model")
            return cls()

        def encode(self, text: str, add_special_tokens: bool) -> list[str]:
            assert not add_special_tokens
            return text.split()

    module: Any = ModuleType("transformers")
    module.AutoTokenizer = Words
    talk = [{"from": "human", "value": "one two three"}, {"from": "gpt", "value": "four five"}]
    path, out = write_conversations(tmp_path / "c.json", talk), tmp_path / "out.csv"
    arguments = ("workload", str(out), "--conversations", f"chat={path}", "--requests", "2", "--tokenizer")
    monkeypatch.setitem(sys.modules, "transformers", module)
    assert call(monkeypatch, *arguments, "words") == 0
    assert {(row.input_tokens, row.output_tokens) for row in read_traces([out])} == {(3, 2)}
    assert call(monkeypatch, *arguments, "nowhere") == 2
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert call(monkeypatch, *arguments, "words") == 0
    assert "transformers is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "paris"), "--preset: 'paris' is unknown"),
        (("--preset", "paper", "--task", "x=prompt:1/1,output:1/1"), "exclude each other"),
        (("--rate", "0"), "--rate: must be a positive number"),
        (("--arrivals", "weekly"), "--arrivals 'weekly': expected poisson"),
        (("--conversations", "chat"), "expected TASK=FILE"),
        (("--conversations", "chat=/nowhere.json"), "/nowhere.json: No such file"),
    ],
)
def test_mistakes_are_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert call(monkeypatch, "workload", str(tmp_path / "out.csv"), *arguments) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_every_format_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for form in TraceFormat:
        out = tmp_path / f"{form.value}.trace"
        options = ("--task", "x=prompt:10/0.1,output:5/0.1", "--requests", "5", "--format", form.value)
        assert call(monkeypatch, "workload", str(out), *options) == 0
        assert len(read_traces([out])) == 5
