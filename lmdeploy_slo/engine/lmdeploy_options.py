"""What an LMDeploy engine is told: model, device, limits, and every field of TurbomindEngineConfig by its name."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.errors import ConfigError

logger = logging.getLogger(__name__)

OWN_KEYS = {
    "max_batch_size": "max_batch_size",
    "max_prefill_token_num": "max_prefill_tokens",
    "session_len": "max_session_tokens",
}
"""Fields of TurbomindEngineConfig that have a setting of their own here -> its name."""

CPU_NOTICE = (
    "no CUDA device: LMDeploy runs on the CPU stand-in; the tokens are the model's own, the speed is that of this CPU"
)


class Device(str, Enum):
    """Where the model runs. AUTO: the GPU where there is one, else the CPU stand-in, with a notice in the log."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


@dataclass(frozen=True, slots=True)
class LmdeployOptions:
    """How an LmdeployEngine is built.

    model: a directory or a Hugging Face id. limits: max_batch_size is the number of LMDeploy's request handles;
    kv_tokens None: LMDeploy's share of free memory. max_session_tokens None: the model's own.
    turbomind: further fields of TurbomindEngineConfig by name (tp, dp, devices, quant_policy, ...).
    patched: False serves with LMDeploy as released, see docs/lmdeploy.md for what is lost.
    look_ahead: requests beyond max_batch_size that wait in LMDeploy's line; None: a thirty-second of max_batch_size,
    at least 1, and none where LMDeploy is not patched, because nothing is ranked there.
    chat_template: one of LMDeploy's names, None for the model's own.
    stall_timeout_s: an engine with requests that takes no step for so long is given up, seconds.
    """

    model: str
    device: Device = Device.AUTO
    limits: EngineLimits = field(default_factory=EngineLimits)
    max_session_tokens: int | None = None
    turbomind: Mapping[str, Any] = field(default_factory=dict)
    patched: bool = True
    look_ahead: int | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    log_level: str = "WARNING"
    stall_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for key in self.turbomind:
            if key in OWN_KEYS:
                raise ConfigError(f"turbomind.{key}: set {OWN_KEYS[key]} instead")
        if self.stall_timeout_s <= 0:
            raise ConfigError(f"stall_timeout_s: must be above 0, got {self.stall_timeout_s}")
        if self.look_ahead is not None and self.look_ahead < 0:
            raise ConfigError(f"look_ahead: must be 0 or more, got {self.look_ahead}")

    @property
    def effective_look_ahead(self) -> int:
        if self.look_ahead is not None:
            return self.look_ahead
        return max(1, self.limits.max_batch_size // 32) if self.patched else 0


def turbomind_config(options: LmdeployOptions) -> Any:
    """LMDeploy's TurbomindEngineConfig of the options; raises ConfigError for an unknown key or a value it refuses."""
    from lmdeploy import TurbomindEngineConfig

    known = [f.name for f in dataclasses.fields(TurbomindEngineConfig)]
    unknown = sorted(options.turbomind.keys() - set(known))
    if unknown:
        raise ConfigError(f"turbomind.{unknown[0]}: no such field; LMDeploy has {', '.join(known)}")
    fields: dict[str, Any] = {
        "max_batch_size": options.limits.max_batch_size,
        "max_prefill_token_num": options.limits.max_prefill_tokens,
        "session_len": options.max_session_tokens,
        **options.turbomind,
    }
    if options.limits.kv_tokens is not None:
        if "cache_max_entry_count" in options.turbomind:
            raise ConfigError("turbomind.cache_max_entry_count: kv_tokens says it already")
        block = fields.get("cache_block_seq_len", 64)
        fields["cache_max_entry_count"] = max(2, options.limits.kv_tokens // block)  # above 1 it counts blocks
    try:
        return TurbomindEngineConfig(**fields)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"turbomind: LMDeploy refuses {dict(options.turbomind)}: {error}") from error


def choose_device(device: Device) -> Device:
    """CUDA or CPU; raises ConfigError where CUDA is asked for and there is none."""
    import torch

    has_cuda = bool(torch.cuda.is_available())
    if device is Device.CUDA and not has_cuda:
        raise ConfigError("device: there is no CUDA device; choose cpu to run the stand-in")
    if device is Device.AUTO and not has_cuda:
        logger.warning(CPU_NOTICE)
    return Device.CUDA if device is not Device.CPU and has_cuda else Device.CPU


def import_lmdeploy(*, device: Device, patched: bool) -> Any:
    """The package lmdeploy, patched and over the CPU stand-in as asked; the one way in which it is imported here.

    Raises ConfigError or MissingExtra where that cannot be.
    """
    from lmdeploy_slo.engine.patching import loader

    if patched:
        loader.install()
    elif loader.installed_finder() is not None:
        raise ConfigError("unpatched: LMDeploy is patched in this process already")
    if device is Device.CPU:
        from lmdeploy_slo.engine.cpu_standin import native

        native.install()
    return importlib.import_module("lmdeploy")
