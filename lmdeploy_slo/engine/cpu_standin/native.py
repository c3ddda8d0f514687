"""The native module's names, as LMDeploy 0.18.0 uses them, over `batch`; and how they are put in its place.

Only what LMDeploy calls is here. Attributes of the settings are as strict as those of the compiled module: an
unknown one is an error. What the stand-in cannot do (guided decoding, images, several devices) raises, with a reason.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import random
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import torch

from lmdeploy_slo.engine.cpu_standin.batch import Batch, BatchLimits, Pace, Sequence, Times
from lmdeploy_slo.engine.cpu_standin.outputs import LogitsWanted, Outputs
from lmdeploy_slo.engine.cpu_standin.rows import RowModel
from lmdeploy_slo.engine.cpu_standin.sampling import SamplingSettings
from lmdeploy_slo.errors import ConfigError

MODULE = "lmdeploy.turbomind._turbomind"

DEFAULT_MAX_BATCH_SIZE = 64
"""Where the configuration names none: LMDeploy would ask the GPU."""

PACE = Pace()
"""The pace of every stand-in in this process."""

_numbers = itertools.count(1)


class DataType(Enum):
    """Element types, by the native module's names."""

    TYPE_UINT32 = "uint32"
    TYPE_INT32 = "int32"
    TYPE_INT64 = "int64"
    TYPE_FP16 = "float16"
    TYPE_BF16 = "bfloat16"
    TYPE_FP32 = "float32"


class Tensor:
    """A tensor that crosses the border by DLPack."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    @property
    def type(self) -> DataType:
        return DataType(str(self.data.dtype).removeprefix("torch."))

    def view(self, data_type: DataType) -> Tensor:
        return Tensor(self.data.view(getattr(torch, data_type.value)))

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.data.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.data.__dlpack_device__()


class TensorMap(dict[str, Tensor]):
    """Tensors by name."""


def from_dlpack(data: Any) -> Tensor:
    return Tensor(torch.from_dlpack(data))


class EngineConfig:
    """What LMDeploy fills from a TurbomindEngineConfig; the stand-in reads that one itself."""


class SessionParam:
    def __init__(self, id: int, step: int = 0) -> None:  # noqa: A002
        self.id = id
        self.step = step


class GenerationConfig:
    """Settings of one request. Token lists come as [tokens, ends]: `ends[i]` closes the i-th list."""

    __slots__ = (
        "bad_ids",
        "eos_ids",
        "max_new_tokens",
        "min_new_tokens",
        "min_p",
        "output_last_hidden_state",
        "output_logits",
        "output_logprobs",
        "random_seed",
        "repetition_penalty",
        "return_ppl",
        "stop_ids",
        "temperature",
        "top_k",
        "top_p",
    )

    def __init__(self) -> None:
        self.max_new_tokens = 0
        self.min_new_tokens = 0
        self.eos_ids: list[int] = []
        self.stop_ids: list[list[int]] = [[], []]
        self.bad_ids: list[list[int]] = [[], []]
        self.top_k = 1
        self.top_p = 0.0
        self.min_p = 0.0
        self.temperature = 1.0
        self.repetition_penalty = 1.0
        self.random_seed = 0
        self.output_logprobs = 0
        self.output_logits = 0
        self.output_last_hidden_state = 0
        self.return_ppl = False


class RequestState:
    """What LMDeploy polls after each signal."""

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence

    def consume(self) -> SimpleNamespace:
        status, seq_len = self._sequence.published
        return SimpleNamespace(status=int(status), seq_len=seq_len)


class ModelRequest:
    """A handle: one request at a time."""

    def __init__(self, batch: Batch, vocab_size: int) -> None:
        self._batch = batch
        self._vocab_size = vocab_size
        self._sequence: Sequence | None = None

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        mm_inputs: Any,
        session: SessionParam,
        gen_cfg: Any,
        stream_output: bool,
        enable_metrics: bool,
        signal_cb: Callable[[], None],
    ) -> tuple[TensorMap, RequestState, Times]:
        """Starts a request; `signal_cb` is called, in the worker's thread, whenever the state has changed."""
        if mm_inputs is not None or "input_embeddings" in inputs:
            raise ValueError("the CPU stand-in takes text only")
        if gen_cfg.output_last_hidden_state:
            raise ValueError("the CPU stand-in does not give out hidden states")
        prompt: list[int] = inputs["input_ids"].data.tolist()
        room = self._batch.limits.session_tokens - len(prompt)
        max_new_tokens = max(1, min(gen_cfg.max_new_tokens, room))
        outputs = Outputs(
            prompt,
            max_new_tokens=max_new_tokens,
            vocab_size=self._vocab_size,
            logprobs=gen_cfg.output_logprobs,
            logits=LogitsWanted(gen_cfg.output_logits),
            perplexity=bool(gen_cfg.return_ppl),
        )
        self._sequence = Sequence(
            number=next(_numbers),
            priority=getattr(gen_cfg, "priority", 0),
            tokens=list(prompt),
            prompt_tokens=len(prompt),
            max_new_tokens=max_new_tokens,
            min_new_tokens=gen_cfg.min_new_tokens,
            stop_ids=frozenset(_single_tokens(gen_cfg.stop_ids)),
            eos_ids=tuple(gen_cfg.eos_ids),
            settings=SamplingSettings(
                top_k=gen_cfg.top_k,
                top_p=gen_cfg.top_p,
                min_p=gen_cfg.min_p,
                temperature=gen_cfg.temperature,
                repetition_penalty=gen_cfg.repetition_penalty,
                logprobs=gen_cfg.output_logprobs,
                banned=tuple(_single_tokens(gen_cfg.bad_ids)),
            ),
            rng=random.Random(gen_cfg.random_seed),
            outputs=outputs,
            streams=stream_output,
            notify=signal_cb,
        )
        tensors = TensorMap({name: Tensor(tensor) for name, tensor in outputs.tensors.items()})
        self._sequence.published = (self._sequence.status, len(prompt))
        self._batch.submit(self._sequence)
        return tensors, RequestState(self._sequence), self._sequence.times

    def cancel(self) -> None:
        if self._sequence is not None:
            self._batch.cancel(self._sequence)

    def set_grammar(self, grammar: Any) -> NoReturn:
        raise RuntimeError("guided decoding (response_format) is not available on the CPU stand-in")


class GrammarCompiler:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("guided decoding (response_format) is not available on the CPU stand-in")


class TokenizerInfo:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("guided decoding (response_format) is not available on the CPU stand-in")


class TurboMind:
    """The engine as LMDeploy holds it. Its worker stops when LMDeploy drops it."""

    def __init__(self, model: RowModel, limits: BatchLimits) -> None:
        self._model = model
        self._batch = Batch(model, limits, PACE)
        weakref.finalize(self, self._batch.close)

    def create_request(self) -> ModelRequest:
        return ModelRequest(self._batch, self._model.vocab_size)

    def get_schedule_metrics(self, device: int) -> SimpleNamespace:
        batch = self._batch
        return SimpleNamespace(
            active_seqs=batch.active,
            waiting_seqs=batch.waiting,
            cache_usage=batch.kv_usage,
            prefix_cache_hit_rate=batch.prefixes.hit_rate,
            scheduler_tick=batch.ticks,
        )

    def is_dummy_node(self) -> bool:
        return False

    def process_weight(self, device: int) -> None:
        """Nothing to do: transformers has loaded the weights."""

    def create_engine(self, device: int) -> None:
        """Nothing to do: the worker waits for requests."""


def is_installed() -> bool:
    return getattr(sys.modules.get(MODULE), "lmdeploy_slo_standin", False)


def install() -> Pace:
    """Puts the stand-in in place of the native module; every engine LMDeploy builds after this runs on the CPU.

    Idempotent. Raises ConfigError where the native module is loaded already. Imports LMDeploy.
    """
    if is_installed():
        return PACE
    if MODULE in sys.modules or getattr(sys.modules.get("lmdeploy.turbomind"), "_tm", None) is not None:
        raise ConfigError("device: TurboMind is loaded in this process already; the CPU stand-in cannot replace it")
    sys.modules[MODULE] = _as_module()
    if "lmdeploy.turbomind" in sys.modules:  # imported before, without a native module
        importlib.reload(sys.modules["lmdeploy.turbomind"])
    turbomind: Any = importlib.import_module("lmdeploy.turbomind.turbomind")
    turbomind.TurboMind._from_hf = _load
    turbomind.torch = _TorchWithOneDevice(torch)
    turbomind.get_max_batch_size = lambda device: DEFAULT_MAX_BATCH_SIZE
    return PACE


def _as_module() -> ModuleType:
    module = ModuleType(MODULE, __doc__)
    vars(module)["lmdeploy_slo_standin"] = True
    for name in (
        DataType,
        TensorMap,
        EngineConfig,
        SessionParam,
        GenerationConfig,
        TokenizerInfo,
        GrammarCompiler,
        ModelRequest,
        TurboMind,
    ):
        setattr(module, name.__name__, name)
    vars(module)["RequestMetrics"] = Times
    vars(module)["from_dlpack"] = from_dlpack
    return module


def _load(self: Any, model_path: str, engine_config: Any, trust_remote_code: bool = False) -> tuple[TurboMind, Any]:
    """Takes the place of LMDeploy's `TurboMind._from_hf`."""
    if len(engine_config.devices) != 1 or engine_config.nnodes != 1:
        raise ConfigError("tp, dp, devices, nnodes: the CPU stand-in is one device")
    if engine_config.quant_policy or engine_config.model_format not in (None, "hf"):
        raise ConfigError("quant_policy, model_format: the CPU stand-in runs unquantised Hugging Face checkpoints")
    model = RowModel(
        model_path,
        dtype=engine_config.dtype,
        session_tokens=engine_config.session_len,
        trust_remote_code=trust_remote_code,
    )
    self._vocab_size = model.vocab_size
    self.engine_config = engine_config
    loader = SimpleNamespace(model=None, export=lambda: None)
    return TurboMind(model, _limits(model, engine_config)), loader


def _limits(model: RowModel, config: Any) -> BatchLimits:
    """cache_max_entry_count above 1 counts blocks, up to 1 it is a share of free memory, as in TurboMind."""
    block = config.cache_block_seq_len
    most = config.max_batch_size * -(-config.session_len // block)
    if config.cache_max_entry_count > 1:
        blocks = int(config.cache_max_entry_count)
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * config.cache_max_entry_count
        blocks = max(1, int(free / (model.token_bytes * block)))
    return BatchLimits(
        max_batch_size=config.max_batch_size,
        max_prefill_tokens=max(1, config.max_prefill_token_num),
        session_tokens=config.session_len,
        block_tokens=block,
        kv_blocks=min(blocks, most),
        prefix_caching=config.enable_prefix_caching,
    )


def _single_tokens(lists: list[list[int]]) -> Iterator[int]:
    tokens, ends = lists
    if len(tokens) != len(ends):
        raise ValueError("the CPU stand-in takes stop and bad words of one token each")
    yield from tokens


class _TorchWithOneDevice:
    """torch, as LMDeploy's turbomind module sees it: one device, which is always the current one."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.cuda = SimpleNamespace(
            device_count=lambda: 1, device=lambda index: contextlib.nullcontext(), current_device=lambda: 0
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
