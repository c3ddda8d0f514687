"""Runs on disk: found again by what was asked, and told apart by the code that answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.offline import run_store
from lmdeploy_slo.offline.experiment import Fleet, Load
from lmdeploy_slo.offline.run_store import RunStore, Stored, code_fingerprint, digest, plain, source_files

MODEL = StepModel(0.01, 1e-5, 1e-9, 1e-5, 1e-8)


@dataclass(frozen=True)
class Setting:
    needed: int
    more: tuple[int, ...] = ()
    made: dict[str, int] = field(default_factory=dict)


def test_an_answer_is_found_by_what_was_asked(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    asked = {"seed": 1, "p2": 1.13e-9}
    stored = Stored(asked, "code", {"attainment": 1 / 3})
    store.keep(stored)
    assert RunStore(tmp_path / "runs").find(asked) == stored
    assert store.find({**asked, "seed": 2}) is None


def test_a_newer_answer_replaces_the_older(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.keep(Stored({"seed": 1}, "old", {"attainment": 0.5}))
    store.keep(Stored({"seed": 1}, "new", {"attainment": 0.6}))
    found = store.find({"seed": 1})
    assert found is not None and (found.code, found.answer) == ("new", {"attainment": 0.6})
    assert len(list(tmp_path.iterdir())) == 1


def test_a_broken_file_is_no_answer(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.keep(Stored({"seed": 1}, "code", {}))
    [path] = tmp_path.iterdir()
    path.write_text(path.read_text()[:20])
    assert store.find({"seed": 1}) is None
    path.write_text("{}")
    assert store.find({"seed": 1}) is None


def test_settings_at_their_defaults_are_not_part_of_a_description() -> None:
    assert plain(Setting(1)) == {"needed": 1}
    assert plain(Setting(1, (2,), {"a": 3})) == {"needed": 1, "more": [2], "made": {"a": 3}}
    assert plain(Fleet(MODEL, MODEL, EngineLimits(128)))["limits"] == {"max_batch_size": 128}


def test_what_differs_is_described_otherwise() -> None:
    loads = [Load(), Load(speedup=2.0), Load(length_noise=0.3), Load(length_noise=0.0)]
    assert len({digest(plain(load)) for load in loads}) == len(loads)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_what_cannot_be_written_is_not_described() -> None:
    with pytest.raises(TypeError):
        plain({"policy": object()})


def test_the_code_of_a_rule_is_not_that_of_annealing() -> None:
    rules = {path.name for path in source_files(["lmdeploy_slo.scheduling.rules"])}
    assert {"rules.py", "snapshot.py", "plan.py", "latency_model.py"} <= rules
    assert "annealing.py" not in rules
    assert "annealing_kernel.py" in {path.name for path in source_files(["lmdeploy_slo.scheduling.annealing"])}
    with pytest.raises(ValueError, match="no module"):
        source_files(["numpy"])


def test_the_fingerprint_follows_code_and_not_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "made_up"
    package.mkdir()
    top, below = package / "top.py", package / "below.py"
    monkeypatch.setattr(run_store, "_PACKAGE", package)

    def fingerprint(top_text: str, below_text: str) -> str:
        top.write_text(top_text)
        below.write_text(below_text)
        return code_fingerprint(["made_up.top"])

    plainly = fingerprint("from made_up.below import x\n", "x = 1\n")
    said = fingerprint('"""Says."""\nfrom made_up.below import x  # why\n', '"""Too."""\n\nx = 1\n')
    assert said == plainly
    assert fingerprint("from made_up.below import x\n", "x = 2\n") != plainly
    assert fingerprint("import made_up.below\n", "x = 1\n") != plainly
