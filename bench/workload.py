"""Exit mixes, and the thresholds that give them on images whose margins are known.

The mixes are those whose average costs are the four rows of the paper's Table 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dgate_rt import GateProgram
from dgate_rt.executors import Predictions
from dgate_rt.gate import leaves

Mix = tuple[float, ...]

PAPER_MIXES: tuple[Mix, ...] = (
    (0.25, 0.40, 0.15, 0.20),
    (0.20, 0.30, 0.25, 0.25),
    (0.15, 0.25, 0.30, 0.30),
    (0.06, 0.16, 0.35, 0.43),
)
"""Shares of (gate 1, gate 2, gate 3, end); 2.22, 2.82, 3.20 and 3.93 GFLOPs a sample on ResNet-101 (Table 1)."""
NO_EXIT: Mix = (0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Workload:
    """A program, images to run it on, and every gate's margin on them."""

    backbone: nn.Module
    program: GateProgram
    images: Tensor  # [N, 3, 32, 32] float32
    margins: Tensor  # [G + 1, N] float32; of every gate, and the largest logit
    labels: Tensor  # [G + 1, N] int64

    def thresholds(self, mix: Mix) -> tuple[float, ...]:
        """Thresholds that send ``mix`` of the images to each exit, each halfway between two margins."""
        count = len(self.images)
        alive = torch.ones(count, dtype=torch.bool)
        thresholds = []
        for g, share in enumerate(mix[:-1]):
            leaving = round(sum(mix[: g + 1]) * count) - round(sum(mix[:g]) * count)
            reached = alive if alive.any() else torch.ones_like(alive)
            ordered = self.margins[g][reached].sort(descending=True).values
            if leaving == 0 and share == 0:
                thresholds.append(float(ordered[0]) + 1.0)  # on, and nobody leaves: the gate's cost is paid
                continue
            below = ordered[leaving] if leaving < len(ordered) else ordered[-1] - 1
            above = ordered[leaving - 1] if leaving else ordered[0] + 1
            thresholds.append(float((above + below) / 2))
            alive &= ~leaves(self.margins[g], thresholds[-1])
        return tuple(thresholds)

    def expected(self, thresholds: Sequence[float]) -> Predictions:
        """What dense execution with post-hoc gating answers."""
        exits = torch.full((len(self.images),), len(thresholds))
        for g in reversed(range(len(thresholds))):
            exits[leaves(self.margins[g], thresholds[g])] = g
        every = torch.arange(len(exits))
        return Predictions(self.labels[exits, every], self.margins[exits, every], exits)

    def shares(self, thresholds: Sequence[float]) -> Mix:
        """The share of the images that leaves at each exit."""
        exits = self.expected(thresholds).exits
        return tuple((exits.bincount(minlength=len(thresholds) + 1) / len(exits)).tolist())

    def first(self, count: int) -> Workload:
        """The same work on the first ``count`` images only."""
        kept = {"images": self.images[:count], "margins": self.margins[:, :count], "labels": self.labels[:, :count]}
        return replace(self, **kept)

    def at(self, thresholds: tuple[float, ...]) -> GateProgram:
        """The program at other thresholds."""
        return replace(self.program, thresholds=thresholds)
