"""Going on in another engine: the tokens a request has shown become the end of its prompt.

Greedy output goes on as it would have: the next token depends on the tokens before it alone. Sampled output goes on
validly, with other draws, also where a seed was given. A stop text that began before the engine was gone and would have
ended after it is not recognised, the text that was held back for it is not shown (its token ids are), and a character
of several tokens that was cut in two is shown as far as it came.
"""

from __future__ import annotations

from dataclasses import replace

from lmdeploy_slo.core.request import RequestSpec
from lmdeploy_slo.engine.base import EngineRequest
from lmdeploy_slo.runtime.live import Live

AT_ONCE = -1
"""Priority of who goes on: before whatever LMDeploy's own priorities say."""


def can_resume(live: Live) -> bool:
    """Whether its tokens were kept, and there are more to come."""
    return live.generated is not None and 0 < len(live.generated) < live.spec.max_new_tokens


def resumed_request(live: Live) -> EngineRequest:
    """What the next engine is given, of a request of which `can_resume`."""
    request, generated = live.request, live.generated
    assert generated is not None
    new = generated[live.resumed_tokens :]
    stopping, emulated = request.stopping, request.emulated_output_tokens
    return replace(
        request,
        prompt_token_ids=[*request.prompt_token_ids, *new],
        generated_tokens=len(generated),
        stopping=replace(
            stopping,
            max_new_tokens=stopping.max_new_tokens - len(new),
            min_new_tokens=max(0, stopping.min_new_tokens - len(new)),
        ),
        emulated_output_tokens=None if emulated is None else max(1, emulated - len(new)),
    )


def resumed_spec(live: Live) -> RequestSpec:
    """What the scheduler is told of it: its first token has been seen, and it has waited in line."""
    spec, done = live.spec, live.output_tokens
    return replace(
        spec,
        prompt_tokens=spec.prompt_tokens + done,
        max_new_tokens=spec.max_new_tokens - done,
        slo=replace(spec.slo, ttft_s=None),
        expected_output_tokens=max(1.0, live.predicted.output_tokens - done),
        queue_timeout_s=None,
        priority=AT_ONCE,
    )
