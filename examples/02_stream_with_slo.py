"""Tokens as they are generated, for someone who reads along: a first token soon, then a steady pace."""

from example_server import server

from lmdeploy_slo.client import Client

conversation = [
    {"role": "system", "content": "Answer in one paragraph."},
    {"role": "user", "content": "Why is the sky blue?"},
]

with server() as target, Client(target) as client:
    # Leaving the block before the end would cancel the request in the server.
    with client.stream(conversation, ttft_ms=1000, tpot_ms=50, max_new_tokens=64) as stream:
        for chunk in stream:
            print(chunk.text, end="", flush=True)

    done = stream.completion
    print(f"\n\nfirst token after {done.timing.ttft_ms:.0f} ms, then one every {done.timing.tpot_ms:.1f} ms")
    print(f"predicted {done.predicted.ttft_ms:.0f} ms and {done.predicted.tpot_ms:.1f} ms; SLO met: {done.slo_met}")
