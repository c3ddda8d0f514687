"""A made-up snapshot that takes a policy through all its code, so that everything is compiled before serving."""

from __future__ import annotations

import numpy as np

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import ROW_DTYPE, EngineLimits, Snapshot


def example_snapshot() -> Snapshot:
    """Eight waiting and two running requests with every kind of objective; read-only like a real one."""
    rows = np.zeros(10, dtype=ROW_DTYPE)
    rows["handle"] = np.arange(1, 11)
    rows["tier"] = 1
    rows["prompt_tokens"] = 2000.0  # not all can meet, so that the search has something to do
    rows["output_tokens"] = 50.0
    rows["length_sigma"] = 0.3
    rows["ttft_s"] = [0.5, np.inf] * 5
    rows["tpot_s"] = [0.05, np.inf] * 5
    rows["e2e_s"] = [np.inf, 2.0] * 4 + [np.inf, np.inf]
    rows["dispatched_at_s"] = np.nan
    rows["first_token_at_s"] = np.nan
    rows["generated_tokens"][1] = 5.0
    rows["first_token_at_s"][1] = 0.1
    rows["dispatched_at_s"][:2] = 0.0
    waiting, running = rows[2:].copy(), rows[:2].copy()
    waiting.flags.writeable = running.flags.writeable = False
    model = StepModel(c0=0.01, p1=5e-5, p2=1e-9, d1=2e-5, d2=4e-8)
    return Snapshot(0.2, waiting, running, EngineLimits(), model)
