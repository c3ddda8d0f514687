"""The slack guard: what each running request can absorb, who can still gain, and what is admitted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_annealing import MODEL, NOW_S, draw_snapshot

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import ROW_DTYPE, EngineLimits, Snapshot
from lmdeploy_slo.scheduling.slack_guard import (
    AHEAD_TOKENS,
    DECODE_SHARE,
    RESERVE_S,
    SlackGuardPolicy,
    can_gain,
    running_slack_s,
)

FLAT = StepModel(c0=0.02, p1=1e-3, p2=0.0, d1=0.0, d2=0.0)
"""A pass takes 20 ms, a prompt token 1 ms."""


def rows(*requests: dict[str, float]) -> Any:
    made = np.zeros(len(requests), dtype=ROW_DTYPE)
    made["handle"] = np.arange(1, len(made) + 1)
    made["tier"] = 1
    for row, request in zip(made, requests, strict=True):
        told = {"ttft_s": np.inf, "tpot_s": np.inf, "e2e_s": np.inf, "first_token_at_s": np.nan, **request}
        for field, value in told.items():
            row[field] = value
    made.flags.writeable = False
    return made


def snapshot(waiting: Any, running: Any, cap: int = 256) -> Snapshot:
    return Snapshot(NOW_S, waiting, running, EngineLimits(max_batch_size=cap), FLAT)


def chat(generated: int, since_first_s: float, output: int = 100) -> dict[str, float]:
    first = NOW_S - since_first_s
    told = {"arrival_at_s": first - 0.1, "first_token_at_s": first, "ttft_s": 1.0, "tpot_s": 0.05}
    return {**told, "prompt_tokens": 100, "output_tokens": output, "generated_tokens": generated}


def new(prompt: int, waited_s: float = 0.0, output: int = 20, **objectives: float) -> dict[str, float]:
    return dict(arrival_at_s=NOW_S - waited_s, prompt_tokens=prompt, output_tokens=output, **objectives)


def plain_slack_s(row: Any, pending_s: float, step_s: float) -> float:
    left = []
    if row["generated_tokens"] > 0:
        first, begin = row["first_token_at_s"], NOW_S + pending_s
    else:
        first = begin = NOW_S + pending_s + MODEL.c0
        left.append(row["arrival_at_s"] + row["ttft_s"] - first)
    done = max(row["generated_tokens"], 1)
    to_come = max(row["output_tokens"] - done, 0)
    if to_come and math.isfinite(row["tpot_s"]):
        ahead = min(to_come, AHEAD_TOKENS)
        left.append(first + row["tpot_s"] * max(done - 1 + ahead, 1e-9) - begin - ahead * step_s)
    left.append(row["arrival_at_s"] + row["e2e_s"] - begin - to_come * step_s)
    return min(left)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_slack_equals_its_twin(seed: int) -> None:
    shot = draw_snapshot(seed)
    running = shot.running
    prompts = running["prompt_tokens"][running["generated_tokens"] == 0].tolist()
    pending_s = sum(MODEL.p1 * prompt + MODEL.p2 * prompt**2 for prompt in prompts)
    wanted = [plain_slack_s(row, pending_s, MODEL.step_s(0, 0, 21, 9000.0)) for row in running]
    assert running_slack_s(shot, 21, 9000.0).tolist() == pytest.approx(wanted)


def test_slack_by_hand() -> None:
    shot = snapshot(rows(), rows(chat(11, 0.3), chat(11, 0.3, output=12), chat(51, 3.0)))
    # 20 tokens at 50 ms, 0.3 s are gone, ten more take 0.2 s; one more takes 0.02 s; behind, and never to catch up
    assert running_slack_s(shot, 3, 0.0).tolist() == pytest.approx([0.5, 0.23, -0.2])


@given(seed=st.integers(0, 2**32 - 1), cap=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_a_plan_names_everybody_once_and_those_that_gain_first(seed: int, cap: int) -> None:
    shot = draw_snapshot(seed, waiting=12, running=min(cap - 1, 20), max_batch_size=cap)
    plan = SlackGuardPolicy().plan(shot)
    assert sorted(plan.order.tolist()) == sorted(shot.waiting["handle"].tolist())
    assert 0 <= plan.send_now <= shot.free_slots
    context = float(np.sum(shot.running["prompt_tokens"] + shot.running["generated_tokens"]))
    step_s = MODEL.step_s(0, 0, len(shot.running) + 1, context + float(np.mean(shot.waiting["prompt_tokens"])))
    gains = dict(zip(shot.waiting["handle"].tolist(), can_gain(shot.waiting, shot, step_s).tolist(), strict=True))
    told = [gains[handle] for handle in plan.order.tolist()]
    assert told == sorted(told, reverse=True)


def test_prefills_use_up_half_the_smallest_slack() -> None:
    waiting = rows(*(new(99, ttft_s=5.0) for _ in range(6)))
    running = rows(chat(11, 0.3), chat(31, 0.3))
    assert SlackGuardPolicy().plan(snapshot(waiting, running)).send_now == 2  # 0.25 s
    assert SlackGuardPolicy(safety=1.0).plan(snapshot(waiting, running)).send_now == 5  # 0.5 s
    assert SlackGuardPolicy().plan(snapshot(waiting, running, cap=3)).send_now == 1
    assert SlackGuardPolicy().plan(snapshot(waiting, rows(chat(51, 3.0)))).send_now == 6  # nothing is at stake


def test_who_has_nothing_to_gain_goes_last_and_leaves_a_reserve() -> None:
    waiting = rows(new(20), new(200, ttft_s=5.0), new(20, 9.0, ttft_s=5.0))
    plan = SlackGuardPolicy().plan(snapshot(waiting, rows(chat(31, 0.3))))  # 1.5 - 0.3 - 0.2 + 0.5: 0.75 s to use
    assert plan.order.tolist() == [2, 3, 1]
    assert plan.send_now == 3
    plan = SlackGuardPolicy().plan(snapshot(waiting, rows(chat(11, 0.1))))  # 0.35 s
    assert RESERVE_S > 0.35 - 0.22
    assert plan.send_now == 1


def test_an_idle_engine_always_gets_work() -> None:
    assert SlackGuardPolicy().plan(snapshot(rows(new(50_000)), rows())).send_now == 1
    assert SlackGuardPolicy().plan(snapshot(rows(), rows())).send_now == 0


def test_who_can_gain() -> None:
    at_most = 1.0 - 0.1 - 0.02 - 19 * 0.02 / DECODE_SHARE
    waiting = rows(
        new(100), new(100, 0.87, ttft_s=1.0), new(100, 0.89, ttft_s=1.0), new(100, at_most - 0.01, e2e_s=1.0),
        new(100, at_most + 0.01, e2e_s=1.0), new(100, ttft_s=1.0, tpot_s=0.019), new(100, tpot_s=0.021),
    )  # fmt: skip
    told = can_gain(waiting, snapshot(waiting, rows()), 0.02)
    assert told.tolist() == [False, True, False, True, False, False, True]


@pytest.mark.parametrize("safety", [0.0, -0.1, 1.1])
def test_safety_is_a_share(safety: float) -> None:
    with pytest.raises(ValueError, match="safety"):
        SlackGuardPolicy(safety)
