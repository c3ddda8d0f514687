"""The client library against the real gateway on the emulated engine, each in a process of its own."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import scripted_server
from serve_process import serve

from lmdeploy_slo import client as sdk
from lmdeploy_slo import errors

connect = scripted_server.connect  # a fixture: one face for both clients
ENDLESS: dict[str, Any] = {"max_new_tokens": 1_000_000, "ignore_eos": True}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("serve")
    config = folder / "config.toml"
    config.write_text("[tasks.chat]\nttft_ms = 60000\n")
    with serve(folder, "--policy", "fcfs", "--config", str(config), "--flush-interval-ms", "0") as (address, _):
        yield address


@pytest.fixture
def tight(tmp_path: Path) -> Iterator[str]:
    """A server with one place in the engine and one in the queue."""
    with serve(tmp_path, "--policy", "fcfs", "--max-batch-size", "1", "--max-queued-requests", "1") as (address, _):
        yield address


def settled(client: sdk.Client, **expected: int) -> sdk.Load:
    """The load once it is what is expected; a cancel may still be on its way."""
    gives_up_at_s = time.monotonic() + scripted_server.WAIT_S
    while True:
        load = client.load()
        if all(getattr(load, name) == value for name, value in expected.items()):
            return load
        assert time.monotonic() < gives_up_at_s, f"not {expected} but {load}"


def test_a_stream_says_the_same_as_the_whole_answer(address: str, connect: Callable[..., Any]) -> None:
    face = connect(address)
    options: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True, "e2e_ms": 60_000}
    whole = face.call("generate", "Tell me", **options)
    chunks, completion = face.read("Tell me", **options)
    assert len(whole.token_ids) == sum(len(chunk.token_ids) for chunk in chunks) == 12
    assert completion.finish_reason is whole.completion.finish_reason is sdk.FinishReason.LENGTH
    for one in (completion, whole.completion):
        assert one.usage.output_tokens == 12
        assert one.slo == sdk.Objectives(e2e_ms=60_000)
        assert one.slo_met is True
        assert one.timing.queue_ms is not None and one.timing.ttft_ms is not None and one.timing.e2e_ms is not None
        assert 0 <= one.timing.queue_ms <= one.timing.ttft_ms <= one.timing.e2e_ms
        assert one.predicted.output_tokens == 12


def test_without_coalescing_each_token_has_its_message(address: str, connect: Callable[..., Any]) -> None:
    chunks, completion = connect(address).read("Hi", max_new_tokens=30, ignore_eos=True)
    assert [len(chunk.token_ids) for chunk in chunks if chunk.token_ids] == [1] * 30
    assert completion.usage.output_tokens == 30


def test_each_kind_of_prompt(address: str, connect: Callable[..., Any]) -> None:
    face = connect(address)
    prompts: list[Any] = ["Hi", [1, 2, 3], [{"role": "user", "content": "Hi"}]]
    for prompt in prompts:
        assert len(face.call("generate", prompt, max_new_tokens=2, ignore_eos=True).token_ids) == 2


def test_a_tasks_default_slo_comes_back(address: str, connect: Callable[..., Any]) -> None:
    face = connect(address)
    assert face.call("generate", "Hi", max_new_tokens=2, task_type="chat").completion.slo == sdk.Objectives(60_000)
    assert face.call("server_info").task_slos == {"chat": sdk.Objectives(ttft_ms=60_000)}


def test_predicting(address: str, connect: Callable[..., Any]) -> None:
    face = connect(address)
    generous = face.call("predict", "Hi", max_new_tokens=10, e2e_ms=60_000)
    assert (generous.would_meet_slo, generous.reason) == (True, "")
    hopeless = face.call("predict", "Hi", max_new_tokens=1000, expected_output_tokens=1000, e2e_ms=1)
    assert hopeless.would_meet_slo is False
    assert hopeless.reason
    assert face.call("predict", "Hi").would_meet_slo is None


def test_wrong_fields_are_named(address: str, connect: Callable[..., Any]) -> None:
    face = connect(address)
    for call in ("generate", "predict"):
        with pytest.raises(errors.InvalidRequest) as caught:
            face.call(call, "", temperature=9, ttft_ms=0)
        prefix = "request." if call == "predict" else ""
        assert {violation.field for violation in caught.value.violations} == {
            f"{prefix}{field}" for field in ("text", "sampling.temperature", "slo.ttft_ms")
        }
    with pytest.raises(errors.InvalidRequest):
        face.read([])
    with pytest.raises(errors.ModelNotFound, match="other"):
        face.call("generate", "Hi", model="other")


def test_a_deadline(address: str, connect: Callable[..., Any]) -> None:
    face = connect(address)
    with pytest.raises(errors.DeadlineExceeded):
        face.call("generate", "Hi", timeout_s=0.1, **ENDLESS)
    with pytest.raises(errors.DeadlineExceeded):
        face.read("Hi", timeout_s=0.1, **ENDLESS)


def test_a_prompt_beyond_the_message_limit_is_an_error_with_a_code(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[server]\nmax_message_bytes = 65536\n")
    with serve(tmp_path, "--policy", "fcfs", "--config", str(config)) as (address, _), sdk.Client(address) as client:
        with pytest.raises(sdk.ClientError, match="larger than max") as caught:
            client.generate("x" * 100_000)
        assert caught.value.code.name == "RESOURCE_EXHAUSTED"


def test_full_queue_abort_and_names_in_use(tight: str) -> None:
    with sdk.Client(tight, retry=sdk.NO_RETRY) as client:
        running = client.stream("Hi", request_id="runs", **ENDLESS)
        next(running)
        with pytest.raises(errors.RequestIdInUse):
            client.generate("Hi", request_id="runs")
        waiting = client.stream("Hi", request_id="waits", **ENDLESS)
        settled(client, waiting=1, in_flight=1)
        with pytest.raises(errors.QueueFull) as full:
            client.generate("Hi")
        assert full.value.retry_after_s is None or full.value.retry_after_s > 0
        assert client.abort("waits") is True
        with pytest.raises(errors.Cancelled):
            next(waiting)
        assert client.abort("waits") is False
        with pytest.raises(errors.QueueTimeout):
            client.generate("Hi", queue_timeout_ms=1)
        assert client.abort("runs") is True
        with pytest.raises(errors.Cancelled):
            list(running)
        load = settled(client, waiting=0, in_flight=0)
        assert (load.rejected, load.timed_out, load.cancelled, load.finished) == (1, 1, 2, 0)


def test_leaving_a_stream_frees_the_engine_and_finishing_one_is_no_cancel(tight: str) -> None:
    with sdk.Client(tight) as client:
        for _chunk in client.stream("Hi", **ENDLESS):
            break
        settled(client, in_flight=0, cancelled=1)
        for _ in range(20):
            for chunk in client.stream("Hi", max_new_tokens=2, ignore_eos=True):
                if chunk.completion is not None:
                    break
        load = settled(client, in_flight=0)
        assert (load.finished, load.cancelled) == (20, 1)


async def test_leaving_an_async_stream_frees_the_engine(tight: str) -> None:
    async with sdk.AsyncClient(tight) as client:
        async for _chunk in client.stream("Hi", **ENDLESS):
            break
        while (await client.load()).cancelled != 1:
            pass
        assert len((await client.generate("Hi", max_new_tokens=2, ignore_eos=True)).token_ids) == 2


async def test_many_streams_on_one_async_client(address: str) -> None:
    async with sdk.AsyncClient(address) as client:

        async def read(count: int) -> int:
            return sum(
                [len(chunk.token_ids) async for chunk in client.stream("Hi", max_new_tokens=count, ignore_eos=True)]
            )

        assert await asyncio.gather(*(read(count) for count in range(1, 65))) == list(range(1, 65))


def test_a_server_that_dies(tmp_path: Path) -> None:
    with serve(tmp_path, "--policy", "fcfs") as (address, process), sdk.Client(address) as client:
        stream = client.stream("Hi", **ENDLESS)
        next(stream)
        process.kill()
        with pytest.raises(sdk.ServerUnreachable) as lost:
            list(stream)
        assert not lost.value.not_sent
        process.wait()
        with pytest.raises(sdk.ServerUnreachable) as gone:
            client.generate("Hi")
        assert gone.value.not_sent


def test_a_server_that_drains(tmp_path: Path) -> None:
    with serve(tmp_path, "--policy", "fcfs") as (address, process):
        with sdk.Client(address, retry=sdk.NO_RETRY) as client:
            stream = client.stream("Hi", **ENDLESS)
            next(stream)
            process.send_signal(signal.SIGTERM)
            settled(client, draining=True)
            with pytest.raises(errors.Draining):
                client.generate("Hi")
            stream.close()
        assert process.wait(timeout=30) == 0
