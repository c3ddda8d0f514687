"""The CPU stand-in computes what transformers computes, whatever shares its batch."""

from __future__ import annotations

import asyncio
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmdeploy_slo.engine.tiny_model import TinyModelOptions, write_tiny_model
from lmdeploy_slo.errors import ConfigError

SESSION = 256


def prompts(count: int, seed: int = 5) -> list[list[int]]:
    """Random prompts of 1 to 40 tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(3, 500) for _ in range(rng.randint(1, 40))] for _ in range(count)]


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    """The checkpoint in plain transformers."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def greedy(reference: Any, prompt: list[int], tokens: int) -> list[int]:
    """What transformers' own generate gives, end tokens ignored."""
    import torch

    ids = torch.tensor([prompt])
    output = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    return [int(token) for token in output[0, len(prompt) :]]


class Native:
    """The stand-in through the names LMDeploy uses."""

    def __init__(self, model: Path, **config: Any) -> None:
        from lmdeploy_slo.engine.cpu_standin import native

        fields: dict[str, Any] = {
            "devices": [0],
            "nnodes": 1,
            "quant_policy": 0,
            "model_format": None,
            "dtype": "auto",
            "session_len": SESSION,
            "max_batch_size": 4,
            "max_prefill_token_num": 64,
            "cache_block_seq_len": 16,
            "cache_max_entry_count": 0.1,
            "enable_prefix_caching": False,
        }
        self.native = native
        self.turbomind, _ = native._load(SimpleNamespace(), str(model), SimpleNamespace(**(fields | config)))

    def config(self, **settings: Any) -> Any:
        config = self.native.GenerationConfig()
        for name, value in {"max_new_tokens": 12, "top_k": 1, "top_p": 1.0, **settings}.items():
            setattr(config, name, value)
        return config

    def start(self, prompt: list[int], **settings: Any) -> Request:
        return Request(self, prompt, self.config(**settings))

    def run(self, prompt: list[int], **settings: Any) -> list[int]:
        return self.start(prompt, **settings).wait()


class Request:
    """One request and its results."""

    def __init__(self, native: Native, prompt: list[int], config: Any) -> None:
        import threading

        import torch

        self.prompt = prompt
        self.ended = threading.Event()
        self.handle = native.turbomind.create_request()
        inputs = {"input_ids": native.native.from_dlpack(torch.tensor(prompt, dtype=torch.int32))}
        session = native.native.SessionParam(id=1, step=0)
        self.tensors, self.state, self.times = self.handle.forward(
            inputs, None, session, config, True, True, self._signal
        )
        self._signal()

    def _signal(self) -> None:
        if hasattr(self, "state") and self.state.consume().status:
            self.ended.set()

    @property
    def status(self) -> int:
        return int(self.state.consume().status)

    def tensor(self, name: str) -> Any:
        return self.tensors[name].data

    def wait(self) -> list[int]:
        """The output's tokens, when it has ended."""
        assert self.ended.wait(60)
        end = self.state.consume().seq_len
        return [int(token) for token in self.tensor("output_ids")[len(self.prompt) : end]]


@pytest.fixture
def native(tiny_model: Path) -> Native:
    return Native(tiny_model)


def test_greedy_output_is_that_of_transformers_in_any_company(native: Native, reference: Any) -> None:
    wanted = [(prompt, 1 + 7 * at % 30) for at, prompt in enumerate(prompts(12))]
    requests = [native.start(prompt, max_new_tokens=tokens) for prompt, tokens in wanted]
    for request, (prompt, tokens) in zip(requests, wanted):
        assert request.wait() == greedy(reference, prompt, tokens)


@pytest.mark.parametrize("prefill", [1, 7, 8192])
def test_prompts_may_be_prefilled_in_pieces(tiny_model: Path, reference: Any, prefill: int) -> None:
    native = Native(tiny_model, max_prefill_token_num=prefill)
    requests = [native.start(prompt) for prompt in prompts(6, seed=6)]
    assert [r.wait() for r in requests] == [greedy(reference, r.prompt, 12) for r in requests]


def test_llama_checkpoints_run_too(tmp_path: Path) -> None:
    import torch
    import transformers

    write_tiny_model(tmp_path / "llama", TinyModelOptions(architecture="llama", layers=3))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    prompt = prompts(1)[0]
    assert Native(tmp_path / "llama").run(prompt) == greedy(reference, prompt, 12)


def test_equal_options_write_equal_checkpoints(tiny_model: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "again")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tiny_model / name).read_bytes()
    with pytest.raises(ConfigError, match="not empty"):
        write_tiny_model(tmp_path / "again")


def test_a_short_kv_budget_evicts_and_recomputes(tiny_model: Path, reference: Any) -> None:
    native = Native(tiny_model, cache_max_entry_count=5)  # 80 tokens for four sequences that grow to 40
    requests = [native.start(prompt[:10], max_new_tokens=30) for prompt in prompts(4, seed=7)]
    assert [r.wait() for r in requests] == [greedy(reference, r.prompt, 30) for r in requests]


def test_a_sequence_that_cannot_fit_ends_with_out_of_memory(tiny_model: Path) -> None:
    native = Native(tiny_model, cache_max_entry_count=2)
    request = native.start([5] * 40)
    assert request.wait() == []
    assert request.status == 11
    grows = native.start([5] * 20, max_new_tokens=30)
    assert len(grows.wait()) < 30
    assert grows.status == 11


def test_cached_prefixes_change_nothing_but_the_work(tiny_model: Path, reference: Any) -> None:
    native = Native(tiny_model, enable_prefix_caching=True)
    prompt = [7 + n for n in range(50)]
    expected = greedy(reference, prompt, 12)
    first = native.start(prompt)
    assert (first.wait(), first.times.cached_tokens) == (expected, 0)
    second = native.start(prompt)
    assert (second.wait(), second.times.cached_tokens) == (expected, 48)
    other = native.start([*prompt[:20], 400, 401])
    assert (other.wait(), other.times.cached_tokens) == (greedy(reference, other.prompt, 12), 16)
    assert native.turbomind.get_schedule_metrics(0).prefix_cache_hit_rate == pytest.approx((48 + 16) / 122)


def test_sampling_repeats_with_its_seed_and_follows_the_distribution(native: Native, reference: Any) -> None:
    import torch

    prompt = prompts(1)[0]
    settings = {"top_k": 3, "temperature": 1.5}
    once = native.run(prompt, random_seed=3, **settings)
    assert native.run(prompt, random_seed=3, **settings) == once
    first = [native.run(prompt, max_new_tokens=1, random_seed=seed, **settings)[0] for seed in range(300)]
    logits = reference(torch.tensor([prompt])).logits[0, -1] / 1.5
    best = torch.topk(logits, 3)
    probabilities = torch.softmax(best.values, 0)
    assert set(first) <= set(best.indices.tolist())
    for token, probability in zip(best.indices.tolist(), probabilities.tolist()):
        spread = 4 * math.sqrt(probability * (1 - probability) / 300)
        assert first.count(token) / 300 == pytest.approx(probability, abs=spread)


def test_logprobs_are_those_of_the_distribution_drawn_from(native: Native, reference: Any) -> None:
    import torch

    prompt = prompts(1)[0]
    request = native.start(prompt, max_new_tokens=1, top_k=0, output_logprobs=4, random_seed=1)
    token = request.wait()[0]
    expected = torch.log_softmax(reference(torch.tensor([prompt])).logits[0, -1].float(), 0)
    count = int(request.tensor("logprob_nums")[0])
    ids, values = request.tensor("logprob_indexes")[0, :count], request.tensor("logprob_vals")[0, :count]
    assert ids[:4].tolist() == torch.topk(expected, 4).indices.tolist()
    assert token in ids.tolist()
    assert torch.allclose(values, expected[ids.long()], atol=1e-4)


def test_logits_and_perplexity(native: Native, reference: Any) -> None:
    import torch

    prompt = prompts(1, seed=9)[0]
    request = native.start(prompt, max_new_tokens=3, output_logits=2)
    output = request.wait()
    plain = reference(torch.tensor([prompt + output])).logits[0]
    assert torch.allclose(request.tensor("logits")[:3], plain[len(prompt) - 1 : -1], atol=1e-3)
    whole = native.start(prompt, max_new_tokens=2, output_logits=1, return_ppl=True)
    whole.wait()
    assert torch.allclose(whole.tensor("logits")[: len(prompt)], plain[: len(prompt)], atol=1e-3)
    loss = torch.nn.functional.cross_entropy(plain[: len(prompt) - 1], torch.tensor(prompt[1:]), reduction="sum")
    assert float(whole.tensor("ce_loss")[0]) == pytest.approx(float(loss.detach()), rel=1e-3)


def test_stop_tokens_bans_and_minimum(native: Native, reference: Any) -> None:
    prompt = prompts(1, seed=11)[0]
    plain = greedy(reference, prompt, 12)
    at = next(n for n in range(2, 12) if plain[n] not in plain[:n])
    stop = plain[at]
    assert native.run(prompt, stop_ids=[[stop], [1]]) == plain[: at + 1]
    longer = native.run(prompt, stop_ids=[[stop], [1]], eos_ids=[stop], min_new_tokens=at + 3)
    assert len(longer) >= at + 3
    assert longer[:at] == plain[:at]
    assert longer[at] != stop
    assert plain[0] not in native.run(prompt, bad_ids=[[plain[0]], [1]])


def test_the_session_length_ends_a_request(native: Native) -> None:
    request = native.start([9] * (SESSION - 4), max_new_tokens=100)
    assert len(request.wait()) == 4
    assert request.status == 7


def test_cancel_frees_the_row_and_leaves_the_others_alone(native: Native, reference: Any, pace: Any) -> None:
    pace.hold()
    requests = [native.start(prompt, max_new_tokens=40) for prompt in prompts(6, seed=12)]
    requests[5].handle.cancel()  # still waits: ends at once
    assert (requests[5].status, requests[5].wait()) == (8, [])
    requests[1].handle.cancel()
    pace.release()
    requests[1].wait()
    assert requests[1].status == 8
    for request in (requests[0], *requests[2:5]):
        assert request.wait() == greedy(reference, request.prompt, 40)
    assert native.turbomind.get_schedule_metrics(0).active_seqs == 0


def test_a_failed_step_ends_everything_and_what_comes_after(native: Native, pace: Any) -> None:
    pace.hold()
    requests = [native.start(prompt) for prompt in prompts(6)]
    pace.fail(RuntimeError("told to"))
    pace.release()
    assert [request.wait() for request in requests] == [[]] * 6
    assert {request.status for request in requests} == {10}
    assert native.start([5]).status == 10


def test_the_worker_ends_with_its_engine(tiny_model: Path) -> None:
    import gc
    import threading

    native = Native(tiny_model)
    native.run([5, 6])
    worker = native.turbomind._batch._thread
    del native
    gc.collect()
    worker.join(10)
    assert worker not in threading.enumerate()


@pytest.mark.parametrize(
    ("config", "why"),
    [({"devices": [0, 1]}, "one device"), ({"quant_policy": 8}, "quant_policy"), ({"model_format": "awq"}, "unquant")],
)
def test_what_it_cannot_be_is_refused(tiny_model: Path, config: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Native(tiny_model, **config)


def test_settings_are_as_strict_as_the_compiled_ones(native: Native) -> None:
    with pytest.raises(AttributeError):
        native.config(priority=3)


async def test_lmdeploys_own_perplexity_and_logits_run_over_it(tiny_model: Path, reference: Any) -> None:
    import torch

    from lmdeploy_slo.core.snapshot import EngineLimits
    from lmdeploy_slo.engine.lmdeploy_options import Device, LmdeployOptions, import_lmdeploy, turbomind_config

    lmdeploy = import_lmdeploy(device=Device.CPU, patched=True)
    options = LmdeployOptions(str(tiny_model), device=Device.CPU, limits=EngineLimits(max_batch_size=2))
    pipeline = lmdeploy.pipeline(str(tiny_model), backend_config=turbomind_config(options))
    engine = pipeline.async_engine
    engine.start_loop(asyncio.get_running_loop(), use_async_api=True)
    prompt = prompts(1, seed=13)[0]
    logits = reference(torch.tensor([prompt])).logits[0]
    assert torch.allclose((await engine.async_get_logits([prompt]))[0], logits, atol=1e-3)
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(prompt[1:]))
    assert await engine.async_get_ppl(prompt) == pytest.approx(float(loss.detach()), rel=1e-3)
    pipeline.close()
