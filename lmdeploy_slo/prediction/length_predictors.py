"""The length predictors by name."""

from __future__ import annotations

from collections.abc import Callable

from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.prediction.length import LengthPredictor, TaskLengthPredictor
from lmdeploy_slo.prediction.length_gaussian import GaussianLengthPredictor

LENGTH_PREDICTORS: dict[str, Callable[[], LengthPredictor]] = {
    "learned": TaskLengthPredictor,
    "gaussian": GaussianLengthPredictor,
}


def make_length_predictor(name: str) -> LengthPredictor:
    """A predictor that has seen nothing; raises ConfigError, listing the names, for an unknown one."""
    if name not in LENGTH_PREDICTORS:
        raise ConfigError(f"unknown length predictor {name!r}; choose one of {', '.join(LENGTH_PREDICTORS)}")
    return LENGTH_PREDICTORS[name]()
