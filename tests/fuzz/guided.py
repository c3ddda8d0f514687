"""The targets under atheris, which keeps inputs that reach new code and works on from them: `make fuzz-guided`.

    python tests/fuzz/guided.py [--seconds 60] [--seed 1] [--only NAME] [--corpus .fuzz/corpus]

Each target has a process of its own and so many seconds; what it found stays in the corpus, from which the next run
goes on. The exit status is 1 if an input broke something; libFuzzer says which, and keeps it.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import subprocess
import sys
from pathlib import Path

import atheris

TESTS = Path(__file__).parents[1]
NAMES = (
    *("validation", "calls", "traces", "conversations", "timelines", "benchmark tables", "profiles", "configuration"),
    *("client policies", "tokens", "profiler state", "server state", "plan snapshots", "slo options"),
)
LIMIT_S, MEMORY_MIB, LONGEST = 10, 2048, 8192


def fuzz(name: str, arguments: list[str]) -> None:
    """Does not return."""
    sys.path.insert(0, str(TESTS))
    with atheris.instrument_imports(include=["lmdeploy_slo"]):
        from targets import TARGETS
    logging.disable(logging.WARNING)
    take = TARGETS[name].take
    atheris.Setup([sys.argv[0], *arguments], lambda data: take(data) and None)
    atheris.Fuzz()


def seeded(corpus: Path, name: str) -> Path:
    """The folder of a target's inputs, with its examples in it."""
    folder = corpus / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(TESTS))
    from targets import TARGETS

    assert set(NAMES) == set(TARGETS), "NAMES is not the list of targets"
    for example in TARGETS[name].examples:
        (folder / hashlib.sha256(example).hexdigest()[:16]).write_bytes(example)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--corpus", type=Path, default=Path(".fuzz/corpus"))
    parser.add_argument("--in-process", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.in_process:
        fuzz(args.in_process, rest)
    broken = []
    for name in (args.only,) if args.only else NAMES:
        folder = seeded(args.corpus, name)
        limits = [f"-max_total_time={args.seconds}", f"-timeout={LIMIT_S}", f"-rss_limit_mb={MEMORY_MIB}"]
        options = [f"-seed={args.seed}", f"-max_len={LONGEST}", f"-artifact_prefix={args.corpus.parent}/broken-"]
        command = [sys.executable, __file__, "--in-process", name, *limits, *options, "-print_final_stats=1"]
        run = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
        executed = next((line.split()[-1] for line in run.stderr.splitlines() if "executed_units" in line), "?")
        verdict = "BROKEN" if run.returncode else ""
        print(f"{name:>16} {executed:>9} inputs, {len(list(folder.iterdir()))} kept {verdict}", flush=True)
        if run.returncode:
            broken.append(name)
            print(run.stdout[-2000:], run.stderr[-4000:], sep="\n")
    print(f"broken: {', '.join(broken) or 'none'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
