"""Tensors for the tests of the operators: shapes, memory layouts, tolerances, and how two scores are compared."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dgate_rt import reference

# Features are widened to float32 exactly, so only the order of the sums differs, whatever their dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
DTYPES = list(TOLERANCE)
LAYOUTS = ["contiguous", "channels_last", "slice", "transposed"]
SHAPES = {"4d": (37, 5, 3), "3d": (6, 37), "2d": (37,)}
POOLS = [("avg", "4d"), ("flat", "4d"), ("avg", "3d"), ("cls", "3d"), ("flat", "3d"), ("avg", "2d"), ("flat", "2d")]
POOLS += [
    ("grid2", "4d"),
    ("grid4", "4d"),
    ("grid2", "3d"),
    ("grid2", "2d"),
]  # of 5 x 3 elements some cells overlap or are shared
# What a refusal is, by whether torch.ops is called directly: torch 2.15 turns whatever a kernel throws to RuntimeError.
REFUSAL: dict[bool, tuple[type[Exception], ...]] = {False: (ValueError,), True: (ValueError, RuntimeError)}


def name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values at other strides; the memory between them is NaN."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        order = (0, *range(2, x.ndim), 1)
    elif layout == "transposed":
        order = tuple(reversed(range(x.ndim)))
    else:
        out = x.new_full([size * 2 + 1 for size in x.shape], math.nan)[tuple(slice(1, None, 2) for _ in x.shape)]
        return out.copy_(x)
    inverse = [order.index(dim) for dim in range(x.ndim)]
    return x.permute(order).contiguous().permute(inverse)


def i32(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)


def moved(values: dict[str, Any], device: str) -> dict[str, Any]:
    """The same with every tensor on ``device``, its strides and overlaps kept."""

    def move(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage().to(device=device)
        empty = torch.empty(0, dtype=value.dtype, device=device)
        return empty.set_(storage, value.storage_offset(), value.shape, value.stride())

    return torch.utils._pytree.tree_map(move, values)


def make(n: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    torch.manual_seed(n)
    return lay_out(torch.randn(n, *shape).to(dtype), layout)


def make_gate(features: Tensor, classes: int, pool: str) -> tuple[Tensor, Tensor]:
    width = reference.pool_features(features[:0], pool).shape[1]
    return torch.randn(classes, width) / max(width, 1) ** 0.5, torch.randn(classes)  # distances of order one


def assert_same_scores(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """Distances and margins agree; so do labels, unless two classes lie within the tolerance of each other."""
    margin, label, distances = expected
    close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(got[0], margin, **close)
    torch.testing.assert_close(got[2], distances, **close)
    flipped = got[1] != label
    chosen = distances.gather(1, got[1][:, None])[:, 0]
    torch.testing.assert_close(chosen[flipped], margin[flipped], **close)
