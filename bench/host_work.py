"""What the host does for a batch beside calls of a graph driver: the operators it launches, the data it waits for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
_NEED_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class HostWork(TorchDispatchMode):
    """Counts while it is entered, on the thread that entered it.

    What runs inside of an operator is not the host's doing, so nothing counts that a simulated capture does: it runs
    within the launch of its graph. Data that is read past the dispatcher (``numpy``, ``tolist``) is not seen.

    Attributes:
        operators: that do work on tensors; views, allocations and calls of a graph driver are none.
        reads: of tensors' values by the host: for a number, for the shape of a result, for a mask to index with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.reads = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with self:
            out = func.decompose(*args, **(kwargs or {}))  # of what is made of others, those count
        if out is not NotImplemented:
            return out
        if _reads(func, args):
            self.reads += 1
        elif not func.is_view and not func.name().startswith(("aten::empty", "aten::new_empty", "dgate_rt::graph_")):
            self.operators += 1
        return func(*args, **(kwargs or {}))


def _reads(func: OpOverload, args: Sequence[Any]) -> bool:
    if func in _INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return not _NEED_DATA.isdisjoint(func.tags)
