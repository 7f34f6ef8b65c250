"""Where the answers of samples under way are kept until their whole batch is answered."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dgate_rt.executors.base import Predictions


@dataclass
class Entry:
    """A batch under way."""

    out: Predictions
    slots: Tensor  # [N] int64; where its samples are answered
    left: int  # samples that are not answered yet


class Ledger:
    """Gives each sample of each batch a slot of one table of answers; batches are handed out when they are complete.

    Args:
        classes: of the distances, if they are wanted.
        in_order: whether a batch waits for those that came before it.
    """

    def __init__(self, classes: int | None, device: torch.device, in_order: bool) -> None:
        self._classes, self._device, self._in_order = classes, device, in_order
        self.answers = self._table(0)
        self._free = np.empty(0, dtype=np.int64)
        self._owners = np.empty(0, dtype=np.int64)  # by slot: the number of its batch
        self._under_way: dict[int, Entry] = {}  # by number, oldest first
        self._complete: deque[int] = deque()
        self._entered = 0

    def __len__(self) -> int:
        """Batches under way."""
        return len(self._under_way)

    def enter(self, out: Predictions) -> Tensor:  # [N] int64
        """Slots for the samples of a batch."""
        count = len(out)
        if count > len(self._free):
            self._grow(count)
        slots, self._free = self._free[:count], self._free[count:]
        number, self._entered = self._entered, self._entered + 1
        self._owners[slots] = number
        self._under_way[number] = Entry(out, torch.from_numpy(slots).to(self._device), count)
        self.answers.exits[self._under_way[number].slots] = -1
        if count == 0:
            self._complete.append(number)
        return self._under_way[number].slots

    def note(self, ids: Tensor) -> None:
        """Look which of some samples are answered now; none of them was before."""
        answered = ids[self.answers.exits[ids] >= 0].cpu().numpy()
        numbers, counts = np.unique(self._owners[answered], return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            entry = self._under_way[number]
            entry.left -= count
            if entry.left == 0:
                self._complete.append(number)

    def due(self, max_wait: int) -> int:
        """Samples that are not answered yet of all batches but the ``max_wait`` that came last."""
        first_kept = self._entered - max_wait
        return sum(entry.left for number, entry in self._under_way.items() if number < first_kept)

    def finished(self) -> Iterator[Predictions]:
        """Every batch that may be handed out now, its answers written."""
        while self._complete:
            number = next(iter(self._under_way)) if self._in_order else self._complete[0]
            entry = self._under_way[number]
            if entry.left:
                return
            self._complete.remove(number)
            del self._under_way[number]
            self._hand_out(entry)
            yield entry.out

    @torch.inference_mode()
    def _hand_out(self, entry: Entry) -> None:
        for name in ("labels", "scores", "exits", "distances"):
            to = getattr(entry.out, name)
            if to is not None:
                torch.index_select(getattr(self.answers, name), 0, entry.slots, out=to)
        self._free = np.concatenate([self._free, entry.slots.cpu().numpy()])

    def _grow(self, count: int) -> None:
        before, known = self.answers, len(self.answers)
        size = max(2 * known, known + count)
        self.answers = self._table(size)
        for name in ("labels", "scores", "exits", "distances"):
            if getattr(before, name) is not None:
                getattr(self.answers, name)[:known] = getattr(before, name)
        self._free = np.concatenate([self._free, np.arange(known, size)])
        self._owners = np.concatenate([self._owners, np.empty(size - known, dtype=np.int64)])

    def _table(self, size: int) -> Predictions:
        with torch.inference_mode(False):
            return Predictions.empty(size, self._classes, self._device)
