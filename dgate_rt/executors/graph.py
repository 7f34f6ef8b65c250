"""The whole batch as one graph launch: the device picks the size of every sub-batch, and the host waits for nothing.

The captures of all segments are assembled into a chain of switches (`dgate_rt.graphs`), and the route of each gate
sets the switch of the next segment. There is a graph for each of a few sizes of the batch itself, which the host knows;
they share the captures. Thresholds are device data, so moving them is a copy; switching a gate on or off captures
again.

With early answers every segment also copies the answers so far to pinned memory on the host.

``device="cpu-sim"`` runs it, control flow included, on the recording driver. On CUDA full batches have run, without
early answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dgate_rt.errors import ExecutorError
from dgate_rt.executors.base import GatedModel, Predictions, Setup
from dgate_rt.executors.captured import CapturedStages
from dgate_rt.executors.captures import captures_for, current, freed_on_failure
from dgate_rt.executors.early import UNANSWERED, Ticket
from dgate_rt.graphs import AssembledGraph, Capture


class GraphExecutor:
    """A graph for each size at which batches enter, up to ``batch_size``; used by one stream at a time."""

    name = "graph"
    devices: tuple[str, ...] = ("cuda", "cpu-sim")
    early_devices = ("cuda", "cpu-sim")

    def __init__(self, model: GatedModel, setup: Setup) -> None:
        self.model, self.setup = model, setup
        self._submitted: Ticket | None = None  # whose answers are being written
        self._build()

    def run(self, x: Tensor, out: Predictions) -> None:
        self._launch(x)
        with current(x.device):
            self.stages.store(out)

    def submit(self, x: Tensor) -> Ticket:
        """Launch a batch; one that was submitted before is waited for, since its answers lie in the same memory."""
        self._launch(x)
        assert self.stages.host is not None
        launched = Launched(x.device)
        self._submitted = Ticket(self.stages.host.rows(0, len(x)), launched)
        return self._submitted

    def _launch(self, x: Tensor) -> None:
        self._end_submitted()
        self._follow_gates()
        if self.stages.host is not None:
            self.stages.host.exits.fill_(UNANSWERED)
        with current(x.device):
            self.stages.load(x)
            self.graphs[self.stages.entry(len(x))].launch()

    @property
    def input(self) -> Tensor:
        """Where the graph reads a batch."""
        return self.stages.input

    def describe(self) -> list[str]:
        """As `CapturedStages.describe`."""
        self._follow_gates()
        return self.stages.describe()

    def assembled(self, format: str) -> Any:
        """As `AssembledGraph.describe`, of full batches, for the gates that are on now."""
        self._follow_gates()
        return self.graph.describe(format)

    @property
    def graph(self) -> AssembledGraph:
        """The graph of full batches."""
        return self.graphs[self.setup.batch_size]

    def _follow_gates(self) -> None:
        """Capture again if a gate was switched on or off."""
        if self.model.active != self.stages.active:
            self._end_submitted()  # it runs in the memory that goes
            self._build()

    def _end_submitted(self) -> None:
        if self._submitted is not None:
            self._submitted.result()
            self._submitted = None

    def _build(self) -> None:
        device = self.model.thresholds.device
        with current(device), freed_on_failure(device):
            self._capture_and_assemble()

    def _capture_and_assemble(self) -> None:
        capture = captures_for(self.setup, self.model.thresholds.device)
        self.stages = stages = CapturedStages(self.model, self.setup, capture)
        names = [segment.called() for segment in stages.segments]
        gates = [segment.gate for segment in stages.segments if segment.gate is not None]
        self.graphs: dict[int, AssembledGraph] = {}
        for entry, first in stages.captures[0].items():
            later = [_holding(entry, captures) for captures in stages.captures[1:]]
            try:
                self.graphs[entry] = AssembledGraph(first, later, capture.driver, names=names)
            except (ValueError, RuntimeError) as error:
                raise ExecutorError(f"graph: {error}") from error
            for gate, switch in zip(gates, self.graphs[entry].switches, strict=True):
                stages.handles_of[entry][gate] = switch


def _holding(count: int, captures: Mapping[int, Capture]) -> dict[int, Capture]:
    """Of captures by their size, smallest first, those that ``count`` samples can need."""
    enough = next(size for size in captures if size >= count)
    return {size: capture for size, capture in captures.items() if size <= enough}


class Launched:
    """All that the current stream of a device has been given so far; on the CPU that has run."""

    def __init__(self, device: torch.device) -> None:
        with current(device):
            self._event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def done(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()
