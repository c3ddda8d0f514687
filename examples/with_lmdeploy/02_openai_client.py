"""The openai client against `lmdeploy_slo serve MODEL --http-port 8000`: SLOs in headers or in the body.

    python 02_openai_client.py [HOST:PORT]

Without HOST:PORT it starts a server with a tiny random model, whose text means nothing.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from openai import AsyncOpenAI

from lmdeploy_slo.app import serving
from lmdeploy_slo.config import load
from lmdeploy_slo.engine.tiny_model import write_tiny_model


async def talk(address: str) -> None:
    client = AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none")
    model = (await client.models.list()).data[0].id

    answer = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=32,
        extra_headers={"x-llm-d-slo-ttft-ms": "500", "x-llm-d-slo-tpot-ms": "50", "x-task-type": "chat"},
    )
    print(repr(answer.choices[0].message.content))

    stream = await client.completions.create(
        model=model,
        prompt="Once upon a time",
        max_tokens=32,
        stream=True,
        extra_body={"slo": {"e2e_ms": 5000}, "expected_output_tokens": 32, "priority": 1},
    )
    async for chunk in stream:
        print(chunk.choices[0].text, end="", flush=True)
    print()


async def main(address: str | None) -> None:
    if address is not None:
        await talk(address)
        return
    with tempfile.TemporaryDirectory() as directory:
        write_tiny_model(Path(directory))
        flags = {"engine.model": directory, "server.port": 0, "server.http_port": 0}
        async with serving(load(flags=flags)) as server:
            print(f"serving on {server}")
            assert server.http_address is not None
            await talk(server.http_address)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else None))
