"""`lmdeploy_slo workload`: makes a trace, from lengths that are drawn or from conversations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from lmdeploy_slo.engine.token_counter import token_counter
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.offline.generated import generate_workload
from lmdeploy_slo.offline.results import check_writable
from lmdeploy_slo.offline.sharegpt import Turn, Turns, estimate_tokens, read_conversations
from lmdeploy_slo.offline.trace_files import TraceFormat, write_trace
from lmdeploy_slo.offline.traces import TraceRow
from lmdeploy_slo.offline.workload_generator import (
    PRESETS,
    Arrivals,
    TaskMix,
    draw_tasks,
    generate,
    parse_arrivals,
    parse_task,
)

_SHUFFLE_STREAM = 0x53484F46
_DEFAULT_RATE_RPS = 1.0


def workload(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The trace to write; gzipped where it ends in .gz.")],
    preset: Annotated[
        str | None,
        typer.Option(help=f"Tasks with their lengths: {', '.join(PRESETS)}; default: azure, if nothing else is named."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=share:S,prompt:M/SIGMA,output:M/SIGMA",
            help="A task with lognormal lengths: median tokens and the sigma of their logarithm. May be repeated.",
        ),
    ] = None,
    conversations: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK=FILE",
            help="A task whose requests are those of a file in the form of ShareGPT. May be repeated; tasks get equal "
            "shares.",
        ),
    ] = None,
    turns: Annotated[Turns, typer.Option(help="Of a conversation.")] = Turns.FIRST,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Counts the tokens of conversations: a directory or a Hugging Face id; needs transformers. Without it "
            "they are estimated: four ASCII characters a token.",
        ),
    ] = None,
    requests: Annotated[int, typer.Option(metavar="N", min=1, help="How many.")] = 1000,
    rate: Annotated[
        float | None, typer.Option(metavar="RPS", help="Requests per second on average; default: the preset's, else 1.")
    ] = None,
    arrivals: Annotated[
        str | None,
        typer.Option(
            metavar="poisson|gamma:CV",
            help="Gaps between arrivals: exponential, or gamma with that coefficient of variation (above 1: bursts). "
            "Default: poisson; of the preset azure the bursts of the recording.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything drawn.")] = 0,
    form: Annotated[TraceFormat, typer.Option("--format", help="Of the file.")] = TraceFormat.PLAIN,
) -> None:
    """Make a trace: drawn from presets or lognormal lengths, or from conversations, with arrivals of a given process.

    The paper's workload, from its two datasets:

    lmdeploy_slo workload paper.csv --conversations code=Python-Code-23k-ShareGPT.json
    --conversations chat=ShareGPT_V3_unfiltered_cleaned_split.json --rate 1 --requests 2000
    """
    chosen = [given for given in (preset, task, conversations) if given]
    if len(chosen) > 1:
        raise ConfigError("--preset, --task and --conversations exclude each other")
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"--preset: {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    if rate is not None and not 0 < rate < float("inf"):
        raise ConfigError(f"--rate: must be a positive number, got {rate}")
    check_writable([out])
    remarks: list[str] = []
    if conversations:
        files = dict(_named_file(text) for text in conversations)
        count, told = _counter(tokenizer)
        remarks.append(told)
        process = parse_arrivals(arrivals or "poisson", rate or _DEFAULT_RATE_RPS)
        rows = rows_of_conversations(
            {name: read_conversations(path, turns, count) for name, path in files.items()}, process, requests, seed
        )
    elif task:
        tasks = dict(map(parse_task, task))
        rows = generate(tasks, parse_arrivals(arrivals or "poisson", rate or _DEFAULT_RATE_RPS), requests, seed)
    else:
        rows = preset_rows(preset or "azure", arrivals, rate, requests, seed)
        remarks.append(f"lengths: {PRESETS[preset or 'azure'].source}")
    written = write_trace(out, rows, form)
    console = Console()
    console.print(workload_table(rows))
    for text in (*remarks, f"written: {', '.join(map(str, written))}"):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def preset_rows(name: str, arrivals: str | None, rate: float | None, requests: int, seed: int) -> list[TraceRow]:
    """Rows of a preset; `azure` without `arrivals` has the arrival process of the recording."""
    chosen = PRESETS[name]
    if name == "azure" and arrivals is None:
        rows = generate_workload(requests, seed)
        scale = chosen.rate_rps / (rate or chosen.rate_rps)
        return [
            TraceRow(row.index, row.arrival_s * scale, row.input_tokens, row.output_tokens, row.task) for row in rows
        ]
    tasks: Mapping[str, TaskMix] = chosen.tasks
    return generate(tasks, parse_arrivals(arrivals or "poisson", rate or chosen.rate_rps), requests, seed)


def rows_of_conversations(
    conversations: Mapping[str, Sequence[Sequence[Turn]]], process: Arrivals, requests: int, seed: int
) -> list[TraceRow]:
    """Conversations of each task in random order, their turns one after the other; tasks have equal shares.

    When a task's conversations are used up they start again, in the same order.
    """
    turns: dict[str, list[Turn]] = {}
    for name, own in conversations.items():
        order = np.random.default_rng([_SHUFFLE_STREAM, seed]).permutation(len(own))
        turns[name] = [turn for number in order for turn in own[number]]
    names, drawn = draw_tasks(dict.fromkeys(turns, 1.0), requests, seed)
    at_s = process.draw(requests, np.random.default_rng([_SHUFFLE_STREAM, seed, 1])).tolist()
    used: Counter[str] = Counter()
    rows = []
    for index, number in enumerate(drawn.tolist()):
        name = names[number]
        turn = turns[name][used[name] % len(turns[name])]
        used[name] += 1
        rows.append(
            TraceRow(index, at_s[index], turn.prompt_tokens, turn.output_tokens, name, turn.prefix_blocks or None)
        )
    return rows


def _named_file(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not name.strip() or not path:
        raise ConfigError(f"--conversations {text!r}: expected TASK=FILE")
    return name.strip(), Path(path)


def _counter(model: str | None) -> tuple[Callable[[str], int], str]:
    """What counts tokens, and how to tell it."""
    if model is None:
        return estimate_tokens, "tokens are estimated, four ASCII characters each; --tokenizer counts them"
    try:
        return token_counter(model), f"tokens are counted by the tokenizer of {model}"
    except ModuleNotFoundError:
        return estimate_tokens, "tokens are estimated, four ASCII characters each: transformers is not installed"


def workload_table(rows: Sequence[TraceRow]) -> Table:
    """How many of each task, and how long they are."""
    span_s = rows[-1].arrival_s - rows[0].arrival_s
    rate = f"{(len(rows) - 1) / span_s:.3g} requests/s" if span_s > 0 else "at once"
    table = Table(title=f"{len(rows):,} requests in {span_s:,.0f} s, {rate}", title_justify="left", header_style="bold")
    table.add_column("task")
    for label in ("requests", "prompt p50", "p90", "p99", "output p50", "p90", "p99"):
        table.add_column(label, justify="right")
    for name in sorted({row.task for row in rows}):
        own = [row for row in rows if row.task == name]
        cells = [
            f"{value:,.0f}"
            for lengths in ([row.input_tokens for row in own], [row.output_tokens for row in own])
            for value in np.percentile(lengths, [50, 90, 99])
        ]
        table.add_row(name or "(no task)", f"{len(own):,}", *cells)
    return table
