"""What a gated batch takes at least: its stages by themselves, each at the buckets that its survivors fill."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from dgate_rt import Runtime
from dgate_rt.executors.base import row_dense
from dgate_rt.executors.graph import GraphExecutor
from dgate_rt.plan import arrivals_at
from dgate_rt.staged import Boundary, as_tuple
from dgate_rt.timing import interleaved

CALLS = 10  # in a row, so that the wait for the device at their end weighs little


@torch.inference_mode()
def stages_ms(run: Runtime, batch: Tensor, simulated: bool, repeats: int = 3) -> float:
    """Milliseconds a batch of the stages alone, at the program's exit shares: no gates, routes or switches.

    The sum over the stages of ``E[t(smallest bucket that holds the survivors)]``, each timed at each bucket as a CUDA
    graph by itself; simulated, as it is.
    """
    captured = cast(GraphExecutor, run._executor).stages
    size, shares, total = len(batch), run.program.point.shares, 0.0
    boundary: Boundary = batch
    for segment, buckets in zip(captured.segments, [(size,), *(plan.sizes for plan in captured.buckets)], strict=True):
        chance = arrivals_at(size, shares, segment.stages[0])  # [size + 1]
        held_by = np.searchsorted(buckets, np.arange(1, size + 1))
        for index in segment.stages:
            stage = run.stages.stages[index]
            jobs = [_repeated(_rows(boundary, bucket), stage, simulated) for bucket in buckets]
            calls = 1 if simulated else CALLS
            times = np.array([timing.median / calls for timing in interleaved(jobs, repeats)])
            total += float(chance[1:] @ times[held_by])
            boundary = run.stages.run_stage(index, _rows(boundary, size))
    return total


def _rows(boundary: Boundary, count: int) -> tuple[Tensor, ...]:
    """A copy of the first rows: a stage may work in place."""
    return tuple(row_dense(t)[:count].clone(memory_format=torch.preserve_format) for t in as_tuple(boundary))


def _repeated(rows: tuple[Tensor, ...], stage: Callable[..., Boundary], simulated: bool) -> Callable[[], object]:
    call = partial(stage, *rows)
    if simulated:
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # lets libraries make their choices
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return partial(_replay, graph, rows)


def _replay(graph: torch.cuda.CUDAGraph, rows: tuple[Tensor, ...]) -> None:
    """``rows`` are what the graph reads, to be kept."""
    for _ in range(CALLS):
        graph.replay()
