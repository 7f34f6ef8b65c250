"""What an engine is, and a network whose stages run on one.

An engine turns a stage into something faster for a few batch sizes, which it is told beforehand. `PreparedStage` makes
of that a stage for any number of rows, so executors need not know what runs below them.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dgate_rt.staged import Boundary, StagedModel, as_tuple

Run = Callable[..., Boundary]
"""Takes the tensors of a boundary, one argument each, and returns the next boundary."""


class StageEngine(Protocol):
    """Prepares a stage. Any function of this signature is an engine.

    If it has a ``name``, that is what it is called; if it has a true ``any_size``, what it returns runs any number of
    rows, and is never given padding. If it has a true ``own_threads``, it does not compute on torch's threads, and
    torch's operators between the stages leave the cores to it (`dgate_rt.threads`). If it has ``packages``, importable
    names of all that it depends on beside torch, what its stages took is found again in later processes.
    """

    def __call__(
        self,
        stage: nn.Module,  # in eval mode; device, dtype and memory format are settled
        example: tuple[Tensor, ...],  # a boundary of the largest size, each [N, ...]
        sizes: Sequence[int],  # ascending
    ) -> Run:
        """What runs boundaries of exactly ``sizes`` rows, strided as ``example``.

        What it returns may lie in memory that its next call in the same thread writes. If it is a module, its
        parameters stay those of the network.
        """


def name_of(engine: StageEngine) -> str:
    """What an engine is called in reports and errors."""
    return str(getattr(engine, "name", None) or getattr(engine, "__name__", None) or type(engine).__name__)


class PreparedStage(nn.Module):
    """A stage on an engine, for any number of rows.

    Fewer rows than a prepared size are padded to the smallest that holds them, with rows of earlier calls or zeros, in
    memory that each thread keeps; samples are independent, and the results of padding are not returned. More rows than
    the largest size are cut up.

    Args:
        run: what the engine made.
        example: the boundary it was made with.
        sizes: what it is prepared for, ascending; empty for any.
    """

    def __init__(self, run: Run, example: tuple[Tensor, ...], sizes: Sequence[int]) -> None:
        super().__init__()
        self.run = run
        self.sizes = tuple(sizes)
        self._padding = _Padding(example)
        self.eval()

    def forward(self, *tensors: Tensor) -> Boundary:
        count = len(tensors[0])
        if not self.sizes:
            return self.run(*tensors)
        largest = self.sizes[-1]
        if count > largest:
            starts = range(0, count, largest)
            return _joined([_copy(self(*(t[i : i + largest] for t in tensors))) for i in starts])
        size = self.sizes[bisect_left(self.sizes, count)]
        return _first(self.run(*self._padding(tensors, size)), count)

    def padding(self) -> list[Tensor]:
        """The memory that this thread pads in; none before it has had to."""
        return self._padding.memory


class _Padding(threading.local):
    """Memory of one boundary at the largest size; each thread makes its own when it first needs it."""

    def __init__(self, example: tuple[Tensor, ...]) -> None:
        self._layouts = [(t.shape, t.stride(), t.dtype, t.device) for t in example]
        self.memory: list[Tensor] = []

    def __call__(self, tensors: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
        """The tensors at ``size`` rows, strided as the example; themselves where they are that already."""
        return tuple(
            t if len(t) == size and _same_strides(t, strides) else self._padded(index, t, size)
            for index, (t, (_, strides, *_)) in enumerate(zip(tensors, self._layouts, strict=True))
        )

    def _padded(self, index: int, t: Tensor, size: int) -> Tensor:
        if not self.memory:
            with torch.inference_mode(False):
                self.memory = [
                    torch.empty_strided(shape, strides, dtype=dtype, device=device).zero_()
                    for shape, strides, dtype, device in self._layouts
                ]
        padded = self.memory[index][:size]
        padded[: len(t)].copy_(t)
        return padded


def _same_strides(t: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether memory is walked alike; where there is one index only, the stride says nothing."""
    return all(n <= 1 or a == b for n, a, b in zip(t.shape, t.stride(), strides, strict=True))


def _first(boundary: Boundary, count: int) -> Boundary:
    if isinstance(boundary, Tensor):
        return boundary[:count]
    return tuple(t[:count] for t in boundary)


def _copy(boundary: Boundary) -> Boundary:
    return boundary.clone() if isinstance(boundary, Tensor) else tuple(t.clone() for t in boundary)


def _joined(parts: Sequence[Boundary]) -> Boundary:
    joined = tuple(torch.cat(tensors) for tensors in zip(*map(as_tuple, parts), strict=True))
    return joined[0] if isinstance(parts[0], Tensor) else joined


class EngineStages(StagedModel):
    """A staged network that is ready to run on an engine; made by `prepare`.

    Attributes:
        engine: the engine's name.
        engine_id: its name and the versions that it depends on; None for one of the user's own, which nothing tells
            from another of its name.
        input_dtype: of the batches that it takes.
    """

    def __init__(
        self,
        staged: StagedModel,
        stages: Sequence[nn.Module],
        engine: str,
        engine_id: str | None,
        input_dtype: torch.dtype,
    ) -> None:
        super().__init__(stages, staged.cuts, staged.nhwc)
        self.engine, self.engine_id = engine, engine_id
        self._fingerprint = staged.fingerprint()  # an engine may keep nothing that tells networks apart
        self.input_dtype = input_dtype
        self.own_threads = False
        """Whether every stage computes on threads of the engine's own."""
        self.fallen: dict[int, str] = {}
        """Stages that run on eager, because the engine cannot run them, and why."""
        self.report: list[str] = []
        """What preparing it took and why this engine was chosen, a line each."""

    def fingerprint(self) -> str:
        """Of the network that was put on the engine."""
        return self._fingerprint

    def sizes(self, index: int) -> tuple[int, ...]:
        """The batch sizes that a stage is prepared for, ascending; none if it runs at any."""
        stage = self.stages[index]
        return stage.sizes if isinstance(stage, PreparedStage) else ()

    def describe(self) -> list[str]:
        """Engine, dtype, sizes, and what preparing took."""
        prepared = [f"stage {index} {self.sizes(index)}" for index in range(len(self.stages)) if self.sizes(index)]
        sizes = f"prepared for samples: {', '.join(prepared)}" if prepared else "any number of samples"
        dtype = str(self.input_dtype).removeprefix("torch.")
        first = f"engine {self.engine}, input {dtype}, {sizes}"
        fallen = [f"stage {i} runs on eager, {self.engine} cannot run it: {why}" for i, why in self.fallen.items()]
        return [first, *self.report, *fallen]
