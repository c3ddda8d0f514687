"""A growable table of request rows with O(1) insert, update and removal by handle."""

from __future__ import annotations

from typing import Any

import numpy as np

from lmdeploy_slo.core.snapshot import ROW_DTYPE, Rows


class RowTable:
    """Rows of `ROW_DTYPE` addressed by handle. The order of rows is arbitrary: the last fills a removed one's place."""

    __slots__ = ("_index", "_rows", "_size", "changes")

    def __init__(self, capacity: int = 64) -> None:
        self._rows: Rows = np.zeros(capacity, dtype=ROW_DTYPE)
        self._size = 0
        self._index: dict[int, int] = {}
        self.changes = 0  # rows inserted and removed so far

    def __len__(self) -> int:
        return self._size

    def __contains__(self, handle: int) -> bool:
        return handle in self._index

    def handles(self) -> list[int]:
        return list(self._index)

    def insert(self, row: Any) -> None:
        """Adds a row (a tuple or record of ROW_DTYPE); its handle must be new, else ValueError."""
        if self._size == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._rows[self._size] = row
        handle = int(self._rows["handle"][self._size])
        if handle in self._index:
            raise ValueError(f"handle {handle} is in the table already")
        self._index[handle] = self._size
        self._size += 1
        self.changes += 1

    def remove(self, handle: int) -> Any:
        """Takes the row out and returns a copy of it; raises KeyError for an unknown handle."""
        at = self._index.pop(handle)
        row = self._rows[at].copy()
        self._size -= 1
        self.changes += 1
        if at != self._size:
            self._rows[at] = self._rows[self._size]
            self._index[int(self._rows["handle"][at])] = at
        return row

    def get(self, handle: int, field: str) -> float:
        return float(self._rows[field][self._index[handle]])

    def set(self, handle: int, field: str, value: float) -> None:
        self._rows[field][self._index[handle]] = value

    def add(self, handle: int, field: str, value: float) -> None:
        self._rows[field][self._index[handle]] += value

    def smallest(self, field: str) -> float | None:
        """The smallest value of a field; None where there are no rows."""
        return float(np.min(self._rows[field][: self._size])) if self._size else None

    def add_where_positive(self, field: str, value: float) -> None:
        """Adds `value` in every row in which the field is above 0."""
        column = self._rows[field][: self._size]
        column[column > 0] += value

    def copy(self) -> Rows:
        """A read-only copy of all rows."""
        rows: Rows = self._rows[: self._size].copy()
        rows.flags.writeable = False
        return rows

    def view(self) -> Rows:
        """All rows, read-only, without a copy: good until the table changes."""
        rows: Rows = self._rows[: self._size]
        rows.flags.writeable = False
        return rows
