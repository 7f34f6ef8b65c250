"""What a gate costs: score and route timed on a device, beside the time its bytes need there (see roofline.py).

    python -m dgate_rt.bench.gates                           # on the GPU
    python -m dgate_rt.bench.gates --quick --device cpu      # the same code on the CPU operators

The floor of a row is its least bytes at the bandwidth of a large copy on the same device, measured in the same run.
Answers are compared with the reference before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgate_rt import ops, reference
from dgate_rt.bench.roofline import ELEMENT_SIZE, GateShape, gate_shapes, least_bytes, route_bytes
from dgate_rt.errors import ExecutorError
from dgate_rt.progress import track
from dgate_rt.timing import Timing, commit, interleaved, machine_header

NETWORKS = ("CIFAR ResNet-101", "ImageNet ResNet-50")
BATCH_SIZES = (32, 256, 1024)
KEEP_RATES = (0.0, 0.5, 1.0)
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}


@dataclass(frozen=True)
class Row:
    """One operator on one gate. Times are microseconds a batch."""

    gate: str
    batch_size: int
    operator: str
    us: float
    p20_us: float
    p80_us: float
    floor_us: float

    @property
    def ratio(self) -> float:
        """Time as a multiple of the floor."""
        return self.us / self.floor_us


class Work:
    """A gate's tensors at one batch size, bfloat16 and channels_last (tokens as they are)."""

    def __init__(self, gate: GateShape, batch_size: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        side = math.isqrt(gate.positions)
        shape = (batch_size, gate.channels, side, gate.positions // side)
        features = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        self.features = features.contiguous(memory_format=torch.channels_last)
        self.weight = torch.randn(gate.classes, gate.width, generator=generator, device=device)
        self.bias = torch.randn(gate.classes, generator=generator, device=device)
        self.pool = gate.pool
        self.margin, self.label = self.score()
        self.ids = torch.arange(batch_size, device=device)
        self.dest = torch.empty_like(self.features)
        self.dest_ids, self.dest_count = torch.empty_like(self.ids), torch.zeros((), dtype=torch.int32, device=device)
        self.labels, self.exits = torch.empty_like(self.ids), torch.empty_like(self.ids)
        self.scores = torch.empty_like(self.margin)

    def score(self) -> tuple[Tensor, Tensor]:
        return ops.gate_score(self.features, self.weight, self.bias, self.pool)

    def route(self, threshold: Tensor) -> None:  # [1] float32
        ops.route_(
            [self.features], self.ids, self.margin, self.label, None, threshold, 0,
            [self.dest], self.dest_ids, self.dest_count, self.labels, self.scores, self.exits,
        )  # fmt: skip

    def threshold(self, survivors: int) -> Tensor:  # [1] float32
        """The threshold that sends on so many rows, halfway between two margins."""
        ordered = self.margin.sort().values
        if survivors == 0:
            return ordered[:1] - 1
        if survivors == len(ordered):
            return ordered[-1:] + 1
        return (ordered[survivors - 1 : survivors] + ordered[survivors : survivors + 1]) / 2

    def check(self, survivors: int) -> None:
        """Raise unless score and route answer as the reference."""
        margin, label = reference.gate_score(self.features, self.weight, self.bias, self.pool)
        close = torch.isclose(self.margin, margin, rtol=1e-4, atol=1e-4)
        self.route(self.threshold(survivors))
        stay = self.margin < self.threshold(survivors)
        gone = ~stay
        same = int(self.dest_count) == survivors and torch.equal(self.dest[:survivors], self.features[stay])
        same &= torch.equal(self.dest_ids[:survivors], self.ids[stay]) and bool(self.exits[gone].eq(0).all())
        same &= torch.equal(self.labels[gone], self.label[gone]) and torch.equal(self.scores[gone], self.margin[gone])
        if not (close.all() and (self.label == label).float().mean() > 0.99 and same):
            raise RuntimeError("will not time wrong answers: score or route differ from the reference")


def measure(jobs: Sequence[Callable[[], object]], device: str) -> list[Timing]:
    """Milliseconds of each job: on CUDA as a captured graph, from events, with a cold L2; on the CPU in turn."""
    if device == "cpu":
        return interleaved(jobs)
    from triton.testing import do_bench

    timings = []
    for job in jobs:
        job()  # kernels are compiled and loaded before the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            job()
        timings.append(Timing.of([float(ms) for ms in do_bench(graph.replay, return_mode="all")]))
    return timings


def bandwidth(device: str) -> float:
    """Bytes a second that a large copy moves there, read and written."""
    source = torch.zeros(COPY_BYTES[device] // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (copy,) = measure([lambda: target.copy_(source)], device)
    return COPY_BYTES[device] / copy.median * 1e3


def rows(gates: Sequence[GateShape], batch_sizes: Sequence[int], device: str) -> Iterator[Row]:
    """Time every gate at every batch size.

    Raises:
        RuntimeError: before any timing of a gate that answers wrongly.
    """
    bytes_per_us = bandwidth(device) / 1e6
    for gate in gates:
        for batch_size in batch_sizes:
            work = Work(gate, batch_size, device)
            kept = [round(rate * batch_size) for rate in KEEP_RATES]
            for survivors in kept:
                work.check(survivors)
            thresholds = [work.threshold(survivors) for survivors in kept]
            jobs: list[Callable[[], object]] = [work.score, *(_bind(work.route, t) for t in thresholds)]
            names = ["score", *(f"route, keeps {rate:.0%}" for rate in KEEP_RATES)]
            routes = [route_bytes(gate, batch_size, survivors, blocks=1) for survivors in kept]
            score = least_bytes(gate, batch_size, 0) - route_bytes(gate, batch_size, 0, blocks=1)
            for name, least, timing in zip(names, [score, *routes], measure(jobs, device), strict=True):
                us = (1e3 * timing.median, 1e3 * timing.p20, 1e3 * timing.p80)
                yield Row(f"{gate.network}, {gate.cut} ({gate.pool})", batch_size, name, *us, least / bytes_per_us)


def _bind(function: Callable[[Tensor], object], threshold: Tensor) -> Callable[[], object]:
    return lambda: function(threshold)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m dgate_rt.bench.gates",
        description="Time score and route of gates on a device, beside the time that their bytes need there.",
        epilog="example: python -m dgate_rt.bench.gates --json gates.json",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="the smallest batch of the first network only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        raise ExecutorError("device: cuda was asked for, but torch sees no CUDA device here; try --device cpu")
    networks, batch_sizes = (NETWORKS[:1], BATCH_SIZES[:1]) if given.quick else (NETWORKS, BATCH_SIZES)
    header: dict[str, Any] = {**machine_header(), "device": given.device, "commit": commit()}
    print(*(f"{name}: {value}" for name, value in header.items()), sep="\n")
    gates = list(gate_shapes(networks))
    found = list(track(rows(gates, batch_sizes, given.device), "gates", 4 * len(gates) * len(batch_sizes)))
    print(f"\nbfloat16 ({ELEMENT_SIZE} bytes), channels_last; microseconds a batch, median (p20 to p80)\n")
    print("| gate | B | operator | us | floor us | ratio |\n|---|---|---|---|---|---|")
    for r in found:
        spread = f"{r.us:.1f} ({r.p20_us:.1f} to {r.p80_us:.1f})"
        print(f"| {r.gate} | {r.batch_size} | {r.operator} | {spread} | {r.floor_us:.1f} | {r.ratio:.2f} |")
    if given.json is not None:
        given.json.write_text(json.dumps({**header, "rows": [asdict(r) for r in found]}) + "\n")


if __name__ == "__main__":
    main()
