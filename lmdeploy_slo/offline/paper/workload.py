"""The requests of the paper's setting: exactly half code and half chat, in random order, at once or one by one.

Equal arguments give equal rows. Arrivals at different rates are the same draws on another scale.
"""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.offline.paper.setting import TASKS
from lmdeploy_slo.offline.traces import TraceRow

_STREAM = 0x50415045  # keeps these draws apart from others that start from the same seed

Pairs = npt.NDArray[np.int64]
"""Prompt and output tokens, shape (any, 2)."""


def read_pairs(path: Path) -> Pairs:
    """The different pairs of lengths in a CSV file (also gzipped) with input_tokens and output_tokens."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        lengths = {(int(row["input_tokens"]), int(row["output_tokens"])) for row in csv.DictReader(file)}
    return np.array(sorted(lengths), dtype=np.int64)


def draw_rows(requests: int, seed: int, *, rate_rps: float | None = None, chat: Pairs | None = None) -> list[TraceRow]:
    """So many requests (>= 1), all there at 0 or, with a rate, as a Poisson process from 0 on.

    chat: recorded lengths to draw chat requests from; None draws them from the quantiles of the preset.
    """
    random = np.random.default_rng([_STREAM, seed, requests])
    is_code = random.permutation(requests) < requests / 2
    prompt = np.empty(requests, dtype=np.int64)
    output = np.empty(requests, dtype=np.int64)
    codes, chats = int(is_code.sum()), int((~is_code).sum())
    prompt[is_code] = TASKS["code"].prompt.draw(codes, random)
    output[is_code] = TASKS["code"].output.draw(codes, random)
    if chat is None:
        prompt[~is_code] = TASKS["chat"].prompt.draw(chats, random)
        output[~is_code] = TASKS["chat"].output.draw(chats, random)
    else:
        prompt[~is_code], output[~is_code] = chat[random.integers(0, len(chat), chats)].T
    gaps = random.exponential(size=requests)
    gaps[0] = 0.0
    arrival_s = np.zeros(requests) if rate_rps is None else np.cumsum(gaps) / rate_rps
    return [
        TraceRow(index, float(arrival_s[index]), int(prompt[index]), int(output[index]), "code" if code else "chat")
        for index, code in enumerate(is_code.tolist())
    ]
