"""`lmdeploy_slo.pipeline()`: LMDeploy's own Pipeline, its requests ordered by the scheduler.

    pipe = lmdeploy_slo.pipeline("model-directory")
    pipe(["a", "b"], slo=[Slo(ttft_s=0.5), None], task_type="chat")

It is LMDeploy's class with a `ScheduledEngine` in it; everything it can do, this can. What differs: `slo`, `task_type`
and `expected_output_tokens` per call or per prompt; `timing` and `slo_met` on the Response that ends a request; a
keyword that nobody knows is an error; a stream that is dropped ends its requests.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import logging
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lmdeploy_slo import app
from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.config import Config, EngineConfig, EngineKind, SchedulerConfig
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.lmdeploy import LmdeployEngine
from lmdeploy_slo.engine.lmdeploy_options import Device, LmdeployOptions, choose_device, import_lmdeploy
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.frontend.scheduled_engine import ScheduledEngine
from lmdeploy_slo.frontend.terms import Terms, slo_of
from lmdeploy_slo.prediction.profiles import load_profile

logger = logging.getLogger(__name__)

_PASSED_ON = {"multiplex", "stream_response", "do_preprocess", "adapter_name"}
"""Keywords of LMDeploy's own calls that reach a request beside those of AsyncEngine.preprocess."""


def pipeline(
    model_path: str,
    backend_config: Any = None,
    chat_template_config: Any = None,
    log_level: str = "WARNING",
    max_log_len: int | None = None,
    trust_remote_code: bool = False,
    speculative_config: Any = None,
    allowed_media_domains: list[str] | None = None,
    *,
    scheduler: SchedulerConfig | str | None = None,
    profile: str = "a100-qwen2.5-7b",
    device: str = "auto",
    **kwargs: Any,
) -> Any:
    """LMDeploy's `pipeline` with a scheduler; the arguments before `scheduler` are LMDeploy's.

    scheduler: how requests are ordered, or the name of a policy. profile: the step model planning goes by, by name
    or file. device: auto, cuda or cpu; without a GPU the CPU stand-in computes. Returns a Pipeline; close it, or use
    it as a context manager. Raises ConfigError for a model or a configuration that TurboMind does not take.
    """
    chosen = choose_device(_device(device))
    lmdeploy = import_lmdeploy(device=chosen, patched=True)
    if backend_config is None:
        backend_config = lmdeploy.TurbomindEngineConfig()
    if not isinstance(backend_config, lmdeploy.TurbomindEngineConfig):
        raise ConfigError("backend_config: lmdeploy_slo drives TurboMind; a TurbomindEngineConfig is needed")
    options = SchedulerConfig(policy=scheduler) if isinstance(scheduler, str) else scheduler or SchedulerConfig()
    load_profile(profile)
    made: Any = _pipeline_class()(
        model_path,
        backend_config=backend_config,
        chat_template_config=chat_template_config,
        log_level=log_level,
        max_log_len=max_log_len,
        trust_remote_code=trust_remote_code,
        speculative_config=speculative_config,
        allowed_media_domains=allowed_media_domains,
        **kwargs,
    )
    try:
        made.begin(options, profile, chosen)
    except BaseException:
        made.close()
        raise
    return made


def _device(name: str) -> Device:
    try:
        return Device(name)
    except ValueError:
        raise ConfigError(f"device: {name!r} is unknown; choose one of {', '.join(d.value for d in Device)}") from None


@functools.cache
def _pipeline_class() -> Any:
    """A subclass of LMDeploy's Pipeline, made when LMDeploy is there."""
    base: Any = importlib.import_module("lmdeploy.pipeline").Pipeline

    class SloPipeline(base):  # type: ignore[misc]
        """LMDeploy's Pipeline over the scheduler. `runtime` is None until `begin`."""

        runtime: Any = None
        async_engine: Any

        def begin(self, scheduler: SchedulerConfig, profile: str, device: Device) -> None:
            """Puts the scheduler in front of the engine that LMDeploy has built."""
            plain: Any = self.async_engine
            if plain.backend != "turbomind":
                raise ConfigError("model: TurboMind does not support it")
            self._known = _known_keywords(plain.preprocess)
            config = self.backend_config
            limits = EngineLimits(config.max_batch_size, max(1, config.max_prefill_token_num))
            clock = MonotonicClock()
            engine = LmdeployEngine(LmdeployOptions(plain.model_name, device, limits), clock, plain)
            settings = Config(
                engine=EngineConfig(kind=EngineKind.LMDEPLOY, model=plain.model_name, profile=profile),
                scheduler=scheduler,
            )
            app.check(settings)
            runtime = app.build_runtime(settings, engine, clock)
            self._run(coro=runtime.start()).result()
            self.runtime = runtime
            self.async_engine = ScheduledEngine(plain, runtime)
            self._plain = plain

        def close(self) -> None:
            """Ends what has not ended, and LMDeploy with it. Idempotent."""
            runtime, self.runtime = self.runtime, None
            if runtime is not None:
                self._run(coro=runtime.close()).result()
                self.async_engine = self._plain
            if not self.internal_thread.closed:
                super().close()

        def _request_generator(
            self,
            prompts: Any,
            sessions: Any = None,
            gen_config: Any = None,
            slo: Any = None,
            task_type: Any = "",
            expected_output_tokens: Any = None,
            **kwargs: Any,
        ) -> Iterator[dict[str, Any]]:
            unknown = sorted(kwargs.keys() - self._known)
            if unknown:
                raise TypeError(f"{unknown[0]!r} is no argument of a pipeline call; known: {sorted(self._known)}")
            terms = _terms(1 if self._is_single(prompts) else len(prompts), slo, task_type, expected_output_tokens)
            requests = super()._request_generator(prompts, sessions, gen_config, **kwargs)
            return iter([{**request, "terms": each} for request, each in zip(requests, terms)])

        def _infer(
            self, requests: Iterable[dict[str, Any]], multiplex: bool, pbar: Any = None, loop: Any = None
        ) -> Iterator[Any]:
            if self.runtime is None:
                raise RuntimeError("the pipeline is closed")
            return _Responses(self, list(requests), multiplex, pbar)

    return SloPipeline


class _Responses:
    """Iterates over the Responses of some requests, or, one after the other, over one iterator per request.

    Started at once. Closed or dropped before its end, it ends its requests.
    """

    def __init__(self, pipe: Any, requests: list[dict[str, Any]], multiplex: bool, pbar: Any) -> None:
        self._queues: list[queue.Queue[Any]] = [queue.Queue() for _ in range(1 if multiplex else len(requests))]
        self._at = 0
        self._multiplex = multiplex
        # The work must not hold on to this iterator, or it would never be dropped.
        self._work = pipe._run(coro=_serve_all(pipe.async_engine, requests, self._queues, multiplex, pbar))

    def __iter__(self) -> _Responses:
        return self

    def __next__(self) -> Any:
        if self._multiplex:
            item = self._queues[0].get()
            if item is None:
                self._queues[0].put(None)  # and again for whoever asks again
                self._work.result()
                raise StopIteration
            return item
        if self._at == len(self._queues):
            self._work.result()
            raise StopIteration
        self._at += 1
        return iter(self._queues[self._at - 1].get, None)

    def close(self) -> None:
        """Ends the requests that have not ended. Idempotent."""
        self._work.cancel()

    def __del__(self) -> None:
        self.close()


async def _serve_all(
    engine: Any, requests: list[dict[str, Any]], queues: list[queue.Queue[Any]], multiplex: bool, pbar: Any
) -> None:
    """Each request's Responses into its queue, or all into the first; None after the last."""
    targets = queues * len(requests) if multiplex else queues
    tasks: list[asyncio.Task[None]] = []
    for at, (request, target) in enumerate(zip(requests, targets)):
        task = asyncio.ensure_future(_serve_one(engine, request, target.put, at, pbar))
        if not multiplex:
            task.add_done_callback(functools.partial(_put_end, target))
        tasks.append(task)
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        if multiplex:
            queues[0].put(None)


def _put_end(target: queue.Queue[Any], task: asyncio.Task[None]) -> None:
    target.put(None)


async def _serve_one(
    engine: Any, request: Mapping[str, Any], put: Callable[[Any], None], index: int, pbar: Any
) -> None:
    """One request; what goes wrong with it becomes a Response, as in LMDeploy."""
    from lmdeploy.messages import Response
    from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

    arguments = dict(request)
    stream_response = arguments.pop("stream_response", True)
    prompt_tokens = 0
    try:
        prepared = await engine.preprocess(**arguments)
        prompt_tokens = prepared.input_token_len
        async for output in engine.generate(prepared, stream_response=stream_response):
            response = output.to_response(index)
            response.timing = getattr(output, "timing", None)
            response.slo_met = getattr(output, "slo_met", None)
            put(response)
    except Exception as error:
        if not isinstance(error, RequestError):
            logger.exception("a request failed unexpectedly")
            error = RequestError(ErrorCode.INTERNAL_ERROR)
        response = Response(
            text="",
            generate_token_len=0,
            input_token_len=prompt_tokens,
            finish_reason="error",
            index=index,
            error_code=error.code.value,
            error_message=error.message,
        )
        response.timing = response.slo_met = None
        put(response)
    finally:
        if pbar is not None:
            pbar.update(1)


def _known_keywords(preprocess: Any) -> set[str]:
    """What a call may pass on to AsyncEngine.preprocess, without what the call itself fills in."""
    named = inspect.signature(preprocess).parameters.values()
    taken = {"messages", "session_id", "gen_config", "input_ids"}
    return ({p.name for p in named if p.kind is not p.VAR_KEYWORD} | _PASSED_ON) - taken


def _terms(count: int, slo: Any, task_type: Any, expected_output_tokens: Any) -> list[Terms]:
    """One per prompt, from values that are given once or once per prompt."""
    slos = _each(count, slo, "slo")
    tasks = _each(count, task_type, "task_type")
    hints = _each(count, expected_output_tokens, "expected_output_tokens")
    return [Terms(slo_of(s), t or "", h) for s, t, h in zip(slos, tasks, hints)]


def _each(count: int, value: Any, name: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name}: {len(value)} given for {count} prompts; give one, or one per prompt")
    return list(value)
