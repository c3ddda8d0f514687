"""Profiles load by name and by file, in seconds, and say plainly what is wrong with a broken one."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdeploy_slo.core.latency_model import BilinearModel, StepModel
from lmdeploy_slo.core.model_range import ModelRange
from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.prediction.profile_format import FORMAT, BilinearCoefficients, StepCoefficients
from lmdeploy_slo.prediction.profiles import load_profile, profile_names, save_profile

# The published table (ms): c0, p1, p2, d1, d2.
PUBLISHED_MS = {
    "h200-qwen2.5-7b": (4.34, 0.01703, 4.99e-7, 0.00733, 1.30e-5),
    "h200-llama3.1-8b": (4.64, 0.01816, 6.37e-7, 0.00977, 3.03e-5),
    "a100-qwen2.5-7b": (10.25, 0.04752, 1.13e-6, 0.02377, 3.67e-5),
    "a100-llama2-7b-turbomind": (9.84, 0.0618, 0.0, 0.0036, 2.98e-4),
}


def document(**changes: Any) -> dict[str, Any]:
    base = {"format": "2.0", "name": "mine", "step_ms": {"c0": 1.0, "p1": 0.1, "p2": 0.0, "d1": 0.01, "d2": 0.001}}
    return {**base, **changes}


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_shipped_profiles_are_the_published_ones() -> None:
    assert profile_names() == sorted(PUBLISHED_MS)


@pytest.mark.parametrize("name", sorted(PUBLISHED_MS))
def test_shipped_profiles_say_what_they_rest_on(name: str) -> None:
    profile = load_profile(name)
    assert profile.format == FORMAT
    assert profile.fitted_range.batch_size is not None and profile.fitted_range.batch_size[1] >= 64
    assert profile.errors is not None
    assert set(profile.errors.step) == set(profile.errors.bilinear) == {"prefill", "decode", "all"}
    assert profile.errors.step["decode"].mape < 0.04
    assert min(profile.bilinear_model.prefill + profile.bilinear_model.decode) >= 0


@pytest.mark.parametrize("name", sorted(PUBLISHED_MS))
def test_the_file_of_a_profile_is_the_profile(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    save_profile(profile, tmp_path / "copy.json")
    assert load_profile(str(tmp_path / "copy.json")) == profile


def test_files_of_the_first_format_are_read(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path / "old.json", document(format=1)))
    assert profile.format == FORMAT
    assert profile.step_model.c0 == pytest.approx(1e-3)
    assert profile.fitted_range == ModelRange()
    with pytest.raises(ConfigError, match="mine: it has no bilinear model"):
        _ = profile.bilinear_model


def test_what_a_later_minor_version_adds_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    newer = document(format="2.9", weather="fine", range={"batch_size": [1, 4], "moon": [0, 1]})
    profile = load_profile(write(tmp_path / "newer.json", newer))
    assert profile.fitted_range.batch_size == (1, 4)
    assert "not read: range.moon, weather" in caplog.text or "not read: weather, range.moon" in caplog.text
    broken = write(tmp_path / "broken.json", {**newer, "step_ms": {}})
    with pytest.raises(ConfigError, match=r"step_ms\.c0: Field required"):
        load_profile(broken)


@given(st.builds(StepModel, *(st.floats(0, 10) for _ in range(5))))
def test_coefficients_keep_their_digits(model: StepModel) -> None:
    assert astuple(StepCoefficients.of(model).model_s()) == pytest.approx(astuple(model), rel=1e-6, abs=0)


@given(st.builds(BilinearModel, *(st.tuples(*(st.floats(0, 10) for _ in range(4))) for _ in range(2))))
def test_bilinear_coefficients_keep_their_digits(model: BilinearModel) -> None:
    kept = BilinearCoefficients.of(model).model_s()
    assert (*kept.prefill, *kept.decode) == pytest.approx((*model.prefill, *model.decode), rel=1e-6, abs=0)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        save_profile(load_profile("h200-qwen2.5-7b"), tmp_path / "absent" / "x.json")


@pytest.mark.parametrize("name", sorted(PUBLISHED_MS))
def test_coefficients_become_seconds(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.source
    assert astuple(profile.step_model) == pytest.approx([ms / 1e3 for ms in PUBLISHED_MS[name]], rel=1e-12, abs=0)


def test_by_file(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path / "mine.json", document()))
    assert astuple(profile.step_model) == pytest.approx([1e-3, 1e-4, 0.0, 1e-5, 1e-6], rel=1e-12, abs=0)


def test_a_relative_path_needs_only_the_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "mine.json", document())
    monkeypatch.chdir(tmp_path)
    assert load_profile("mine.json").name == "mine"


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError) as caught:
        load_profile("a100-qwen2.5")
    text = str(caught.value)
    assert "did you mean a100-qwen2.5-7b?" in text
    assert all(name in text for name in PUBLISHED_MS)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not JSON"),
        ("[]", "a JSON object is expected, this is a list"),
        (document(format="3.0"), """format is '3.0', this version reads "2.x" and 1"""),
        (document(format=2), 'format is 2, this version reads "2.x" and 1'),
        (document(format=True), "format is True, this version reads"),
        (document(format="2"), "format is '2', this version reads"),
        (document(format="3.0", surprise=1), "format is '3.0'"),
        ({"step_ms": {}}, "format is missing, this version reads"),
        (document(date="yesterday"), "date: String should match"),
        (document(range={"batch_size": [4, 1]}), "range: Value error, batch_size must be two finite numbers"),
        (document(bilinear_ms={"prefill": [1, 2, 3, 4], "decode": [1, 2, 3]}), "bilinear_ms.decode"),
        (document(samples={"count": 0, "set_aside": 0, "digest": "x"}), "samples.count"),
        (document(step_ms={"c0": 1.0}), "step_ms.p1: Field required"),
        (document(step_ms={"c0": -1.0, "p1": 0, "p2": 0, "d1": 0, "d2": 0}), "step_ms.c0: Input should be greater"),
        (document(gpus="A100"), "gpus: Extra inputs are not permitted"),
        ('{"format": "2.0", "name": "n", "step_ms": {"c0": NaN, "p1": 0, "p2": 0, "d1": 0, "d2": 0}}', "finite number"),
    ],
)
def test_broken_files(tmp_path: Path, content: Any, expected: str) -> None:
    path = write(tmp_path / "broken.json", content)
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    assert expected in str(caught.value)
    assert path in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="not JSON"):
        load_profile(str(path))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_profile(str(tmp_path / "absent.json"))
    with pytest.raises(ConfigError, match="directory"):
        load_profile(f"{tmp_path}/")
