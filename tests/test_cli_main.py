"""The table of commands: what is listed, what is imported, and what a user's mistake looks like."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import lmdeploy_slo
from lmdeploy_slo.cli.main import COMMANDS, main
from lmdeploy_slo.errors import ConfigError, EngineUnavailable


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The status the process would end with."""
    monkeypatch.setattr(sys, "argv", ["lmdeploy_slo", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.fixture
def fake_plan(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Puts a function in place of the `plan` command."""

    def install(function: Callable[[], None]) -> None:
        module: Any = ModuleType("lmdeploy_slo.cli.plan")
        module.plan = function
        monkeypatch.setitem(sys.modules, "lmdeploy_slo.cli.plan", module)

    return install


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"lmdeploy_slo {lmdeploy_slo.__version__}\n"


def test_only_the_command_that_runs_is_imported() -> None:
    script = """
import sys
sys.argv = ["lmdeploy_slo", "--help"]
from lmdeploy_slo.cli.main import main
try:
    main()
except SystemExit:
    heavy = {"numpy", "numba", "grpc", "pydantic"} & set(sys.modules)
    commands = {name for name in sys.modules if name.startswith("lmdeploy_slo.cli.")} - {"lmdeploy_slo.cli.main"}
    print(sorted(heavy | commands))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *listing, imported = done.stdout.splitlines()
    assert imported == "[]"
    assert all(any(f" {command} " in line for line in listing) for command in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert call(monkeypatch, command, "--help") == 0
    assert f"lmdeploy_slo {command}" in capsys.readouterr().out


def test_a_typo_gets_a_suggestion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "serv") == 2
    assert "'serve'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failure", "status", "expected"),
    [
        (ConfigError("port: no"), 2, "lmdeploy_slo: port: no\n"),
        (EngineUnavailable("it is gone"), 1, "lmdeploy_slo: it is gone\n"),
        (
            ModuleNotFoundError("No module named 'ray.data'", name="ray.data"),
            2,
            "lmdeploy_slo: this command (ray) needs an optional dependency: pip install 'lmdeploy-slo[ray]'\n",
        ),
    ],
)
def test_failures_are_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fake_plan: Callable[[Callable[[], None]], None],
    failure: Exception,
    status: int,
    expected: str,
) -> None:
    def plan() -> None:
        raise failure

    fake_plan(plan)
    assert call(monkeypatch, "plan") == status
    assert capsys.readouterr().err == expected


def test_a_missing_package_that_no_extra_brings_is_a_defect(
    monkeypatch: pytest.MonkeyPatch, fake_plan: Callable[[Callable[[], None]], None]
) -> None:
    def plan() -> None:
        raise ModuleNotFoundError("No module named 'nothing'", name="nothing")

    fake_plan(plan)
    monkeypatch.setattr(sys, "argv", ["lmdeploy_slo", "plan"])
    with pytest.raises(ModuleNotFoundError):
        main()
