"""SLO-aware scheduling for LMDeploy's TurboMind.

What programs use, by name; each is imported when it is first asked for, so that `import lmdeploy_slo` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmdeploy_slo.config import Config, SchedulerConfig
    from lmdeploy_slo.core.request import PriorityClass
    from lmdeploy_slo.core.slo import Slo
    from lmdeploy_slo.errors import SloError
    from lmdeploy_slo.slo_pipeline import pipeline

__all__ = ["Config", "PriorityClass", "SchedulerConfig", "Slo", "SloError", "__version__", "pipeline"]

try:
    __version__ = version("lmdeploy-slo")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

_HOME = {
    "Config": "lmdeploy_slo.config",
    "PriorityClass": "lmdeploy_slo.core.request",
    "SchedulerConfig": "lmdeploy_slo.config",
    "Slo": "lmdeploy_slo.core.slo",
    "SloError": "lmdeploy_slo.errors",
    "pipeline": "lmdeploy_slo.slo_pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
