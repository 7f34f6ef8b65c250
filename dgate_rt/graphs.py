"""A batch as one graph: captured stages, chained by switches that the device sets.

C++ assembles the graph (``csrc/graph``) through a table of driver calls. One table is the CUDA driver's. The other is a
recording driver that needs no GPU: it holds graphs to CUDA's rules, runs `SimulatedCapture` stages on CPU tensors, and
counts. Importing this touches no GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from dgate_rt import ops
from dgate_rt.errors import ExecutorError

_STAGE = ctypes.CFUNCTYPE(ctypes.c_int)


class Capture(Protocol):
    """A captured graph: ``torch.cuda.CUDAGraph(keep_graph=True)`` or `SimulatedCapture`."""

    def raw_cuda_graph(self) -> int:
        """The graph's handle, as a number."""


class SimulatedCapture:
    """A captured graph of the recording driver, which runs a Python function.

    Args:
        stage: what the graph does; it stands for device code, so it must not launch graphs.
        nodes: what the driver believes the graph holds: types with commas between, ``"child graph(kernel)"`` for one
            that holds others, ``"kernel@2"`` for one of another context.

    Raises:
        ValueError: if ``nodes`` cannot be read.
        ExecutorError: if there is no recording driver, for want of the extension.
    """

    def __init__(self, stage: Callable[[], object], nodes: str = "kernel") -> None:
        self._graph = 0
        graph_driver("recording")
        errors: list[BaseException] = []
        self._errors = errors

        def run() -> int:  # without self, or they would keep each other alive
            try:
                stage()
            except BaseException as error:  # it cannot pass through C
                errors.append(error)
                return 1
            return 0

        self._callback = _STAGE(run)  # kept, for the driver knows only its address
        address = ctypes.cast(self._callback, ctypes.c_void_p).value
        self._graph = _call("sim_capture", address, nodes)

    def raw_cuda_graph(self) -> int:
        """The graph's number, as ``torch.cuda.CUDAGraph`` has it."""
        return self._graph

    def take_error(self) -> BaseException | None:
        """What the stage raised last, once."""
        return self._errors.pop() if self._errors else None

    def release(self) -> None:
        """End the graph and the memory it stands for; a graph that was assembled from it must not run any more."""
        graph, self._graph = self._graph, 0
        if graph:
            torch.ops.dgate_rt.sim_release(graph)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.release()


class AssembledGraph:
    """Captured stages as one graph, instantiated and uploaded: one launch runs a batch.

    The network is captured in segments, each one stage or several. The last thing that one does is to set the switch of
    the next, which then runs the bucket of that index; a switch that is not set, or set to their number, runs none. A
    context manager; it never waits for the device.

    Args:
        first: the first segment at the full batch.
        later: for each segment behind it the captures by their size, smallest first.
        driver: ``"cuda"`` or ``"recording"``.
        stream: where it is uploaded, as a number; torch's current stream where None.
        names: what errors and `describe` call the segments, the first one's first; if None, each is taken for a stage.

    Attributes:
        switches: of the segments behind the first; what ``route_`` is given as ``handles``.

    Raises:
        ValueError: if a capture holds what a switch's body may not; it is named. If there are not as many names as
            segments.
        ExecutorError: if there is no such driver here.
        RuntimeError: if the driver refuses a call, with the call's name and the driver's reason.
    """

    def __init__(
        self,
        first: Capture,
        later: Sequence[Mapping[int, Capture]] = (),
        driver: str = "cuda",
        stream: int | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self._graph = 0
        self._recording = driver == "recording"
        table = graph_driver(driver)
        names = [f"stage {k}" for k in range(1 + len(later))] if names is None else list(names)
        for name, buckets in zip(names[1:], later, strict=False):  # their number is checked with the rest
            if list(buckets) != sorted(buckets):
                raise ValueError(f"later: expected the buckets of {name} smallest first, got {list(buckets)}")
        captures = [first, *(capture for buckets in later for capture in buckets.values())]
        self._captures = captures  # kept, because the graph runs in their memory
        graphs = [capture.raw_cuda_graph() for capture in captures]
        sizes = [size for buckets in later for size in buckets]
        counts = [len(buckets) for buckets in later]
        made = _call("graph_assemble", table, self._stream(stream), graphs, names, counts, sizes)
        self._graph, self.switches = made[0], tuple(made[1:])

    def launch(self, stream: int | None = None) -> None:
        """Put one run on a stream, torch's current one where None; returns at once.

        Raises:
            ValueError: if the graph was closed.
            RuntimeError: if the driver refuses. What a simulated stage raises comes through as it is.
        """
        captures = self._captures  # kept, should a stage close this graph
        try:
            _call("graph_launch", self._graph, self._stream(stream))
        except RuntimeError:
            for capture in captures:
                error = capture.take_error() if isinstance(capture, SimulatedCapture) else None
                if error is not None:
                    raise error from None
            raise

    def describe(self, format: str = "json") -> Any:
        """The graph as the driver has it: nodes, edges, and the bodies of each switch by bucket.

        Args:
            format: ``"json"`` for a dict, ``"dot"`` for the text of Graphviz.

        Raises:
            ValueError: if it is neither, or the graph was closed.
        """
        text = _call("graph_describe", self._graph, format)
        return json.loads(text) if format == "json" else text

    def close(self) -> None:
        """Destroy the graph and let go of the captures; on CUDA the last run must be over before their memory goes."""
        graph, self._graph = self._graph, 0
        if graph:
            _call("graph_destroy", graph)
        self._captures = []

    def __enter__(self) -> AssembledGraph:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def _stream(self, stream: int | None) -> int:
        if stream is not None or self._recording:
            return stream or 0
        return torch.cuda.current_stream().cuda_stream


class DriverCounts(NamedTuple):
    """What the recording driver was asked for since `reset_simulation`, and what lives now."""

    launches: int
    """Of graphs."""
    stages: int
    """Captured graphs that ran."""
    conditionals: int
    """Switches that were looked at."""
    host_calls: int
    """Calls into the driver."""
    synchronisations: int
    """Always 0: no call that graphs are made or run with waits."""
    allocations: int
    """Graphs, nodes, switches and instantiations that were made."""
    live: int
    """Graphs, switches and instantiations that were not destroyed."""
    live_captures: int
    """Captured graphs that were not released."""


def driver_counts() -> DriverCounts:
    """The counts of the recording driver."""
    return DriverCounts(*torch.ops.dgate_rt.sim_counts())


def reset_simulation() -> None:
    """Start the counts of the recording driver again; what lives goes on."""
    torch.ops.dgate_rt.sim_reset()


def graph_driver(name: str) -> int:
    """The address of a driver's table of calls.

    Raises:
        ValueError: if ``name`` is neither ``"cuda"`` nor ``"recording"``.
        ExecutorError: if there is no such driver here; the message says why.
    """
    if name not in ("cuda", "recording"):
        raise ValueError(f"driver: expected 'cuda' or 'recording', got {name!r}")
    missing = ops.extension_error("_C") or (ops.extension_error("_C_cuda") if name == "cuda" else None)
    if missing:
        raise ExecutorError(f"driver: expected the extension that has {name!r}, got none ({missing})")
    try:
        return _call(f"{name}_graph_driver")
    except (ValueError, RuntimeError) as error:
        raise ExecutorError(str(error)) from None


def _call(name: str, *args: Any) -> Any:
    return ops.call(getattr(torch.ops.dgate_rt, name).default, *args)
