"""What holds for every test: no wall-clock deadlines, repeatable draws, and no configuration from outside."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

from lmdeploy_slo.config import ENV_PREFIX, ENV_TRACES_DIR

# `--hypothesis-profile=explore` draws new examples; a failing one prints what reproduces it.
settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("explore", deadline=None, print_blob=True, max_examples=1000)
settings.load_profile("repeatable")

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would every server they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_configuration_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith(ENV_PREFIX) and name != ENV_TRACES_DIR]:
        monkeypatch.delenv(variable)
