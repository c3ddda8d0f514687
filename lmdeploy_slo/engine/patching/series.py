"""The patch series: unified diffs that only insert lines, so that nothing of LMDeploy's text is in them.

Every patch is a file with a header of `Key: value` lines and hunks without context. A hunk's line numbers are those
of the file after the patches before it, as `git apply --unidiff-zero` and `patch -p1` expect. The manifest pins each
touched file by its SHA-256, before and after the series, so a hunk always lands where it was made for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import lmdeploy_slo
from lmdeploy_slo.errors import ConfigError

MANIFEST = "manifest.json"

_HUNK = re.compile(r"@@ -(\d+),0 \+(\d+)(?:,(\d+))? @@$")
_HEADER = re.compile(r"([A-Z][a-z]+(?: [a-z]+)*): (.*)$")

Row: TypeAlias = "tuple[str | None, str]"
"""(name of the patch that inserted it, None for LMDeploy's own; the line with its end)."""


@dataclass(frozen=True, slots=True)
class Hunk:
    """`lines` go after line `after_line` (1-based; 0: at the top) of the file as the patch finds it."""

    path: str
    after_line: int
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Patch:
    """One patch, one purpose. `header` has at least the keys of `REQUIRED_HEADER`."""

    name: str
    header: Mapping[str, str]
    hunks: tuple[Hunk, ...]
    text: str

    @property
    def paths(self) -> list[str]:
        """The files it touches, relative to the directory that holds the package."""
        return sorted({hunk.path for hunk in self.hunks})


REQUIRED_HEADER = ("Subject", "Reason", "Upstream", "Drop when", "Lost without")


@dataclass(frozen=True, slots=True)
class Pin:
    """SHA-256 of a file as released, and with the whole series applied."""

    released: str
    patched: str


@dataclass(frozen=True, slots=True)
class Series:
    """The patches in the order in which they apply, for one version of one package."""

    package: str
    version: str
    patches: tuple[Patch, ...]
    pins: Mapping[str, Pin]

    @property
    def modules(self) -> dict[str, str]:
        """Module name -> path of each touched file."""
        return {path.removesuffix(".py").replace("/", "."): path for path in self.pins}

    def check_names(self, names: Collection[str]) -> None:
        """Raises ConfigError where one of `names` is not a patch of the series."""
        known = [patch.name for patch in self.patches]
        for name in names:
            if name not in known:
                raise ConfigError(f"patches: there is no patch {name!r}; there are {', '.join(known)}")

    def apply(self, path: str, source: str, without: Collection[str] = ()) -> str:
        """`source` of the released file `path` with the series applied, all but the patches named in `without`."""
        rows: list[Row] = [(None, line) for line in source.splitlines(keepends=True)]
        for patch in self.patches:
            hunks = sorted((h for h in patch.hunks if h.path == path), key=lambda h: h.after_line, reverse=True)
            for hunk in hunks:
                rows[hunk.after_line : hunk.after_line] = [(patch.name, line) for line in hunk.lines]
        return "".join(line for name, line in rows if name not in without)


def parse_patch(name: str, text: str) -> Patch:
    """Reads one patch file; raises ValueError, with the line, where it is anything but insertions."""
    header: dict[str, str] = {}
    hunks: list[Hunk] = []
    path = ""
    after_line, wanted, lines = 0, 0, list[str]()
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if wanted:
            if not line.startswith("+"):
                raise ValueError(f"{name}:{number}: only inserted lines may follow, got {line!r}")
            lines.append(line[1:])
            wanted -= 1
            if not wanted:
                hunks.append(Hunk(path, after_line, tuple(lines)))
        elif line.startswith("+++ b/"):
            path = line.removeprefix("+++ b/").rstrip("\n")
        elif line.startswith("@@"):
            match = _HUNK.match(line.rstrip("\n"))
            if match is None or not path:
                raise ValueError(f"{name}:{number}: not a hunk that only inserts: {line!r}")
            after_line, wanted, lines = int(match[1]), int(match[3] or 1), []
        elif not path and not line.startswith("---"):
            key_value = _HEADER.match(line.rstrip("\n"))
            if key_value:
                header[key_value[1]] = key_value[2]
            elif line.strip() and header:
                header[list(header)[-1]] += " " + line.strip()
    missing = [key for key in REQUIRED_HEADER if key not in header]
    if missing or wanted or not hunks:
        raise ValueError(f"{name}: incomplete; header lacks {missing}, last hunk lacks {wanted} lines")
    return Patch(name, header, tuple(hunks), text)


def load_series(directory: Path | None = None) -> Series:
    """The series in `directory`, or the one that comes with this package; ConfigError where it cannot be read."""
    directory = directory or patch_directory()
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        patches = tuple(
            parse_patch(name.removesuffix(".patch"), (directory / name).read_text(encoding="utf-8"))
            for name in manifest["patches"]
        )
        pins = {path: Pin(pin["released"], pin["patched"]) for path, pin in manifest["files"].items()}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"patches: {directory} cannot be read: {error}") from error
    touched = {path for patch in patches for path in patch.paths}
    if touched != pins.keys():
        raise ConfigError(f"patches: {directory / MANIFEST} does not list the files the patches touch")
    return Series(manifest["package"], manifest["version"], patches, pins)


def patch_directory() -> Path:
    """Where the patches are: inside an installed package, or beside it in a checkout."""
    package = Path(lmdeploy_slo.__file__).parent
    for candidate in (package / "_patches", package.parent / "patches"):
        if (candidate / MANIFEST).is_file():
            return candidate
    raise ConfigError(f"patches: neither {package / '_patches'} nor {package.parent / 'patches'} has a {MANIFEST}")


def sha256(content: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(content).hexdigest()
