"""--unpatched: LMDeploy as released still serves, in the order of submission, and leaves nothing behind.

In a process of its own, because a process imports LMDeploy once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import asyncio, json, sys
from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.engine.base import EngineRequest, Stopping
from lmdeploy_slo.engine.lmdeploy import Device, LmdeployEngine, LmdeployOptions
from lmdeploy_slo.testing.event_log import EventLog


async def main(model):
    limits = EngineLimits(max_batch_size=1)
    options = LmdeployOptions(model, device=Device.CPU, limits=limits, patched=False, log_level="CRITICAL")
    engine, log = LmdeployEngine(options, MonotonicClock()), EventLog()
    await engine.start(log.sink)
    from lmdeploy_slo.engine.cpu_standin.native import PACE

    PACE.hold()
    for rank, name in ((3, "a"), (2, "b"), (1, "c"), (0, "d")):
        engine.submit(EngineRequest(name, [5, 6], Stopping(max_new_tokens=4, ignore_eos=True)), rank)
    for _ in range(20):
        await asyncio.sleep(0)
    engine.rerank({"d": -5})
    engine.abort("b")
    PACE.release()
    await log.ended("a", "b", "c", "d")
    while engine._tasks:
        await asyncio.wait(engine._tasks)
    manager = engine.async_engine.session_mgr
    left = len(manager.sessions) + manager.request_handle_pool.num_dispatched
    first = log.events("a")[0]
    await engine.close()
    order = [e.request_id for _, events in log.calls for e in events if e.end is not None]
    print(json.dumps({"order": order, "ends": {n: log.end(n).value for n in "abcd"}, "left": left,
                      "patched": engine.info.details["patched"], "queued": first.queued_at_s,
                      "violations": log.violations}))


asyncio.run(main(sys.argv[1]))
"""


def test_the_order_is_that_of_submission(tiny_model: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tiny_model)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {
        "order": ["b", "a", "c", "d"],
        "ends": {"a": "length", "b": "abort", "c": "length", "d": "length"},
        "left": 0,
        "patched": "no",
        "queued": None,
        "violations": [],
    }
