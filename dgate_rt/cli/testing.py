"""Programs on a test split: the measured table of ``dgate report``, and what its images look like."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dgate_rt.compiling import compile
from dgate_rt.cost import measure_costs
from dgate_rt.data import DataBundle
from dgate_rt.program import GateProgram
from dgate_rt.progress import track
from dgate_rt.report import TableRow, configuration
from dgate_rt.runtime import Runtime

_MOST_BYTES = 2**30


class _Tally:
    """What one runtime did on the batches so far."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.seconds, self.right, self.samples = runtime, 0.0, 0, 0
        self.exits = torch.zeros(len(runtime.thresholds) + 1, dtype=torch.int64)

    def add(self, x: Tensor, y: Tensor) -> None:
        start = time.perf_counter()
        answers = self.runtime(x)
        labels = answers.labels.cpu()  # waits for the device
        self.seconds += time.perf_counter() - start
        self.right += int((labels == y).sum())
        self.samples += len(y)
        self.exits += answers.exits.cpu().bincount(minlength=len(self.exits))


def measure(
    programs: Mapping[str, GateProgram],
    loader: DataLoader[Any],
    executor: str,
    options: Mapping[str, Any],
) -> list[TableRow]:
    """Run dense, then every program, on each batch in turn; accuracy, exits and time are of these runs.

    ``options`` are those of `compile` that dense and gated runs share.
    """
    first = next(iter(programs.values()))
    tallies = [_Tally(compile(first, executor="dense", **options))]
    tallies += [_Tally(compile(program, executor=executor, **options)) for program in programs.values()]
    example: Tensor | None = None
    for x, y in track(loader, "dense and gated on the test split"):
        batch = x.to(tallies[0].runtime.device)
        if example is None:
            example = batch
            for tally in tallies:
                tally.runtime(batch)  # warm-up
        for tally in tallies:
            tally.add(batch, y)
    if example is None:
        raise ValueError("data: expected at least one sample in the test split, got none")
    costs = measure_costs(first.staged, first.gates, example[:2])
    dense, rows = tallies[0], []
    for tally in tallies:
        shares = tally.exits.numpy() / tally.samples
        thresholds = (math.inf,) * len(costs.gates) if tally is dense else tally.runtime.thresholds
        used = [0.0 if t == math.inf else cost for t, cost in zip(thresholds, costs.gates, strict=True)]
        flops = float(shares @ (np.cumsum(costs.stages) + np.cumsum([*used, 0.0])))
        rows.append(
            TableRow(
                name="dense" if tally is dense else configuration(thresholds),
                accuracy=tally.right / tally.samples,
                gflops=flops / 1e9,
                flops_reduction=None if tally is dense else 1 - flops / costs.dense,
                ms=1e3 * tally.seconds / tally.samples,
                speed_up=None if tally is dense else 1 - tally.seconds / dense.seconds,
                shares=tuple(shares.tolist()),
            )
        )
    return rows


def pictures(bundle: DataBundle, loader: DataLoader[Any]) -> Tensor | None:  # [N, C, H, W] uint8
    """The images of the loader as they were before normalisation; None if they would take more than a GiB."""
    if len(bundle.test) * torch.Size(bundle.image_shape).numel() > _MOST_BYTES:  # type: ignore[arg-type]  # Dataset has no len
        return None
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in bundle.stats)
    return torch.cat([((x * std + mean) * 255).round().clamp(0, 255).byte() for x, _ in loader])
