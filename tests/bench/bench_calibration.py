"""What learning costs a server: per window, per step of the engine, per request. Microseconds; each figure is that of
the fastest of many short runs, between which other work on the machine may come.

    python tests/bench/bench_calibration.py
"""

from __future__ import annotations

import random
from collections.abc import Callable

from lmdeploy_slo.clock import MonotonicClock
from lmdeploy_slo.core.snapshot import EngineLimits
from lmdeploy_slo.prediction.calibration import Calibration
from lmdeploy_slo.prediction.calibration_estimator import StepEstimator, Work
from lmdeploy_slo.prediction.prefix import PrefixPredictor
from lmdeploy_slo.testing.builders import A100, make_spec

REPEATS, COUNT, BATCH = 100, 400, 128


def best_us(count: int, run: Callable[[], None]) -> float:
    """Of one of the `count` things that `run` does."""
    clock, times = MonotonicClock(), []
    for _ in range(REPEATS):
        begun_at_s = clock.now_s()
        run()
        times.append(clock.now_s() - begun_at_s)
    return 1e6 * min(times) / count


def works(count: int) -> list[Work]:
    draw = random.Random(0)
    made = []
    for _ in range(count):
        batch, tokens = draw.randint(1, 128), draw.choice([0.0, draw.uniform(50, 4000)])
        steps, context = draw.randint(1, 8), 1000.0 * batch
        work = Work(1.0, steps, tokens, tokens * tokens, steps * batch, steps * context)
        seconds = StepEstimator(A100).expected_s(work) * draw.lognormvariate(0, 0.02)
        made.append(Work(seconds, steps, tokens, tokens * tokens, steps * batch, steps * context))
    return made


def update_us() -> float:
    made = works(COUNT)

    def run() -> None:
        estimator = StepEstimator(A100)
        for work in made:
            estimator.update(work)

    return best_us(len(made), run)


def step_us(learning: bool) -> float:
    """A pure decode step of a full batch, its share of a window's end included."""
    steps = COUNT

    def run() -> None:
        tokens = dict.fromkeys(range(BATCH), 1)
        calibration = Calibration(A100, EngineLimits(), progress=tokens.__getitem__, learning=learning, quiet=True)
        for handle in tokens:
            calibration.sent(handle, 1000, 0.0, 0.0)
            calibration.first_token(handle)
        calibration.step(1.0, 0)
        clock, at_s = BATCH - 1, 1.0
        for _ in range(steps):
            at_s += 0.02
            tokens[clock] += 1
            calibration.step(at_s, BATCH)

    return best_us(steps, run)


def request_us() -> float:
    """Sent, first token, end: what is kept of a request."""
    requests = COUNT

    def run() -> None:
        calibration = Calibration(A100, EngineLimits(), progress=lambda handle: 1, learning=False, quiet=True)
        for handle in range(requests):
            if handle % 16 == 0:
                calibration.step(1e-3 * handle, 0)
            calibration.sent(handle, 1000, 0.0, 0.0)
            calibration.first_token(handle)
            calibration.left(handle, 1, finished=True)

    return best_us(requests, run)


def prefix_us() -> tuple[float, float]:
    """(a forecast, learning from a request)."""
    specs = [make_spec(str(n), conversation_id=f"c{n % 50}", task_type="chat") for n in range(COUNT)]
    prefixes = PrefixPredictor()
    for spec in specs:
        prefixes.observe(spec, 50, 0.0)

    def predict() -> None:
        for spec in specs:
            prefixes.predict(spec)

    def learn() -> None:
        for spec in specs:
            prefixes.observe(spec, 50, 0.0)
            prefixes.finish(spec, 100, 1.0)

    return best_us(len(specs), predict), best_us(len(specs), learn)


def main() -> None:
    predict, learn = prefix_us()
    for what, us in (
        ("an update of the coefficients", update_us()),
        (f"a step of {BATCH} sequences, an update every 8 included", step_us(True)),
        (f"a step of {BATCH} sequences, only watched", step_us(False)),
        ("a request: sent, first token, end", request_us()),
        ("expecting a prefix hit", predict),
        ("learning from a prefix hit", learn),
    ):
        print(f"{us:8.1f} us  {what}")


if __name__ == "__main__":
    main()
