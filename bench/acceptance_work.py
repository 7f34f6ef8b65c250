"""The engines of `gpu_acceptance`: the executors, and the dense network as a user would run it on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dgate_rt import GateProgram, StagedModel, compile, engines
from dgate_rt.bench.cases import Case
from dgate_rt.executors import Predictions
from dgate_rt.gate import margin_and_label

CUDA_ONLY = ("dense graph", "dense compiled", "graph compiled")
DENSE = ("dense", "dense graph", "dense compiled")
GATED = ("eager", "graph", "graph compiled", "lag")
WITHOUT_GATES = {"graph": "dense graph", "graph compiled": "dense compiled"}
"""The same kernels as one graph, less gates."""

Engine = Callable[[Sequence[Tensor]], list[Predictions]]
"""Answers batches, in order."""


def prepare(engine: str, case: Case, program: GateProgram, batch: Tensor, simulated: bool) -> Engine:
    """An engine that is ready to run batches like ``batch``."""
    compiled = engine.endswith(" compiled")
    stages = "inductor" if compiled else "eager"
    if engine in WITHOUT_GATES.values():
        whole = StagedModel([program.staged]) if compiled else program.staged  # a compiler sees all of it
        network = engines.prepare(
            whole, stages, sizes=[len(batch)], sample_shape=program.input_shape, input_dtype=program.input_dtype,
            device=case.device, channels_last=True,
        )  # fmt: skip
        return OneByOne(OneGraph(network, batch, len(program.gates)))
    executor = engine.removesuffix(" compiled")
    device = "cpu-sim" if simulated and executor in ("graph", "lag") else str(case.device)
    run = compile(
        program, batch_size=len(batch), device=device, executor=executor, engine=stages, channels_last=True
    )  # fmt: skip
    return (lambda batches: list(run.stream(batches))) if engine == "lag" else OneByOne(run)


class OneGraph:
    """A dense network as one CUDA graph at one batch size, answers included."""

    @torch.inference_mode()
    def __init__(self, network: Callable[[Tensor], Tensor], batch: Tensor, exit_index: int) -> None:
        self._input, self._exit, stream = batch.clone(), exit_index, torch.cuda.Stream()
        self._network = network  # kept, for the graph reads its weights
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and lets libraries make their choices
            for _ in range(3):
                margin_and_label(network(self._input).float())
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._scores, self._labels = margin_and_label(network(self._input).float())

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Predictions:
        self._input.copy_(x)
        self._graph.replay()
        return Predictions(self._labels.clone(), self._scores.clone(), torch.full_like(self._labels, self._exit))


class OneByOne:
    """An engine that answers one batch after another."""

    def __init__(self, run: Callable[[Tensor], Predictions]) -> None:
        self.run = run

    def __call__(self, batches: Sequence[Tensor]) -> list[Predictions]:
        return [self.run(batch) for batch in batches]
