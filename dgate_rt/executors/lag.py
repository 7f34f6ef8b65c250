"""Captures that the host launches, each of a size that it picks from a count which another batch's work has hidden.

For drivers without switches (CUDA before 12.8), and to compare the graph executor with. Every segment at every bucket
is a graph of its own. Behind each segment the number of survivors is copied to pinned memory; the host reads it when an
event says so and launches the next segment at the smallest bucket that holds them. One batch has to wait for its own
counts; a stream of batches does not, for two or more of them are under way, each in memory and on a CUDA stream of its
own.

``device="cpu-sim"`` runs it on the recording driver, with streams and events that do nothing.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from dgate_rt.errors import ExecutorError
from dgate_rt.executors.base import GatedModel, Predictions, Setup
from dgate_rt.executors.captured import CapturedStages
from dgate_rt.executors.captures import captures_for, freed_on_failure
from dgate_rt.graphs import AssembledGraph, Capture

IN_FLIGHT = 2
_launches = itertools.count(1)


class LagExecutor:
    """Two batches in flight, or as many as asked for; used by one thread at a time."""

    name = "lag"
    devices: tuple[str, ...] = ("cuda", "cpu-sim")

    def __init__(self, model: GatedModel, setup: Setup) -> None:
        self.model, self.setup = model, setup
        with freed_on_failure(model.thresholds.device):
            self._free = [Lane(model, setup) for _ in range(IN_FLIGHT)]

    def run(self, x: Tensor, out: Predictions) -> None:
        """Answer one batch. With nothing else under way the host waits for each of its counts; `stream` avoids that."""
        lane = self._take()
        try:
            lane.start(x, out)
            while not lane.done:
                lane.advance()
        finally:
            self._release(lane)

    def stream(
        self,
        batches: Iterable[tuple[Tensor, Predictions]],
        max_wait: int | None = None,
        in_flight: int = IN_FLIGHT,
    ) -> Generator[Predictions, None, None]:
        """Answer batch after batch, in order, with up to ``in_flight`` of them under way.

        Each time the oldest batch whose count has arrived goes on; where there is none, a new batch starts; and only
        where ``in_flight`` are under way, or no more come, the host waits, for the count that was asked for first. So
        what was launched since computes meanwhile, and at most ``in_flight`` batches more are taken than answered. If
        ``batches`` raises, those before are answered first. When closed it leaves nothing under way.

        Args:
            batches: each as for `run`, or empty.
            max_wait: no more than this and one are in flight.
            in_flight: memory is prepared for two; for each one more it is made at need, and kept.
        """
        if max_wait is not None:
            in_flight = min(in_flight, max_wait + 1)
        source: Iterator[tuple[Tensor, Predictions]] | None = iter(batches)
        under_way: deque[Lane] = deque()  # oldest first
        try:
            while source is not None or under_way:
                arrived = next((lane for lane in under_way if lane.arrived()), None)
                if arrived is not None:
                    arrived.advance()
                elif source is not None and len(under_way) < in_flight:
                    try:
                        x, out = next(source)
                    except StopIteration:
                        source = None
                        continue
                    except Exception:
                        while under_way:
                            yield self._finish(under_way)
                        raise
                    under_way.append(self._take())
                    under_way[-1].start(x, out)
                else:
                    min((lane for lane in under_way if not lane.done), key=lambda lane: lane.launched).advance()
                while under_way and under_way[0].done:
                    yield self._finish(under_way)
        finally:
            while under_way:
                self._release(under_way.popleft())

    def describe(self) -> list[str]:
        """How many batches may be in flight; the buckets of every segment behind the first and what they waste."""
        lane = self._take()
        self._release(lane)
        return [f"{IN_FLIGHT} batches of a stream in flight", *lane.describe()]

    def _finish(self, under_way: deque[Lane]) -> Predictions:
        """The answers of the oldest batch, however long they take."""
        while not under_way[0].done:
            under_way[0].advance()
        return self._release(under_way.popleft())

    def _take(self) -> Lane:
        """A lane that is free and has the gates that are on now; it is captured here if there is none."""
        self._free = [lane for lane in self._free if lane.active == self.model.active]
        if self._free:
            return self._free.pop()
        with freed_on_failure(self.model.thresholds.device):
            return Lane(self.model, self.setup)

    def _release(self, lane: Lane) -> Predictions:
        out = lane.hand_back()
        self._free.append(lane)
        return out


class Lane:
    """What one batch in flight needs, and how far the batch has got.

    It has thresholds of its own, copied when a batch starts, so that moving them does not reach batches under way.

    Attributes:
        active: which gates are captured.
        done: whether all has been launched.
        launched: when that last happened, counted over all lanes.
    """

    def __init__(self, model: GatedModel, setup: Setup) -> None:
        self._model, self._own = model, model.snapshot()
        self.active = model.active
        self.done, self.launched = True, 0
        self._out = Predictions.empty(0, None, model.thresholds.device)
        self._stream: Stream = SimulatedStream() if setup.simulated else CudaStream(model.thresholds.device)
        self._stream.follow()
        with self._stream.current():  # so that the memory belongs to this stream
            capture = captures_for(setup, model.thresholds.device)  # with a pool of its own: lanes run side by side
            self._stages = CapturedStages(self._own, setup, capture)
            self._launchers = [
                {
                    size: launcher(captured, capture.driver, self._stages.called(index, size))
                    for size, captured in sizes.items()
                }
                for index, sizes in enumerate(self._stages.captures)
            ]
        self._segment = 0

    @torch.inference_mode()
    def start(self, x: Tensor, out: Predictions) -> None:
        """Bring a batch in and launch its first segment."""
        self._out, self.done = out, len(x) == 0
        if self.done:
            return
        self._stream.follow()
        with self._stream.current():
            self._own.thresholds.copy_(self._model.thresholds)
            self._stages.load(x)
        self._stream.lead()  # from here on the caller may change the batch and the thresholds
        self._launch(0, self._stages.entry(len(x)))

    def arrived(self) -> bool:
        """Whether `advance` would not wait."""
        return not self.done and self._stream.event.query()

    @torch.inference_mode()
    def advance(self) -> None:
        """Launch the next segment at the smallest bucket that holds the survivors, whose count is waited for."""
        self._stream.event.synchronize()
        count = int(self._stream.count)
        if count == 0:
            self._store()
            return
        sizes = list(self._launchers[self._segment + 1])
        self._launch(self._segment + 1, sizes[bisect_left(sizes, count)])

    def hand_back(self) -> Predictions:
        """Let the caller's stream wait for this one; what was not launched is given up."""
        self._stream.lead()
        self.done = True
        return self._out

    def describe(self) -> list[str]:
        """As `CapturedStages.describe`."""
        return self._stages.describe()

    def _launch(self, segment: int, size: int) -> None:
        self._segment, self.launched = segment, next(_launches)
        with self._stream.current():
            self._launchers[segment][size]()
            if segment + 1 < len(self._launchers):
                self._stream.count.copy_(self._stages.arenas[segment + 1].count, non_blocking=True)
                self._stream.event.record()
                return
        self._store()

    def _store(self) -> None:
        with self._stream.current():
            self._stages.store(self._out)
        self.done = True


def launcher(capture: Capture, driver: str, name: str) -> Callable[[], None]:
    """What launches one capture on the current stream; errors call it ``name``.

    On CUDA it is torch that instantiates: the assembler asks for a driver that has switches, and this is to do without.

    Raises:
        ExecutorError: if the driver refuses.
    """
    try:
        if isinstance(capture, torch.cuda.CUDAGraph):
            capture.instantiate()
            return capture.replay
        return AssembledGraph(capture, driver=driver, names=[name]).launch
    except (ValueError, RuntimeError) as error:
        raise ExecutorError(f"lag: {error}") from error


class Event(Protocol):
    """A point in a stream's work."""

    def record(self) -> None:
        """Be the point that the current stream has got to."""

    def query(self) -> bool:
        """Whether all work before it is done."""

    def synchronize(self) -> None:
        """Wait until it is."""


class Stream(Protocol):
    """A line of work beside the caller's, and what the host learns from it."""

    event: Event
    count: Tensor  # [] int32, on the host; to be read behind the event

    def current(self) -> AbstractContextManager[object]:
        """Work that is begun inside goes to this stream."""

    def follow(self) -> None:
        """Let this stream wait for all that the caller's has been given."""

    def lead(self) -> None:
        """Let the caller's stream wait for all that this one has been given."""


class CudaStream:
    """A CUDA stream, an event, and pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self.event: Event = torch.cuda.Event()
        with torch.inference_mode(False):
            self.count = torch.zeros((), dtype=torch.int32, pin_memory=True)

    def current(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def lead(self) -> None:
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class SimulatedStream:
    """For the recording driver, which has done everything by the time that a launch returns."""

    def __init__(self) -> None:
        self.event: Event = SimulatedEvent()
        with torch.inference_mode(False):
            self.count = torch.zeros((), dtype=torch.int32)

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def follow(self) -> None:
        pass

    def lead(self) -> None:
        pass


class SimulatedEvent:
    """Past as soon as it is recorded."""

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass
