"""The server inside a program that has an event loop of its own, as in a test or a notebook."""

import asyncio

from lmdeploy_slo.app import serving
from lmdeploy_slo.client import AsyncClient
from lmdeploy_slo.config import Config

config = Config.model_validate(
    {
        "server": {"port": 0},
        "engine": {"profile": "h200-qwen2.5-7b"},
        "tasks": {"chat": {"ttft_ms": 1000, "tpot_ms": 50}},  # for requests of this task that carry no SLO
    }
)


async def main() -> None:
    async with serving(config) as server, AsyncClient(server.address) as client:
        model = await client.model_info()
        print(f"{server.address} serves {model.model} with {(await client.server_info()).policy}")
        answer = await client.generate("Hi", task_type="chat", max_new_tokens=16)
        print(answer.text)
        print(f"held to {answer.completion.slo}, met: {answer.completion.slo_met}")


asyncio.run(main())
