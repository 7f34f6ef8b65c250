"""What a sample costs at every stage and gate: FLOPs counted, or milliseconds measured.

FLOPs are two a multiply-add (`flops.py`). CIFAR-form ResNet-101 then costs 5.02 GFLOPs a
sample, the figure of the paper's Table 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgate_rt.allocator import keep_freed_memory
from dgate_rt.engines import StageEngine, prepare
from dgate_rt.executors.base import prefers_channels_last
from dgate_rt.flops import count_flops
from dgate_rt.gate import GRIDS, Gate, Pool
from dgate_rt.plan import refill_sizes
from dgate_rt.stage_times import gate_times, sizes_up_to, stage_times
from dgate_rt.staged import Boundary, StagedModel

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

    def to_exits(self, thresholds: Sequence[float]) -> NDArray[np.float64]:  # [G + 1]
        """Cost of a sample that leaves at each exit; a gate that is off costs nothing."""
        used = [0.0 if t == np.inf else cost for cost, t in zip(self.gates, thresholds, strict=True)]
        return np.cumsum(self.stages) + np.cumsum([*used, 0.0])

    def keeping(self, gates: Sequence[int]) -> Costs:
        """Of the network cut at some of its gates only, by ascending index: the stages up to each are one."""
        ends = [*(gate + 1 for gate in gates), len(self.stages)]
        stages = [math.fsum(self.stages[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        return Costs(self.unit, tuple(stages), tuple(self.gates[gate] for gate in gates))


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
    if (gate.pool is Pool.AVG or gate.pool.value in GRIDS) and len(sample_shape) > 1:
        pooling = torch.Size(sample_shape).numel()
    return pooling + 2 * gate.classes * gate.width


def measure_costs(
    staged: StagedModel,
    gates: Sequence[Gate],
    example: Tensor,  # [N, ...]; for times, N is the largest batch size that is tried
    kind: CostKind = "flops",
    engine: str | StageEngine = "eager",
    dtype: str | torch.dtype | None = None,
    remeasure: bool = False,
) -> Costs:
    """Cost of every stage and gate on inputs like ``example``: counted FLOPs, or measured milliseconds a sample.

    Times are those at the batch size that suits each stage best, of the stages as `compile` prepares them for the CPU:
    measured once on a machine and then kept (`dgate_rt.stage_times`), unless they are to be measured again; with freed
    memory kept by the process, from then on (`dgate_rt.allocator`). ``engine`` and ``dtype`` are those of `compile`.

    Raises:
        ValueError: if ``kind`` is neither ``"flops"`` nor ``"time"``, ``example`` has no rows, or the engine or dtype
            is unknown.
        ExecutorError: if the engine or dtype is not to be had here, or the engine cannot run a stage.
    """
    if kind not in ("flops", "time"):
        raise ValueError(f"cost: expected 'flops' or 'time', got {kind!r}")
    if len(example) == 0:
        raise ValueError(f"example: expected at least one row, got shape {tuple(example.shape)}")
    if kind == "time":
        return _times(staged, gates, example, engine, dtype, remeasure)
    with torch.no_grad():
        boundaries = staged.boundaries(example)  # one by one: the next stage may work in place
        features = (staged.gate_features(g, b) for g, b in zip(range(len(gates)), boundaries, strict=False))
        per_gate = [gate_flops(gate, f.shape[1:]) for gate, f in zip(gates, features, strict=True)]
        return Costs("FLOPs", tuple(stage_flops(staged, example)), tuple(per_gate))


def _times(
    staged: StagedModel,
    gates: Sequence[Gate],
    example: Tensor,
    engine: str | StageEngine,
    dtype: str | torch.dtype | None,
    remeasure: bool,
) -> Costs:
    shape, device = example.shape[1:], example.device
    if device.type == "cpu":  # as where it will run
        keep_freed_memory()
    channels_last = prefers_channels_last(staged, shape, device)
    ready = prepare(
        staged, engine, sizes=refill_sizes(len(example)), sample_shape=shape, input_dtype=example.dtype,
        dtype=dtype, device=device, channels_last=channels_last, remeasure=remeasure,
    )  # fmt: skip
    sizes = ready.sizes(0) or sizes_up_to(len(example))
    times = stage_times(ready, shape, ready.input_dtype, device, channels_last, sizes, ready.engine_id, remeasure)
    best = [min(zip(ms, sizes, strict=False), key=lambda pair: pair[0] / pair[1]) for ms in times.ms]
    at = [size for _, size in best[:-1]]
    per_gate = gate_times(ready, gates, shape, ready.input_dtype, channels_last, at)
    return Costs("ms", tuple(ms / size for ms, size in best), per_gate)
