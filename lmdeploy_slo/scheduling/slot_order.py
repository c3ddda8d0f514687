"""Who goes first where more requests may enter than there are free slots.

The rollout of `annealing` knows no slots: it decides who may enter now. Where that is more than the in-flight cap lets
in, each of them waits for a slot, and the order decides who waits too long. It is planned as the static model plans
batches of one, with the slots as engines; see `slot_order_kernel`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lmdeploy_slo.core.snapshot import Snapshot
from lmdeploy_slo.scheduling.annealing_arrays import QUANTILES, Candidates, Floats, Ints, Pace
from lmdeploy_slo.scheduling.slot_order_kernel import score_order, search_order

MOVES_EACH = 40
MOST_WORK = 400_000
"""Moves of a search for each request to order; fewer where they would take longer than a quarter of a millisecond: a
move takes about 0.5 ns times requests times six and twice the slots."""

LATE_STARTS = np.linspace(0.0, 0.5, QUANTILES)
"""By length quantile, how much later than planned a request is taken to start: lengths of those before it are guesses,
and shorter ones that are yet to come will overtake it."""

LEAST_GAIN = 0.01
"""An order must score better than that of arrival by this part to be taken instead of it: less than what forecasts are
off by is no reason to overtake anybody."""

SHORTEST_STEP_S = 1e-9


def order_for_slots(
    snapshot: Snapshot, candidates: Candidates, chosen: Ints, pace: Pace, state: npt.NDArray[np.uint64]
) -> Ints:
    """`chosen`, at least two entries of `candidates`, in the order in which they should get a slot.

    state: of the random draws, as `annealing_kernel.next_random` has it. At least one slot is free.
    """
    waiting = snapshot.waiting[candidates.row[chosen]]
    run_s, limit_s, worth, free_s = describe(snapshot, candidates, chosen, pace)
    waited_s = len(waiting) * snapshot.now_s - float(np.sum(waiting["arrival_at_s"]))
    latest_s = np.max(limit_s, axis=1)
    lost = latest_s < 0.0
    arrival = np.argsort(waiting["arrival_at_s"], kind="stable")
    starts = np.array([arrival, np.argsort(run_s), np.lexsort((run_s, lost)), np.lexsort((latest_s, lost))])
    best = np.empty(len(chosen), dtype=np.int64)
    moves = min(MOVES_EACH * len(chosen), MOST_WORK // (len(chosen) * (2 * len(free_s) + 6)))
    score = search_order(starts, run_s, limit_s, worth, waited_s, free_s, moves, state, best)
    if score < (1.0 + LEAST_GAIN) * score_order(arrival, run_s, limit_s, worth, waited_s, free_s):
        best = arrival
    return np.asarray(chosen[best], dtype=np.int64)


def describe(
    snapshot: Snapshot, candidates: Candidates, chosen: Ints, pace: Pace
) -> tuple[Floats, Floats, Floats, Floats]:
    """(run, limit, worth, free) as in `slot_order_kernel`; of as many slots as can matter.

    Everybody decodes at the pace of an engine with as many in flight as the cap or the requests allow, slowed by the
    prefills that are expected.
    """
    n, running = len(chosen), snapshot.running
    batch = min(snapshot.limits.max_batch_size, len(running) + n)
    held = np.concatenate([
        running["prompt_tokens"] + running["cached_tokens"] + running["output_tokens"] / 2,
        candidates.prompt[chosen] + candidates.output[chosen] / 2,
    ])  # fmt: skip
    step_s = snapshot.model.step_s(0, 0, batch, batch * float(np.mean(held))) * (1.0 + pace.background)
    step_s = max(step_s, SHORTEST_STEP_S)
    stall_s, output = candidates.stall[chosen], candidates.output[chosen]
    by_ttft_s = candidates.ttft_at[chosen] - stall_s - step_s
    by_e2e_s = candidates.e2e_at[chosen, None] - stall_s[:, None] - candidates.outputs[chosen] * step_s
    limit_s = np.minimum(by_ttft_s[:, None], by_e2e_s) / (1.0 + LATE_STARTS)
    limit_s[(candidates.tpot[chosen] < step_s) & (output > 1)] = -1.0
    left_s = np.maximum(running["output_tokens"] - running["generated_tokens"], 1.0) * step_s
    free_s = np.concatenate([np.zeros(snapshot.free_slots), np.sort(left_s)])[:n]
    return stall_s + output * step_s, limit_s, candidates.worth[chosen], free_s
