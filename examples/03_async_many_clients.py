"""Two kinds of users on one engine: chat wants its first token soon, batch work wants to be done at some point.

The server orders them; nobody here waits for anybody else.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from example_server import server

from lmdeploy_slo.client import AsyncClient, Completion


async def chat(client: AsyncClient) -> Completion:
    async with client.stream("Hi!", task_type="chat", ttft_ms=1000, tpot_ms=50, max_new_tokens=32) as stream:
        async for _chunk in stream:
            pass  # a real program shows it
    return stream.completion


async def summarise(client: AsyncClient) -> Completion:
    answer = await client.generate(
        "Summarise: " + "word " * 200, task_type="batch", e2e_ms=20_000, max_new_tokens=128, expected_output_tokens=100
    )
    return answer.completion


async def main(target: str) -> None:
    async with AsyncClient(target) as client:
        kinds = ["chat", "batch"] * 30
        calls = [chat(client) if kind == "chat" else summarise(client) for kind in kinds]
        completions = await asyncio.gather(*calls)
        met = Counter(kind for kind, completion in zip(kinds, completions, strict=True) if completion.slo_met)
        for kind in ("chat", "batch"):
            print(f"{kind}: {met[kind]} of {kinds.count(kind)} met their SLO")
        load = await client.load()
        print(f"the server finished {load.finished} requests and made {load.plans} plans")


with server() as target:
    asyncio.run(main(target))
