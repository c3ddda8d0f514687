"""The same burst under two policies: first come, first served against simulated annealing.

More work arrives at once than the engine can run at a time, long requests among short ones.
"""

from __future__ import annotations

import asyncio

from example_server import started_server

from lmdeploy_slo.client import AsyncClient, Completion


async def send(client: AsyncClient, tokens: int, e2e_ms: float) -> Completion:
    answer = await client.generate(
        "Do some work.", max_new_tokens=tokens, expected_output_tokens=tokens, ignore_eos=True, e2e_ms=e2e_ms
    )
    return answer.completion


async def burst(target: str) -> list[Completion]:
    async with AsyncClient(target) as client:
        long_and_short = [(100, 6000.0), (10, 800.0)] * 20
        return await asyncio.gather(*(send(client, tokens, e2e_ms) for tokens, e2e_ms in long_and_short))


print(f"{'policy':<10} {'SLO met':>8} {'mean E2E':>10}")
for policy in ("fcfs", "annealing"):
    with started_server("--policy", policy, "--max-batch-size", "8") as target:
        completions = asyncio.run(burst(target))
    met = sum(completion.slo_met is True for completion in completions)
    mean_ms = sum(completion.timing.e2e_ms or 0.0 for completion in completions) / len(completions)
    print(f"{policy:<10} {met:>3} of {len(completions)} {mean_ms:>7.0f} ms")
