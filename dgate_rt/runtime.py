"""Runtime: a gated network, ready to run; `compile` makes it."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from dgate_rt.allocator import freed_memory
from dgate_rt.engines import EngineStages
from dgate_rt.errors import ExecutorError
from dgate_rt.executors import (
    EarlyExecutor,
    Executor,
    GatedModel,
    GraphExecutor,
    Predictions,
    RegroupingExecutor,
    Setup,
    StreamingExecutor,
    Ticket,
)
from dgate_rt.monitor import Monitor, Window
from dgate_rt.program import GateProgram, check_thresholds


class Runtime:
    """A gated network, ready to run: ``run(x)`` gives `Predictions` in input order. Made by `compile`."""

    def __init__(
        self,
        program: GateProgram,
        model: GatedModel,
        executor: Executor,
        reason: str,
        setup: Setup,
        stages: EngineStages,
        monitored: bool = False,
    ) -> None:
        self.program = program
        self.batch_size = setup.batch_size
        self.executor = executor.name
        self.engine = stages.engine
        self.reason = reason
        self.channels_last = setup.channels_last
        self.device = model.thresholds.device
        self._model = model
        self._executor = executor
        self._setup = setup
        self.stages = stages
        self._monitor = Monitor(program.reference, self._gating, self.device) if monitored else None

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The operating point in force, length G."""
        return self._model.point

    @property
    def monitor(self) -> Monitor:
        """Where samples left and with what scores, and whether that is what validation samples did.

        Raises:
            ExecutorError: unless compiled with ``monitor=True``.
        """
        if self._monitor is None:
            raise ExecutorError("monitor: compile the program with monitor=True")
        return self._monitor

    @property
    def input(self) -> Tensor | None:  # [batch_size, ...]
        """Where a captured graph reads its batch; None for executors that read a batch where it lies.

        Rows written here and given to the runtime (``run(run.input[:n])``) are not copied. Another tensor takes its
        place when a gate is switched on or off.
        """
        return getattr(self._executor, "input", None)

    def set_thresholds(self, thresholds: Sequence[float] | Tensor) -> None:
        """Move the operating point; holds from the next batch on. ``+inf`` switches a gate off.

        A monitor begins anew, unless they are those in force.

        Raises:
            TypeError: if it is no sequence of numbers.
            ValueError: if there are not as many as gates, or one is NaN.
        """
        values = check_thresholds(thresholds, len(self._model.gates))
        self._model.set_thresholds(values)
        if self._monitor is not None:
            self._monitor.moved_to(self._gating)

    @torch.inference_mode()
    def __call__(
        self,
        x: Tensor,  # [N, ...], N >= 0
    ) -> Predictions:
        """Answer every sample of ``x``; more than ``batch_size`` of them run in several batches.

        Raises:
            TypeError: if ``x`` is not a tensor, or of another dtype than the program was calibrated on or runs in.
            ValueError: if its shape or device is another.
        """
        self._check(x)
        window, out = self._window(), self._empty(len(x))
        if len(x) > 0:
            for part, rows in self._cut(x, out):
                self._executor.run(part, rows)
        if window is not None:
            window.add(out)
        return out

    def submit(
        self,
        x: Tensor,  # [N, ...], 0 <= N <= batch_size
    ) -> Ticket:
        """Start a batch and return at once; the answers of samples that leave early can be had before it is done.

        Answers come to the host. ``"graph"`` copies them to pinned memory behind every gate, and has memory for one
        batch: another call waits until a batch that was submitted is done. ``"eager"`` runs batches one after another
        on a thread of its own; ``x`` must stay as it is until the batch is done.

        Raises:
            ExecutorError: unless compiled with ``early_answers=True``.
            TypeError, ValueError: as a call does, and if ``x`` has more than ``batch_size`` samples.
        """
        if not isinstance(self._executor, EarlyExecutor) or not self._setup.early_answers:
            raise ExecutorError("submit: compile the program with early_answers=True")
        self._check(x)
        if len(x) > self.batch_size:
            raise ValueError(f"x: expected at most batch_size={self.batch_size} samples to submit, got {len(x)}")
        window = self._window()
        with torch.inference_mode():
            ticket = self._executor.submit(self._laid_out(x))
        if window is not None:
            self.monitor.submitted(ticket, window)
        return ticket

    @overload
    def stream(
        self, batches: Iterable[Tensor], in_order: Literal[True] = True, max_wait: int | None = None
    ) -> Generator[Predictions, None, None]: ...

    @overload
    def stream(
        self, batches: Iterable[Tensor], in_order: Literal[False], max_wait: int | None = None
    ) -> Generator[tuple[int, Predictions], None, None]: ...

    def stream(
        self,
        batches: Iterable[Tensor],  # each [N, ...], N >= 0
        in_order: bool = True,
        max_wait: int | None = None,
    ) -> Generator[Any, None, None]:
        """Answer batch after batch, each as a call would, and yield the answers.

        Batches are taken when they are needed. The executor ``"refill"`` lets samples of different batches share
        chunks: it takes as many as it needs to fill them, and answers what is under way before it takes one under new
        thresholds. ``"lag"`` works on two at once, so it has taken at most two more than it has answered; new
        thresholds hold from the next one that it takes, or the next part of one that is larger than ``batch_size``.
        The others take one at a time. To close the generator drops the batches that are under way.

        Nothing runs while ``batches`` is waited for, so ``max_wait`` counts batches, and no time can be promised. A
        source that has none to give for a while may yield empty ones: they count, and let others be answered.

        Args:
            batches: taken one by one.
            in_order: with False each batch comes as ``(index, answers)`` as soon as its last sample is answered,
                perhaps before one that came earlier.
            max_wait: a batch is answered at the latest when so many later ones have been taken, before the next is; 0
                answers each before another is taken. None: it waits for as many as fill the chunks. The parts of a
                batch that is larger than ``batch_size`` count one by one.

        Raises:
            TypeError, ValueError: at once, if ``max_wait`` is no whole number, or negative. Later as a call does, and
                whatever ``batches`` raises; after the answers to the batches before.
        """
        if max_wait is not None and not isinstance(max_wait, int):
            raise TypeError(f"max_wait: expected a whole number or None, got {type(max_wait).__name__}")
        if max_wait is not None and max_wait < 0:
            raise ValueError(f"max_wait: expected at least 0, got {max_wait}")
        return self._streamed(batches, in_order, max_wait)

    def _streamed(self, batches: Iterable[Tensor], in_order: bool, max_wait: int | None) -> Generator[Any, None, None]:
        with closing(self._answered(batches, in_order, max_wait)) as answered:
            for index, out in answered:
                yield out if in_order else (index, out)

    def _answered(
        self, batches: Iterable[Tensor], in_order: bool, max_wait: int | None
    ) -> Generator[tuple[int, Predictions], None, None]:  # each with its place in the stream
        executor = self._executor
        if not isinstance(executor, StreamingExecutor):
            for index, x in enumerate(batches):
                yield index, self(x)
            return
        under_way: dict[int, tuple[_Batch, Window | None]] = {}  # by the identity of the answers to each part

        def parts() -> Iterator[tuple[Tensor, Predictions]]:
            for index, x in enumerate(batches):
                self._check(x)
                batch = _Batch(index, self._empty(len(x)), max(1, math.ceil(len(x) / self.batch_size)))
                for part, rows in self._cut(x, batch.out):
                    under_way[id(rows)] = batch, self._window()
                    yield part, rows

        answer = executor.stream
        if not in_order and isinstance(executor, RegroupingExecutor):
            answer = executor.as_finished
        with closing(answer(parts(), max_wait)) as answered:
            for rows in answered:
                batch, window = under_way.pop(id(rows))
                if window is not None:
                    window.add(rows)
                batch.parts_left -= 1
                if batch.parts_left == 0:
                    yield batch.index, batch.out

    @overload
    def describe(self, format: Literal["text", "dot"] = "text") -> str: ...
    @overload
    def describe(self, format: Literal["json"]) -> dict[str, Any]: ...

    def describe(self, format: str = "text") -> Any:
        """What runs where: executor and why, batch size, layout, engine, and every gate's place and threshold.

        The shares of samples and the guarantee are those of the program's own operating point, and are left out at any
        other.

        Args:
            format: ``"text"`` for the above. For the executor ``"graph"`` also the graph that it launches, as the
                driver has it: ``"json"`` for a dict of its nodes, edges and the bodies of each switch by bucket,
                ``"dot"`` for the text of Graphviz.

        Raises:
            ValueError: if it is none of these.
            ExecutorError: if a graph is asked for of an executor that assembles none.
        """
        if format not in ("text", "json", "dot"):
            raise ValueError(f"format: expected 'text', 'json' or 'dot', got {format!r}")
        if format == "text":
            return self._describe()
        if not isinstance(self._executor, GraphExecutor):
            raise ExecutorError(
                f"format: {format!r} asks for a graph; only the executor 'graph' assembles one, not {self.executor!r}"
            )
        return self._executor.assembled(format)

    def _describe(self) -> str:
        known = self.thresholds == self.program.thresholds and self.executor != "dense"
        shares = [f", {share:.1%} left here on validation data" if known else "" for share in self.program.point.shares]
        promised = [f"on new data: {self.program.guarantee}"] if known and self.program.guarantee else []
        layout = "channels_last" if self.channels_last else "as given"
        where = "cpu-sim" if self._setup.simulated else self.device
        lines = [f"executor {self.executor} ({self.reason}) on {where}, batch size {self.batch_size}, layout {layout}"]
        for g, (cut, threshold) in enumerate(zip(self.program.staged.cuts, self.thresholds, strict=True)):
            state = "off" if threshold == math.inf else f"t = {threshold:.4g}"
            state = "not run by this executor" if self.executor == "dense" else state
            lines.append(f"gate {g} after {cut}: {state}{shares[g]}")
        lines.append(f"exit {len(self.thresholds)}, the network's own classifier{shares[-1]}")
        if self.device.type == "cpu":
            lines.append(f"freed memory {freed_memory()}")
        return "\n".join([*lines, *promised, *self._executor.describe(), *self.stages.describe()])

    @property
    def _gating(self) -> tuple[float, ...]:
        """The thresholds that decide who leaves: the dense executor asks no gate."""
        return (math.inf,) * len(self.thresholds) if self.executor == "dense" else self.thresholds

    def _window(self) -> Window | None:
        """Where a batch that begins now is to be counted."""
        return None if self._monitor is None else self._monitor.window

    def _empty(self, count: int) -> Predictions:
        with torch.inference_mode(False):  # ordinary tensors, which the caller may change
            return Predictions.empty(count, self._setup.classes, self.device)

    def _cut(self, x: Tensor, out: Predictions) -> Iterator[tuple[Tensor, Predictions]]:
        """Parts of at most ``batch_size`` rows, at least one, as they are to run, with their rows of ``out``."""
        for start in range(0, max(1, len(x)), self.batch_size):
            stop = min(start + self.batch_size, len(x))
            with torch.inference_mode():
                part = self._laid_out(x[start:stop])
            yield part, out.rows(start, stop)

    def _laid_out(self, x: Tensor) -> Tensor:
        x = x.to(self._setup.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        shape = self.program.input_shape
        if tuple(x.shape[1:]) != shape or x.ndim == 0:
            raise ValueError(f"x: expected shape [N, {', '.join(map(str, shape))}], got {list(x.shape)}")
        if x.dtype not in (self.program.input_dtype, self._setup.dtype):
            raise TypeError(f"x: expected {self.program.input_dtype}, got {x.dtype}")
        if x.device.type != self.device.type or self.device.index not in (None, x.device.index):
            raise ValueError(f"x: expected a tensor on {self.device}, got one on {x.device}")


@dataclass
class _Batch:
    """A batch of a stream."""

    index: int
    out: Predictions
    parts_left: int
