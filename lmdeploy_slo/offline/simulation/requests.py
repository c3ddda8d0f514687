"""Requests as the simulator takes them: what the scheduler may know, and apart from it what only the engine may."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.offline.workload import OfferedRequest


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """A request with its true output length, which goes to the engine alone. `spec.arrival_at_s` is when it arrives.

    cached_tokens: of its prompt, found in the prefix cache whatever was served before. prefix_blocks: block ids of its
    prompt, for a simulated prefix cache.
    """

    spec: RequestSpec
    output_tokens: int
    cached_tokens: int = 0
    prefix_blocks: tuple[int, ...] = ()


def simulated_requests(offered: Iterable[OfferedRequest]) -> Iterator[SimulatedRequest]:
    """The same requests, one after the other, as a server would get them from the replayer.

    Requests whose prompts begin with the same block are turns of one conversation, and say so.
    """
    for request in offered:
        spec = RequestSpec(
            request_id=str(request.index),
            arrival_at_s=request.due_s,
            prompt_tokens=request.prompt_tokens,
            max_new_tokens=request.max_new_tokens,
            slo=request.slo,
            expected_output_tokens=request.expected_output_tokens,
            task_type=request.task,
            conversation_id=str(request.prefix_blocks[0]) if request.prefix_blocks else "",
        )
        output_tokens = min(request.output_tokens, request.max_new_tokens)
        yield SimulatedRequest(spec, output_tokens, prefix_blocks=request.prefix_blocks)
