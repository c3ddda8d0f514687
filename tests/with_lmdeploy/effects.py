"""What each patch gives, seen in LMDeploy itself; run as a program, because a process imports LMDeploy once.

    python effects.py MODEL all | released | WITHOUT...      prints {effect: whether it is there} as JSON

An effect that is not there must say False, not hang and not raise.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.cpu_standin.native import PACE
from lmdeploy_slo.engine.lmdeploy_options import Device, LmdeployOptions, import_lmdeploy, turbomind_config

HANDLES = 2
PRIORITIES = [1, 1, 6, 5, 4, 3, 2, 0]
PROMPT = [17, 42, 99]


class Stage:
    """An LMDeploy with two handles, and the order in which its requests got one."""

    def __init__(self, lmdeploy: Any, model: str) -> None:
        options = LmdeployOptions(model, device=Device.CPU, limits=EngineLimits(max_batch_size=HANDLES))
        self.lmdeploy = lmdeploy
        self.pipeline = lmdeploy.pipeline(model, backend_config=turbomind_config(options), log_level="CRITICAL")
        self.engine = self.pipeline.async_engine
        self.started: list[int] = []
        instance = sys.modules["lmdeploy.turbomind.turbomind"].TurboMindInstance
        original = instance.async_stream_infer

        def recording(handle: Any, session_id: int, **kwargs: Any) -> Any:
            self.started.append(session_id)
            return original(handle, session_id, **kwargs)

        instance.async_stream_infer = recording

    @property
    def free_handles(self) -> int:
        return HANDLES - int(self.engine.session_mgr.request_handle_pool.num_dispatched)

    def config(self, tokens: int = 3, priority: int = 0) -> Any:
        config = self.lmdeploy.GenerationConfig(max_new_tokens=tokens, ignore_eos=True)
        config.priority = priority  # also where the class has no such field
        return config

    async def run(self, session: Any, config: Any) -> list[Any]:
        request = await self.engine.preprocess(None, session, gen_config=config, input_ids=list(PROMPT))
        return [output async for output in self.engine.generate(request)]

    def begin(self, tokens: int = 3, priority: int = 0, session: Any = None) -> tuple[Any, asyncio.Task[list[Any]]]:
        session = session or self.pipeline.session()
        return session, asyncio.ensure_future(self.run(session, self.config(tokens, priority)))


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def priority_field(stage: Stage) -> bool:
    try:
        if stage.lmdeploy.GenerationConfig(priority=255).priority != 255:
            return False
    except TypeError:
        return False
    refused = 0
    for wrong in (-1, 256, 1.5, True, None):
        try:
            stage.lmdeploy.GenerationConfig(priority=wrong)
        except ValueError:
            refused += 1
    return refused == 5 and stage.lmdeploy.GenerationConfig().priority == 0


async def ranked_handles(stage: Stage) -> bool:
    PACE.hold()
    stage.started.clear()
    sessions, tasks = zip(*(stage.begin(priority=priority) for priority in PRIORITIES))
    await turns()
    PACE.release()
    await asyncio.gather(*tasks)
    by_session = {session.session_id: priority for session, priority in zip(sessions, PRIORITIES)}
    return [by_session[s] for s in stage.started] == [1, 1, 0, 2, 3, 4, 5, 6]


async def cancelled_wait_leaves_nothing(stage: Stage) -> bool:
    PACE.hold()
    running = [stage.begin()[1] for _ in range(HANDLES)]
    session, waiting = stage.begin()
    await turns()
    waiting.cancel()
    await turns()
    clean = session.session_id not in stage.engine.session_mgr.sessions
    PACE.release()
    await asyncio.gather(*running, waiting, return_exceptions=True)
    stage.engine.session_mgr.remove(session)
    return clean and stage.free_handles == HANDLES


async def shared_session_loses_no_handle(stage: Stage) -> bool:
    PACE.hold()
    running = [stage.begin()[1] for _ in range(HANDLES)]
    session, first = stage.begin()
    second = stage.begin(session=session)[1]
    await turns()
    PACE.release()
    results = await asyncio.gather(*running, first, second, return_exceptions=True)
    ended_well = all(isinstance(result, list) for result in results[:-1])
    pool = stage.engine.session_mgr.request_handle_pool
    if stage.free_handles < HANDLES:  # as released: give the lost one back, for the effects that follow
        known = list(pool.pool._queue)
        for handle in pool.handles:
            if handle not in known:
                pool.pool.put_nowait(handle)
        return False
    return ended_well and getattr(results[-1], "code", None) == "request_conflict"


async def abort_while_waiting(stage: Stage) -> bool:
    PACE.hold()
    running = [stage.begin()[1] for _ in range(HANDLES)]
    session, waiting = stage.begin()
    await turns()
    await session.async_abort()
    await turns()
    ended = waiting.done() and waiting.result()[-1].finish_reason == "abort"
    PACE.release()
    await asyncio.gather(*running, waiting)
    return ended and session.session_id not in stage.engine.session_mgr.sessions


async def cancellation_is_seen(stage: Stage) -> bool:
    began = asyncio.Event()

    async def consume() -> None:
        request = await stage.engine.preprocess(
            None, stage.pipeline.session(), gen_config=stage.config(tokens=2000), input_ids=list(PROMPT)
        )
        async for _ in stage.engine.generate(request):
            began.set()

    task = asyncio.ensure_future(consume())
    await began.wait()
    task.cancel()
    result = (await asyncio.gather(task, return_exceptions=True))[0]
    return isinstance(result, asyncio.CancelledError) and stage.free_handles == HANDLES


async def engine_times(stage: Stage) -> bool:
    outputs = await stage.begin()[1]
    responses = [output.to_response() for output in outputs]
    whole = responses[0]
    for response in responses[1:]:
        whole.extend(response)
    for told in (*outputs, whole):
        metrics = getattr(told, "req_metrics", None)
        names = [event.type.name for event in metrics.engine_events] if metrics else []
        if names != ["QUEUED", "SCHEDULED"]:
            return False
    return True


async def priority_over_http(stage: Stage) -> bool:
    from lmdeploy.serve.core.generation_config import build_generation_config
    from lmdeploy.serve.openai.protocol import ChatCompletionRequest, CompletionRequest, GenerateReqInput
    from pydantic import ValidationError

    bodies: list[tuple[Any, dict[str, Any]]] = [
        (ChatCompletionRequest, {"model": "m", "messages": [{"role": "user", "content": "x"}]}),
        (CompletionRequest, {"model": "m", "prompt": "x"}),
        (GenerateReqInput, {"prompt": "x"}),
    ]
    for kind, body in bodies:
        try:
            config = build_generation_config(kind(**body, priority=7), {}, max_new_tokens=1)
        except TypeError:  # forwarded to a GenerationConfig that has no such field
            return False
        if getattr(config, "priority", None) != 7:
            return False
        try:
            kind(**body, priority=256)
        except ValidationError:
            continue
        return False
    return True


async def priority_in_the_engine(stage: Stage) -> bool:
    turbomind = sys.modules["lmdeploy.turbomind.turbomind"]
    native = turbomind._tm.GenerationConfig

    class WithPriority(native):  # type: ignore[misc, valid-type]
        __slots__ = ("priority",)

        def __init__(self) -> None:
            super().__init__()
            self.priority = 0

    turbomind._tm.GenerationConfig = WithPriority
    try:
        handle = stage.engine.session_mgr.request_handle_pool.handles[0]
        return bool(handle._get_generation_config(stage.config(priority=9)).priority == 9)
    finally:
        turbomind._tm.GenerationConfig = native


async def pipeline_is_ranked(stage: Stage) -> bool:
    loop = stage.pipeline.internal_thread.loop
    stage.engine.session_mgr.attach_event_loop(loop)
    # Pool and semaphore belong to one loop: from here on the pipeline's own.
    stage.engine.session_mgr.build_request_handle_pool(stage.engine.engine, HANDLES)
    PACE.hold()
    stage.started.clear()
    configs = [stage.config(priority=priority) for priority in PRIORITIES]
    outputs = stage.pipeline.stream_infer(["a story"] * len(configs), gen_config=configs)
    for _ in range(20):  # every prompt that is let in has joined the line by then
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()
    PACE.release()
    await asyncio.to_thread(lambda: list(outputs))
    first = min(stage.started)
    return [PRIORITIES[session - first] for session in stage.started] == [1, 1, 0, 2, 3, 4, 5, 6]


EFFECTS: dict[str, Callable[[Stage], Awaitable[bool]]] = {
    "0001-priority-field": priority_field,
    "0002-ranked-handles": ranked_handles,
    "0002-ranked-handles: cancelled wait": cancelled_wait_leaves_nothing,
    "0002-ranked-handles: shared session": shared_session_loses_no_handle,
    "0003-abort-while-waiting": abort_while_waiting,
    "0004-cancellation-is-seen": cancellation_is_seen,
    "0006-priority-over-http": priority_over_http,
    "0007-engine-times": engine_times,
    "0008-priority-in-the-engine": priority_in_the_engine,
    "0005-pipeline-lets-requests-be-ranked": pipeline_is_ranked,  # the last: it takes the engine to another loop
}


async def check(stage: Stage) -> dict[str, bool]:
    stage.engine.start_loop(asyncio.get_running_loop(), use_async_api=True)
    return {name: await effect(stage) for name, effect in EFFECTS.items()}


def main(model: str, *choice: str) -> None:
    from lmdeploy_slo.engine.patching import loader

    if choice != ("released",):
        loader.install(without=() if choice == ("all",) else choice)
    lmdeploy = import_lmdeploy(device=Device.CPU, patched=False) if choice == ("released",) else _import(choice)
    stage = Stage(lmdeploy, model)
    print(json.dumps(asyncio.run(check(stage))))
    stage.pipeline.close()


def _import(choice: tuple[str, ...]) -> Any:
    import importlib

    from lmdeploy_slo.engine.cpu_standin import native

    native.install()
    return importlib.import_module("lmdeploy")


if __name__ == "__main__":
    main(*sys.argv[1:])
