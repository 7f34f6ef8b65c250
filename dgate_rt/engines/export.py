"""What engines outside of torch share: a stage exported with a free batch size, between contiguous tensors."""

from __future__ import annotations

import copy
import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from dgate_rt.cache import kept_files
from dgate_rt.errors import ExecutorError
from dgate_rt.staged import Boundary, as_tuple, update_digest
from dgate_rt.versions import package_version

T = TypeVar("T")
_SCHEMA = 1  # of what is kept: raised where a graph is written in another way


@dataclass(frozen=True)
class Layout:
    """A tensor of a boundary: how it lies in memory, and so in which shape the graph takes or returns it."""

    order: tuple[int, ...]  # dimensions from the outermost in memory to the innermost: (0, 2, 3, 1) for channels_last
    pixels: tuple[int, ...]  # (H, W) of a channels_last image that the graph has as [N, H * W, C]; else empty
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor, merged: bool) -> Layout:
        strides = t.stride()
        order = (0, *sorted(range(1, t.ndim), key=lambda d: -strides[d]))
        channels_last = t.ndim > 3 and order == (0, *range(2, t.ndim), 1)
        return cls(order, tuple(t.shape[2:]) if merged and channels_last else (), t.dtype)

    def into(self, t: Tensor) -> Tensor:
        """A tensor of the boundary in the graph's shape; contiguous if it lies so."""
        return t.flatten(2).transpose(1, 2) if self.pixels else t.permute(self.order)

    def back(self, t: Tensor) -> Tensor:
        """A tensor of the graph in the boundary's shape, in the same memory."""
        t = t.unflatten(1, self.pixels) if self.pixels else t
        return t.permute([self.order.index(d) for d in range(t.ndim)])


@dataclass(frozen=True)
class Exported:
    """A stage as a graph that takes and returns contiguous tensors."""

    program: torch.export.ExportedProgram
    inputs: tuple[Layout, ...]
    outputs: Outputs
    single: bool  # whether it returns one tensor, not a tuple of one

    def given(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the graph takes, from what the stage is given; copied only where it lies otherwise."""
        return [layout.into(t).contiguous() for layout, t in zip(self.inputs, tensors, strict=True)]

    def boundary(self, rows: Sequence[Tensor]) -> Boundary:
        """What the stage returns, from what the graph returned."""
        restored = tuple(layout.back(t) for layout, t in zip(self.outputs.layouts, rows, strict=True))
        return restored[0] if self.single else restored

    def converted(
        self, packages: Sequence[str], write: Callable[[Path], None], read: Callable[[Path], T]
    ) -> tuple[T, bool]:
        """What ``read`` makes of the files that ``write`` converts the graph to, now or in an earlier process.

        Args:
            packages: those that convert it, the one that reads it first; files of other versions are not found.
            write: puts the files into an empty folder.
            read: takes that folder; see `dgate_rt.cache.kept_files`.

        Returns:
            What ``read`` returned, and whether the files were found.
        """
        versions = [package_version(name) for name in ("torch", *packages)]
        key = hashlib.sha256(f"{_SCHEMA} {versions} {self.digest()}".encode()).hexdigest()[:32]
        return kept_files("stages", f"{packages[0]}-{key}", write, read)

    def digest(self) -> str:
        """SHA-256 over every operation of the graph, what it takes, and, byte for byte, what it holds.

        What torch exported tells two stages apart also where the same modules with the same weights are called from
        other Python code, which `StagedModel.fingerprint` cannot see.
        """
        program, digest = self.program, hashlib.sha256()
        taken = [(t.dtype, tuple(t.shape[1:]), t.stride()) for t in program.example_inputs[0]]
        digest.update(f"{program.graph_signature} {taken}\n".encode())
        for name, module in program.graph_module.named_modules():
            if isinstance(module, fx.GraphModule):
                digest.update(f"{name}\n{module.code}\n".encode())
        for name, held in (*program.state_dict.items(), *program.constants.items()):
            update_digest(digest, f"{name} {held.stride()}", held)
        return digest.hexdigest()


class Outputs(threading.local):
    """Memory for what a stage returns, of as many rows as were ever asked for; each thread keeps its own."""

    def __init__(self, example: tuple[Tensor, ...], layouts: tuple[Layout, ...]) -> None:
        self.layouts = layouts
        self._rows = [layout.into(t).shape[1:] for layout, t in zip(layouts, example, strict=True)]
        self._memory: list[Tensor] = []

    def __call__(self, count: int) -> list[Tensor]:
        """The first ``count`` rows of each tensor, contiguous, as the graph returns them."""
        if not self._memory or len(self._memory[0]) < count:
            with torch.inference_mode(False):
                rows = zip(self._rows, self.layouts, strict=True)
                self._memory = [torch.empty(count, *shape, dtype=layout.dtype) for shape, layout in rows]
        return [t[:count] for t in self._memory]


class ExportedRun(ABC):
    """What an engine outside of torch made of a stage; a `dgate_rt.engines.base.Run`.

    Attributes:
        found: whether its graph was kept from before.
    """

    def __init__(self, exported: Exported, found: bool) -> None:
        self._exported, self.found = exported, found

    @abstractmethod
    def __call__(self, *tensors: Tensor) -> Boundary:
        """The next boundary."""


def export(
    stage: nn.Module, example: tuple[Tensor, ...], *, widen: bool = False, planar: bool = False, merged: bool = False
) -> Exported:
    """Export a stage.

    Args:
        stage: in eval mode.
        example: a boundary.
        widen: whether the graph computes in float32, between inputs and outputs of the stage's own dtypes.
        planar: whether the graph returns tensors whose last dimension is innermost in memory, however the stage
            lays them out.
        merged: whether images that lie channels_last are taken and returned as ``[N, H * W, C]``, their pixels one
            dimension.

    Raises:
        ExecutorError: if the stage fixes its batch size.
        Exception: whatever else `torch.export.export` raises.
    """
    from torch._dynamo.exc import UserError, UserErrorType  # takes a second to import

    with torch.inference_mode(False), torch.no_grad():
        given = tuple(
            torch.cat([t, t]) if len(t) == 1 else t[:2].clone() for t in example
        )  # a size of 1 would be fixed
        returned = stage(*(t.clone() for t in given))
        single = isinstance(returned, Tensor)
        results = tuple(t.contiguous() for t in as_tuple(returned)) if planar else as_tuple(returned)
        inputs, layouts = (tuple(Layout.of(t, merged) for t in tensors) for tensors in (given, results))
        between = _Between(copy.deepcopy(stage).float() if widen else stage, inputs, layouts, widen)
        free = tuple({0: torch.export.Dim.DYNAMIC} for _ in given)
        arguments = tuple(layout.into(t).contiguous() for layout, t in zip(inputs, given, strict=True))
        try:
            program = torch.export.export(between, arguments, dynamic_shapes=(free,))
        except UserError as error:
            if error.error_type is not UserErrorType.CONSTRAINT_VIOLATION:
                raise
            raise ExecutorError(f"its batch size is fixed, by len(x) say in place of x.shape[0]: {error}") from error
    return Exported(program, inputs, Outputs(results, layouts), single)


class _Between(nn.Module):
    """A stage between tensors as the graph has them, in float32 if it is widened."""

    def __init__(self, stage: nn.Module, inputs: Sequence[Layout], outputs: Sequence[Layout], widen: bool) -> None:
        super().__init__()
        self.stage = stage
        self._inputs, self._outputs, self._widen = inputs, outputs, widen
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = (layout.back(t) for layout, t in zip(self._inputs, tensors, strict=True))
        wide = (t.float() if self._widen and t.is_floating_point() else t for t in given)
        returned = zip(self._outputs, as_tuple(self.stage(*wide)), strict=True)
        return tuple(layout.into(t.to(layout.dtype)) for layout, t in returned)
