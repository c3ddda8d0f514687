"""The LMDeploy adapter on the CPU: what a request asks for is what comes out, in the order of the plan."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import ChatMessage, EngineRequest, Sampling, Stopping
from lmdeploy_slo.engine.lmdeploy import Device, LmdeployEngine, LmdeployOptions
from lmdeploy_slo.errors import InvalidRequest, RequestIdInUse
from lmdeploy_slo.testing.event_log import EventLog

pytestmark = pytest.mark.asyncio(loop_scope="module")

SLOTS = 2
GREEDY = Sampling(temperature=0.0)


@dataclass
class Running:
    """A started engine, what it said, and plain transformers beside it."""

    engine: LmdeployEngine
    log: EventLog
    reference: Any
    count: int = 0

    def submit(
        self, prompt: str | list[int], stopping: Stopping, sampling: Sampling = GREEDY, *, rank: int = 0, name: str = ""
    ) -> str:
        self.count += 1
        name = name or f"r{self.count}"
        ids = self.engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        self.engine.submit(EngineRequest(name, ids, stopping, sampling), rank)
        return name

    async def run(self, prompt: str | list[int], stopping: Stopping, sampling: Sampling = GREEDY) -> str:
        name = self.submit(prompt, stopping, sampling)
        await self.log.ended(name)
        return name

    def pool(self) -> Any:
        return self.engine.async_engine.session_mgr.request_handle_pool

    async def idle(self) -> None:
        """Until LMDeploy has let go of everything."""
        while self.engine._tasks:
            await asyncio.wait(self.engine._tasks)

    def assert_nothing_left(self) -> None:
        manager = self.engine.async_engine.session_mgr
        assert self.engine.load().in_flight == 0
        assert manager.sessions == {}
        assert self.pool().num_dispatched == 0
        assert self.pool().pool.qsize() == SLOTS
        assert len(self.pool().slo_line) == 0
        assert self.engine._live == {}
        assert self.engine._tasks == set()


def options(model: Path, **changes: Any) -> LmdeployOptions:
    return replace(LmdeployOptions(str(model), device=Device.CPU, limits=EngineLimits(max_batch_size=SLOTS)), **changes)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tiny_model: Path) -> AsyncIterator[Running]:
    import torch
    import transformers

    log = EventLog()
    engine = LmdeployEngine(options(tiny_model, turbomind={"enable_prefix_caching": True}), MonotonicClock())
    await engine.start(log.sink)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    yield Running(engine, log, reference)
    await engine.close()
    assert log.violations == []


def greedy(running: Running, prompt: str, tokens: int) -> list[int]:
    import torch

    ids = torch.tensor([running.engine.tokenizer.encode(prompt)])
    output = running.reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    return [int(token) for token in output[0, ids.shape[1] :]]


# -- what comes out ---------------------------------------------------------------------------------------------------


async def test_greedy_text_is_that_of_transformers(running: Running) -> None:
    expected = greedy(running, "Tell me a story", 20)
    name = await running.run("Tell me a story", Stopping(max_new_tokens=20))
    assert running.log.token_ids(name) == expected
    assert running.log.text(name) == running.engine.tokenizer.decode(expected)
    assert running.log.end(name) is FinishReason.LENGTH
    assert len(running.log.events(name)) > 1


async def test_chat_is_rendered_as_lmdeploy_renders_it(running: Running) -> None:
    messages = [ChatMessage("system", "Be brief."), ChatMessage("user", "Hello, how are you?")]
    ids = running.engine.tokenizer.encode_chat(messages)
    rendered = await running.engine.async_engine.prompt_processor.get_prompt_input(
        prompt=[{"role": m.role, "content": m.content} for m in messages], do_preprocess=True, adapter_name=None
    )
    assert ids == rendered["input_ids"]
    assert "<|im_start|>user\nHello, how are you?<|im_end|>" in running.engine.tokenizer.decode_text(
        ids, skip_special_tokens=False
    )


async def test_a_stop_text_may_span_tokens(running: Running) -> None:
    whole = running.engine.tokenizer.decode(greedy(running, "One, two", 40))
    stop = whole[9:14]
    assert len(running.engine.tokenizer.encode(stop)) > 1
    name = await running.run("One, two", Stopping(max_new_tokens=40, stop=("never seen", stop)))
    assert (running.log.end(name), running.log.text(name)) == (FinishReason.STOP, whole[: whole.index(stop)])
    tokens = running.log.token_ids(name)
    assert stop in running.engine.tokenizer.decode(tokens)
    assert stop not in running.engine.tokenizer.decode(tokens[:-1])
    kept = await running.run("One, two", Stopping(max_new_tokens=40, stop=(stop,), include_stop=True))
    assert running.log.text(kept) == whole[: whole.index(stop) + len(stop)]
    late = await running.run("One, two", Stopping(max_new_tokens=40, min_new_tokens=40, stop=(stop,)))
    assert len(running.log.token_ids(late)) == 40


async def test_stop_tokens_end_it_even_where_the_models_own_do_not(running: Running) -> None:
    plain = greedy(running, "Monday", 30)
    at = next(n for n in range(3, 30) if plain[n] not in plain[:n])
    for ignore_eos in (False, True):
        stopping = Stopping(max_new_tokens=30, stop_token_ids=(plain[at],), ignore_eos=ignore_eos)
        name = await running.run("Monday", stopping)
        assert running.log.end(name) is FinishReason.STOP
        assert running.log.token_ids(name) == plain[:at]
        kept = await running.run("Monday", replace(stopping, include_stop=True))
        assert running.log.token_ids(kept) == plain[: at + 1]
        longer = await running.run("Monday", replace(stopping, min_new_tokens=at + 4))
        assert len(running.log.token_ids(longer)) >= at + 4


async def test_a_request_that_stops_at_once_has_no_tokens_and_an_end(running: Running) -> None:
    first = greedy(running, "Sunday", 1)[0]
    name = await running.run("Sunday", Stopping(max_new_tokens=5, stop_token_ids=(first,)))
    assert (running.log.end(name), running.log.token_ids(name)) == (FinishReason.STOP, [])


async def test_greedy_logprobs_are_the_models(running: Running) -> None:
    import torch

    name = await running.run("Hello", Stopping(max_new_tokens=6), Sampling(temperature=0.0, logprobs=3))
    prompt, tokens = running.engine.tokenizer.encode("Hello"), running.log.token_ids(name)
    with torch.no_grad():
        expected = torch.log_softmax(running.reference(torch.tensor([prompt + tokens])).logits[0].float(), -1)
    told = [row for event in running.log.events(name) for row in event.logprobs or ()]
    assert len(told) == 6
    for at, (token, row) in enumerate(zip(tokens, told)):
        assert row[0].token_id == token
        assert [c.token_id for c in row] == torch.topk(expected[len(prompt) + at - 1], 3).indices.tolist()
        assert row[0].logprob == pytest.approx(float(expected[len(prompt) + at - 1, token]), abs=1e-3)
        assert row[0].text == running.engine.tokenizer.decode([token])


async def test_sampled_requests_repeat_with_their_seed_and_have_logprobs(running: Running) -> None:
    sampling = Sampling(temperature=1.2, top_k=20, top_p=0.95, min_p=0.01, seed=2**63 + 5, logprobs=4)
    one, two = [await running.run("Hello", Stopping(max_new_tokens=10), sampling) for _ in range(2)]
    other = await running.run("Hello", Stopping(max_new_tokens=10), replace(sampling, seed=6))
    assert running.log.token_ids(one) == running.log.token_ids(two) != running.log.token_ids(other)
    for event in running.log.events(one):
        for token, row in zip(event.token_ids, event.logprobs or ()):
            assert row[0].token_id == token
            assert len(row) <= 5
            assert all(c.logprob <= 0 for c in row)
            assert [c.logprob for c in row[1:]] == sorted((c.logprob for c in row[1:]), reverse=True)


async def test_a_repetition_penalty_counts_in_greedy_decoding_too(running: Running) -> None:
    import torch

    ids = torch.tensor([running.engine.tokenizer.encode("a a a a")])
    output = running.reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=15,
        do_sample=False,
        eos_token_id=None,
        repetition_penalty=1.5,
    )
    name = await running.run("a a a a", Stopping(max_new_tokens=15), Sampling(temperature=0.0, repetition_penalty=1.5))
    assert running.log.token_ids(name) == output[0, ids.shape[1] :].tolist()
    assert running.log.token_ids(name) != greedy(running, "a a a a", 15)


async def test_cached_tokens_and_the_engines_times_are_told_once(running: Running) -> None:
    prompt = [11 + n % 300 for n in range(200)]
    before_s = MonotonicClock().now_s()
    first = await running.run(prompt, Stopping(max_new_tokens=3))
    again = await running.run(prompt, Stopping(max_new_tokens=3))
    after_s = MonotonicClock().now_s()
    for name, cached in ((first, 0), (again, 192)):
        told = running.log.events(name)[0]
        assert told.cached_tokens == cached
        assert told.queued_at_s is not None
        assert told.scheduled_at_s is not None
        assert before_s - 0.01 < told.queued_at_s <= told.scheduled_at_s < after_s + 0.01
        assert all(event.scheduled_at_s is None for event in running.log.events(name)[1:])


async def test_tokens_without_whole_characters_get_their_text_at_the_end(running: Running) -> None:
    """Two bytes of a three-byte character: LMDeploy's detokenizer holds them back for ever."""
    tokenizer = running.engine.tokenizer
    from lmdeploy_slo.engine.lmdeploy_output import OutputReader

    request = EngineRequest("x", [5], Stopping(max_new_tokens=4))
    reader = OutputReader(request, tokenizer, MonotonicClock())
    euro = tokenizer.encode("€")
    assert len(euro) == 3

    class Output:
        def __init__(self, token_ids: list[int], response: str, finish_reason: str | None = None) -> None:
            self.token_ids, self.response, self.finish_reason = token_ids, response, finish_reason
            self.cached_tokens, self.logprobs, self.logits = 0, None, None

    events = [
        reader.read(Output(euro[:1], "")),
        reader.read(Output(euro[1:2], "")),
        reader.read(Output([], "", "length")),
    ]
    assert "".join(event.text for event in events) == tokenizer.decode(euro[:2])
    assert events[-1].end is FinishReason.LENGTH


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        ([5] * 4096, GREEDY, "prompt"),
        ([], GREEDY, "prompt"),
        ([5, 512], GREEDY, "token_ids"),
        ([5], Sampling(temperature=2.5), "sampling.temperature"),
        ([5], Sampling(temperature=0.0, logprobs=1), "sampling.logprobs"),
    ],
)
async def test_what_lmdeploy_cannot_do_is_refused_by_name(
    running: Running, prompt: list[int], sampling: Sampling, field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        running.submit(prompt, Stopping(max_new_tokens=10**6), sampling)
    assert [violation.field for violation in caught.value.violations] == [field]


async def test_an_id_in_use_is_refused(running: Running) -> None:
    running.submit([5], Stopping(max_new_tokens=4000, ignore_eos=True), name="twice")
    with pytest.raises(RequestIdInUse):
        running.submit([5], Stopping(max_new_tokens=4), name="twice")
    running.engine.abort("twice")
    await running.idle()


# -- order, abort, and what is left -----------------------------------------------------------------------------------


@pytest.fixture
def started(running: Running, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The order in which requests reach the engine, as places in the order of submission."""
    from lmdeploy_slo.engine.cpu_standin import native

    order: list[int] = []
    first = running.engine.async_engine.session_mgr.session_id_generator.__reduce__()[1][0]
    forward = native.ModelRequest.forward

    def recording(self: Any, inputs: Any, mm: Any, session: Any, *rest: Any) -> Any:
        order.append(session.id - first)
        return forward(self, inputs, mm, session, *rest)

    monkeypatch.setattr(native.ModelRequest, "forward", recording)
    return order


RANKS = [1, 1, 6, 5, 4, 3, 2, 0]


async def test_waiting_requests_start_in_the_order_of_their_ranks(
    running: Running, started: list[int], pace: Any
) -> None:
    pace.hold()
    names = [running.submit([9, at], Stopping(max_new_tokens=3), rank=rank) for at, rank in enumerate(RANKS)]
    await _turns()
    pace.release()
    await running.log.ended(*names)
    assert [RANKS[at] for at in started] == [1, 1, 0, 2, 3, 4, 5, 6]


async def test_a_waiting_request_may_be_reranked(running: Running, started: list[int], pace: Any) -> None:
    pace.hold()
    names = [running.submit([9, at], Stopping(max_new_tokens=3), rank=rank) for at, rank in enumerate(RANKS)]
    await _turns()
    running.engine.rerank({name: -(10**12) + at for at, name in enumerate(reversed(names))} | {"nobody": 3})
    pace.release()
    await running.log.ended(*names)
    assert started == [0, 1, 7, 6, 5, 4, 3, 2]


async def test_an_aborted_wait_ends_at_once_and_the_next_in_line_moves_up(running: Running, pace: Any) -> None:
    pace.hold()
    runners = [running.submit([9], Stopping(max_new_tokens=3)) for _ in range(SLOTS)]
    waits, follows = (running.submit([9], Stopping(max_new_tokens=3), rank=rank) for rank in (1, 2))
    await _turns()
    running.engine.abort(waits)
    await _turns()
    assert running.log.end(waits) is FinishReason.ABORT
    assert len(running.pool().slo_line) == 1
    pace.release()
    await running.log.ended(*runners, follows)
    await running.idle()
    running.assert_nothing_left()


async def test_an_abort_is_told_before_the_engine_lets_go(running: Running, pace: Any) -> None:
    name = running.submit([9], Stopping(max_new_tokens=4000, ignore_eos=True))
    await running.log.tokens(name, 1)
    pace.hold()
    running.engine.abort(name)
    await _turns(2)
    assert running.log.end(name) is FinishReason.ABORT
    assert running.engine.load().in_flight == 0
    assert running.pool().num_dispatched == 1
    pace.release()
    await running.idle()
    running.assert_nothing_left()


async def test_two_thousand_requests_with_aborts_leave_nothing(running: Running) -> None:
    rng = random.Random(3)
    tasks_before = len(asyncio.all_tasks())
    names = []
    for _ in range(2000):
        stopping = Stopping(max_new_tokens=rng.randint(1, 3), ignore_eos=True)
        names.append(running.submit([rng.randrange(3, 500)], stopping, rank=rng.randrange(100)))
        if rng.random() < 0.4:
            running.engine.abort(rng.choice(names[-30:]))
        if rng.random() < 0.1:
            await asyncio.sleep(0)
    await running.log.ended(*names)
    await running.idle()
    ends = [running.log.end(name) for name in names]
    assert set(ends) == {FinishReason.LENGTH, FinishReason.ABORT}
    assert ends.count(FinishReason.ABORT) > 400
    running.assert_nothing_left()
    assert len(asyncio.all_tasks()) == tasks_before
    gc.collect()


# -- the engine as a whole --------------------------------------------------------------------------------------------


async def test_it_says_what_it_is_and_does(running: Running, pace: Any) -> None:
    info = running.engine.info
    assert (info.name, info.synthetic, info.vocab_size, info.max_session_tokens) == ("lmdeploy", False, 512, 4096)
    assert info.details["device"] == "cpu"
    assert info.details["lmdeploy"] == "0.18.0"
    pace.hold()
    names = [running.submit([9] * 300, Stopping(max_new_tokens=3)) for _ in range(SLOTS + 1)]
    await _turns()
    pace.release()
    await running.log.tokens(names[0], 1)
    load = running.engine.load()
    assert load.kv_usage is not None
    assert 0 <= load.kv_usage <= 1
    await running.log.ended(*names)
    assert await running.engine.check_health() is None


async def _turns(count: int = 20) -> None:
    """Lets what is due on the loop happen."""
    for _ in range(count):
        await asyncio.sleep(0)
