"""What a fuzz target is: a name, examples to start from, and what must hold of any input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random


class Broken(AssertionError):
    """Something was promised, and an input broke it."""


def promise(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


@dataclass(frozen=True)
class Target:
    """make: an input of its seed. take: says in a word what became of it; raises for what must not happen.

    cost: how many times as long as the cheapest target an input takes, about; the long run gives the dear ones less.
    """

    name: str
    make: Callable[[Random], bytes]
    take: Callable[[bytes], str]
    examples: Sequence[bytes]
    cost: int = 1
