"""The runs of `bench_planner.py`: what is run on which cell, made in processes, kept on disk, not made twice.

A run is found again where its cell, contender and seed and the rows of its trace are those it was made with, and
the code that it rests on is unchanged.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from bench_planner_setting import ANNEALING_CAP, BASELINE, CAPS, RULES, Cell, Rows

from lmdeploy_slo.offline.experiment import run_once
from lmdeploy_slo.offline.parallel import Workers
from lmdeploy_slo.offline.run_store import RunStore, Stored, code_fingerprint, digest, plain
from lmdeploy_slo.scheduling.annealing import AnnealingOptions, AnnealingPolicy
from lmdeploy_slo.scheduling.policy import Policy, PolicyFactory, SearchBudget, make_policy

SPREAD = 0.025
"""A rule and cap that is this far behind at the first seed is not run at the others: seeds differ by a third of it."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy with an in-flight cap. options, evaluations: of annealing, where they are not the defaults."""

    policy: str
    max_batch_size: int
    options: tuple[tuple[str, Any], ...] = ()
    evaluations: int | None = None

    @property
    def factory(self) -> str | PolicyFactory:
        return self._annealing if self.options or self.evaluations else self.policy

    def _annealing(self, seed: int, budget: SearchBudget) -> Policy:
        budget = budget if self.evaluations is None else SearchBudget(None, self.evaluations)
        return AnnealingPolicy(seed=seed, budget=budget, options=AnnealingOptions(**dict(self.options)))

    @property
    def is_rule(self) -> bool:
        return self.policy != "annealing"


FCFS = Contender(*BASELINE)
ANNEALING = Contender("annealing", ANNEALING_CAP)


def annealing_with(options: Mapping[str, Any], evaluations: int | None = None) -> Contender | None:
    """Annealing with options of its own; None where it has no such option."""
    if not options.keys() <= {field.name for field in fields(AnnealingOptions)}:
        return None
    return Contender("annealing", ANNEALING_CAP, tuple(sorted(options.items())), evaluations)


def at_each_cap(policy: str) -> list[Contender]:
    return [Contender(policy, cap) for cap in CAPS]


@dataclass(frozen=True, slots=True)
class Run:
    cell: Cell
    contender: Contender
    seed: int


def make_run(run: Run, traces: Mapping[str, Rows]) -> dict[str, Any]:
    """What is kept of it."""
    began_s = time.process_time()
    fleet = run.cell.fleet(run.contender.max_batch_size)
    outcome = run_once(traces[run.cell.trace], run.cell.load, fleet, run.contender.factory, run.seed)
    figures = outcome.run
    return {
        "attainment": figures["slo_attainment"],
        "mean_e2e_s": figures["e2e_ms"]["mean"] / 1e3,
        "p99_e2e_s": figures["e2e_ms"]["p99"] / 1e3,
        "finished": figures["finished"],
        "by_task": {name: task["slo_attainment"] for name, task in figures["by_task"].items()},
        "cpu_s": time.process_time() - began_s,
    }


class Book:
    """All runs there are, by cell, contender and seed."""

    def __init__(self, store: RunStore, traces: Mapping[str, Rows], pool: Workers) -> None:
        self.cpu_s = 0.0
        self.of_other_code = 0  # runs that `recheck` took
        self._store = store
        self._pool = pool
        self._traces = {name: digest(plain(rows)) for name, rows in traces.items()}
        # All at once, and now: what is edited later is not what runs.
        modules = {policy: code_of(policy) for policy in (*RULES, "annealing")}
        codes = {each: code_fingerprint(each) for each in set(modules.values())}
        self._codes = {policy: codes[each] for policy, each in modules.items()}
        self._runs: dict[Run, dict[str, Any]] = {}

    def __getitem__(self, run: Run) -> dict[str, Any]:
        return self._runs[run]

    def make(self, runs: Iterable[Run]) -> None:
        """Makes those that are not there; says how far it is on stderr."""
        missing = [run for run in dict.fromkeys(runs) if run not in self._runs and not self._recall(run)]
        began_s = said_s = time.monotonic()
        for done, (position, answer) in enumerate(self._pool.map(make_run, missing), 1):
            run = missing[position]
            self._store.keep(Stored(self._asked(run), self._code(run), answer))
            self._take(run, answer)
            if time.monotonic() - said_s > 20 or done == len(missing):
                said_s = time.monotonic()
                print(f"{done} of {len(missing)} runs in {said_s - began_s:.0f} s", file=sys.stderr, flush=True)

    def recheck(self, runs: Iterable[Run], count: int) -> None:
        """Takes kept runs of other code as runs of this, if `count` of them, drawn at random, come out the same."""
        stale = [run for run in runs if run not in self._runs and not self._recall(run)]
        known = [(run, stored) for run in stale if (stored := self._store.find(self._asked(run))) is not None]
        for run, stored in random.Random(0).sample(known, min(count, len(known))):
            [(_, answer)] = self._pool.map(make_run, [run])
            if _figures(answer) != _figures(stored.answer):
                print(f"{run.contender.policy} on {run.cell.name} comes out otherwise: all again", file=sys.stderr)
                return
        for run, stored in known:
            self._store.keep(Stored(stored.asked, self._code(run), stored.answer))
            self._take(run, stored.answer)
        self.of_other_code += len(known)

    def at_best_caps(self, cell: Cell, seeds: Sequence[int]) -> dict[str, Contender]:
        """Rule -> itself at the cap of best attainment, of those that were run at every seed."""
        best = {}
        for rule in RULES:
            whole = [c for c in at_each_cap(rule) if all(Run(cell, c, seed) in self._runs for seed in seeds)]
            if whole:
                best[rule] = max(whole, key=lambda c: self.attainment(cell, c, seeds))
        return best

    def attainment(self, cell: Cell, contender: Contender, seeds: Sequence[int]) -> float:
        values = [self._runs[Run(cell, contender, seed)]["attainment"] for seed in seeds]
        return sum(values) / len(values)

    def _recall(self, run: Run) -> bool:
        stored = self._store.find(self._asked(run))
        if stored is None or stored.code != self._code(run):
            return False
        self._take(run, stored.answer)
        return True

    def _take(self, run: Run, answer: dict[str, Any]) -> None:
        self._runs[run] = answer
        self.cpu_s += answer["cpu_s"]

    def _asked(self, run: Run) -> Any:
        cell, contender = run.cell, run.contender
        return {
            "rows": self._traces[cell.trace],
            "load": plain(cell.load),
            "fleet": plain(cell.fleet(contender.max_batch_size)),
            "contender": plain(contender),
            "seed": run.seed,
        }

    def _code(self, run: Run) -> str:
        return self._codes[run.contender.policy]


def code_of(policy: str) -> tuple[str, ...]:
    """The modules a run of this policy rests on, beside those they import."""
    return "lmdeploy_slo.offline.experiment", type(make_policy(policy)).__module__


def first_wave(cell: Cell, seeds: Sequence[int]) -> list[Run]:
    """Every rule at every cap at the first seed, and the baseline at all."""
    rules = [Run(cell, contender, seeds[0]) for rule in RULES for contender in at_each_cap(rule)]
    return rules + [Run(cell, FCFS, seed) for seed in seeds]


def second_wave(book: Book, cell: Cell, seeds: Sequence[int], *, every_rule: bool) -> list[Run]:
    """The other seeds for whoever is near the best: of its own rule, or with `every_rule` False of all rules."""
    groups = [at_each_cap(rule) for rule in RULES]
    if not every_rule:
        groups = [[one for group in groups for one in group], at_each_cap("slack-guard")]
    chosen = []
    for group in groups:
        first = {contender: book.attainment(cell, contender, seeds[:1]) for contender in group}
        most = max(first.values())
        chosen += [contender for contender, value in first.items() if value >= most - SPREAD]
    return [Run(cell, contender, seed) for contender in chosen for seed in seeds]


def _figures(answer: Mapping[str, Any]) -> dict[str, Any]:
    return {key: round(answer[key], 6) for key in ("attainment", "mean_e2e_s", "p99_e2e_s", "finished")}
