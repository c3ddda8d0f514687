"""lmdeploy_slo.pipeline(): LMDeploy's Pipeline, with SLOs, and with every request ordered by the scheduler."""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lmdeploy_slo
from lmdeploy_slo.core.slo import Slo
from lmdeploy_slo.errors import ConfigError, InvalidRequest

SLOTS = 2


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> Iterator[Any]:
    from lmdeploy_slo.engine.lmdeploy_options import Device, import_lmdeploy

    lmdeploy = import_lmdeploy(device=Device.CPU, patched=True)
    made = lmdeploy_slo.pipeline(
        str(tiny_model), lmdeploy.TurbomindEngineConfig(max_batch_size=SLOTS), scheduler="fcfs", device="cpu"
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def plain(tiny_model: Path, pipe: Any) -> Iterator[Any]:
    """LMDeploy's own pipeline on the same checkpoint."""
    lmdeploy = importlib.import_module("lmdeploy")
    made = lmdeploy.pipeline(str(tiny_model), lmdeploy.TurbomindEngineConfig(max_batch_size=SLOTS))
    yield made
    made.close()


def config(tokens: int = 8, **fields: Any) -> Any:
    return importlib.import_module("lmdeploy").GenerationConfig(max_new_tokens=tokens, **fields)


def on_loop(pipe: Any, work: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(work, pipe.internal_thread.loop).result(60)


def settle(pipe: Any) -> None:
    """Lets what is due on the pipeline's loop happen."""
    for _ in range(30):
        on_loop(pipe, asyncio.sleep(0))


def assert_nothing_left(pipe: Any) -> None:
    async def until_idle() -> None:
        engine = pipe.runtime.engine
        while engine._tasks:
            await asyncio.wait(engine._tasks)

    settle(pipe)
    on_loop(pipe, until_idle())
    manager = pipe.session_mgr
    assert pipe.runtime.load().in_flight == pipe.runtime.load().waiting == 0
    assert manager.sessions == {}
    assert manager.request_handle_pool.num_dispatched == 0
    assert len(manager.request_handle_pool.slo_line) == 0


def test_the_signature_is_lmdeploys_and_more(pipe: Any) -> None:
    ours = list(inspect.signature(lmdeploy_slo.pipeline).parameters)
    theirs = list(inspect.signature(importlib.import_module("lmdeploy").pipeline).parameters)
    assert [name for name in ours if name in theirs] == theirs
    assert set(ours) - set(theirs) == {"scheduler", "profile", "device"}
    assert isinstance(pipe, importlib.import_module("lmdeploy.pipeline").Pipeline)


PROMPTS = [
    "Hello",
    ["Hello", "Tell me a story about a river", "One, two"],
    [{"role": "user", "content": "Hello"}],
    [
        [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}],
        [{"role": "user", "content": "x"}],
    ],
]


@pytest.mark.parametrize("prompts", PROMPTS)
def test_the_results_are_lmdeploys(pipe: Any, plain: Any, prompts: Any) -> None:
    ours, theirs = pipe(prompts, gen_config=config()), plain(prompts, gen_config=config())
    assert type(ours) is type(theirs)
    for one, other in zip(*([r] if not isinstance(r, list) else r for r in (ours, theirs))):
        for name in ("text", "token_ids", "finish_reason", "generate_token_len", "input_token_len", "index"):
            assert getattr(one, name) == getattr(other, name), name
        assert one.slo_met is None
        assert one.timing.output_tokens == len(one.token_ids)


def test_streams_chats_and_perplexity_are_lmdeploys(pipe: Any, plain: Any) -> None:
    streams = [list(p.stream_infer("Hello", gen_config=config())) for p in (pipe, plain)]
    # Tokens that become known together share a Response: how many there are is a matter of time.
    assert len({"".join(response.text for response in stream) for stream in streams}) == 1
    assert [stream[-1].finish_reason for stream in streams] == ["length", "length"]
    histories = []
    for p in (pipe, plain):
        session = p.chat("Hi", gen_config=config(4))
        session = p.chat("And then?", session=session, gen_config=config(4))
        list(p.chat("Well", session=session, gen_config=config(4), stream_response=True))
        histories.append(session.history)
    assert histories[0] == histories[1]
    assert len(histories[0]) == 3
    assert pipe.get_ppl([5, 6, 7]) == pytest.approx(plain.get_ppl([5, 6, 7]))


def test_slos_are_judged_one_by_one(pipe: Any) -> None:
    met, missed, none = pipe(["a", "b", "c"], gen_config=config(), slo=[Slo(e2e_s=60), {"tpot_ms": 1e-6}, None])
    assert (met.slo_met, missed.slo_met, none.slo_met) == (True, False, None)
    assert 0 < met.timing.ttft_s <= met.timing.e2e_s
    last = list(pipe.stream_infer("a", gen_config=config(), slo={"ttft_ms": 60_000}, task_type="chat"))[-1]
    assert (last.finish_reason, last.slo_met) == ("length", True)


def test_stop_words_may_be_longer_than_a_token(pipe: Any) -> None:
    whole = pipe("Hello", gen_config=config(30)).text
    stop = whole[8:13]
    response = pipe("Hello", gen_config=config(30, stop_words=[stop]))
    assert (response.text, response.finish_reason) == (whole[: whole.index(stop)], "stop")
    kept = pipe("Hello", gen_config=config(30, stop_words=[stop], include_stop_str_in_output=True))
    assert kept.text == whole[: whole.index(stop) + len(stop)]
    assert_nothing_left(pipe)


def test_logits_and_logprobs_come_through(pipe: Any, plain: Any) -> None:
    import torch

    wanted = config(4, output_logits="generation", logprobs=2)
    ours, theirs = pipe("Hello", gen_config=wanted), plain("Hello", gen_config=wanted)
    assert torch.allclose(ours.logits, theirs.logits)
    assert ours.logprobs == theirs.logprobs


def test_errors_are_responses(pipe: Any) -> None:
    good, bad = pipe(["Hello", "x" * 9000], gen_config=config())
    assert (good.finish_reason, bad.finish_reason, bad.error_code) == ("length", "error", "context_length_exceeded")
    assert bad.timing is None


def test_what_nobody_knows_is_an_error(pipe: Any) -> None:
    with pytest.raises(TypeError, match="'slow' is no argument"):
        pipe("a", slow=1)
    with pytest.raises(ValueError, match="slo: 2 given for 1 prompts"):
        pipe("a", slo=[None, None])
    with pytest.raises(InvalidRequest, match=r"slo\.ttft: is no objective"):
        pipe("a", slo={"ttft": 1})
    assert_nothing_left(pipe)
    with pytest.raises(ValueError, match="priority must be an integer from 0"):
        config(priority=256)


PRIORITIES = [1, 1, 6, 5, 4, 3, 2, 0]


@pytest.fixture
def started(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompts, by their length, in the order in which they reach the engine."""
    from lmdeploy_slo.engine.cpu_standin import native

    order: list[int] = []
    forward = native.ModelRequest.forward

    def recording(self: Any, inputs: Any, *rest: Any) -> Any:
        order.append(len(inputs["input_ids"].data))
        return forward(self, inputs, *rest)

    monkeypatch.setattr(native.ModelRequest, "forward", recording)
    return order


def test_priorities_are_honoured(pipe: Any, started: list[int], pace: Any) -> None:
    pace.hold()
    blockers = pipe.stream_infer(["a"] * (SLOTS + 1), gen_config=config(2))  # handles, and the look-ahead
    settle(pipe)
    configs = [config(2, priority=priority) for priority in PRIORITIES]
    prompts = ["x" + " x" * at for at in range(len(PRIORITIES))]
    answers = pipe.stream_infer(prompts, gen_config=configs)
    while pipe.runtime.load().waiting < len(PRIORITIES):
        settle(pipe)
    pace.release()
    list(blockers), list(answers)
    lengths = started[SLOTS + 1 :]
    assert [PRIORITIES[sorted(lengths).index(length)] for length in lengths] == sorted(PRIORITIES)


@pytest.mark.parametrize("scheduler", ["edf", "annealing"])
def test_a_later_and_more_urgent_prompt_goes_before_those_in_lmdeploys_line(
    tiny_model: Path, pipe: Any, started: list[int], pace: Any, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmdeploy_slo.engine.lmdeploy_options import LmdeployOptions
    from lmdeploy_slo.engine.patching.hooks import line_of

    def ask(*promised_ms: float) -> Iterator[Any]:
        """Prompts that are longer the laxer they are."""
        prompts = ["x" + " x" * int(each / 10_000) for each in promised_ms]
        stream: Iterator[Any] = one.stream_infer(
            prompts, gen_config=config(2), slo=[{"e2e_ms": e} for e in promised_ms]
        )
        return stream

    def settle_until(in_lmdeploy: int) -> None:
        pool = one.session_mgr.request_handle_pool
        while pool.num_dispatched + len(line_of(pool)) < in_lmdeploy:
            settle(one)
        settle(one)

    monkeypatch.setattr(LmdeployOptions, "effective_look_ahead", 6)
    tight = importlib.import_module("lmdeploy").TurbomindEngineConfig(max_batch_size=SLOTS)
    with lmdeploy_slo.pipeline(str(tiny_model), tight, scheduler=scheduler, device="cpu") as one:
        pace.hold()
        answers = [ask(60_000, 60_000)]
        settle_until(2)
        answers += [ask(90_000, 130_000, 80_000, 150_000, 110_000)]
        settle_until(7)
        answers += [ask(70_000)]
        settle_until(8)
        pace.release()
        for stream in answers:
            list(stream)
    assert started[2:] == sorted(started[2:])
    assert len(set(started[2:])) == 6


def test_a_dropped_stream_ends_its_requests(pipe: Any) -> None:
    stream = pipe.stream_infer(["x"] * 5, gen_config=config(3000, ignore_eos=True))
    next(stream)
    del stream
    assert_nothing_left(pipe)
    chat = pipe.chat("x", gen_config=config(3000, ignore_eos=True), stream_response=True)
    next(chat)
    chat.close()
    assert_nothing_left(pipe)


def test_aborting_a_session_ends_its_request_wherever_it_waits(pipe: Any, pace: Any) -> None:
    pace.hold()
    sessions = [pipe.session() for _ in range(SLOTS + 3)]  # running, looked ahead, and with the scheduler
    stream = pipe.stream_infer(["x"] * len(sessions), sessions=sessions, gen_config=config(3000, ignore_eos=True))
    while pipe.runtime.load().waiting + pipe.runtime.load().in_flight < len(sessions):
        settle(pipe)
    for session in sessions:
        session.abort()
    pace.release()
    assert [r.finish_reason for r in stream if r.finish_reason] == ["abort"] * len(sessions)
    assert_nothing_left(pipe)


def test_it_is_a_context_manager_and_closing_ends_everything(tiny_model: Path, pipe: Any) -> None:
    with lmdeploy_slo.pipeline(str(tiny_model), device="cpu", scheduler=lmdeploy_slo.SchedulerConfig(seed=3)) as other:
        assert other.runtime.policy.name == "annealing"
        stream = other.stream_infer(["x"] * 3, gen_config=config(3000, ignore_eos=True))
        next(stream)
    ends = [r for r in stream if r.finish_reason]
    assert [r.error_code for r in ends] == ["engine_unavailable"] * 3
    other.close()
    with pytest.raises(RuntimeError, match="closed"):
        other("x")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [({"device": "tpu"}, "device: 'tpu'"), ({"scheduler": "none"}, "policy: 'none'"), ({"profile": "x"}, "profile")],
)
def test_wrong_settings_are_told(tiny_model: Path, pipe: Any, arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        lmdeploy_slo.pipeline(str(tiny_model), **{"device": "cpu", **arguments})
