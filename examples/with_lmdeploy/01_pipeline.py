"""lmdeploy_slo.pipeline() in the place of lmdeploy.pipeline(): the same calls, and an SLO for who wants one.

    python 01_pipeline.py [MODEL]

With a GPU and a MODEL (a directory or a Hugging Face id) TurboMind generates. Without a GPU LMDeploy runs on the CPU
stand-in, and without a MODEL a tiny random one is made, whose text means nothing.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import lmdeploy_slo
from lmdeploy_slo import Slo
from lmdeploy_slo.engine.tiny_model import write_tiny_model


def main(model: str) -> None:
    with lmdeploy_slo.pipeline(model) as pipe:
        # As with LMDeploy: one prompt or many, plain or streamed, chats.
        print(repr(pipe("Hello, how are you?").text))

        # One SLO for all prompts, or one per prompt. The Response says how it went.
        prompts = ["Summarise this.", "Translate this.", "Write a long story."]
        slos = [Slo(ttft_s=1.0, tpot_s=0.1), Slo(e2e_s=5.0), None]
        for prompt, response in zip(prompts, pipe(prompts, slo=slos, task_type="demo")):
            told = response.timing
            print(f"{prompt:20} SLO met: {response.slo_met}, {told.output_tokens} tokens in {1e3 * told.e2e_s:.0f} ms")

        for response in pipe.stream_infer("Tell me a story", slo=Slo(ttft_s=0.5)):
            print(response.text, end="", flush=True)
        print(f"\nSLO met: {response.slo_met}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as directory:
            write_tiny_model(Path(directory))
            main(directory)
