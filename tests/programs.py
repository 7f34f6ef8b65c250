"""Programs for tests: a staged network with gates at chosen thresholds, without any calibration data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dgate_rt import Gate, GateProgram, StagedModel
from dgate_rt.cost import measure_costs
from dgate_rt.frontier import Frontier, OperatingPoint
from dgate_rt.gate import pooled_width

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-3}
"""Float error of a margin, relative to the largest, when layout or batch size change under a convolution."""


def make_program(staged: StagedModel, gates: nn.ModuleList, thresholds: Sequence[float], x: Tensor) -> GateProgram:
    """A program at the given thresholds, whose frontier is that one point."""
    costs = measure_costs(staged, gates, x[:1])
    point = OperatingPoint(tuple(thresholds), 0.5, costs.dense, (*(0.0 for _ in gates), 1.0))
    return GateProgram(
        staged, tuple(gates), point.thresholds, point, Frontier((point,)), costs, 0.5, tuple(x.shape[1:]), x.dtype
    )


@torch.inference_mode()
def random_gates(staged: StagedModel, x: Tensor, classes: int, pool: str = "avg") -> nn.ModuleList:
    """Gates with random weights, of the widths that ``staged`` needs, with distances of order one on ``x``."""
    gates = nn.ModuleList()
    for features in staged.features(x):
        gate = Gate(pooled_width(tuple(features.shape[1:]), pool), classes, pool)
        nn.init.normal_(gate.weight)
        gate.weight.data /= gate(features).std().clamp_min(1e-12)
        gates.append(gate)
    return gates


@torch.inference_mode()
def all_margins(staged: StagedModel, gates: nn.ModuleList, x: Tensor) -> Tensor:  # [G, N]
    """Every gate's margin on every sample."""
    return torch.stack([gate(f).amax(1) for gate, f in zip(gates, staged.features(x), strict=True)])


def thresholds_for(margins: Tensor, share: float) -> tuple[float, ...]:
    """Thresholds that let about ``share`` of all samples leave at each gate; 0 is none, 1 all.

    Each lies halfway between two samples, so that float error decides about few.
    """
    k = round(share * margins.shape[1])
    if k in (0, margins.shape[1]):
        bound = margins.max() + 1 if k == 0 else margins.min() - 1
        return (float(bound),) * len(margins)
    ordered = margins.sort(1, descending=True).values
    return tuple(((ordered[:, k - 1] + ordered[:, k]) / 2).tolist())


def program_with(staged: StagedModel, gates: nn.ModuleList, x: Tensor, share: float) -> GateProgram:
    """A program by which about ``share`` of the batch passes the threshold of each gate."""
    return make_program(staged, gates, thresholds_for(all_margins(staged, gates, x), share), x)


def in_band(
    margins: Tensor,  # [G, N]
    thresholds: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [N] bool
    """Samples that lie within float error of a threshold, and may flip."""
    scale = margins.abs().amax(1, keepdim=True).clamp_min(1.0)
    return ((margins - torch.tensor(thresholds)[:, None]).abs() <= TOLERANCE[dtype] * scale).any(0)
