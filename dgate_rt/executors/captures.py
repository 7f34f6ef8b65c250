"""How a function becomes a capture, with CUDA or on the recording driver, and what is said and freed if it does not."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

from dgate_rt.errors import ExecutorError
from dgate_rt.executors.base import Setup
from dgate_rt.graphs import Capture, SimulatedCapture


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one: captures, graphs and streams belong to that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Captures(Protocol):
    """Makes captures for one driver."""

    driver: str

    def reserved(self) -> int:
        """Bytes of device memory that are held for captures and all else."""

    def __call__(self, function: Callable[[], None], what: str) -> Capture:
        """Capture what ``function`` does; ``what`` is said in errors."""


def captures_for(setup: Setup, device: torch.device) -> Captures:
    """The captures of the driver that is wanted."""
    return SimulatedCaptures() if setup.simulated else CudaCaptures(device)


class SimulatedCaptures:
    """Captures for the recording driver: the function itself, run when the graph gets there."""

    driver = "recording"

    def reserved(self) -> int:
        return 0  # the CPU's memory is nobody's in particular

    def __call__(self, function: Callable[[], None], what: str) -> Capture:
        return SimulatedCapture(function)


class CudaCaptures:
    """Captures in one memory pool, each warmed up so that libraries have made their choices."""

    driver = "cuda"

    def __init__(self, device: torch.device) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise ExecutorError("executor: cannot be compiled inside another CUDA graph capture")
        self._pool = torch.cuda.graph_pool_handle()
        # Libraries keep a workspace a stream, and a capture that of its own: captures that are to run side by side are
        # made on the streams that they will run on. The default stream cannot be captured.
        current = torch.cuda.current_stream(device)
        self._stream = torch.cuda.Stream(device) if current == torch.cuda.default_stream(device) else current

    def reserved(self) -> int:
        return torch.cuda.memory_reserved(self._stream.device)

    def __call__(self, function: Callable[[], None], what: str) -> Capture:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        try:
            with torch.cuda.stream(self._stream):
                function()
                function()
            self._stream.synchronize()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                function()
        except RuntimeError as error:
            cause = first_cause(error)
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise ExecutorError(f"executor: {what} cannot be captured: {reason(cause)}") from error
        return graph


def first_cause(error: BaseException) -> BaseException:
    """What went wrong first: the end of a capture that failed raises an error of its own over it."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


_REASONS = {
    "operation not permitted when stream is capturing": "it waits for the device, or allocates past torch's allocator",
    "capturing a legacy stream": "it launches on the default stream",
    "would make the legacy stream depend on a capturing": "it launches on the default stream",
    "Offset increment outside graph capture": "it draws random numbers",
}


def reason(error: BaseException) -> str:
    """What CUDA or torch says of a capture that failed, after what that means where it is known."""
    text = str(error)
    known = next((meaning for said, meaning in _REASONS.items() if said in text), None)
    return text if known is None else f"{known} ({text})"


@contextmanager
def freed_on_failure(device: torch.device) -> Iterator[None]:
    """What is built inside and fails is freed, even while somebody keeps the error."""
    try:
        yield
    except ExecutorError as error:
        link: BaseException | None = error
        while link is not None:
            traceback.clear_frames(link.__traceback__)  # their variables hold what was built
            link = link.__cause__ or link.__context__
        if device.type == "cuda":
            torch.cuda.empty_cache()
        raise
