"""Profiles by the name of one that ships with the package, or by the path of a file; `profile_format` says what is in
one."""

from __future__ import annotations

import difflib
from pathlib import Path

from lmdeploy_slo.errors import ConfigError
from lmdeploy_slo.prediction.profile_format import FORMAT, Profile, StepCoefficients, parse_profile

__all__ = ["FORMAT", "Profile", "StepCoefficients", "load_profile", "profile_names", "save_profile"]

_SHIPPED = Path(__file__).parent / "profiles"


def profile_names() -> list[str]:
    """Names of the profiles that ship with the package, sorted."""
    return sorted(path.stem for path in _SHIPPED.glob("*.json"))


def load_profile(name_or_file: str) -> Profile:
    """The profile of that name or, where it names a file (a path separator or `.json`), the one in that file.

    Raises ConfigError: for an unknown name it lists the known ones, for a file it says what is wrong in it.
    """
    if "/" in name_or_file or "\\" in name_or_file or name_or_file.endswith(".json"):
        path = Path(name_or_file)
        try:
            return parse_profile(path.read_bytes(), str(path))
        except OSError as error:
            raise ConfigError(f"profile {path}: {error.strerror or error}") from error
    names = profile_names()
    if name_or_file not in names:
        close = difflib.get_close_matches(name_or_file, names, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"profile {name_or_file!r} is unknown; {hint}known: {', '.join(names)}; or give the path of a .json file"
        )
    return parse_profile((_SHIPPED / f"{name_or_file}.json").read_bytes(), f"{name_or_file} (shipped)")


def save_profile(profile: Profile, path: Path) -> None:
    """Writes the file that `load_profile` reads; raises ConfigError where that fails."""
    try:
        path.write_text(profile.text(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error
