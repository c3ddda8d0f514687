"""A gateway over gRPC as the profiler's target.

Durations from the engine's getting a request to its first token, and from there to its last, are those that the gateway
measured itself and tells with the last message: neither the network nor the flush interval of the stream is in them.
When tokens of different requests came is told by the messages: a first token is sent at once, whatever the interval.

A request that is not watched is not streamed: hundreds of streams of which nobody reads the tokens would keep client
and gateway from measuring anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from lmdeploy_slo.client import AsyncClient
from lmdeploy_slo.client.channel import OPEN_ACCESS, Access
from lmdeploy_slo.client.request import GenerateOptions
from lmdeploy_slo.client.results import Completion
from lmdeploy_slo.client.retry import NO_RETRY
from lmdeploy_slo.clock import Clock
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.errors import SloError
from lmdeploy_slo.offline.profiler.target import Answer, TargetInfo

TASK = "lmdeploy_slo-profile"
"""Task of all requests: what the gateway learns of lengths from them stays with them."""

JITTER_S = 0.003
"""Within this the first tokens of one pass come in, one message after the other."""


class ClientTarget:
    """See the module and `target`; made by `client_target`."""

    def __init__(self, client: AsyncClient, info: TargetInfo, clock: Clock) -> None:
        self._client = client
        self._info = info
        self._clock = clock

    @property
    def info(self) -> TargetInfo:
        return self._info

    def send(self, prompt: Sequence[int], output_tokens: int, *, watched: bool = True) -> _ClientCall:
        options: GenerateOptions = {
            "max_new_tokens": output_tokens,
            "min_new_tokens": output_tokens,
            "ignore_eos": True,
            "task_type": TASK,
            "emulated_output_tokens": output_tokens if self._info.synthetic else None,
        }
        return _ClientCall(self._client, prompt, options, self._clock, watched)

    async def in_flight(self) -> tuple[int, int]:
        load = await self._client.load()
        return load.in_flight, load.waiting


@asynccontextmanager
async def client_target(address: str, clock: Clock, access: Access = OPEN_ACCESS) -> AsyncIterator[ClientTarget]:
    """The gateway at HOST:PORT; raises SloError where it cannot be reached or does not say what it is."""
    async with AsyncClient(
        address,
        credentials=access.credentials,
        token=access.token,
        insecure=access.insecure,
        retry=NO_RETRY,
        clock=clock,
    ) as client:
        try:
            model, server = await client.model_info(), await client.server_info()
        except SloError as error:
            raise SloError(f"--target {address}: {error}") from error
        info = TargetInfo(
            engine=model.engine,
            model=model.model,
            synthetic=model.synthetic,
            limits=EngineLimits(model.max_batch_size, model.max_prefill_tokens, model.kv_tokens),
            max_session_tokens=model.max_session_tokens,
            vocab_size=model.vocab_size,
            policy=server.policy,
            versions=server.versions,
            jitter_s=JITTER_S,
        )
        yield ClientTarget(client, info, clock)


class _ClientCall:
    """A request of a `ClientTarget`, carried out by a task of its own."""

    def __init__(
        self, client: AsyncClient, prompt: Sequence[int], options: GenerateOptions, clock: Clock, watched: bool
    ) -> None:
        self._clock = clock
        self._first: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._sent_at_s = clock.now_s()
        work = self._watch(client, prompt, options) if watched else self._wait(client, prompt, options)
        self._task = asyncio.ensure_future(work)
        self._task.add_done_callback(self._on_end)

    @property
    def sent_at_s(self) -> float:
        return self._sent_at_s

    @property
    def ended(self) -> bool:
        return self._task.done()

    @property
    def generated(self) -> int | None:
        return None

    async def first_token_at_s(self) -> float:
        return await asyncio.shield(self._first)

    async def answer(self) -> Answer:
        return await asyncio.shield(self._task)

    def cancel(self) -> None:
        self._task.cancel()

    async def _watch(self, client: AsyncClient, prompt: Sequence[int], options: GenerateOptions) -> Answer:
        first_at_s = last_at_s = self._sent_at_s
        async with client.stream(prompt, **options) as stream:
            async for chunk in stream:
                last_at_s = self._clock.now_s()
                if chunk.token_ids and not self._first.done():
                    first_at_s = last_at_s
                    self._first.set_result(first_at_s)
            return _answer(stream.completion, first_at_s - self._sent_at_s, last_at_s - first_at_s)

    async def _wait(self, client: AsyncClient, prompt: Sequence[int], options: GenerateOptions) -> Answer:
        answer = await client.generate(prompt, **options)
        return _answer(answer.completion, 0.0, self._clock.now_s() - self._sent_at_s)

    def _on_end(self, task: asyncio.Task[Answer]) -> None:
        failure: BaseException | None = None
        with suppress(asyncio.CancelledError):
            failure = task.exception()  # asked for here, so that nobody need ask
        if not self._first.done():
            self._first.set_exception(failure or SloError("the request ended without a token"))
            self._first.exception()


def _answer(completion: Completion, seen_prefill_s: float, seen_decode_s: float) -> Answer:
    """By the gateway's clock; by the client's where the gateway does not say."""
    timing = completion.timing
    if timing.ttft_ms is None or timing.e2e_ms is None or timing.queue_ms is None:
        return Answer(completion.usage.output_tokens, seen_prefill_s, seen_prefill_s, seen_decode_s)
    return Answer(
        completion.usage.output_tokens,
        timing.ttft_ms / 1e3,
        (timing.ttft_ms - timing.queue_ms) / 1e3,
        (timing.e2e_ms - timing.ttft_ms) / 1e3,
    )
