"""Which step of the network runs next, and on how many of the rows that wait before it.

A step is one stage, or several that run as one; before each lies an arena. The rule: the deepest step before which a
full chunk waits. Where there is none, more input is taken in, unless some of the oldest rows are due: these have to be
answered first, because no more input can come, or their time is up. Rows do not overtake each other, so the oldest
wait deepest. The shallowest step before which a due row waits runs then, on all that wait there, younger ones too, cut
up as the plan says: so those that go on arrive at the next step together with those that are due there.

Going deepest first is what bounds the arenas: a step runs only while less than a chunk waits before each deeper one, so
``capacity[s] = chunk[s] - 1 + chunk[s - 1]`` rows are room enough, and a step before a full arena cannot be next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The chunk of every step, and how the rows that are left before one in the end are cut up."""

    chunks: tuple[int, ...]  # [S]
    cuts: tuple[Sequence[int] | None, ...]  # [S]; cuts[s][n] of the last n < chunks[s] rows run next; None: all of them

    @property
    def capacities(self) -> tuple[int, ...]:  # [S]
        """The rows that an arena must hold; the first holds input, which is taken in a chunk at a time."""
        pairs = zip(self.chunks, self.chunks[1:], strict=False)
        return (self.chunks[0], *(chunk - 1 + before for before, chunk in pairs))

    def next(
        self,
        waiting: Sequence[int],  # [S]; rows before each step
        due: int,  # so many of the oldest rows are answered before more input comes; 0 to all of them, or more
    ) -> tuple[int, int] | None:
        """The step that runs next, and how many of its oldest rows; None if it is for input to come, or all is done."""
        shallowest = None
        for step in reversed(range(len(waiting))):
            if waiting[step] >= self.chunks[step]:
                return step, self.chunks[step]
            if due > 0 and waiting[step]:
                shallowest = step
            due -= waiting[step]
        if shallowest is None:
            return None
        rows, cut = waiting[shallowest], self.cuts[shallowest]
        return shallowest, rows if cut is None else cut[rows]
