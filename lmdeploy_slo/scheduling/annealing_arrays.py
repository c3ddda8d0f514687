"""What the annealing kernels work on: sizes, and the arrays of a rollout, made once and filled for every plan."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FINE, COARSE = 64, 8
"""The first FINE passes are rolled out one by one, later ones COARSE at a time: there only the pace matters."""

MAX_STEPS = 640
"""Passes a rollout looks ahead; what ends later is extrapolated from the pace of the last ones."""

SPANS = FINE + (MAX_STEPS - FINE) // COARSE
"""The horizon in spans: single passes, then groups of COARSE."""

NEVER = 1 << 30
QUANTILES = 3
WAVES = np.array([0, 1, 2, 4, 7, 11, 16, 24, 36, 52], dtype=np.int64)
"""Admission steps that annealing tries: near ones finely, far ones coarsely."""

GREEDY_WAVES = np.array([0, 4, 16, 40], dtype=np.int64)
"""Those the greedy insertion tries: it leaves the rest to annealing, which finds more in the same time."""

EPSILON = 1e-9

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Pace(NamedTuple):
    """The step model, and what else is expected of the coming passes."""

    c0: float
    p1: float
    p2: float
    d1: float
    d2: float
    background: float  # stall by requests still to come, as a multiple of each pass's decode time


class Base(NamedTuple):
    """What the running requests do in each coming span; length SPANS + 2."""

    decode: Floats  # seconds of its passes without any prefill
    prefill: Floats  # seconds of prompts submitted but not prefilled; only in single passes
    sequences: Floats  # that decode in the first pass
    context: Floats  # tokens in the KV cache of those


class Stakes(NamedTuple):
    """One entry for each running request and length quantile whose SLO is still at stake."""

    end: Ints  # the pass after which it ends
    deadline: Floats
    weight: Floats


class Candidates(NamedTuple):
    """Waiting requests the search decides on, one entry each."""

    row: Ints  # of the snapshot's waiting rows
    stall: Floats  # prefill, s
    prompt: Floats  # tokens it brings into the KV cache, cached ones included
    output: Ints  # predicted tokens
    outputs: Ints  # the same by quantile, shape (n, QUANTILES)
    ttft_at: Floats  # latest first token
    e2e_at: Floats  # latest last token
    tpot: Floats
    worth: Floats  # of meeting its SLO
    price: Floats  # of the engine time it takes, in the same unit


class Scratch(NamedTuple):
    """Work arrays of the rollout, by span; length SPANS + 2."""

    joining: Floats
    context: Floats
    prefill: Floats
    times: Floats
    quiet: Floats  # the same without stall by requests still to come


def make_base() -> Base:
    return Base(*(np.zeros(SPANS + 2) for _ in Base._fields))


def make_scratch() -> Scratch:
    return Scratch(*(np.zeros(SPANS + 2) for _ in Scratch._fields))


def make_stakes(capacity: int) -> Stakes:
    return Stakes(np.zeros(capacity, dtype=np.int64), np.zeros(capacity), np.zeros(capacity))


def make_candidates(capacity: int) -> Candidates:
    ints, floats = np.zeros(capacity, dtype=np.int64), np.zeros(capacity)
    return Candidates(
        row=ints.copy(),
        stall=floats.copy(),
        prompt=floats.copy(),
        output=ints.copy(),
        outputs=np.zeros((capacity, QUANTILES), dtype=np.int64),
        ttft_at=floats.copy(),
        e2e_at=floats.copy(),
        tpot=floats.copy(),
        worth=floats.copy(),
        price=floats.copy(),
    )
