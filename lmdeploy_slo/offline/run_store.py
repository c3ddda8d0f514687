"""Answers of long runs kept on disk, found again by what was asked and by the code that answered.

A benchmark of thousands of simulated runs is interrupted, extended, and repeated after a change of one policy; what the
change cannot have touched is not run again. The code that answered is told by a fingerprint of everything it imports,
in which comments, docstrings and layout do not count.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Stored:
    """asked: what was asked, as `plain` makes it. code: the fingerprint of what answered. answer: JSON."""

    asked: Any
    code: str
    answer: dict[str, Any]


class RunStore:
    """A folder with one file for each question; a newer answer replaces the older. Processes may share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, asked: Any) -> Stored | None:
        """The last answer to this, whichever code gave it; None where there is none, or its file is broken."""
        try:
            document = json.loads(self._path(asked).read_text(encoding="utf-8"))
            return Stored(document["asked"], document["code"], document["answer"])
        except (OSError, ValueError, KeyError):
            return None

    def keep(self, stored: Stored) -> None:
        """Writes it, whole or not at all, each number to its last digit; raises OSError where that fails."""
        path = self._path(stored.asked)
        text = json.dumps({"asked": stored.asked, "code": stored.code, "answer": stored.answer}, indent=1)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)

    def _path(self, asked: Any) -> Path:
        return self._folder / f"{digest(asked)}.json"


def digest(value: Any) -> str:
    """16 hexadecimal digits of any JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """A description as JSON. Dataclasses are dictionaries without the fields that are at their defaults, so that one
    more setting does not make every question a new one. Raises TypeError for what cannot be written so."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) != _default(f)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"cannot describe {value!r}")


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def code_fingerprint(modules: Iterable[str]) -> str:
    """16 hexadecimal digits of the code of `modules` (of this package) and of all they import from it as they load.

    What is imported inside a function is not followed: name it among the modules where it matters.
    """
    code = hashlib.sha256()
    for path in source_files(modules):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        _strip_docstrings(tree)
        code.update(f"{path.relative_to(_PACKAGE)} {ast.dump(tree)}\n".encode())
    return code.hexdigest()[:16]


def source_files(modules: Iterable[str]) -> list[Path]:
    """The files that `code_fingerprint` reads, sorted; raises ValueError for a module that is not of this package."""
    found: set[Path] = set()
    new = []
    for module in modules:
        path = _path_of(module)
        if path is None:
            raise ValueError(f"{module} is no module of this package")
        new.append(path)
    while new:
        path = new.pop()
        if path in found:
            continue
        found.add(path)
        named = map(_path_of, _imports(ast.parse(path.read_text(encoding="utf-8"))))
        new.extend(imported for imported in named if imported is not None)
    return sorted(found)


def _path_of(module: str) -> Path | None:
    """None for what is no module of this package, and for packages, whose `__init__` here hold no code."""
    top, *below = module.split(".")
    path = _PACKAGE.joinpath(*below).with_suffix(".py")
    return path if top == _PACKAGE.name and below and path.is_file() else None


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _strip_docstrings(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [
                line
                for line in node.body
                if not (
                    isinstance(line, ast.Expr)
                    and isinstance(line.value, ast.Constant)
                    and isinstance(line.value.value, str)
                )
            ]
