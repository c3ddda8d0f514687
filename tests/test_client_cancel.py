"""The client library against a scripted server: whoever stops reading cancels the request."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import grpc
import pytest
import scripted_server
from scripted_server import WAIT_S, ScriptedServer, whole_stream

from lmdeploy_slo import client as sdk
from lmdeploy_slo import errors
from lmdeploy_slo.v1 import inference_pb2 as pb

server = scripted_server.server  # a fixture


class Endless:
    """A script entry that yields one message and then waits until its client is gone."""

    def __init__(self) -> None:
        self.gone = threading.Event()

    def __call__(self, _request: Any, context: grpc.ServicerContext) -> Iterator[pb.GenerateStreamResponse]:
        context.add_callback(self.gone.set)
        yield pb.GenerateStreamResponse(text="a")
        self.gone.wait(WAIT_S)


def test_closing_leaving_or_dropping_a_stream_cancels_it(server: ScriptedServer) -> None:
    def close(client: sdk.Client) -> None:
        stream = client.stream("x")
        next(stream)
        stream.close()
        assert list(stream) == []
        with pytest.raises(RuntimeError, match="not run to its end"):
            _ = stream.completion

    def leave(client: sdk.Client) -> None:
        with client.stream("x") as stream:
            next(stream)

    def drop(client: sdk.Client) -> None:
        for _chunk in client.stream("x"):
            break
        gc.collect()

    with sdk.Client(server.target) as client:
        for give_up in (close, leave, drop):
            endless = Endless()
            server.script = [endless]
            give_up(client)
            assert endless.gone.wait(WAIT_S), give_up.__name__


async def test_closing_leaving_or_dropping_an_async_stream_cancels_it(server: ScriptedServer) -> None:
    async def close(client: sdk.AsyncClient) -> None:
        stream = client.stream("x")
        await anext(stream)
        await stream.aclose()
        assert [chunk async for chunk in stream] == []

    async def leave(client: sdk.AsyncClient) -> None:
        async with client.stream("x") as stream:
            await anext(stream)

    async def drop(client: sdk.AsyncClient) -> None:
        async for _chunk in client.stream("x"):
            break
        gc.collect()

    async def cancel_task(client: sdk.AsyncClient) -> None:
        started = asyncio.Event()

        async def read() -> None:
            async for _chunk in client.stream("x"):
                started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def close_while_another_task_reads(client: sdk.AsyncClient) -> None:
        stream = client.stream("x")
        await anext(stream)
        reader = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        stream.cancel()
        with pytest.raises(errors.Cancelled):
            await reader

    async with sdk.AsyncClient(server.target) as client:
        for give_up in (close, leave, drop, cancel_task, close_while_another_task_reads):
            endless = Endless()
            server.script = [endless]
            await give_up(client)
            assert await asyncio.to_thread(endless.gone.wait, WAIT_S), give_up.__name__


async def test_cancelling_the_task_of_a_unary_call_cancels_the_request(server: ScriptedServer) -> None:
    started, gone = threading.Event(), threading.Event()

    def hang(_request: Any, context: grpc.ServicerContext) -> Any:
        context.add_callback(gone.set)
        started.set()
        gone.wait(WAIT_S)

    server.script = [hang]
    async with sdk.AsyncClient(server.target) as client:
        task = asyncio.create_task(client.generate("x"))
        assert await asyncio.to_thread(started.wait, WAIT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(gone.wait, WAIT_S)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals go to the main thread")
def test_ctrl_c_during_a_blocking_call_cancels_the_request(server: ScriptedServer) -> None:
    gone = threading.Event()

    def hang(_request: Any, context: grpc.ServicerContext) -> Any:
        context.add_callback(gone.set)
        while not main_thread_waits():
            pass
        os.kill(os.getpid(), signal.SIGINT)
        gone.wait(WAIT_S)

    server.script = [hang]
    with sdk.Client(server.target) as client:
        with pytest.raises(KeyboardInterrupt):
            client.generate("x")
        assert gone.wait(WAIT_S)


def main_thread_waits() -> bool:
    """Whether the main thread waits for the result of a call."""
    frame: FrameType | None = sys._current_frames()[threading.main_thread().ident or 0]
    names = []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return "wait" in names and "result" in names  # threading.Condition.wait in grpc.Future.result


def test_closing_a_client_ends_its_calls(server: ScriptedServer) -> None:
    started = threading.Semaphore(0)
    gone = [threading.Event(), threading.Event()]

    def hangs(event: threading.Event) -> Any:
        def hang(_request: Any, context: grpc.ServicerContext) -> Any:
            context.add_callback(event.set)
            started.release()
            event.wait(WAIT_S)
            return iter(())

        return hang

    server.script = [hangs(event) for event in gone]
    client = sdk.Client(server.target)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(client.generate, "x"), pool.submit(lambda: next(client.stream("x")))]
        assert all(started.acquire(timeout=WAIT_S) for _ in calls)
        client.close()
        for call in calls:
            with pytest.raises(errors.Cancelled):
                call.result(WAIT_S)
    assert all(event.wait(WAIT_S) for event in gone)
    with pytest.raises(ValueError, match="closed"):
        client.load()


def test_one_client_serves_many_threads(server: ScriptedServer) -> None:
    server.script = [whole_stream() for _ in range(40)]
    with sdk.Client(server.target) as client, ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda _: "".join(c.text for c in client.stream("x")), range(40)))
    assert texts == ["Hello"] * 40
