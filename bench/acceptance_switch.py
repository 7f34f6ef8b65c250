"""What a switch of the graph executor costs: chains of one and of several, launched often, and their difference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import nn

from dgate_rt import Gate, StagedModel, compile
from dgate_rt.executors.captures import CudaCaptures, SimulatedCaptures
from dgate_rt.executors.graph import GraphExecutor
from dgate_rt.files import gates_off
from dgate_rt.graphs import AssembledGraph
from dgate_rt.timing import interleaved

CHAIN, LAUNCHES = 9, 50


def switch_us(simulated: bool) -> dict[str, float]:
    """Microseconds a switch: as nobody takes it, and with the trivial gate and stage that take it."""
    device = torch.device("cpu" if simulated else "cuda")
    jobs = [chain(count, device, simulated) for chain in (_untaken, _taken) for count in (1, CHAIN)]
    short, long, taken_short, taken_long = (1e3 * t.median / LAUNCHES for t in interleaved(jobs))
    steps = CHAIN - 1
    return {"not taken": (long - short) / steps, "taken, with its gate": (taken_long - taken_short) / steps}


def _untaken(count: int, device: torch.device, simulated: bool) -> Callable[[], object]:
    capture, t = SimulatedCaptures() if simulated else CudaCaptures(device), torch.zeros(8, device=device)

    def stage() -> None:
        t.add_(1)

    first, *bodies = [capture(stage, "a trivial stage") for _ in range(count + 1)]
    return partial(_launch, AssembledGraph(first, [{1: body} for body in bodies], capture.driver), t)


def _taken(count: int, device: torch.device, simulated: bool) -> Callable[[], object]:
    x = torch.ones(8, 8, device=device)
    staged = StagedModel([nn.Linear(8, 8) for _ in range(count)] + [nn.Linear(8, 4)]).eval().to(device)
    program = gates_off(staged, [Gate(8, 4).to(device) for _ in range(count)], x)
    program = replace(program, thresholds=(1.0,) * count)  # every margin is 0
    where = "cpu-sim" if simulated else device
    run = compile(program, batch_size=len(x), device=where, executor="graph", buckets=())
    if not run(x).exits.eq(count).all():
        raise RuntimeError("will not time wrong answers: samples left a chain of gates that nobody leaves")
    return partial(_launch, cast(GraphExecutor, run._executor).graph, run)


def _launch(graph: AssembledGraph, memory: object) -> None:
    """Launch often; ``memory`` is what the graph works in, to be kept."""
    for _ in range(LAUNCHES):
        graph.launch()
