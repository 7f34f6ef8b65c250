"""What an executor is given and what it must do."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dgate_rt.gate import Gate
from dgate_rt.staged import StagedModel


@dataclass
class Predictions:
    """Answers for one call, in input order, on the runtime's device."""

    labels: Tensor  # [N] int64
    scores: Tensor  # [N] float32; what the gate that answered goes by, or the network's largest logit
    exits: Tensor  # [N] int64; index of the gate that answered, or G for the network's own classifier
    distances: Tensor | None = None  # [N, K] float32 with scores=True: all distances (or logits) behind the score

    @classmethod
    def empty(cls, count: int, classes: int | None, device: torch.device, pinned: bool = False) -> Predictions:
        """Unwritten predictions for ``count`` samples; ``classes`` asks for the distances too."""

        def make(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)

        return cls(
            make(count, dtype=torch.int64),
            make(count, dtype=torch.float32),
            make(count, dtype=torch.int64),
            None if classes is None else make(count, classes, dtype=torch.float32),
        )

    def rows(self, start: int, stop: int) -> Predictions:
        """A view of some rows; what is written to it is written here."""
        distances = None if self.distances is None else self.distances[start:stop]
        return Predictions(self.labels[start:stop], self.scores[start:stop], self.exits[start:stop], distances)

    def clone(self) -> Predictions:
        """A copy in memory of its own."""
        distances = None if self.distances is None else self.distances.clone()
        return Predictions(self.labels.clone(), self.scores.clone(), self.exits.clone(), distances)

    def __len__(self) -> int:
        return len(self.labels)


class GatedModel:
    """A staged network with its gates and thresholds on one device: what every executor runs."""

    def __init__(self, staged: StagedModel, gates: Sequence[Gate], thresholds: tuple[float, ...]) -> None:
        self.staged = staged
        self.gates = tuple(gates)
        self.thresholds = torch.empty(len(gates), dtype=torch.float32, device=_device_of(*gates, staged))
        self.version = 0
        """How often the operating point was moved."""
        self.set_thresholds(thresholds)

    def set_thresholds(self, thresholds: tuple[float, ...]) -> None:
        """Move the operating point; the tensor executors read is written in place."""
        with torch.inference_mode():  # allowed whether or not the tensor was made in it
            values = torch.tensor(thresholds, dtype=torch.float32)
            if self.thresholds.is_cuda:  # from pinned memory the copy waits for nobody
                values = values.pin_memory()
            self.thresholds.copy_(values, non_blocking=True)
        self.point = thresholds
        """The operating point, as numbers."""
        self.active = tuple(t != float("inf") for t in thresholds)
        self.version += 1

    def snapshot(self) -> GatedModel:
        """The same model with the thresholds of now, which later ones do not reach."""
        copied = copy.copy(self)
        with torch.inference_mode(False):
            copied.thresholds = self.thresholds.clone()
        return copied

    def classes(self, sample_shape: Sequence[int], dtype: torch.dtype) -> int:
        """Number of classes, K; a network without gates is run to find out."""
        if self.gates:
            return self.gates[0].classes
        probe = torch.zeros((1, *sample_shape), dtype=dtype, device=self.thresholds.device)
        return int(self.staged(probe).shape[1])


def prefers_channels_last(staged: StagedModel, input_shape: Sequence[int], device: torch.device) -> bool:
    """Whether the network runs in channels_last unless told otherwise: images convolved on the CPU."""
    return device.type == "cpu" and len(input_shape) == 3 and any(isinstance(m, nn.Conv2d) for m in staged.modules())


def deploy(staged: StagedModel, device: torch.device, channels_last: bool) -> StagedModel:
    """A copy of the network to run: on ``device``, in eval mode, its weights in the wanted memory format."""
    copied = copy.deepcopy(staged).to(device).eval()
    return copied.to(memory_format=torch.channels_last) if channels_last else copied


@dataclass(frozen=True)
class Setup:
    """What batches will be like: for executors that prepare themselves."""

    batch_size: int
    sample_shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    classes: int | None  # where the distances to all classes are wanted
    shares: tuple[float, ...]  # [G + 1]; of the samples that leave at each exit, on validation data
    buckets: Sequence[int] | Literal["auto"] = "auto"
    chunks: Sequence[int] | Literal["auto"] = "auto"  # [G + 1]
    remeasure: bool = False  # whether stage times that were kept are measured again
    simulated: bool = False  # on the recording driver instead of CUDA's
    early_answers: bool = False  # whether batches are submitted, see `early.Ticket`
    losing_gates: Literal["keep", "off"] = "keep"  # what happens to gates that take more time than they save
    engine_id: str | None = "eager"  # what runs the stages, and its version
    sizes: tuple[tuple[int, ...], ...] = ()  # [G + 1]; that it prepared each stage for; none where it runs any

    def sizes_of(self, stage: int) -> tuple[int, ...]:
        """The batch sizes that a stage is prepared for, ascending; none if it runs at any."""
        return self.sizes[stage] if self.sizes else ()

    def empty_input(self, device: torch.device) -> Tensor:
        """A batch of zeros."""
        x = torch.zeros((self.batch_size, *self.sample_shape), dtype=self.dtype, device=device)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


class Executor(Protocol):
    """Runs one batch of at most ``batch_size`` rows."""

    name: str
    devices: tuple[str, ...]  # where it runs: "cpu", "cuda", and "cpu-sim", the simulation of a CUDA driver

    def __init__(self, model: GatedModel, setup: Setup) -> None: ...

    def run(
        self,
        x: Tensor,  # [N, ...], N >= 1
        out: Predictions,  # of N rows; every row must be written
    ) -> None:
        """Answer every row of ``x`` into ``out``."""

    def describe(self) -> list[str]:
        """What it prepared, a line each."""


@runtime_checkable
class StreamingExecutor(Executor, Protocol):
    """An executor that gains from seeing the next batch before it has answered the last."""

    def stream(
        self,
        batches: Iterable[tuple[Tensor, Predictions]],  # each as for run, or empty
        max_wait: int | None = None,
    ) -> Generator[Predictions, None, None]:
        """Answer every batch and yield where its answers went, in order; to be closed if it is not run to its end.

        Between two batches that are taken all are answered but the last ``max_wait``, if that is given.
        """


@runtime_checkable
class RegroupingExecutor(StreamingExecutor, Protocol):
    """A streaming executor by which a batch may be answered before one that came earlier."""

    def as_finished(
        self, batches: Iterable[tuple[Tensor, Predictions]], max_wait: int | None = None
    ) -> Generator[Predictions, None, None]:
        """As `stream`, but each batch as soon as its last sample is answered."""


def row_dense(t: Tensor) -> Tensor:
    """``t`` itself where each row is one dense block of memory, in any order of dimensions; else a copy."""
    return t if len(t) == 0 or _is_dense(t[0]) else t.contiguous()


def empty_rows(t: Tensor, count: int) -> Tensor:
    """Memory for ``count`` rows, each laid out as those of ``t``, which are dense, one behind the other."""
    row = t.shape[1:].numel()
    flat = torch.empty(count * row, dtype=t.dtype, device=t.device)
    return flat.as_strided((count, *t.shape[1:]), (row, *t.stride()[1:]))


def _is_dense(row: Tensor) -> bool:
    """Whether the values of ``row`` fill one block of memory without gaps or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(row.stride(), row.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _device_of(*modules: nn.Module) -> torch.device:
    return next((p.device for module in modules for p in module.parameters()), torch.device("cpu"))
