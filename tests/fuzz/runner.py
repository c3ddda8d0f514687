"""The long run: as many inputs as asked for, over all targets, from where it was interrupted.

    python tests/fuzz/runner.py [--inputs 1000000] [--seed 1] [--only NAME] [--progress .fuzz/progress.json]

Input `n` of a target depends on the seed, the target and `n` alone, so a run goes on from the counts in its progress
file, and a failing input is had again with --only NAME --from N --inputs 1. An input may take `LIMIT_S`. One that
breaks something is written beside the progress file and told; the others go on. The exit status is 1 if there was any.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import math
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import FrameType

sys.path.insert(0, str(Path(__file__).parents[1]))  # what tests share

from outcome import Broken, Target
from targets import TARGETS

LIMIT_S = 10.0
SLICE = 5_000
"""Inputs of a target before the next has its turn."""


class Hang(BaseException):
    """An input took longer than `LIMIT_S`; no code under test catches it by mistake."""


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise Hang(f"longer than {LIMIT_S:g} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run_one(target: Target, seed: int, number: int) -> str:
    """What became of an input. Raises what it broke."""
    data = target.make(Random(f"{seed}/{target.name}/{number}"))
    with time_limit():
        return target.take(data)


def share(inputs: int, targets: list[Target]) -> dict[str, int]:
    """Inputs of each target: fewer of those that take longer."""
    weight = sum(1 / target.cost for target in targets)
    return {target.name: math.ceil(inputs / (weight * target.cost)) for target in targets}


class Run:
    """One seed's progress: how many inputs of each target are done, and what became of them."""

    def __init__(self, seed: int, file: Path) -> None:
        self.seed, self._file = seed, file
        known = json.loads(file.read_text()) if file.exists() else {}
        mine = known.get(str(seed), {})
        self.done: Counter[str] = Counter(mine.get("done", {}))
        self.outcomes: dict[str, Counter[str]] = {n: Counter(c) for n, c in mine.get("outcomes", {}).items()}
        self.broken: Counter[str] = Counter(mine.get("broken", {}))

    def save(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(self._file.read_text()) if self._file.exists() else {}
        known[str(self.seed)] = {"done": self.done, "outcomes": self.outcomes, "broken": self.broken}
        beside = self._file.with_suffix(".new")
        beside.write_text(json.dumps(known, indent=1))
        beside.replace(self._file)

    def go_on(self, target: Target, first: int, count: int) -> None:
        outcomes = self.outcomes.setdefault(target.name, Counter())
        for number in range(first, first + count):
            try:
                outcomes[run_one(target, self.seed, number)] += 1
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                self._tell(target, number, error)
        self.done[target.name] = max(self.done[target.name], first + count)

    def _tell(self, target: Target, number: int, error: BaseException) -> None:
        shown = error.__cause__ if isinstance(error, Broken) and error.__cause__ is not None else error
        place = traceback.extract_tb(shown.__traceback__)[-1]
        what = f"{target.name}: {type(shown).__name__} at {Path(place.filename).name}:{place.lineno}"
        self.broken[what] += 1
        if self.broken[what] > 1:
            return
        data = target.make(Random(f"{self.seed}/{target.name}/{number}"))
        self._file.parent.mkdir(parents=True, exist_ok=True)
        kept = self._file.parent / f"broken-{hashlib.sha256(data).hexdigest()[:12]}"
        kept.write_bytes(data)
        again = f"--seed {self.seed} --only '{target.name}' --from {number} --inputs 1"
        print(f"{what}: {str(error)[:300]}\n  {kept}; {again}")
        traceback.print_exception(shown)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="of all targets together, since the seed's start")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=sorted(TARGETS))
    parser.add_argument("--from", type=int, dest="first", help="instead of going on: the number of the first input")
    parser.add_argument("--progress", type=Path, default=Path(".fuzz/progress.json"))
    args = parser.parse_args()
    logging.disable(logging.WARNING)

    targets = [TARGETS[args.only]] if args.only else list(TARGETS.values())
    run, began_at_s = Run(args.seed, args.progress), time.monotonic()
    if args.first is not None:
        if not args.only:
            parser.error("--from needs --only")
        run.go_on(targets[0], args.first, args.inputs)
        return 1 if run.broken else 0
    wanted, here = share(args.inputs, targets), 0
    while left := [target for target in targets if run.done[target.name] < wanted[target.name]]:
        for target in left:
            count = min(SLICE, wanted[target.name] - run.done[target.name])
            run.go_on(target, run.done[target.name], count)
            run.save()
            here += count
        elapsed_s = time.monotonic() - began_at_s
        memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{run.done.total()} inputs, {here / elapsed_s:.0f}/s, {memory_mib:.0f} MiB at most", flush=True)
    for target in targets:
        outcomes = ", ".join(f"{what} {n}" for what, n in run.outcomes.get(target.name, Counter()).most_common(12))
        print(f"{target.name:>16} {run.done[target.name]:8d}  {outcomes}")
    print(f"{run.done.total()} inputs of seed {args.seed}, broken: {dict(run.broken) or 'none'}")
    return 1 if run.broken else 0


if __name__ == "__main__":
    sys.exit(main())
