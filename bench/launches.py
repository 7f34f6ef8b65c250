"""What a batch asks of host and driver, and what padding to buckets costs: two tables, counted and computed, not timed.

    python -m dgate_rt.bench.launches
    python -m dgate_rt.bench.launches --picture docs/assembled-graph.svg

Counts are those of a small network with three gates at the paper's second exit mix, for every executor; those of the
driver come from the recording driver. The picture is of that network's assembled graph. Padded costs come from the
planner, for CIFAR ResNet-101's FLOPs at the paper's four mixes and independent samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dgate_rt import Gate, GateProgram, StagedModel, compile
from dgate_rt.bench.host_work import HostWork
from dgate_rt.bench.workload import PAPER_MIXES
from dgate_rt.executors import EXECUTORS
from dgate_rt.files import gates_off
from dgate_rt.gate import leaves
from dgate_rt.graphs import driver_counts, reset_simulation
from dgate_rt.plan import binomial_arrivals, choose_buckets

GFLOPS = (0.4397, 0.6711, 3.3806, 0.5285)
"""CIFAR ResNet-101 by stage, a sample (`dgate flops resnet101`)."""
BATCH_SIZE = 256
MOST_BUCKETS = 8
COUNTED = (
    "executor", "operators launched", "host reads", "graph launches", "captures run", "switches looked at",
    "driver calls", "driver waits", "driver allocations",
)  # fmt: skip


def padded_cost(mix: Sequence[float], buckets: int) -> float:
    """Expected cost of a padded batch over that of exact sub-batches, whole network."""
    reach = 1 - np.cumsum(mix[:-1])
    sizes = np.arange(BATCH_SIZE + 1, dtype=np.float64)
    stages = [
        choose_buckets(binomial_arrivals(BATCH_SIZE, share), flops * sizes, buckets)
        for share, flops in zip(reach, GFLOPS[1:], strict=True)
    ]
    first = GFLOPS[0] * BATCH_SIZE
    return (first + sum(s.expected for s in stages)) / (first + sum(s.ideal for s in stages))


def small_program() -> tuple[GateProgram, torch.Tensor]:
    """A small network with three gates, and images that leave it as the paper's second mix says."""
    torch.manual_seed(0)
    staged = StagedModel([nn.Linear(8, 8) for _ in range(3)] + [nn.Linear(8, 4)]).eval()
    x = torch.randn(BATCH_SIZE, 8)
    gates = [Gate(8, 4) for _ in range(3)]
    alive, thresholds = torch.ones(BATCH_SIZE, dtype=torch.bool), []
    with torch.no_grad():
        for gate, features, share in zip(gates, staged.features(x), PAPER_MIXES[1], strict=False):
            nn.init.normal_(gate.weight)
            margin, _ = gate.score(features)
            ordered = margin[alive].sort(descending=True).values
            leaving = round(share * BATCH_SIZE)
            thresholds.append(float(ordered[leaving - 1 : leaving + 1].mean()))
            alive &= ~leaves(margin, thresholds[-1])
    program = replace(gates_off(staged, gates, x), thresholds=tuple(thresholds))
    return replace(program, point=replace(program.point, thresholds=program.thresholds, shares=PAPER_MIXES[1])), x


def count_rows() -> Iterator[tuple[str | int, ...]]:
    """A row of `COUNTED` for each executor, on the simulated driver where it has a use for one."""
    program, x = small_program()
    for name, executor in EXECUTORS.items():
        device = "cpu-sim" if "cpu-sim" in executor.devices else "cpu"
        chunks = (BATCH_SIZE,) * len(program.staged.stages)  # not by times, which differ from run to run
        run = compile(program, batch_size=BATCH_SIZE, device=device, executor=name, chunks=chunks)
        run(x)
        reset_simulation()
        with HostWork() as host:
            run(x)
        d = driver_counts()
        driver = (d.launches, d.stages, d.conditionals, d.host_calls, d.synchronisations, d.allocations)
        yield (f"`{name}`", host.operators, host.reads, *driver)


def picture() -> str:
    """The assembled graph of the small network, as an SVG file."""
    from dgate_rt.drawing import standalone
    from dgate_rt.figures import graph_figure

    program, _ = small_program()
    graph = compile(program, batch_size=BATCH_SIZE, device="cpu-sim", executor="graph").describe("json")
    gates = len(program.gates)
    exits = {g: f"gate {g}" for g in range(gates)} | {gates: "whole network"}
    return standalone(graph_figure(graph, exits))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m dgate_rt.bench.launches",
        description="Count what a batch asks of the host and of a recording driver, and compute what padding costs.",
    )
    parser.add_argument("--picture", type=Path, help="only draw the assembled graph, into this SVG file")
    path = parser.parse_args(arguments).picture
    if path is not None:
        path.write_text(picture(), encoding="utf-8")
        return
    print("|", " | ".join(COUNTED), "|")
    print("|---|" + "---|" * (len(COUNTED) - 1))
    for row in count_rows():
        print("|", " | ".join(map(str, row)), "|")
    print(f"\nExpected cost of a batch of {BATCH_SIZE}, padded to M buckets a stage, over that of exact sub-batches:\n")
    print("| exit mix |", *(f"M = {m} |" for m in range(1, MOST_BUCKETS + 1)))
    print("|---|" + "---|" * MOST_BUCKETS)
    for mix in PAPER_MIXES:
        costs = (f"{padded_cost(mix, m):.3f} |" for m in range(1, MOST_BUCKETS + 1))
        print(f"| {' '.join(f'{share:g}'.lstrip('0') for share in mix)} |", *costs)


if __name__ == "__main__":
    main()
