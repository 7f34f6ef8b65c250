"""Rows that wait before a step, oldest first, with the samples that they are of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgate_rt.executors.base import empty_rows, row_dense

Rows = tuple[Tensor, ...]  # of every tensor that crosses, each [N, ...]


class Arena:
    """Memory for a bounded number of rows, taken from the front and added behind.

    A whole boundary may also wait where it lies, lent, as long as nothing is added behind it: nothing is copied then.
    Own memory is made when it is first needed, in the layout of the first rows, and kept.

    Args:
        capacity: rows of own memory.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.own: Rows = ()  # each [capacity, ...]
        self._own_ids = torch.empty(0, dtype=torch.int64)
        self._rows: Rows = ()  # where those that wait lie: the own memory, or what was lent
        self._ids = self._own_ids
        self._start = self._stop = 0

    def __len__(self) -> int:
        return self._stop - self._start

    def lend(self, rows: Rows, ids: Tensor) -> None:
        """Let all of ``rows`` wait where they are, in an arena that is empty. Ids are copied: another arena's move."""
        self._rows, self._ids, self._start, self._stop = rows, ids.clone(), 0, len(ids)

    def take(self, count: int) -> tuple[Rows, Tensor]:  # ids [count] int64
        """The oldest rows; what is read of them must be read before anything is added."""
        start, stop = self._start, self._start + count
        if start == 0 and stop == len(self._ids):
            taken = self._rows, self._ids
        else:
            taken = tuple(t[start:stop] for t in self._rows), self._ids[start:stop]
        self._start = stop
        if stop == self._stop:
            self.clear()
        return taken

    def append(self, rows: Rows, ids: Tensor) -> None:
        """Copy rows behind those that wait."""
        dest, dest_ids = self.room(rows, len(ids))
        for t, to in zip(rows, dest, strict=True):
            to.copy_(t)
        dest_ids.copy_(ids)
        self.added(len(ids))

    def room(self, like: Rows, count: int) -> tuple[Rows, Tensor]:
        """Own memory behind the rows that wait, for ``count`` more; they wait there once they are `added`."""
        self.keep()
        if not self.own:
            self._allocate(like)
        if self._rows is not self.own:
            self._rows, self._ids = self.own, self._own_ids
        if self._stop + count > self.capacity:
            rest = len(self)
            assert rest <= self._start
            for t in (*self.own, self._own_ids):
                t[:rest].copy_(t[self._start : self._stop])
            self._start, self._stop = 0, rest
        end = self._stop + count
        assert end <= self.capacity
        return tuple(t[self._stop : end] for t in self.own), self._own_ids[self._stop : end]

    def added(self, count: int) -> None:
        """Let rows wait that were written to the front of the last `room`."""
        self._stop += count

    def laid_out(self, rows: Rows) -> list[Tensor]:
        """The same values, each row one block of memory, laid out as the arena's own where it has some."""
        dense = [row_dense(t) for t in rows]
        if not self.own:
            return dense
        return [
            t if t.stride()[1:] == own.stride()[1:] else empty_rows(own, len(t)).copy_(t)
            for t, own in zip(dense, self.own, strict=True)
        ]

    def keep(self) -> None:
        """Move lent rows that still wait to own memory."""
        if len(self) and self._rows is not self.own:
            rows, ids = self.take(len(self))
            self.append(rows, ids)

    def clear(self) -> None:
        """Nothing waits any more; what was lent is let go."""
        self._rows, self._ids, self._start, self._stop = self.own, self._own_ids, 0, 0

    @property
    def nbytes(self) -> int:
        """Size of the own memory."""
        return sum(t.nbytes for t in self.own)

    def _allocate(self, like: Sequence[Tensor]) -> None:
        with torch.inference_mode(False):
            self.own = tuple(empty_rows(row_dense(t), self.capacity) for t in like)
            self._own_ids = torch.empty(self.capacity, dtype=torch.int64, device=like[0].device)
