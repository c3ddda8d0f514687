"""The file of what was learnt: whole or not at all, and never a reason not to start."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.prediction.calibration import Calibration
from lmdeploy_slo.prediction.prefix import PrefixPredictor
from lmdeploy_slo.prediction.state import Learner, StateFile
from lmdeploy_slo.runtime.keeper import Keeper
from lmdeploy_slo.testing.virtual_time import run_virtual


class Counter:
    """Learns a number."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state(self) -> dict[str, Any]:
        return {"value": self.value}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["value"] < 0:
            raise ValueError("below 0")
        self.value = state["value"]


def state_file(folder: Path, model: str = "m", **learners: Learner) -> StateFile:
    return StateFile(folder, engine="emulated", model=model, learners=lambda: learners)


def kept(folder: Path, **values: int) -> Path:
    file = state_file(folder, **{name: Counter(value) for name, value in values.items()})
    assert file.write(file.collect())
    return file.path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = kept(tmp_path / "new" / "folder", a=3, b=4)
    a, b = Counter(), Counter()
    assert state_file(path.parent, a=a, b=b).load() == ["a", "b"]
    assert (a.value, b.value) == (3, 4)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_nothing_is_there_at_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert state_file(tmp_path, a=Counter()).load() == []
    assert caplog.text == ""


def test_engines_and_models_have_files_of_their_own(tmp_path: Path) -> None:
    paths = {state_file(tmp_path, model).path for model in ("m", "n", "org/m", "/models/m", "..", "m" * 500)}
    paths.add(StateFile(tmp_path, engine="lmdeploy", model="m", learners=dict).path)
    assert len(paths) == 7
    assert {path.parent for path in paths} == {tmp_path}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "JSONDecodeError"),
        (b'{"format": 1, "of": {"engine": "emul', "JSONDecodeError"),
        (b"\xff\xfe\x00", "UnicodeDecodeError"),
        (b"[]", "its format is None"),
        (b'{"format": 2}', "its format is 2, this version reads 1"),
        (b'{"format": 1}', "KeyError: 'of'"),
        (b'{"format": 1, "of": {"engine": "emulated", "model": "m"}, "parts": 3}', "its parts are no object"),
        (b'{"format": 1, "of": {"engine": "lmdeploy", "model": "m"}, "parts": {}}', "not of"),
        (b"[" * 100_000, "RecursionError"),
    ],
)
def test_a_file_that_cannot_be_used_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, why: str
) -> None:
    path = kept(tmp_path, a=3)
    path.write_bytes(content)
    learner = Counter(7)
    file = state_file(tmp_path, a=learner)
    assert file.load() == []
    assert learner.value == 7
    assert not path.exists()
    assert path.with_name(path.name + ".set-aside").read_bytes() == content
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert why in caplog.text
    assert file.write(file.collect())
    assert state_file(tmp_path, a=learner).load() == ["a"]


def test_one_wrong_part_costs_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = kept(tmp_path, a=3, b=-1, c=5)
    a, b, c = Counter(), Counter(), Counter()
    assert state_file(tmp_path, a=a, b=b, c=c).load() == ["a", "c"]
    assert (a.value, b.value, c.value) == (3, 0, 5)
    assert "b (ValueError: below 0)" in caplog.text
    assert path.with_name(path.name + ".set-aside").exists()


@pytest.mark.parametrize("part", [None, 3, "x", [], {}, {"value": None}])
def test_no_part_can_stop_a_learner_of_the_package(tmp_path: Path, part: Any) -> None:
    from lmdeploy_slo.core.snapshot import EngineLimits
    from lmdeploy_slo.testing.builders import A100

    path = kept(tmp_path, step_model=1, prefix_cache=1)
    document = json.loads(path.read_text())
    document["parts"] = dict.fromkeys(document["parts"], part)
    path.write_text(json.dumps(document))
    calibration = Calibration(A100, EngineLimits(), progress=lambda handle: 0)
    file = state_file(tmp_path, step_model=calibration, prefix_cache=PrefixPredictor())
    assert file.load() == []
    assert calibration.model == A100


def test_parts_that_nobody_learns_now_are_kept(tmp_path: Path) -> None:
    kept(tmp_path, a=3, b=4)
    file = state_file(tmp_path, a=Counter())
    file.load()
    file.write(file.collect())
    b = Counter()
    state_file(tmp_path, b=b).load()
    assert b.value == 4


def test_a_failed_write_leaves_the_file_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "lmdeploy_slo.prediction.state")
    path = kept(tmp_path, a=3)
    before = path.read_bytes()
    counter = Counter(4)
    file = state_file(tmp_path, a=counter)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert not file.write(file.collect())
        assert not file.write(file.collect())
    assert path.read_bytes() == before
    assert file.write(file.collect())
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "No space left" in caplog.messages[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_what_json_cannot_hold_is_not_written(tmp_path: Path, value: Any) -> None:
    path = kept(tmp_path, a=3)
    before = path.read_bytes()
    assert not state_file(tmp_path, a=Counter()).write({"a": {"value": value}})
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_used_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"state_dir .*file"):
        state_file(tmp_path / "file")
    with pytest.raises(ConfigError, match="state_dir"):
        state_file(tmp_path / "file" / "below")


# -- the keeper -------------------------------------------------------------------------------------------------------


def test_it_is_written_now_and_then_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(function: Any, *arguments: Any) -> Any:  # virtual time does not wait for threads
        return function(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", at_once)
    counter = Counter(1)
    file = state_file(tmp_path, a=counter)
    written: list[int] = []
    write = file.write

    def note(parts: Mapping[str, Any]) -> bool:
        written.append(parts["a"]["value"])
        return write(parts)

    file.write = note  # type: ignore[method-assign]

    async def main(clock: object) -> None:
        keeper = Keeper(file, every_s=60.0)
        keeper.start()
        await asyncio.sleep(61)
        counter.value = 2
        await asyncio.sleep(60)
        await asyncio.sleep(600)  # nothing new
        counter.value = 3
        await keeper.close()
        await keeper.close()

    run_virtual(main)
    assert written == [1, 2, 3]
    assert json.loads(file.path.read_text())["parts"] == {"a": {"value": 3}}


def test_a_learner_that_fails_harms_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Counter):
        def state(self) -> dict[str, Any]:
            raise RuntimeError("a defect")

    async def main(clock: object) -> None:
        keeper = Keeper(state_file(tmp_path, a=Broken()))
        keeper.start()
        await keeper.close()

    run_virtual(main)
    assert "a defect" in caplog.text
