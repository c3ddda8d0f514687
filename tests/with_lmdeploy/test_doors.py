"""A model behind gRPC and HTTP at once: one server, one engine, one scheduler, two kinds of client."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from lmdeploy_slo.app import Server, serving
from lmdeploy_slo.client import AsyncClient
from lmdeploy_slo.config import load
from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.engine.supervised import SupervisedEngine
from lmdeploy_slo.errors import Cancelled, ConfigError, DeadlineExceeded, InvalidRequest, QueueTimeout

pytestmark = pytest.mark.asyncio(loop_scope="module")

SLOTS = 2
FLAGS: dict[str, Any] = {
    "engine.device": "cpu",
    "engine.max_batch_size": SLOTS,
    "engine.look_ahead": 0,
    "scheduler.policy": "edf",
    "server.port": 0,
    "server.http_port": 0,
    "tasks.quick.e2e_ms": 60_000.0,
}


@dataclass
class Doors:
    """The server, a client of each kind, and the model's name."""

    server: Server
    grpc: AsyncClient
    openai: Any
    model: str

    @property
    def engine(self) -> Any:
        supervised = self.server.runtime.engine
        assert isinstance(supervised, SupervisedEngine)
        return supervised.inner

    def here(self) -> int:
        """Requests that have arrived and not ended."""
        load = self.server.runtime.load()
        return load.in_flight + load.waiting

    async def idle(self) -> None:
        """Until neither the runtime nor LMDeploy has anything; then nothing may be left."""
        await until(lambda: self.here() == 0 and not self.engine._tasks)
        manager = self.engine.async_engine.session_mgr
        pool = manager.request_handle_pool
        await turns()
        assert manager.sessions == {}
        assert (pool.num_dispatched, pool.pool.qsize(), len(pool.slo_line)) == (0, SLOTS, 0)

    async def chat(self, content: str = "Hello", **fields: Any) -> Any:
        messages = [{"role": "user", "content": content}]
        return await self.openai.chat.completions.create(model=self.model, messages=messages, **fields)

    async def complete(self, prompt: str = "Hello", **fields: Any) -> Any:
        return await self.openai.completions.create(model=self.model, prompt=prompt, **fields)


async def until(condition: Callable[[], bool]) -> None:
    """Turns the loop until the condition holds."""
    for _ in itertools.count():
        if condition():
            return
        await asyncio.sleep(0)


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def doors(tiny_model: Path) -> AsyncIterator[Doors]:
    from openai import AsyncOpenAI

    config = load(flags={**FLAGS, "engine.model": str(tiny_model)}, environ={})
    async with serving(config) as server, AsyncClient(server.address) as client:
        http = AsyncOpenAI(base_url=f"http://{server.http_address}/v1", api_key="none", max_retries=0)
        yield Doors(server, client, http, str(tiny_model))
        await http.close()


# -- the same model through both --------------------------------------------------------------------------------------


async def test_text_and_chat_are_the_same_through_both(doors: Doors) -> None:
    text = await doors.grpc.generate("Tell me a story", max_new_tokens=12)
    assert (await doors.complete("Tell me a story", max_tokens=12, temperature=0)).choices[0].text == text.text
    chat = await doors.grpc.generate([{"role": "user", "content": "Hello"}], max_new_tokens=12)
    answer = await doors.chat(max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == chat.text
    assert answer.usage.completion_tokens == chat.completion.usage.output_tokens == 12
    assert answer.usage.prompt_tokens == chat.completion.usage.prompt_tokens
    info = await doors.grpc.model_info()
    assert (info.engine, info.synthetic, info.max_batch_size) == ("lmdeploy", False, SLOTS)
    assert [model.id async for model in doors.openai.models.list()] == [doors.model]


async def test_streams(doors: Doors) -> None:
    whole = (await doors.grpc.generate("Hello", max_new_tokens=10)).text
    pieces = []
    async with doors.grpc.stream("Hello", max_new_tokens=10, ttft_ms=60_000) as stream:
        async for chunk in stream:
            pieces.append(chunk.text)
    assert "".join(pieces) == whole
    assert stream.completion.slo_met is True
    over_http = [c.choices[0].text async for c in await doors.complete(max_tokens=10, temperature=0, stream=True)]
    assert "".join(over_http) == whole


async def test_stop_words_of_several_tokens(doors: Doors) -> None:
    whole = (await doors.grpc.generate("One, two", max_new_tokens=40)).text
    stop = whole[9:14]
    expected = whole[: whole.index(stop)]
    stopped = await doors.grpc.generate("One, two", max_new_tokens=40, stop=[stop])
    assert (stopped.text, stopped.completion.finish_reason) == (expected, FinishReason.STOP)
    over_http = await doors.complete("One, two", max_tokens=40, temperature=0, stop=[stop])
    assert (over_http.choices[0].text, over_http.choices[0].finish_reason) == (expected, "stop")
    pieces = [
        c.choices[0].text
        async for c in await doors.complete("One, two", max_tokens=40, temperature=0, stop=stop, stream=True)
    ]
    assert "".join(pieces) == expected
    await doors.idle()


async def test_logprobs(doors: Doors) -> None:
    answer = await doors.grpc.generate("Hello", max_new_tokens=4, logprobs=3)
    assert [len(candidates) for candidates in answer.logprobs] == [3] * 4
    assert [candidates[0].token_id for candidates in answer.logprobs] == list(answer.token_ids)
    over_http = await doors.chat(max_tokens=4, temperature=1.0, logprobs=True, top_logprobs=3, seed=5)
    assert [len(token.top_logprobs) for token in over_http.choices[0].logprobs.content] == [3] * 4


async def test_sixteen_streams_at_once_each_get_their_own(doors: Doors) -> None:
    prompts = [f"Number {n}" for n in range(16)]
    alone = [(await doors.grpc.generate(prompt, max_new_tokens=6)).text for prompt in prompts]
    over_grpc = [doors.grpc.generate(prompt, max_new_tokens=6) for prompt in prompts]
    over_http = [doors.complete(prompt, max_tokens=6, temperature=0) for prompt in prompts]
    answers = await asyncio.gather(*over_grpc, *over_http)
    assert [answer.text for answer in answers[:16]] == alone
    assert [answer.choices[0].text for answer in answers[16:]] == alone
    await doors.idle()


# -- objectives and priorities ----------------------------------------------------------------------------------------


async def test_slos_come_in_headers_and_in_the_body(doors: Doors) -> None:
    before = doors.server.runtime.load()
    await doors.chat(max_tokens=2, extra_headers={"x-llm-d-slo-ttft-ms": "60000", "x-llm-d-slo-tpot-ms": "60000"})
    await doors.chat(max_tokens=2, extra_body={"slo": {"e2e_ms": 0.001}})
    await doors.complete(max_tokens=2, extra_headers={"x-task-type": "quick"})
    await doors.complete(max_tokens=2)
    after = doors.server.runtime.load()
    assert after.with_slo - before.with_slo == 3
    assert after.slo_met - before.slo_met == 2


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"extra_headers": {"x-llm-d-slo-ttft-ms": "soon"}}, "x-llm-d-slo-ttft-ms"),
        ({"extra_body": {"slo": {"ttft": 3}}}, "slo.ttft"),
        ({"extra_body": {"slo": {"ttft_ms": -3}}}, "slo.ttft_ms"),
        ({"extra_body": {"priority": 256}}, "priority"),
        ({"extra_body": {"priority": -1}}, "priority"),
        ({"prompt": "x" * 9000}, "context length"),
    ],
)
async def test_a_wrong_request_is_a_bad_request(doors: Doors, fields: dict[str, Any], why: str) -> None:
    from openai import BadRequestError

    with pytest.raises(BadRequestError) as caught:
        await doors.complete(**{"max_tokens": 2, **fields})
    assert why in caught.value.message
    await doors.idle()


async def test_a_prompt_that_is_too_long_is_refused_over_grpc_by_field(doors: Doors) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await doors.grpc.generate("x" * 9000, max_new_tokens=2)
    assert "4096" in str(caught.value)


PRIORITIES = [1, 1, 6, 5, 4, 3, 2, 0]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The last token of each prompt, in the order in which they reach the engine."""
    from lmdeploy_slo.engine.cpu_standin import native

    order: list[int] = []
    forward = native.ModelRequest.forward

    def recording(self: Any, inputs: Any, *rest: Any) -> Any:
        order.append(int(inputs["input_ids"].data[-1]))
        return forward(self, inputs, *rest)

    monkeypatch.setattr(native.ModelRequest, "forward", recording)
    return order


async def queued(doors: Doors, requests: list[Coroutine[Any, Any, Any]]) -> list[asyncio.Task[Any]]:
    """The requests, sent one after the other, each when the last has arrived; the first ones take the slots."""
    tasks = []
    load = doors.server.runtime.load
    for at, request in enumerate(requests):
        tasks.append(asyncio.ensure_future(request))
        await until(lambda count=at: doors.here() > count and load().in_flight >= min(count + 1, SLOTS))
    await turns()
    return tasks


async def test_requests_over_http_start_in_the_order_of_their_priority(
    doors: Doors, started: list[int], pace: Any
) -> None:
    pace.hold()
    ids = {doors.engine.tokenizer.encode(letter)[0]: p for letter, p in zip("abcdefgh", PRIORITIES)}
    tasks = await queued(
        doors,
        [
            doors.complete(letter, max_tokens=2, extra_body={"priority": priority})
            for letter, priority in zip("abcdefgh", PRIORITIES)
        ],
    )
    pace.release()
    await asyncio.gather(*tasks)
    assert [ids[token] for token in started] == [1, 1, 0, 2, 3, 4, 5, 6]


async def test_requests_over_grpc_start_in_the_order_of_the_plan(doors: Doors, started: list[int], pace: Any) -> None:
    pace.hold()
    tasks = await queued(
        doors,
        [
            doors.grpc.generate([100 + at], max_new_tokens=2, e2e_ms=60_000 + 10_000 * priority)
            for at, priority in enumerate(PRIORITIES)
        ],
    )
    pace.release()
    await asyncio.gather(*tasks)
    assert [PRIORITIES[token - 100] for token in started] == [1, 1, 0, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("door", ["grpc", "http"])
@pytest.mark.parametrize("policy", ["edf", "annealing"])
async def test_a_later_and_more_urgent_request_goes_before_those_in_lmdeploys_line(
    tiny_model: Path, started: list[int], pace: Any, door: str, policy: str
) -> None:
    from openai import AsyncOpenAI

    flags = {"engine.model": str(tiny_model), "engine.look_ahead": 6, "scheduler.policy": policy}
    async with (
        serving(load(flags=FLAGS | flags, environ={})) as server,
        AsyncClient(server.address) as client,
        AsyncOpenAI(base_url=f"http://{server.http_address}/v1", api_key="none", max_retries=0) as http,
    ):
        local = Doors(server, client, http, str(tiny_model))
        letters = "abcdefgh"
        promised_ms = [60_000, 60_000, 90_000, 110_000, 80_000, 120_000, 100_000, 70_000]
        ids = {local.engine.tokenizer.encode(letter)[0]: letter for letter in letters}

        def request(letter: str, e2e_ms: float) -> Coroutine[Any, Any, Any]:
            if door == "grpc":
                return local.grpc.generate(letter, max_new_tokens=2, e2e_ms=e2e_ms)
            return local.complete(letter, max_tokens=2, extra_body={"slo": {"e2e_ms": e2e_ms}})

        pace.hold()
        tasks = await queued(local, [request(*pair) for pair in zip(letters[:7], promised_ms)])
        line = local.engine.async_engine.session_mgr.request_handle_pool.slo_line
        await until(lambda: len(line) == 5)
        tasks += [asyncio.ensure_future(request(letters[7], promised_ms[7]))]
        await until(lambda: len(line) == 6)
        await turns()
        assert local.server.runtime.load().waiting == 0
        pace.release()
        await asyncio.gather(*tasks)
        assert "".join(ids[token] for token in started) == "abhecgdf"


# -- ends -------------------------------------------------------------------------------------------------------------


async def test_aborts_waiting_and_running(doors: Doors, pace: Any) -> None:
    pace.hold()
    names = [f"a{n}" for n in range(SLOTS + 2)]
    tasks = await queued(
        doors, [doors.grpc.generate("x", max_new_tokens=3000, ignore_eos=True, request_id=name) for name in names]
    )
    for name in reversed(names):
        assert await doors.grpc.abort(name)
    pace.release()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, Cancelled) for result in results)
    assert not await doors.grpc.abort(names[0])
    await doors.idle()


async def test_clients_that_go_away_free_the_engine(doors: Doors) -> None:
    async with doors.grpc.stream("x", max_new_tokens=3000, ignore_eos=True) as stream:
        async for _ in stream:
            break
    await doors.idle()
    over_http = await doors.complete(max_tokens=3000, stream=True, extra_body={"ignore_eos": True})
    async for _ in over_http:
        break
    await over_http.close()
    await doors.idle()
    task = asyncio.ensure_future(doors.complete(max_tokens=3000, extra_body={"ignore_eos": True}))
    await until(lambda: doors.here() == 1)
    task.cancel()
    await asyncio.wait([task])
    await doors.idle()


async def test_time_limits(doors: Doors, pace: Any) -> None:
    pace.hold()
    running = await queued(doors, [doors.grpc.generate("x", max_new_tokens=2) for _ in range(SLOTS)])
    with pytest.raises(QueueTimeout):
        await doors.grpc.generate("x", max_new_tokens=2, queue_timeout_ms=20)
    with pytest.raises(DeadlineExceeded):
        await doors.grpc.generate("x", max_new_tokens=2, timeout_s=0.05)
    pace.release()
    await asyncio.gather(*running)
    await doors.idle()


async def test_many_requests_with_aborts_leave_nothing(doors: Doors) -> None:
    rng = random.Random(4)

    async def one(n: int) -> bool:
        name = f"many{n}"
        call = asyncio.ensure_future(doors.grpc.generate("x", max_new_tokens=rng.randint(1, 4), request_id=name))
        if rng.random() < 0.4:
            await asyncio.sleep(0)
            if rng.random() < 0.5:
                call.cancel()
            else:
                await doors.grpc.abort(name)
        return not isinstance((await asyncio.gather(call, return_exceptions=True))[0], BaseException)

    finished = 0
    for start in range(0, 400, 50):
        finished += sum(await asyncio.gather(*(one(n) for n in range(start, start + 50))))
    assert 200 < finished < 400
    await doors.idle()


async def test_a_full_queue_is_told_as_too_many_requests(tiny_model: Path, pace: Any) -> None:
    from openai import APIStatusError, AsyncOpenAI

    flags = {**FLAGS, "engine.model": str(tiny_model), "scheduler.max_queued_requests": 1}
    async with serving(load(flags=flags, environ={})) as server:
        http = AsyncOpenAI(base_url=f"http://{server.http_address}/v1", api_key="none", max_retries=0)
        local = Doors(server, None, http, str(tiny_model))  # type: ignore[arg-type]
        pace.hold()
        tasks = await queued(local, [local.complete(max_tokens=2) for _ in range(SLOTS + 1)])
        with pytest.raises(APIStatusError) as caught:
            await local.complete(max_tokens=2)
        assert caught.value.status_code == 429
        pace.release()
        await asyncio.gather(*tasks)
        await http.close()


async def test_the_emulated_engine_has_no_http_door() -> None:
    with pytest.raises(ConfigError, match="http_port"):
        load(flags={"server.http_port": 0}, environ={})
