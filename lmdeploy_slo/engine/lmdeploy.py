"""LMDeploy as an engine: each request is a session of its own in LMDeploy's pipeline.

    submit -> session with a rank -> preprocess -> LMDeploy's line for handles -> generate -> events

Requests beyond `max_batch_size` wait in LMDeploy's own line, ranked by the plan, so that a freed handle is taken in
the same turn of the event loop; `rerank` moves them while they wait. Events of one step reach the sink together.

An aborted request ends at once for the caller; TurboMind lets go of it at its next step, and until then `load` may
show it among the active ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.engine import lmdeploy_request
from lmdeploy_slo.engine.base import EngineEvent, EngineInfo, EngineLoad, EngineRequest, EventSink
from lmdeploy_slo.engine.lmdeploy_options import (
    Device,
    LmdeployOptions,
    choose_device,
    import_lmdeploy,
    turbomind_config,
)
from lmdeploy_slo.engine.lmdeploy_output import OutputReader
from lmdeploy_slo.engine.lmdeploy_prepared import PreparedReader
from lmdeploy_slo.engine.lmdeploy_tokenizer import LmdeployTokenizer
from lmdeploy_slo.engine.patching import hooks
from lmdeploy_slo.errors import (
    ConfigError,
    EngineError,
    EngineUnavailable,
    FieldViolation,
    InvalidRequest,
    RequestIdInUse,
)

logger = logging.getLogger(__name__)

HEALTH_INTERVAL_S = 5.0
"""How often LMDeploy is asked whether it still makes progress."""

CLOSE_GRACE_S = 10.0
"""How long `close` waits for aborted requests to leave LMDeploy before their tasks are cancelled."""


@dataclass(slots=True, eq=False)
class _Live:
    """A request that LMDeploy works on; `ended`: its caller knows its end already."""

    request: EngineRequest
    session: Any
    reader: OutputReader | PreparedReader
    task: asyncio.Task[None] | None = None
    ended: bool = False


class LmdeployEngine:
    """See the module, and `engine.base.Engine` for the protocol."""

    def __init__(self, options: LmdeployOptions, clock: Clock, async_engine: Any = None) -> None:
        """async_engine: an AsyncEngine of LMDeploy that was built already, and is closed by whoever did; its event
        loop must be the one that calls `start`."""
        self.options = options
        self._clock = clock
        self._info = EngineInfo(
            name="lmdeploy",
            model=options.model,
            synthetic=False,
            limits=options.limits,
            max_session_tokens=options.max_session_tokens,
            vocab_size=None,
            look_ahead=options.effective_look_ahead,
        )
        self._given = async_engine
        self._pipeline: Any = None  # where it was built here
        self._async_engine: Any = None
        self._tokenizer: LmdeployTokenizer | None = None
        self._sink: EventSink | None = None
        self._live: dict[str, _Live] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._events: list[EngineEvent] = []
        self._gone: str | None = "the engine is not started"

    @property
    def info(self) -> EngineInfo:
        """Complete after `start`; before it, what the options say."""
        return self._info

    @property
    def tokenizer(self) -> LmdeployTokenizer:
        """Raises EngineUnavailable before `start`."""
        if self._tokenizer is None:
            raise EngineUnavailable("the model is not loaded yet")
        return self._tokenizer

    @property
    def async_engine(self) -> Any:
        """LMDeploy's AsyncEngine; raises EngineUnavailable where it is not running."""
        if self._async_engine is None:
            raise EngineUnavailable(self._gone or "the engine is closed")
        return self._async_engine

    # -- life -----------------------------------------------------------------

    async def start(self, sink: EventSink) -> None:
        """Loads the model, in a thread. Raises ConfigError for options LMDeploy refuses, EngineUnavailable for a
        model that cannot be loaded."""
        engine = self._given
        if engine is None:
            self._pipeline = await asyncio.to_thread(self._build)
            engine = self._pipeline.async_engine
        self._async_engine = engine
        engine.start_loop(asyncio.get_running_loop(), use_async_api=True)
        self._tokenizer = LmdeployTokenizer(engine)
        self._info = self._describe(engine)
        self._sink = sink
        self._gone = None
        self._watch = asyncio.get_running_loop().create_task(self._watch_health(), name="lmdeploy-health")

    def _build(self) -> Any:
        options = self.options
        device = choose_device(options.device)
        lmdeploy = import_lmdeploy(device=device, patched=options.patched)
        config = turbomind_config(options)
        template = lmdeploy.ChatTemplateConfig(options.chat_template) if options.chat_template else None
        try:
            pipeline = lmdeploy.pipeline(
                options.model,
                backend_config=config,
                chat_template_config=template,
                log_level=options.log_level,
                trust_remote_code=options.trust_remote_code,
            )
        except ConfigError:
            raise
        except Exception as error:  # loading a model can fail in any way
            raise EngineUnavailable(f"LMDeploy could not load {options.model}: {error}") from error
        if pipeline.async_engine.backend != "turbomind":
            pipeline.close()
            raise ConfigError(f"model: TurboMind does not support {options.model}")
        self._info = replace(self._info, details={"device": device.value})
        return pipeline

    def _describe(self, engine: Any) -> EngineInfo:
        options, config = self.options, engine.backend_config
        text_config = engine.hf_cfg.get_text_config()
        kv_tokens = None
        if config.cache_max_entry_count > 1:
            kv_tokens = int(config.cache_max_entry_count) * config.cache_block_seq_len
        return replace(
            self._info,
            limits=replace(options.limits, kv_tokens=kv_tokens),
            max_session_tokens=engine.session_len,
            vocab_size=text_config.vocab_size,
            details={
                **self._info.details,
                "patched": "yes" if options.patched else "no",
                "chat_template": type(engine.chat_template).__name__,
                **{name: metadata.version(name) for name in ("lmdeploy", "torch", "transformers")},
            },
        )

    async def close(self) -> None:
        if self._async_engine is None:
            return
        self._fail_all("the engine was closed")
        if self._watch is not None:
            self._watch.cancel()
        pending = self._tasks | ({self._watch} if self._watch is not None else set())
        if pending:
            _, late = await asyncio.wait(pending, timeout=CLOSE_GRACE_S)
            for task in late:
                task.cancel()
        self._async_engine, pipeline, self._pipeline = None, self._pipeline, None
        if pipeline is not None:
            await asyncio.to_thread(pipeline.close)

    # -- requests -------------------------------------------------------------

    def submit(self, request: EngineRequest, rank: int) -> None:
        if self._gone is not None:
            raise EngineUnavailable(self._gone)
        self._check(request)
        prepared = request.prepared
        session = self.async_engine.session_mgr.get() if prepared is None else prepared.request.session
        hooks.set_rank(session, rank)
        reader = (
            OutputReader(request, self.tokenizer, self._clock)
            if prepared is None
            else PreparedReader(request.request_id, prepared)
        )
        live = _Live(request, session, reader)
        self._live[request.request_id] = live
        live.task = self._spawn(self._drive(live, self.async_engine))

    def rerank(self, ranks: Mapping[str, int]) -> None:
        for request_id, rank in ranks.items():
            live = self._live.get(request_id)
            if live is not None:
                hooks.set_rank(live.session, rank)

    def abort(self, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is not None:
            self._end(live, EngineEvent(request_id, end=FinishReason.ABORT))
            self._spawn(self._release(live))

    def unsupported_fields(self, request: EngineRequest) -> Sequence[tuple[str, str]]:
        return lmdeploy_request.unsupported_fields(request, self._info.vocab_size)

    def load(self) -> EngineLoad:
        if self._gone is not None or self._async_engine is None:
            gone = self._gone or "the engine is closed"
            return EngineLoad(in_flight=len(self._live), active=0, kv_tokens_used=None, kv_usage=None, gone=gone)
        metrics = self.async_engine.engine.get_schedule_metrics()
        kv_tokens = self._info.limits.kv_tokens
        return EngineLoad(
            in_flight=len(self._live),
            active=metrics.active_seqs,
            kv_tokens_used=None if kv_tokens is None else round(metrics.cache_usage * kv_tokens),
            kv_usage=min(1.0, max(0.0, metrics.cache_usage)),
            steps=metrics.scheduler_tick,
        )

    # -- health ---------------------------------------------------------------

    async def check_health(self) -> str | None:
        """None where LMDeploy makes progress; else what is wrong, and every request has ended with it."""
        if self._gone is not None:
            return self._gone
        try:
            result = await self.async_engine.health_probe(self.options.stall_timeout_s)
        except Exception as error:  # whatever it is, an engine that cannot be asked is not healthy
            result = {"status": "unhealthy", "message": f"{type(error).__name__}: {error}"}
        if result["status"] != "unhealthy":
            return None
        logger.error("LMDeploy is unhealthy: %s", result["message"])
        self._fail_all(f"LMDeploy is unhealthy: {result['message']}")
        return self._gone

    async def _watch_health(self) -> None:
        while self._gone is None:
            await asyncio.sleep(HEALTH_INTERVAL_S)
            await self.check_health()

    def _fail_all(self, reason: str) -> None:
        """From now on the engine is gone; every request ends with that."""
        self._gone = self._gone or reason
        for live in list(self._live.values()):
            self._end(live, EngineEvent(live.request.request_id, error=EngineUnavailable(reason)))
            self._spawn(self._release(live))
        self._flush()

    # -- inside ---------------------------------------------------------------

    def _check(self, request: EngineRequest) -> None:
        if request.request_id in self._live:
            raise RequestIdInUse(f"request_id {request.request_id!r} is in the engine already")
        if request.prepared is not None:  # LMDeploy has checked it
            return
        wrong = lmdeploy_request.wrong_fields(request, self._info)
        if wrong:
            raise InvalidRequest([FieldViolation(path, reason) for path, reason in wrong])

    async def _drive(self, live: _Live, engine: Any) -> None:
        """One request, from LMDeploy's first look at it to the last; runs on after an abort until LMDeploy lets go."""
        from lmdeploy.serve.core.exceptions import ErrorCode, RequestError

        request = live.request
        error = EngineError("LMDeploy ended the request without a reason")
        try:
            if live.ended:  # aborted before anything was done
                return
            if request.prepared is not None:
                prepared = request.prepared.request
            else:
                prepared = await engine.preprocess(
                    None,
                    live.session,
                    gen_config=self._generation_config(request),
                    input_ids=list(request.prompt_token_ids),
                )
                self._correct_stop_tokens(request, prepared.gen_config, engine.stop_words or ())
            async with contextlib.aclosing(engine.generate(prepared, stream_response=True)) as outputs:
                async for output in outputs:
                    if not live.ended:
                        self._on_output(live, output)
        except RequestError as failure:
            if failure.code is ErrorCode.ENGINE_UNAVAILABLE:
                self._fail_all(failure.message)
            error = EngineError(failure.message, failure.code.value)
        except Exception:
            extra = {"request_id": request.request_id}
            logger.exception("request %s failed in LMDeploy", request.request_id, extra=extra)
            error = EngineError("LMDeploy failed")
        finally:
            engine.session_mgr.remove(live.session)
        if not live.ended:
            self._end(live, EngineEvent(request.request_id, error=error))

    def _generation_config(self, request: EngineRequest) -> Any:
        messages = importlib.import_module("lmdeploy.messages")
        return messages.GenerationConfig(**lmdeploy_request.generation_fields(request))

    def _correct_stop_tokens(self, request: EngineRequest, config: Any, template_ids: Sequence[int]) -> None:
        """`config` is what LMDeploy made of ours: it forgets the template's end tokens where a request has its own,
        and with ignore_eos it ignores those too."""
        stopping = request.stopping
        texts = [self.tokenizer.special_token(stop) for stop in stopping.stop]
        own = {*stopping.stop_token_ids, *(token for token in texts if token is not None)}
        if not stopping.ignore_eos:
            config.stop_token_ids = sorted({*own, *template_ids, *(config.stop_token_ids or ())})
        elif own:
            config.stop_token_ids, config.ignore_eos = sorted(own), False

    def _on_output(self, live: _Live, output: Any) -> None:
        event = live.reader.read(output)
        if event.end is None:
            self._emit(event)
            return
        self._end(live, event)
        if live.reader.stopped_early:
            self._spawn(self._release(live))

    def _end(self, live: _Live, event: EngineEvent) -> None:
        live.ended = True
        self._live.pop(live.request.request_id, None)
        self._emit(event)

    def _emit(self, event: EngineEvent) -> None:
        if not self._events:  # those of the same step are read in this turn of the loop
            asyncio.get_running_loop().call_soon(self._flush)
        self._events.append(event)

    def _flush(self) -> None:
        events, self._events = self._events, []
        if events and self._sink is not None:
            self._sink(events, self._clock.now_s())

    async def _release(self, live: _Live) -> None:
        """Lets LMDeploy stop working on a request, waiting or running."""
        if self.options.patched or live.session._handle is not None:
            await live.session.async_abort()
        elif live.task is not None:  # as released, a wait ends with its task alone
            live.task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


__all__ = ["Device", "LmdeployEngine", "LmdeployOptions"]
