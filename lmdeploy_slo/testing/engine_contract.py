"""What every engine must do, as a pytest suite: timing-free, and usable by engines outside this package.

    class TestMyEngine(EngineContract):
        async def make_engine(self) -> Engine:
            return MyEngine(...)          # not started; a small max_batch_size keeps the suite quick

Needs pytest-asyncio in auto mode. `pytest.register_assert_rewrite("lmdeploy_slo.testing.engine_contract")` in a
conftest.py makes its failures tell what was compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from lmdeploy_slo.core.request import FinishReason
from lmdeploy_slo.engine.base import Engine, EngineRequest, Sampling, Stopping
from lmdeploy_slo.errors import EngineUnavailable, InvalidRequest
from lmdeploy_slo.testing.event_log import EventLog


class EngineContract:
    """Subclass it, name the class `Test...`, and say how an engine is made."""

    patience_s = 60.0
    """How long the suite waits for an event before it gives up, seconds; no test depends on it when all is well."""

    long_output_tokens = 2000
    """So long that a request cannot end before it is aborted; prompt and output must fit into the engine."""

    async def make_engine(self) -> Engine:
        """A new engine, not started."""
        raise NotImplementedError

    def prompt(self, engine: Engine) -> list[int]:
        """A prompt the engine takes."""
        return engine.tokenizer.encode("Count from one to ten.")

    def text_of(self, engine: Engine, token_ids: Sequence[int]) -> str:
        """The text that should have been streamed for these tokens."""
        return engine.tokenizer.decode(token_ids)

    def request(self, engine: Engine, request_id: str, tokens: int, sampling: Sampling | None = None) -> EngineRequest:
        """A request that ends after exactly `tokens` tokens, with LENGTH."""
        stopping = Stopping(max_new_tokens=tokens, min_new_tokens=tokens, ignore_eos=True)
        return EngineRequest(request_id, self.prompt(engine), stopping, sampling or Sampling(temperature=0.0))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[tuple[Engine, EventLog]]:
        """A started engine with its log; afterwards it is closed and nothing may have broken the protocol."""
        engine = await self.make_engine()
        log = EventLog(self.patience_s)
        await engine.start(log.sink)
        try:
            yield engine, log
        finally:
            await engine.close()
        await _turns()
        assert log.violations == []
        assert engine.load().in_flight == 0

    async def start_long(self, engine: Engine, log: EventLog, *request_ids: str) -> None:
        """Submits long requests and waits until each has begun to generate."""
        for rank, request_id in enumerate(request_ids):
            engine.submit(self.request(engine, request_id, self.long_output_tokens), rank)
        for request_id in request_ids:
            await log.tokens(request_id, 1)

    # -- what it says of itself -----------------------------------------------

    async def test_describes_itself(self) -> None:
        async with self.running() as (engine, _):
            info, load = engine.info, engine.load()
            assert info.name
            assert info.model
            assert info.limits.max_batch_size >= 1
            assert info.max_session_tokens is None or info.max_session_tokens > 1
            assert info.vocab_size is None or all(0 <= i < info.vocab_size for i in self.prompt(engine))
            assert (load.in_flight, load.active) == (0, 0)
            assert load.kv_usage is None or 0 <= load.kv_usage <= 1

    async def test_text_survives_the_tokenizer(self) -> None:
        async with self.running() as (engine, _):
            ids = engine.tokenizer.encode("plain words")
            assert "plain words" in engine.tokenizer.decode(ids)

    # -- generating -----------------------------------------------------------

    @pytest.mark.parametrize("tokens", [1, 2, 17])
    async def test_one_request_ends_once_with_all_its_tokens(self, tokens: int) -> None:
        async with self.running() as (engine, log):
            engine.submit(self.request(engine, "a", tokens), 0)
            assert engine.load().in_flight == 1
            await log.ended("a")
            assert len(log.token_ids("a")) == tokens
            assert log.end("a") is FinishReason.LENGTH
            assert log.text("a") == self.text_of(engine, log.token_ids("a"))
            assert engine.load().in_flight == 0

    async def test_many_at_once_each_get_their_own_tokens(self) -> None:
        async with self.running() as (engine, log):
            wanted = {f"r{n}": 1 + n % 7 for n in range(3 * engine.info.limits.max_batch_size + 1)}
            for rank, (request_id, tokens) in enumerate(wanted.items()):
                engine.submit(self.request(engine, request_id, tokens), rank)
            assert engine.load().in_flight == len(wanted)
            await log.ended(*wanted)
            assert log.request_ids() == wanted.keys()
            assert {i: len(log.token_ids(i)) for i in wanted} == wanted
            assert all(log.text(i) == self.text_of(engine, log.token_ids(i)) for i in wanted)

    async def test_requests_may_come_while_others_run(self) -> None:
        async with self.running() as (engine, log):
            await self.start_long(engine, log, "long")
            engine.submit(self.request(engine, "short", 3), 0)
            await log.ended("short")
            assert len(log.token_ids("short")) == 3
            engine.abort("long")
            await log.ended("long")

    async def test_an_id_may_be_used_again_after_its_end(self) -> None:
        async with self.running() as (engine, log):
            engine.submit(self.request(engine, "a", 2), 0)
            await log.ended("a")
            log.forget("a")
            engine.submit(self.request(engine, "a", 3), 0)
            await log.ended("a")
            assert len(log.token_ids("a")) == 3

    async def test_what_it_cannot_do_is_refused_and_leaves_nothing_behind(self) -> None:
        async with self.running() as (engine, log):
            request = self.request(engine, "a", 4, Sampling(temperature=0.0, logprobs=2))
            if engine.unsupported_fields(request):
                with pytest.raises(InvalidRequest):
                    engine.submit(request, 0)
                await _turns()
                assert log.calls == []
                assert engine.load().in_flight == 0
            else:
                engine.submit(request, 0)
                await log.ended("a")
                assert sum(len(event.logprobs or ()) for event in log.events("a")) == 4

    # -- abort ----------------------------------------------------------------

    async def test_abort_right_after_submit(self) -> None:
        async with self.running() as (engine, log):
            engine.submit(self.request(engine, "a", self.long_output_tokens), 0)
            engine.abort("a")
            await log.ended("a")
            assert log.end("a") is FinishReason.ABORT
            assert engine.load().in_flight == 0

    async def test_abort_while_running(self) -> None:
        async with self.running() as (engine, log):
            await self.start_long(engine, log, "a", "b")
            engine.abort("a")
            await log.ended("a")
            assert log.end("a") is FinishReason.ABORT
            assert not log.has_ended("b")
            engine.abort("b")
            await log.ended("b")
            assert engine.load().in_flight == 0

    async def test_abort_while_waiting_for_a_slot(self) -> None:
        async with self.running() as (engine, log):
            runners = [f"r{n}" for n in range(engine.info.limits.max_batch_size)]
            await self.start_long(engine, log, *runners)
            engine.submit(self.request(engine, "waits", 5), len(runners))
            engine.abort("waits")
            await log.ended("waits")
            assert log.end("waits") is FinishReason.ABORT
            assert log.token_ids("waits") == []
            for request_id in runners:
                engine.abort(request_id)
            await log.ended(*runners)

    async def test_an_aborted_slot_is_free_again(self) -> None:
        async with self.running() as (engine, log):
            runners = [f"r{n}" for n in range(engine.info.limits.max_batch_size)]
            await self.start_long(engine, log, *runners)
            engine.submit(self.request(engine, "next", 2), len(runners))
            engine.abort(runners[0])
            await log.ended("next")
            assert log.end("next") is FinishReason.LENGTH
            for request_id in runners[1:]:
                engine.abort(request_id)
            await log.ended(*runners)

    async def test_abort_of_unknown_ended_and_aborted_ids_changes_nothing(self) -> None:
        async with self.running() as (engine, log):
            engine.abort("nobody")
            engine.submit(self.request(engine, "a", 2), 0)
            await log.ended("a")
            engine.abort("a")
            engine.submit(self.request(engine, "b", self.long_output_tokens), 0)
            engine.abort("b")
            engine.abort("b")
            await log.ended("b")
            await _turns()
            assert log.request_ids() == {"a", "b"}
            assert log.end("a") is FinishReason.LENGTH

    # -- rank -----------------------------------------------------------------

    async def test_rerank_loses_nobody_and_ignores_unknown_ids(self) -> None:
        async with self.running() as (engine, log):
            ids = [f"r{n}" for n in range(2 * engine.info.limits.max_batch_size)]
            for rank, request_id in enumerate(ids):
                engine.submit(self.request(engine, request_id, 3), rank)
            engine.rerank({request_id: -rank for rank, request_id in enumerate(ids)})
            engine.rerank({"nobody": 0})
            await log.ended(*ids)
            engine.rerank({ids[0]: 1})
            assert all(len(log.token_ids(i)) == 3 for i in ids)

    # -- close ----------------------------------------------------------------

    async def test_close_ends_everything_with_unavailable(self) -> None:
        async with self.running() as (engine, log):
            await self.start_long(engine, log, "runs")
            engine.submit(self.request(engine, "new", self.long_output_tokens), 1)
            await engine.close()
            await log.ended("runs", "new")
            assert isinstance(log.error("runs"), EngineUnavailable)
            assert isinstance(log.error("new"), EngineUnavailable)
            assert engine.load().in_flight == 0

    async def test_after_close_submit_raises_and_close_does_nothing(self) -> None:
        async with self.running() as (engine, log):
            await engine.close()
            await engine.close()
            with pytest.raises(EngineUnavailable):
                engine.submit(self.request(engine, "a", 1), 0)
            engine.abort("a")
            engine.rerank({"a": 1})
            await _turns()
            assert log.calls == []

    async def test_ended_requests_are_not_ended_again_by_close(self) -> None:
        async with self.running() as (engine, log):
            engine.submit(self.request(engine, "done", 2), 0)
            await log.ended("done")
            engine.submit(self.request(engine, "aborted", self.long_output_tokens), 0)
            engine.abort("aborted")
            await engine.close()
            await log.ended("aborted")
            assert log.end("done") is FinishReason.LENGTH
            assert log.end("aborted") is FinishReason.ABORT


async def _turns(count: int = 10) -> None:
    """Lets what is due on the loop happen."""
    for _ in range(count):
        await asyncio.sleep(0)
