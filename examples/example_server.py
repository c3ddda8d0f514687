"""The server of an example: the one named by --target, or one that is started here and ended afterwards.

Started here it is `lmdeploy_slo serve` on a free port with the emulated engine: no GPU, no model, synthetic tokens.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def server(*flags: str) -> Iterator[str]:
    """The address, as host:port. `flags` go to `lmdeploy_slo serve`; with --target they are of no effect."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", metavar="HOST:PORT", help="a running server; default: start one")
    target = parser.parse_args().target
    if target is not None:
        yield target
        return
    with started_server(*flags) as address:
        yield address


@contextmanager
def started_server(*flags: str) -> Iterator[str]:
    """A server of our own."""
    command = [sys.executable, "-m", "lmdeploy_slo", "serve", "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            # "lmdeploy_slo: serving on 127.0.0.1:40001 (emulated engine, ...)" says that requests are taken
            ready = process.stdout.readline()
            if " serving on " not in ready:
                raise SystemExit("the server did not start")
            yield ready.split(" serving on ")[1].split()[0]
        finally:
            process.terminate()  # running requests may end, then it exits
