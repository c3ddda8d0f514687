"""Requests over gRPC, half of them aborted at random moments: nothing of them stays, and the counters add up."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from lmdeploy_slo.app import serving
from lmdeploy_slo.config import load
from lmdeploy_slo.core.request import EndStatus
from lmdeploy_slo.runtime.observer import AppliedPlan, EndedRequest, Refusal
from lmdeploy_slo.v1 import inference_pb2 as pb
from lmdeploy_slo.v1 import inference_pb2_grpc

PLACES, AT_ONCE, TOKENS = 8, 48, 12
MOMENTS = ("at once", "soon", "at a token", "after the end")
FDS = Path("/proc/self/fd")


@dataclass
class Ends:
    """An observer: how far requests had come when they were cancelled."""

    stages: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)

    def on_end(self, ended: EndedRequest) -> None:
        self.seen[ended.spec.request_id] += 1
        if ended.status is EndStatus.CANCELLED:
            timing = ended.timing
            sent, began = timing.dispatched_at_s is not None, timing.first_token_at_s is not None
            self.stages["decode" if began else "prefill" if sent else "queue"] += 1

    def on_refusal(self, refusal: Refusal) -> None:
        self.stages[f"refused: {refusal.reason}"] += 1

    def on_plan(self, applied: AppliedPlan) -> None:
        pass


def open_files() -> int:
    """0 where the system does not tell."""
    return len(list(FDS.iterdir())) if FDS.exists() else 0


async def soak(requests: int, profile: Path) -> None:
    flags = {
        "server.port": 0,
        "engine.profile": str(profile),
        "engine.max_batch_size": PLACES,
        "engine.max_prefill_tokens": 64,  # a prompt takes several steps
        "engine.kv_tokens": 4000,
        "scheduler.policy": "fcfs",
        "observability.explain_requests": 100,
        "stream.flush_interval_ms": 0.0,
    }
    draw, ends, outcomes = random.Random(7), Ends(), Counter[str]()
    async with serving(load(environ={}, flags=flags)) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        runtime = server.runtime
        runtime.journal.watch(ends)
        prompt = pb.TokenIds(ids=[300] * 100)

        async def one(number: int) -> None:
            name = f"r{number}"
            message = pb.GenerateRequest(request_id=name, token_ids=prompt)
            message.stopping.max_new_tokens = message.emulation.output_tokens = TOKENS
            moment = draw.choice(MOMENTS) if number % 2 else None
            by_call, left = draw.random() < 0.5, draw.randint(1, TOKENS)
            call = stub.GenerateStream(message)

            async def abort() -> None:
                if by_call and not call.done():
                    call.cancel()
                else:
                    await stub.Abort(pb.AbortRequest(request_id=name))

            try:
                if moment == "at once":
                    await abort()
                elif moment == "soon":
                    await asyncio.sleep(draw.uniform(0.0, 0.03))
                    await abort()
                async for _ in call:
                    left -= 1
                    if moment == "at a token" and left == 0:
                        await abort()
                outcomes["ran to its end"] += 1
                if moment == "after the end":
                    await abort()
            except asyncio.CancelledError:
                assert by_call
                outcomes["call cancelled"] += 1
            except grpc.aio.AioRpcError as error:
                outcomes[error.code().name] += 1

        async def some(numbers: range) -> None:
            for number in numbers:
                await one(number)

        async def settle() -> tuple[int, int]:
            """Tasks and file descriptors once nothing is here any more."""
            while runtime._live or runtime.replicas[0].leaving:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            for _ in range(3):  # what grpc and the kernel still have to say of cancelled calls
                await asyncio.sleep(0.05)
                gc.collect()
            return len(asyncio.all_tasks()), open_files()

        await some(range(20))
        before = await settle()
        await asyncio.gather(*(some(range(20 + lane, requests, AT_ONCE)) for lane in range(AT_ONCE)))
        after = await settle()

        load_now, limits, engine = runtime.load(), runtime.limiter.statistics(), runtime.engine.load()
        assert after == before, "(tasks, file descriptors) before and after"
        assert load_now.waiting == load_now.in_flight == load_now.waiting_prompt_tokens == 0
        assert (limits.open, limits.queued_requests, limits.queued_tokens) == (0, 0, 0)
        assert (engine.in_flight, engine.active, engine.kv_tokens_used) == (0, 0, 0)
        assert not runtime._live and not runtime._by_handle
        assert not runtime.replicas[0].in_engine and not runtime.replicas[0].leaving
        assert set(ends.seen.values()) == {1}, "each ended once"
        # A call that is cancelled at once may never have reached the server.
        arrived = sum(load_now.ended.values())
        assert arrived == len(ends.seen) <= requests
        assert outcomes.total() == requests
        assert requests - arrived <= outcomes["call cancelled"]
        assert load_now.ended[EndStatus.FINISHED] + load_now.ended[EndStatus.CANCELLED] == arrived
        assert load_now.ended[EndStatus.FINISHED] >= outcomes["ran to its end"]
        assert min(ends.stages[stage] for stage in ("queue", "prefill", "decode")) > 0
        print(f"{arrived} of {requests} arrived; {dict(outcomes)}; cancelled in {dict(ends.stages)}; {after}")


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "soak.json"
    step_ms = {"c0": 0.5, "p1": 0.001, "p2": 0.0, "d1": 0.01, "d2": 0.0}
    path.write_text(json.dumps({"format": 1, "name": "soak", "step_ms": step_ms}))
    return path


async def test_a_thousand_requests_half_of_them_aborted(profile: Path) -> None:
    await soak(1000, profile)


@pytest.mark.nightly
async def test_twenty_thousand_requests_half_of_them_aborted(profile: Path) -> None:
    await soak(20_000, profile)
