"""LMDeploy's AsyncEngine with the scheduler in front: what `preprocess` prepared, `generate` submits to the runtime.

    LMDeploy's Pipeline or HTTP routes -> preprocess (LMDeploy's own) -> generate -> runtime -> policy -> engine
        -> LMDeploy's own generate -> outputs, as LMDeploy makes them -> the caller

Everything else is the AsyncEngine's. Stop words are looked for in the text, so they may be longer than one token.
Tokens always stream inside, so that TTFT and TPOT are known; a caller that wants one output gets them merged.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from lmdeploy_slo.core.clients import clamp
from lmdeploy_slo.core.request import ClientId, PriorityClass, RequestSpec
from lmdeploy_slo.engine.base import EngineRequest, Stopping
from lmdeploy_slo.engine.lmdeploy_prepared import PreparedRequest
from lmdeploy_slo.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    QueueTimeout,
    Rejected,
    RequestError,
)
from lmdeploy_slo.frontend.gate import current_call
from lmdeploy_slo.frontend.terms import Terms, current_terms
from lmdeploy_slo.runtime.runtime import Runtime
from lmdeploy_slo.runtime.stream import Delta

_TOO_MANY_REQUESTS = 429
_GATEWAY_TIMEOUT = 504


class ScheduledEngine:
    """Stands in for an AsyncEngine of LMDeploy, on the loop of `runtime`, whose engine is built on that AsyncEngine."""

    def __init__(self, async_engine: Any, runtime: Runtime) -> None:
        self._async_engine = async_engine
        self._runtime = runtime
        self._numbers = itertools.count(1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._async_engine, name)

    def close(self) -> None:
        """Nothing: who built the AsyncEngine closes it."""

    def start_loop(self, loop: asyncio.AbstractEventLoop, use_async_api: bool = False) -> bool:
        """The runtime has started it already, on its own loop."""
        return True

    async def preprocess(
        self, messages: Any, session_id: Any, gen_config: Any = None, *, terms: Terms | None = None, **kwargs: Any
    ) -> Any:
        """As AsyncEngine.preprocess. terms: else those of the current context.

        Raises LMDeploy's RequestError where a limit refuses it already."""
        arrival_at_s = self._runtime.clock.now_s()
        terms = terms or current_terms.get()
        self._check_limits(terms)
        stops: tuple[str, ...] = ()
        if gen_config is not None and gen_config.stop_words:
            stops = tuple(gen_config.stop_words)
            gen_config = copy.copy(gen_config)
            gen_config.stop_words = None
        request = await self._async_engine.preprocess(messages, session_id, gen_config=gen_config, **kwargs)
        self._keep_special_stops(request.gen_config, stops)
        request.session.slo_intake = (arrival_at_s, terms, stops)
        return request

    def _client(self, terms: Terms) -> ClientId:
        call = current_call.get()
        policies = self._runtime.limiter.policies()
        return policies.client_of(None if call is None else call.name, terms.fairness_id)

    def _check_limits(self, terms: Terms) -> None:
        """Before the prompt costs anything. What is let in here enters when it is submitted."""
        runtime = self._runtime
        try:
            runtime.enter(self._client(terms), PriorityClass.DEFAULT).leave(0, runtime.clock.now_s())
        except RequestError as refusal:
            runtime.journal.refused(refusal, task_type=terms.task_type, with_slo=terms.slo.has_objective)
            raise _refused(refusal) from refusal

    async def generate(self, request: Any, stream_response: bool = True) -> AsyncIterator[Any]:
        """As AsyncEngine.generate; the last output also has `timing` (core.slo.Timing) and `slo_met`.

        Raises LMDeploy's RequestError. Closing it, or cancelling its task, ends the request.
        """
        outputs = _Outputs()
        request_id = f"lmdeploy-{next(self._numbers)}"
        session = request.session
        arrival_at_s, terms, stops = session.slo_intake
        client = self._client(terms)
        claimed = RequestSpec(
            request_id,
            client=client,
            arrival_at_s=arrival_at_s,
            prompt_tokens=request.input_token_len,
            max_new_tokens=max(1, request.gen_config.max_new_tokens),
            slo=terms.slo,
            expected_output_tokens=terms.expected_output_tokens,
            task_type=terms.task_type,
            fairness_id=terms.fairness_id,
            conversation_id=terms.conversation_id,
            priority=request.gen_config.priority,
        )
        spec, _ = clamp(claimed, self._runtime.limiter.policies().of(client))
        work = EngineRequest(
            request_id,
            request.inputs["input_ids"],
            Stopping(max_new_tokens=spec.max_new_tokens),
            prepared=PreparedRequest(request, stops, outputs.put),
        )
        try:
            stream = self._runtime.submit(spec, work)
        except RequestError as refusal:
            self._async_engine.session_mgr.remove(session)
            raise _refused(refusal) from refusal
        ending = asyncio.ensure_future(stream.result())
        ending.add_done_callback(outputs.close)
        session.slo_abort = lambda: self._abort(session, request_id)
        try:
            merged = None
            async for output in outputs:
                if stream_response:
                    yield output
                else:
                    merged = _merge(merged, output)
            last = self._last_output(request, outputs.last, ending)
            yield last if merged is None else _merge(merged, last)
        finally:
            session.slo_abort = None
            if not ending.done():
                self._runtime.abort(request_id)
            await asyncio.wait([ending])
            if not ending.cancelled():
                ending.exception()
            self._async_engine.session_mgr.remove(session)

    # -- inside ---------------------------------------------------------------

    def _keep_special_stops(self, config: Any, stops: tuple[str, ...]) -> None:
        """Stop words that are special tokens are not in the text: they stay tokens. LMDeploy forgets those of the
        chat template where a request has its own."""
        tokenizer = self._runtime.engine.tokenizer
        special = [tokenizer.special_token(stop) for stop in stops]  # type: ignore[attr-defined]
        own = {token for token in special if token is not None}
        template = self._async_engine.stop_words or ()
        if own or not config.ignore_eos:
            config.stop_token_ids = sorted({*own, *template, *(config.stop_token_ids or ())})

    def _abort(self, session: Any, request_id: str) -> None:
        session.slo_abort = None
        self._runtime.abort(request_id)

    def _last_output(self, request: Any, last: Any, ending: asyncio.Future[Delta]) -> Any:
        """The output that ends the request, with how it went."""
        error = ending.exception()
        aborted = isinstance(error, Cancelled) or (last is not None and last.finish_reason == "abort")
        if aborted:
            return last if last is not None and last.finish_reason == "abort" else _aborted_output(request)
        if error is not None:
            raise _as_lmdeploy_error(error) from error
        completion = ending.result().completion
        if completion is not None and last is not None:
            last.timing, last.slo_met = completion.timing, completion.slo_met
        return last


class _Outputs:
    """Outputs on their way from the engine to one reader; the last is held back until the request has ended."""

    def __init__(self) -> None:
        self._ready: deque[Any] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False
        self.last: Any = None

    def put(self, output: Any) -> None:
        if output.finish_reason is None:
            self._ready.append(output)
            self._wake()
        else:
            self.last = output

    def close(self, ending: asyncio.Future[Delta]) -> None:
        self._closed = True
        self._wake()

    def __aiter__(self) -> _Outputs:
        return self

    async def __anext__(self) -> Any:
        while not self._ready:
            if self._closed:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._ready.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _merge(whole: Any, output: Any) -> Any:
    """One output with the text and tokens of both, and the rest of the later one."""
    if whole is None:
        return output
    output.response = whole.response + (output.response or "")
    output.token_ids = [*(whole.token_ids or ()), *(output.token_ids or ())]
    if whole.logprobs is not None or output.logprobs is not None:
        output.logprobs = [*(whole.logprobs or ()), *(output.logprobs or ())]
    for name in ("logits", "last_hidden_state"):  # LMDeploy gives those of all tokens so far
        if getattr(output, name) is None:
            setattr(output, name, getattr(whole, name))
    return output


def _aborted_output(request: Any) -> Any:
    from lmdeploy.serve.core.async_engine import GenOut

    return GenOut("", request.input_token_len, 0, "abort", token_ids=[])


def _refused(refusal: RequestError) -> Exception:
    """The same as LMDeploy says it; the HTTP call, where there is one, learns when to come back."""
    call = current_call.get()
    if call is not None and isinstance(refusal, Rejected):
        call.retry_after_s = refusal.retry_after_s
    return _as_lmdeploy_error(refusal)


def _as_lmdeploy_error(error: BaseException) -> Exception:
    """The RequestError of LMDeploy that says the same; too many requests and time-outs keep their HTTP status."""
    from lmdeploy.serve.core.exceptions import ErrorCode
    from lmdeploy.serve.core.exceptions import RequestError as LmdeployError

    code, status = ErrorCode.INTERNAL_ERROR, None
    if isinstance(error, InvalidRequest):
        code = ErrorCode.INVALID_REQUEST
    elif isinstance(error, Rejected):
        code, status = ErrorCode.ENGINE_UNAVAILABLE, _TOO_MANY_REQUESTS
    elif isinstance(error, (QueueTimeout, DeadlineExceeded)):
        code, status = ErrorCode.REQUEST_CANCELLED, _GATEWAY_TIMEOUT
    elif isinstance(error, (Draining, EngineUnavailable)):
        code = ErrorCode.ENGINE_UNAVAILABLE
    elif isinstance(error, EngineError) and error.code in set(ErrorCode):
        code = ErrorCode(error.code)
    told: Any = LmdeployError(code, str(error) if isinstance(error, RequestError) else None)
    if status is not None:
        told.status_code = status
    result: Exception = told
    return result
