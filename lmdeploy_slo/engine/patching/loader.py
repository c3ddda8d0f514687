"""Applies the series in memory: a finder that gives the touched modules their patched text while they are imported.

Nothing on disk changes. Tracebacks show the patched lines, because the text that ran is put into `linecache`.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Collection, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

from lmdeploy_slo.engine.patching.installed import Installation, inspect_installation, released_source
from lmdeploy_slo.engine.patching.series import Series, load_series
from lmdeploy_slo.errors import ConfigError


class PatchFinder(MetaPathFinder):
    """Finds the modules of `series.modules`, with their patched text, and leaves every other module alone."""

    def __init__(self, series: Series, installation: Installation, without: Collection[str] = ()) -> None:
        self.without = tuple(without)
        self._modules = series.modules
        self._sources = {
            path: series.apply(path, released_source(series, installation, path), without) for path in series.pins
        }

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._modules:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _PatchedLoader(fullname, spec.origin, self._sources[self._modules[fullname]])
        return spec


class _PatchedLoader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, source: str) -> None:
        super().__init__(fullname, path)
        self._source = source

    def get_source(self, fullname: str) -> str:
        return self._source

    def get_code(self, fullname: str) -> CodeType:
        # An entry without a modification time is never checked against the file.
        lines = self._source.splitlines(keepends=True)
        linecache.cache[self.path] = (len(self._source), None, lines, self.path)
        return compile(self._source, self.path, "exec", dont_inherit=True)


def install(series: Series | None = None, without: Collection[str] = ()) -> bool:
    """Makes every later import of LMDeploy a patched one; True where it is in effect when this returns.

    Idempotent. `without` leaves patches out by name (for tests of what each one does). An LMDeploy that is patched on
    disk is left as it is. Raises ConfigError where the patches do not fit what is installed, where LMDeploy was
    imported before, or where other patches were left out than asked for; MissingExtra without LMDeploy.
    """
    series = series or load_series()
    series.check_names(without)
    finder = installed_finder()
    if finder is not None:
        if finder.without != tuple(without):
            raise ConfigError("patches: installed already, with another choice of patches")
        return True
    installation = inspect_installation(series)
    problem = installation.problem(series)
    if problem is not None:
        raise ConfigError(f"patches: {problem}")
    if installation.patched_on_disk:
        if without:
            raise ConfigError("patches: none can be left out of an LMDeploy that is patched on disk")
        return True
    imported = sorted(name for name in series.modules if name in sys.modules)
    if imported:
        raise ConfigError(
            f"patches: {imported[0]} was imported before lmdeploy_slo could patch it; "
            "import lmdeploy through lmdeploy_slo, or call lmdeploy_slo.engine.patching.loader.install() first"
        )
    sys.meta_path.insert(0, PatchFinder(series, installation, without))
    return True


def installed_finder() -> PatchFinder | None:
    """The finder in effect, if there is one."""
    return next((finder for finder in sys.meta_path if isinstance(finder, PatchFinder)), None)
