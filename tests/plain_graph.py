"""Graphs of the recording driver made call by call, past the assembler, by the names of CUDA."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch

from dgate_rt.graphs import SimulatedCapture

SWITCH, CONTEXT, ASSIGN_DEFAULT = 2, 1, 1
FORBIDDEN = [
    "host call", "event wait", "event record", "semaphore signal", "semaphore wait", "memory allocation", "memory free",
    "batch memory operation",
]  # fmt: skip


def call(name: str, *arguments: int) -> list[int]:
    return torch.ops.dgate_rt.sim_call(name, list(arguments))


class Plain:
    """A graph of the driver with a switch, made call by call; ``ran`` tells which bodies ran."""

    def __init__(self, bodies: int = 3, default: int | None = None, flags: int = ASSIGN_DEFAULT) -> None:
        self.ran: list[object] = []
        (self.graph,) = call("cuGraphCreate")
        default = bodies if default is None else default
        (self.switch,) = call("cuGraphConditionalHandleCreate", self.graph, CONTEXT, default, flags)
        self.before = SimulatedCapture(self.set_all)
        (self.first,) = call("cuGraphAddChildGraphNode", self.graph, self.before.raw_cuda_graph())
        self.sets: list[tuple[int, int]] = []
        self.captures = [SimulatedCapture(lambda i=i: self.ran.append(i)) for i in range(bodies)]
        self.node, *self.bodies = self.add_switch(bodies)
        for body, capture in zip(self.bodies, self.captures, strict=True):
            call("cuGraphAddChildGraphNode", body, capture.raw_cuda_graph())
        self.execs: list[int] = []

    def add_switch(
        self, bodies: int, handle: int | None = None, kind: int = SWITCH, context: int = CONTEXT
    ) -> list[int]:
        handle = self.switch if handle is None else handle
        return call("cuGraphAddNode", self.graph, handle, kind, context, bodies, self.first)

    def set_all(self) -> None:
        for handle, value in self.sets:
            call("cudaGraphSetConditional", handle, value)

    def instantiate(self, upload: bool = True) -> int:
        self.execs += call("cuGraphInstantiate", self.graph)
        if upload:
            call("cuGraphUpload", self.execs[-1], 0)
        return self.execs[-1]

    def run(self, *sets: tuple[int, int]) -> list[object]:
        """Launch with these switches set by the first node; gives the bodies that ran."""
        self.sets = list(sets)
        self.ran.clear()
        try:
            call("cuGraphLaunch", self.execs[-1] if self.execs else self.instantiate(), 0)
        except RuntimeError as error:
            raise self.before.take_error() or error from None
        return self.ran

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *exception: object) -> None:
        for instantiation in self.execs:
            call("cuGraphExecDestroy", instantiation)
        call("cuGraphDestroy", self.graph)


def refused(
    message: str, error: type[Exception] = RuntimeError
) -> AbstractContextManager[pytest.ExceptionInfo[Exception]]:
    return pytest.raises(error, match=message)
