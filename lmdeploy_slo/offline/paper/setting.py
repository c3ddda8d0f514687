"""What `make bench-paper` runs: fixed before anything was tuned on it, and not changed since.

From the paper: the two tasks in equal shares with their objectives, the two data sets, small batches, the coefficients
of its slow GPU (the last three as recalled, not verified against its text). Ours: everything else.

The persistent batch has step coefficients with the same slopes. Where the static model has a term that a sum over the
batch cannot have (0.00088 ms per token of context, whatever the batch), it is spread over four sequences; what it
charges a prefill beside its tokens (43.67 + 5.7 b ms) is left out but for the c0 of the step, since prompts that
prefill in one step would each pay it.
"""

from __future__ import annotations

from lmdeploy_slo.core.latency_model import StepModel
from lmdeploy_slo.core.slo import Slo
from lmdeploy_slo.offline.workload_generator import PRESETS, TaskMix
from lmdeploy_slo.scheduling.paper_setting import CHAT, CODE, LATENCY

SLOS: dict[str, Slo] = {"code": CODE.slo, "chat": CHAT.slo}
"""30 s E2E; 10 s TTFT and 50 ms TPOT."""

TASKS: dict[str, TaskMix] = dict(PRESETS["paper"].tasks)
"""Half each; lengths fitted to samples of the two data sets, see `workload_generator`."""

STATIC_MODEL = LATENCY

STEP_MODEL = StepModel(c0=15.85e-3, p1=0.11e-3, p2=0.0, d1=0.275e-3, d2=(0.0002e-3 + 0.00088e-3 / 4))

BATCH_SIZES = (1, 2, 4, 8)
"""Most requests in a static batch; the in-flight cap of the persistent one."""

INSTANCES = (1, 2)

AT_ONCE = (4, 8, 16, 32)
"""Requests that are there from the start, for all instances together."""

AT_ONCE_SEEDS = tuple(range(20))

LOADS = (0.5, 0.8, 1.0, 1.5, 2.0)
"""Poisson arrivals, in multiples of the capacity of all instances."""

POISSON_REQUESTS = 200

POISSON_SEEDS = tuple(range(10))

CAPACITY_REQUESTS = 400
"""Capacity is what one instance serves a second under FCFS of so many requests that are all there from the start."""

CAPACITY_SEED = 1000

LENGTH_NOISE = 0.3
"""The scheduler knows output lengths times lognormal(0, this)."""

PLAN_EVALUATIONS = 800
"""Plans the online policy may score for one of its own, as in `simulate`."""
