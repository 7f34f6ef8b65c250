"""The work that is timed: CIFAR ResNet-101 with gates whose thresholds give a wanted exit mix.

Weights are random (speed does not depend on them), but batch statistics are settled first so that activations are
sane. The exit mixes are those whose average costs are the four rows of the paper's Table 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from dgate_rt import Gate, GateProgram, StagedModel, split
from dgate_rt.backbones import build
from dgate_rt.cost import Costs, measure_costs
from dgate_rt.engines import EngineStages
from dgate_rt.executors import Predictions
from dgate_rt.frontier import Frontier, OperatingPoint
from dgate_rt.gate import leaves, margin_and_label, pooled_width

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
            ordered = self.margins[g][alive].sort(descending=True).values
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

    def on(self, stages: EngineStages) -> Workload:
        """The same work with the margins that a prepared network gives: thresholds between those fit its rounding."""
        images = self.images.to(stages.input_dtype)
        margins, labels = _scores(stages, nn.ModuleList(self.program.gates), images)
        return replace(self, margins=margins, labels=labels)

    def first(self, count: int) -> Workload:
        """The same work on the first ``count`` images only."""
        kept = {"images": self.images[:count], "margins": self.margins[:, :count], "labels": self.labels[:, :count]}
        return replace(self, **kept)

    def at(self, thresholds: tuple[float, ...]) -> GateProgram:
        """The program at other thresholds."""
        return replace(self.program, thresholds=thresholds)


def resnet101_workload(count: int, seed: int = 0) -> Workload:
    """CIFAR ResNet-101 with gates after layer1, layer2 and layer3, and ``count`` noise images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        images = torch.randn(count, 3, 32, 32)
        model = _settle(build("resnet101"), images[:32])
        staged = split(model, ["layer1", "layer2", "layer3"], example=images[:2])
        with torch.inference_mode():
            widths = [pooled_width(tuple(f.shape[1:]), "avg") for f in staged.features(images[:1])]
            gates = nn.ModuleList(Gate(width, 10) for width in widths)
            for gate in gates:
                nn.init.normal_(gate.weight, std=gate.width**-0.5)
    margins, labels = _scores(staged, gates, images)
    costs: Costs = measure_costs(staged, gates, images[:1])
    off = (np.inf,) * len(gates)
    point = OperatingPoint(off, float("nan"), costs.dense, (0.0, 0.0, 0.0, 1.0))
    program = GateProgram(
        staged, tuple(gates), off, point, Frontier((point,)), costs, float("nan"), tuple(images.shape[1:]), images.dtype
    )
    return Workload(model, program, images, margins, labels)


def _settle(model: nn.Module, images: Tensor) -> nn.Module:
    """Give every BatchNorm the statistics of some images, so that 101 random layers do not blow up."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # cumulative average
    with torch.no_grad():
        model(images)
    return model.eval()


@torch.inference_mode()
def _scores(staged: StagedModel, gates: nn.ModuleList, images: Tensor) -> tuple[Tensor, Tensor]:
    margins, labels = [], []
    for chunk in images.split(16):
        found = []
        for g, boundary in enumerate(staged.boundaries(chunk)):  # one by one: the next stage may work in place
            features = staged.gate_features(g, boundary) if g < len(gates) else boundary
            scored = gates[g].score(features) if g < len(gates) else margin_and_label(features.float())
            found.append(scored)
        margins.append(torch.stack([margin for margin, _ in found]))
        labels.append(torch.stack([label for _, label in found]))
    return torch.cat(margins, 1), torch.cat(labels, 1)
