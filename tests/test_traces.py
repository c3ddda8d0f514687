"""Trace files of the three formats, and what is said of files that are none of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lmdeploy_slo.config import ENV_TRACES_DIR, traces_dir
from lmdeploy_slo.errors import TraceError
from lmdeploy_slo.offline.traces import TraceRow, read_traces

TRACES = traces_dir()  # read before a test begins: within one, the environment is empty

AZURE_CODE = """TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:17:03.9799600,4808,10\r
2023-11-16 18:17:04.0319601,3180,8\r
2023-11-16 18:17:04.5,110,27"""
AZURE_CHAT = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.4799600,374,44
2023-11-16 18:17:04.0319601,396,109
"""
PLAIN = """arrival_s,input_tokens,output_tokens,task_class
5,374,44,chat
4.5,396,109,code
"""
MOONCAKE = "\n".join(
    json.dumps(row)
    for row in (
        {"timestamp": 1000, "input_length": 40, "output_length": 6, "hash_ids": [0, 1]},
        {"timestamp": 1027, "input_length": 30, "output_length": 4},
    )
)


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_azure_files_merge_on_absolute_time(tmp_path: Path) -> None:
    rows = read_traces([write(tmp_path / "a.csv", AZURE_CODE), write(tmp_path / "b.csv", AZURE_CHAT)], ["code", "chat"])
    assert rows == [
        TraceRow(0, 0.0, 374, 44, "chat"),
        TraceRow(1, 0.5, 4808, 10, "code"),
        TraceRow(2, 0.5520001, 3180, 8, "code"),  # the seventh digit is kept; equal instants keep the order of files
        TraceRow(3, 0.5520001, 396, 109, "chat"),
        TraceRow(4, 1.02004, 110, 27, "code"),
    ]


def test_the_zone_of_an_instant_counts(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:01.5+00:00,1,1\n2024-05-10 02:00:01+02:00,2,2\n"
        "2024-05-10T00:00:02Z,3,3\n"
    )
    assert [(r.arrival_s, r.input_tokens) for r in read_traces([write(tmp_path / "a", text)])] == [
        (0.0, 2),
        (0.5, 1),
        (1.0, 3),
    ]


def test_plain_rows_are_sorted_and_start_at_zero(tmp_path: Path) -> None:
    assert read_traces([write(tmp_path / "t.csv", PLAIN)]) == [
        TraceRow(0, 0.0, 396, 109, "code"),
        TraceRow(1, 0.5, 374, 44, "chat"),
    ]


def test_mooncake_counts_milliseconds_and_keeps_hash_ids(tmp_path: Path) -> None:
    assert read_traces([write(tmp_path / "t.jsonl", MOONCAKE)], ["agent"]) == [
        TraceRow(0, 0.0, 40, 6, "agent", (0, 1)),
        TraceRow(1, 0.027, 30, 4, "agent", None),
    ]


@pytest.mark.parametrize("text", [AZURE_CODE, PLAIN, MOONCAKE], ids=["azure", "plain", "mooncake"])
def test_gzip_is_told_by_content_not_by_name(tmp_path: Path, text: str) -> None:
    packed = tmp_path / "trace.txt"
    packed.write_bytes(gzip.compress(text.encode()))
    assert read_traces([packed]) == read_traces([write(tmp_path / "misleading.gz", text)])


def test_a_task_named_on_the_command_line_wins_and_an_empty_one_keeps_the_files_own(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", PLAIN)
    assert [r.task for r in read_traces([path], ["bulk"])] == ["bulk", "bulk"]
    assert [r.task for r in read_traces([path], [""])] == ["code", "chat"]


def test_the_task_column_may_be_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "arrival_s,input_tokens,output_tokens\n0,1,2\n")
    assert read_traces([path]) == [TraceRow(0, 0.0, 1, 2)]


def test_a_length_of_zero_is_read_as_one(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "arrival_s,input_tokens,output_tokens\n0,0,0\n")
    assert read_traces([path]) == [TraceRow(0, 0.0, 1, 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AZURE_CHAT + "2023-11-16 18:17:05.1,x,1\n", "line 4, ContextTokens: .*'x'"),
        (AZURE_CHAT + "2023-11-16 18:17:05.1,1,-2\n", "line 4, GeneratedTokens: .*'-2'"),
        (AZURE_CHAT + "16/11/2023,1,2\n", "line 4, TIMESTAMP: .*'16/11/2023'"),
        (AZURE_CHAT + "2023-13-16 18:17:05,1,2\n", "line 4, TIMESTAMP"),
        (AZURE_CHAT + "\n2023-11-16 18:17:05.1,1\n", "line 5: 2 fields where the header names 3"),
        (PLAIN + "soon,1,2,chat\n", "line 4, arrival_s: .*'soon'"),
        (PLAIN + "nan,1,2,chat\n", "line 4, arrival_s: .*'nan'"),
        (PLAIN + "inf,1,2,chat\n", "line 4, arrival_s: .*'inf'"),
        (PLAIN + "1,1.5,2,chat\n", "line 4, input_tokens: .*'1.5'"),
        (MOONCAKE + "\n{", "line 3: not JSON"),
        (MOONCAKE + "\n[1]", "line 3: expected a JSON object"),
        (MOONCAKE + '\n{"timestamp": 1, "input_length": 2}', "line 3, output_length: is missing"),
        (MOONCAKE + '\n{"timestamp": 1, "input_length": true, "output_length": 2}', "line 3, input_length"),
        (
            MOONCAKE + '\n{"timestamp": null, "input_length": 1, "output_length": 2}',
            "line 3, timestamp: must be a finite number, got None",
        ),
        (
            MOONCAKE + '\n{"timestamp": 1, "input_length": 1, "output_length": 2, "hash_ids": "x"}',
            "line 3, hash_ids: must be a list",
        ),
        ("a,b\n1,2\n", "line 1: not a trace this program reads.*arrival_s"),
        ("\n \n", "the trace is empty"),
        ("arrival_s,input_tokens,output_tokens\n", "the trace has no rows"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "broken.csv", text)
    with pytest.raises(TraceError, match=f"broken.csv.*{message}"):
        read_traces([path])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nowhere\.csv: No such file"):
        read_traces([tmp_path / "nowhere.csv"])
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(PLAIN.encode())[:-12])
    with pytest.raises(TraceError, match=r"cut\.gz: neither text nor a whole gzip file"):
        read_traces([cut])
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="binary: neither text"):
        read_traces([binary])


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    azure, plain = write(tmp_path / "a.csv", AZURE_CODE), write(tmp_path / "p.csv", PLAIN)
    with pytest.raises(TraceError, match=r"a\.csv has calendar instants and .*p\.csv counts from its own start"):
        read_traces([plain, azure])
    with pytest.raises(TraceError, match="1 tasks were given for 2 traces"):
        read_traces([azure, azure], ["code"])
    with pytest.raises(TraceError, match="no trace was named"):
        read_traces([])


def test_traces_that_count_from_their_own_start_share_one_axis(tmp_path: Path) -> None:
    plain, mooncake = write(tmp_path / "p.csv", PLAIN), write(tmp_path / "m.jsonl", MOONCAKE)
    assert [r.arrival_s for r in read_traces([plain, mooncake])] == [0.0, 0.027, 3.5, 4.0]


# -- recorded traces, where somebody has them ------------------------------------------------------------------------


@pytest.fixture
def recorded() -> Path:
    """The folder of downloaded traces."""
    if TRACES is None or not (TRACES / "AzureLLMInferenceTrace_code.csv").exists():
        pytest.skip(f"{ENV_TRACES_DIR} names no folder with the recorded traces")
    return TRACES


def test_the_merged_azure_trace_equals_the_merge_of_the_two_files(recorded: Path) -> None:
    parts = [recorded / "AzureLLMInferenceTrace_code.csv", recorded / "AzureLLMInferenceTrace_conv.csv"]
    merged = read_traces(parts, ["code", "chat"])
    assert len(merged) == 28_185
    mixed = read_traces([recorded / "azure2023_mixed.csv.gz"])
    assert [(r.index, r.input_tokens, r.output_tokens, r.task) for r in merged] == [
        (r.index, r.input_tokens, r.output_tokens, r.task) for r in mixed
    ]
    assert [r.arrival_s for r in mixed] == pytest.approx([r.arrival_s for r in merged], rel=0, abs=1e-6)


def test_the_mooncake_trace_is_read_whole(recorded: Path) -> None:
    rows = read_traces([recorded / "mooncake_synthetic_trace.jsonl.gz"])
    assert len(rows) == 3_993
    assert all(row.hash_ids for row in rows)


DEEP = '{"a":' * 100_000


@pytest.mark.parametrize("text", [DEEP, MOONCAKE + "\n" + DEEP, PLAIN + "9" * 200_000 + ",1,2,x", "a" * 200_000])
def test_what_python_gives_up_on_is_no_trace(tmp_path: Path, text: str) -> None:
    """Brackets without end, and fields larger than csv takes."""
    with pytest.raises(TraceError):
        read_traces([write(tmp_path / "t", text)])
