"""What engines outside of torch share: a stage exported with a free batch size, between contiguous tensors."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dgate_rt.errors import ExecutorError
from dgate_rt.staged import Boundary, as_tuple

Order = tuple[int, ...]
"""Dimensions of a tensor from the outermost in memory to the innermost: (0, 2, 3, 1) for channels_last."""


@dataclass(frozen=True)
class Exported:
    """A stage as a graph that takes and returns tensors with dimensions in their order in memory."""

    program: torch.export.ExportedProgram
    inputs: tuple[Order, ...]
    dtypes: tuple[torch.dtype, ...]  # of what the stage takes
    outputs: Outputs
    single: bool  # whether it returns one tensor, not a tuple of one

    def boundary(self, rows: Sequence[Tensor]) -> Boundary:
        """What the stage returns, from what the graph returned."""
        restored = tuple(t.permute(inverse(dims)) for t, dims in zip(rows, self.outputs.orders, strict=True))
        return restored[0] if self.single else restored


class Outputs(threading.local):
    """Memory for what a stage returns, of as many rows as were ever asked for; each thread keeps its own."""

    def __init__(self, example: tuple[Tensor, ...]) -> None:
        self.orders = tuple(map(order, example))
        self.dtypes = tuple(t.dtype for t in example)
        self._rows = [t.permute(dims).shape[1:] for t, dims in zip(example, self.orders, strict=True)]
        self._memory: list[Tensor] = []

    def __call__(self, count: int) -> list[Tensor]:
        """The first ``count`` rows of each tensor, contiguous, dimensions in their order in memory."""
        if not self._memory or len(self._memory[0]) < count:
            with torch.inference_mode(False):
                rows = zip(self._rows, self.dtypes, strict=True)
                self._memory = [torch.empty(count, *shape, dtype=dtype) for shape, dtype in rows]
        return [t[:count] for t in self._memory]


def export(
    stage: nn.Module, example: tuple[Tensor, ...], *, widen: bool = False, planar: bool = False, merged: bool = False
) -> Exported:
    """Export a stage.

    Args:
        stage: in eval mode.
        example: a boundary.
        widen: whether the graph is that of the stage in float32.
        planar: whether the graph returns tensors whose last dimension is innermost in memory, however the stage
            lays them out.
        merged: whether images that lie channels_last are returned as ``[N, H * W, C]``, their pixels one dimension.

    Raises:
        ExecutorError: if the stage fixes its batch size.
        Exception: whatever else `torch.export.export` raises.
    """
    from torch._dynamo.exc import UserError, UserErrorType  # takes a second to import

    with torch.inference_mode(False), torch.no_grad():
        given = tuple(torch.cat([t, t]) if len(t) == 1 else t.clone() for t in example)  # a size of 1 would be fixed
        returned = stage(*(t.clone() for t in given))
        single = isinstance(returned, Tensor)
        results = tuple(t.contiguous() for t in as_tuple(returned)) if planar else as_tuple(returned)
        inputs, dtypes, outputs = tuple(map(order, given)), tuple(t.dtype for t in given), Outputs(results)
        if widen:
            stage = copy.deepcopy(stage).float()
            given = tuple(t.float() if t.is_floating_point() else t for t in given)
        between = _Between(stage, inputs, outputs.orders, merged)
        free = tuple({0: torch.export.Dim.DYNAMIC} for _ in given)
        arguments = tuple(t.permute(o) for t, o in zip(given, inputs, strict=True))
        try:
            program = torch.export.export(between, arguments, dynamic_shapes=(free,))
        except UserError as error:
            if error.error_type is not UserErrorType.CONSTRAINT_VIOLATION:
                raise
            raise ExecutorError(f"its batch size is fixed, by len(x) say in place of x.shape[0]: {error}") from error
    return Exported(program, inputs, dtypes, outputs, single)


class _Between(nn.Module):
    def __init__(self, stage: nn.Module, inputs: Sequence[Order], outputs: Sequence[Order], merged: bool) -> None:
        super().__init__()
        self.stage = stage
        self._inputs, self._outputs, self._merged = inputs, outputs, merged
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = (t.permute(inverse(o)) for t, o in zip(tensors, self._inputs, strict=True))
        return tuple(self._laid_out(t, o) for t, o in zip(as_tuple(self.stage(*given)), self._outputs, strict=True))

    def _laid_out(self, t: Tensor, dims: Order) -> Tensor:
        if self._merged and t.ndim > 3 and dims == (0, *range(2, t.ndim), 1):
            return t.flatten(2).transpose(1, 2)
        return t.permute(dims)


def order(t: Tensor) -> Order:
    """The order in memory of the dimensions of ``t``, the batch first."""
    strides = t.stride()
    return (0, *sorted(range(1, t.ndim), key=lambda d: -strides[d]))


def inverse(dims: Order) -> Order:
    """The permutation that undoes ``dims``."""
    return tuple(dims.index(d) for d in range(len(dims)))


def in_order(t: Tensor, dims: Order) -> Tensor:
    """``t`` with its dimensions permuted, contiguous; itself, not a copy, where it is laid out so."""
    return t.permute(dims).contiguous()
