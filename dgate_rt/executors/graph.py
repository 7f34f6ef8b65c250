"""The whole batch as one graph launch: the device picks the size of every sub-batch, and the host waits for nothing.

The captures of all segments are assembled into a chain of switches (`dgate_rt.graphs`), and the route of each gate
sets the switch of the next segment. Thresholds are device data, so moving them is a copy; switching a gate on or off
captures again.

On CUDA this has not run yet; ``device="cpu-sim"`` runs it, control flow included, on the recording driver.
"""

from __future__ import annotations

from torch import Tensor

from dgate_rt.errors import ExecutorError
from dgate_rt.executors.base import GatedModel, Predictions, Setup
from dgate_rt.executors.captured import CapturedStages, captures_for, current
from dgate_rt.graphs import AssembledGraph


class GraphExecutor:
    """One graph for batches of up to ``batch_size``; used by one stream at a time."""

    name = "graph"
    devices: tuple[str, ...] = ("cuda", "cpu-sim")

    def __init__(self, model: GatedModel, setup: Setup) -> None:
        self.model, self.setup = model, setup
        self._build()

    def run(self, x: Tensor, out: Predictions) -> None:
        if self.model.active != self.stages.active:
            self._build()
        with current(x.device):
            self.stages.load(x)
            self.graph.launch()
            self.stages.store(out)

    @property
    def input(self) -> Tensor:
        """Where the graph reads a batch."""
        return self.stages.input

    def describe(self) -> list[str]:
        """The buckets of every segment behind the first, and what padding to them is expected to cost."""
        return self.stages.describe()

    def _build(self) -> None:
        with current(self.model.thresholds.device):
            self._capture_and_assemble()

    def _capture_and_assemble(self) -> None:
        capture = captures_for(self.setup, self.model.thresholds.device)
        self.stages = stages = CapturedStages(self.model, self.setup, capture)
        (first,) = stages.captures[0].values()
        try:
            self.graph = AssembledGraph(first, stages.captures[1:], capture.driver)
        except (ValueError, RuntimeError) as error:
            raise ExecutorError(f"graph: {error}") from error
        gates = [segment.gate for segment in stages.segments if segment.gate is not None]
        for gate, switch in zip(gates, self.graph.switches, strict=True):
            stages.handles[gate] = switch
