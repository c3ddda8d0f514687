"""The patched text of LMDeploy's files: checked, compared with the released text, or written out as a source tree."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

from lmdeploy_slo.engine.patching.installed import FileState, Installation, released_source
from lmdeploy_slo.engine.patching.series import Series, sha256
from lmdeploy_slo.errors import ConfigError


def patched_sources(series: Series, installation: Installation) -> dict[str, str]:
    """Path -> patched text of every touched file.

    Raises ConfigError where a file is not as released, or where the result is not what the manifest says.
    """
    sources: dict[str, str] = {}
    for path, pin in series.pins.items():
        text = series.apply(path, released_source(series, installation, path))
        digest = sha256(text.encode())
        if digest != pin.patched:
            raise ConfigError(f"patches: {path} comes out as {digest}, the manifest says {pin.patched}")
        compile(text, path, "exec", dont_inherit=True)
        sources[path] = text
    return sources


def context_diff(series: Series, installation: Installation) -> str:
    """What the series changes, as a unified diff with context, to be read."""
    parts: list[str] = []
    for path, patched in patched_sources(series, installation).items():
        released = released_source(series, installation, path)
        lines = difflib.unified_diff(released.splitlines(), patched.splitlines(), f"a/{path}", f"b/{path}", lineterm="")
        parts.extend(f"{line}\n" for line in lines)
    return "".join(parts)


def export_tree(series: Series, installation: Installation, directory: Path, *, whole_root: bool) -> int:
    """Copies LMDeploy to `directory`, patched, and returns the number of files changed.

    whole_root: everything beside the package too, as in a source checkout (without its .git); else the package alone.
    Raises ConfigError where `directory` holds anything, or where the patches do not fit.
    """
    problem = installation.problem(series)
    if problem is not None:
        raise ConfigError(f"patches: {problem}")
    if any(file.state is FileState.PATCHED for file in installation.files):
        raise ConfigError(f"patches: {installation.root} is patched already")
    sources = patched_sources(series, installation)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists and is not empty")
    source, target = installation.root, directory
    if not whole_root:
        source, target = installation.root / series.package, directory / series.package
    ignored = shutil.ignore_patterns("__pycache__", ".git")
    shutil.copytree(source, target, ignore=ignored, symlinks=True, dirs_exist_ok=True)
    for path, text in sources.items():
        (directory / path).write_text(text, encoding="utf-8")
    return len(sources)
