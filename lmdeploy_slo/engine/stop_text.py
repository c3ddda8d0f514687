"""Finds stop texts in a stream of text, and never gives out what could still become one.

LMDeploy stops at single tokens; a text may be spread over several, so it is looked for here.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Feed it the text as it comes; it gives out what is safe to show. `stops` are not empty."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool) -> None:
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The text that may be shown now. After a stop text was found (`stopped`) it gives out nothing more."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at, len(stop)) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            # The earliest to be complete, as if the text had come letter by letter; the longest of those.
            at, length = min(found, key=lambda hit: (hit[0] + hit[1], hit[0]))
            self.stopped = True
            self._held = ""
            return text[: at + length] if self._include_stop else text[:at]
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
