"""A small random checkpoint with a tokenizer and a chat template, made offline, for trials and tests.

Its text means nothing, but everything about it is real: files, weights, tokens. Byte tokens that are no character by
themselves are never the likeliest, so that greedy text is readable; the end-of-sequence token is as unlikely.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdeploy_slo.errors import ConfigError

ARCHITECTURES = ("qwen2", "llama")

END_OF_TEXT, TURN_BEGINS, TURN_ENDS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_CORPUS = """\
A request waits in line until a slot of the engine is free. The scheduler looks at every request that waits, at what
each one promises its user, and at how long it will take, and then decides who goes first. Short answers go quickly;
long answers take their time. When the batch is full, the next one has to wait. What is the time to the first token?
It is the time from the arrival of a request to the moment its first token is known. What is the time per output token?
It is the mean time between two tokens after the first. Hello, how are you today? I am fine, thank you. Tell me a
story about a river. The river begins in the mountains, runs through the old town, and ends in the sea. Write a
function that adds two numbers: def add(left, right): return left + right. One, two, three, four, five, six, seven,
eight, nine, ten. Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday. 0 1 2 3 4 5 6 7 8 9 10 11 12 100.
"""


@dataclass(frozen=True, slots=True)
class TinyModelOptions:
    """Shape of the checkpoint. context_tokens: longest session. Sizes are for trials: keep them small."""

    architecture: str = "qwen2"
    layers: int = 2
    hidden_size: int = 32
    context_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ConfigError(
                f"architecture: {self.architecture!r} is unknown; choose one of {', '.join(ARCHITECTURES)}"
            )
        if self.hidden_size % 8 or self.hidden_size < 8:
            raise ConfigError(f"hidden_size: must be a multiple of 8, got {self.hidden_size}")
        if self.layers < 1 or self.context_tokens < 16:
            raise ConfigError("layers must be at least 1 and context_tokens at least 16")


def write_tiny_model(directory: Path, options: TinyModelOptions | None = None) -> int:
    """Writes the checkpoint and returns its size in bytes. Equal options give equal weights.

    Raises ConfigError where the directory holds anything already.
    """
    import torch
    import transformers
    from safetensors.torch import save_model

    options = options or TinyModelOptions()
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise ConfigError(f"{directory} is not empty")
    tokenizer = _train_tokenizer()
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    end = vocabulary[TURN_ENDS]
    shape: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": options.hidden_size,
        "intermediate_size": 2 * options.hidden_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": options.context_tokens,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": end,
        "initializer_range": 0.3,
    }
    family = {"qwen2": "Qwen2", "llama": "Llama"}[options.architecture]
    config = getattr(transformers, f"{family}Config")(**shape, architectures=[f"{family}ForCausalLM"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    silent = [index for token, index in vocabulary.items() if index <= end or not _is_ascii_text(token)]
    with torch.no_grad():
        model.lm_head.weight[torch.tensor(silent)] = 0.0
    model.generation_config.eos_token_id = end
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    save_model(model, str(directory / "model.safetensors"), {"format": "pt"})
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": TURN_ENDS,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": options.context_tokens,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return sum(path.stat().st_size for path in directory.iterdir())


def _is_ascii_text(token: str) -> bool:
    """Whether a byte-level token is ASCII; a blank and a line end are written as letters of their own there."""
    return token.replace("Ġ", "").replace("Ċ", "").isascii()


def _train_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[END_OF_TEXT, TURN_BEGINS, TURN_ENDS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    return tokenizer


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
