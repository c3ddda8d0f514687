"""What was learnt while serving, in a file, so that a restart need not learn it again.

Whatever learns offers `state` and `restore`, and is kept under a name of its own. A file is replaced as a whole or not
at all. One that cannot be read, or with a part that its owner does not take, is set aside with a warning, and what it
would have told is learnt anew: a state is worth having, but never worth a server that does not start.

    {"format": 1, "of": {"engine": "...", "model": "..."}, "parts": {NAME: state, ...}}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lmdeploy_slo.errors import ConfigError

logger = logging.getLogger(__name__)

FORMAT = 1
"""The version of the file that is written, and the only one that is read."""

SET_ASIDE = ".set-aside"
"""Appended to the name of a file that could not be used; a later one takes its place."""

WRONG = (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError)
"""What `restore` may raise for something that is not its state."""


@runtime_checkable
class Learner(Protocol):
    """Learns while serving."""

    def state(self) -> dict[str, Any]:
        """What it knows, as JSON has it; nothing in it is changed later."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from there. Raises one of WRONG for what is not a state, and then has changed nothing."""
        ...


class StateFile:
    """The file of one engine and model in a folder. learners: by the names of their parts, as they are by then.

    Raises ConfigError where the folder is none, cannot be made, or cannot be written to.
    """

    def __init__(self, folder: Path, *, engine: str, model: str, learners: Callable[[], Mapping[str, Learner]]) -> None:
        self._of = {"engine": engine, "model": model}
        self._learners = learners
        self._others: dict[str, Any] = {}  # parts that nobody here learns; they stay as they are
        self._failing = False
        digest = hashlib.sha256(json.dumps(self._of, sort_keys=True).encode()).hexdigest()[:8]
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.")[-48:]
        self.path = folder / f"{readable or 'model'}-{digest}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._temporary.touch()
            self._temporary.unlink()
        except OSError as error:
            raise ConfigError(f"state_dir {folder}: {error.strerror or error}") from error

    def load(self) -> list[str]:
        """Lets the learners go on from the file; the names of those that did."""
        try:
            document = json.loads(self.path.read_bytes())
            json.dumps(document, allow_nan=False)  # what nobody here learns is written again as it is
            parts = self._parts(document)
        except FileNotFoundError:
            return []
        except (OSError, RecursionError, *WRONG) as error:
            self._set_aside(f"cannot be used: {_words(error)}")
            return []
        learners = self._learners()
        self._others = {name: part for name, part in parts.items() if name not in learners}
        restored, wrong = [], []
        for name, learner in learners.items():
            if name not in parts:
                continue
            try:
                learner.restore(parts[name])
                restored.append(name)
            except WRONG as error:
                wrong.append(f"{name} ({_words(error)})")
        if wrong:
            self._set_aside(f"has parts that cannot be used: {', '.join(wrong)}")
        return restored

    def collect(self) -> dict[str, Any]:
        """What the learners know now; to be called where they learn."""
        return {name: learner.state() for name, learner in self._learners().items()}

    def write(self, parts: Mapping[str, Any]) -> bool:
        """Replaces the file by what was collected; may be called from another thread, one call at a time.

        Where that fails it is logged, once until it works again, and False is returned.
        """
        document = {"format": FORMAT, "of": self._of, "parts": {**self._others, **parts}}
        try:
            with self._temporary.open("w", encoding="utf-8") as file:
                json.dump(document, file, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            self._temporary.replace(self.path)
            _sync_folder(self.path.parent)
        except (OSError, *WRONG) as error:
            if not self._failing:
                logger.warning("what was learnt cannot be kept in %s: %s", self.path, error)
            self._failing = True
            return False
        if self._failing:
            logger.info("what was learnt is kept in %s again", self.path)
        self._failing = False
        return True

    # -- inside ---------------------------------------------------------------

    @property
    def _temporary(self) -> Path:
        return self.path.with_name(f".{self.path.name}.{os.getpid()}")

    def _parts(self, document: Any) -> Mapping[str, Any]:
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            form = document.get("format") if isinstance(document, dict) else None
            raise ValueError(f"its format is {form!r}, this version reads {FORMAT}")
        if document["of"] != self._of:
            raise ValueError(f"it is of {document['of']}, not of {self._of}")
        parts = document["parts"]
        if not isinstance(parts, dict):
            raise TypeError("its parts are no object")
        return parts

    def _set_aside(self, why: str) -> None:
        aside = self.path.with_name(self.path.name + SET_ASIDE)
        try:
            self.path.replace(aside)
        except OSError as error:
            logger.warning("state file %s %s; it cannot be set aside either (%s)", self.path, why, error)
            return
        logger.warning("state file %s %s; it is now %s, and that is learnt anew", self.path, why, aside.name)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _sync_folder(folder: Path) -> None:
    """So that the new name survives a loss of power; where a folder cannot be synced, it is as safe as it gets."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
