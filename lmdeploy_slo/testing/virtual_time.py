"""An event loop that never waits: where it would sleep until a timer, its clock jumps there.

Timed code that takes its `Clock` from the loop runs at once and always the same way. Only for code that waits on
timers and on itself: a jump does not wait for threads or other processes.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from lmdeploy_slo.clock import VirtualClock

T = TypeVar("T")

_PATIENCE_S = 5.0
"""How long a loop without any timer may wait for a file or a thread before it counts as stuck."""


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            ready = super().select(_PATIENCE_S)
            if not ready:
                raise RuntimeError("nothing is left that could wake the loop: what is awaited will never happen")
            return ready
        ready = super().select(0)
        if not ready and timeout > 0:
            self._clock.advance(timeout)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`loop.clock` starts at 0 and is what `loop.time()`, and so every timer, goes by."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        super().__init__(_JumpingSelector(self.clock))

    def time(self) -> float:
        return self.clock.now_s()


def run_virtual(
    main: Callable[[VirtualClock], Coroutine[Any, Any, T]], loop_type: type[VirtualTimeLoop] = VirtualTimeLoop
) -> T:
    """Runs `main(clock)` to its end in virtual time and closes the loop; RuntimeError where it waits for nothing."""
    loop = loop_type()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(main(loop.clock))
    finally:
        asyncio.set_event_loop(None)
        loop.close()
