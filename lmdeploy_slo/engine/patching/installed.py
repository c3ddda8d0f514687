"""Which LMDeploy is installed here, and whether the patches fit it. Nothing of it is imported."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path

from lmdeploy_slo.engine.patching.series import Series, sha256
from lmdeploy_slo.errors import ConfigError, MissingExtra


class FileState(str, Enum):
    """How a touched file looks on disk."""

    RELEASED = "as released"
    PATCHED = "patched on disk"
    MODIFIED = "modified"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class InstalledFile:
    """`digest` is its SHA-256, None where it is missing."""

    path: str
    state: FileState
    digest: str | None


@dataclass(frozen=True, slots=True)
class Installation:
    """An LMDeploy on disk. root: the directory that holds the package. version: as its metadata say."""

    root: Path
    version: str
    files: tuple[InstalledFile, ...]

    @property
    def patched_on_disk(self) -> bool:
        """Whether it was built from a tree with the whole series applied."""
        return all(file.state is FileState.PATCHED for file in self.files)

    def problem(self, series: Series) -> str | None:
        """Why the series does not fit, naming the file and both hashes; None where it does."""
        if self.version != series.version:
            return (
                f"the patches are for {series.package} {series.version}, installed is {self.version}; "
                f"install {series.package}=={series.version}, or serve with --unpatched"
            )
        states = {file.state for file in self.files}
        if states in ({FileState.RELEASED}, {FileState.PATCHED}):
            return None
        # Where some files are patched and some are as released, the patched ones are the odd ones.
        order = (FileState.MODIFIED, FileState.MISSING, FileState.PATCHED, FileState.RELEASED)
        wrong = min(self.files, key=lambda file: order.index(file.state))
        return (
            f"{self.root / wrong.path} is not as released ({wrong.state.value}): its SHA-256 is "
            f"{wrong.digest or 'none'}, {series.package} {series.version} has {series.pins[wrong.path].released}; "
            f"reinstall {series.package}=={series.version}, or serve with --unpatched"
        )


def inspect_installation(series: Series, root: Path | None = None) -> Installation:
    """The installation of the series' package, or the tree at `root`; raises MissingExtra where there is none."""
    if root is None:
        spec = importlib.util.find_spec(series.package)
        if spec is None or spec.origin is None:  # a directory of that name alone is no package
            raise MissingExtra(series.package, "turbomind")
        root = Path(spec.origin).parent.parent
    return Installation(root, _version(series.package, root), tuple(_inspect(series, root, p) for p in series.pins))


def released_source(series: Series, installation: Installation, path: str) -> str:
    """The text of a touched file; raises ConfigError where it is not as released."""
    content = (installation.root / path).read_bytes()
    if sha256(content) != series.pins[path].released:
        raise ConfigError(f"patches: {installation.problem(series) or f'{path} is patched already'}")
    return content.decode("utf-8")


def _inspect(series: Series, root: Path, path: str) -> InstalledFile:
    try:
        digest = sha256((root / path).read_bytes())
    except OSError:
        return InstalledFile(path, FileState.MISSING, None)
    pin = series.pins[path]
    state = {pin.released: FileState.RELEASED, pin.patched: FileState.PATCHED}.get(digest, FileState.MODIFIED)
    return InstalledFile(path, state, digest)


def _version(package: str, root: Path) -> str:
    """From the package's own version file, so that a source tree without metadata has one too."""
    version_file = root / package / "version.py"
    if version_file.is_file():
        for line in version_file.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition("=")
            if name.strip() == "__version__":
                return value.strip().strip("'\"")
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
