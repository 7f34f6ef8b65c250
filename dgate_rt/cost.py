"""What a sample costs at every stage and gate: FLOPs counted, or milliseconds measured.

FLOPs are two a multiply-add (`flops.py`). CIFAR-form ResNet-101 then costs 5.02 GFLOPs a
sample, the figure of the paper's Table 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dgate_rt.executors.base import deploy, prefers_channels_last
from dgate_rt.flops import count_flops
from dgate_rt.gate import Gate, Pool
from dgate_rt.staged import Boundary, StagedModel
from dgate_rt.timing import interleaved

CostKind = Literal["flops", "time"]


@dataclass(frozen=True)
class Costs:
    """Cost a sample of each stage and each gate, in one unit."""

    unit: Literal["FLOPs", "ms"]
    stages: tuple[float, ...]  # length G + 1
    gates: tuple[float, ...]  # length G

    @property
    def dense(self) -> float:
        """Cost of a sample that runs every stage and no gate."""
        return sum(self.stages)


def stage_flops(
    staged: StagedModel,
    example: Tensor,  # [N, ...], N >= 1
) -> list[float]:
    """FLOPs a sample of every stage, length G + 1."""
    flops: list[float] = []
    boundary: Boundary = example
    with torch.no_grad():
        for index in range(len(staged.stages)):
            with count_flops() as counter:
                boundary = staged.run_stage(index, boundary)
            flops.append(counter.get_total_flops() / len(example))
    return flops


def gate_flops(
    gate: Gate,
    sample_shape: Sequence[int],  # of one sample's features
) -> float:
    """FLOPs a sample of one gate: an addition a value for the pooling, then the projection."""
    pooling = 0
    if gate.pool is Pool.AVG and len(sample_shape) > 1:
        pooling = torch.Size(sample_shape).numel()
    return pooling + 2 * gate.classes * gate.width


def measure_costs(
    staged: StagedModel,
    gates: Sequence[Gate],
    example: Tensor,  # [N, ...]; for times, N is the batch size they hold for
    kind: CostKind = "flops",
) -> Costs:
    """Cost of every stage and gate on inputs like ``example``: counted FLOPs, or measured milliseconds a sample.

    Times are those of the memory format that `compile` would choose.

    Raises:
        ValueError: if ``kind`` is neither ``"flops"`` nor ``"time"``, or ``example`` has no rows.
    """
    if kind not in ("flops", "time"):
        raise ValueError(f"cost: expected 'flops' or 'time', got {kind!r}")
    if len(example) == 0:
        raise ValueError(f"example: expected at least one row, got shape {tuple(example.shape)}")
    if kind == "time" and prefers_channels_last(staged, example.shape[1:], example.device):  # as compile will run it
        staged = deploy(staged, example.device, channels_last=True)
        example = example.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        boundaries = list(staged.boundaries(example))  # a later stage may have worked in place; costs do not mind
        features = [staged.gate_features(g, boundaries[g]) for g in range(len(gates))]
        if kind == "flops":
            per_gate = [gate_flops(gate, f.shape[1:]) for gate, f in zip(gates, features, strict=True)]
            return Costs("FLOPs", tuple(stage_flops(staged, example)), tuple(per_gate))
        inputs: list[Boundary] = [example, *boundaries[:-1]]
        jobs = [_bind(staged.run_stage, index, inputs[index]) for index in range(len(inputs))]
        jobs += [_bind(gate.score, f) for gate, f in zip(gates, features, strict=True)]
        times = [t.median / len(example) for t in interleaved(jobs)]
    return Costs("ms", tuple(times[: len(inputs)]), tuple(times[len(inputs) :]))


def _bind(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: function(*arguments)
