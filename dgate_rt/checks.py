"""What the operators ask of their arguments, checked on shapes, dtypes and devices alone: no data is read.

Errors name the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dgate_rt.gate import GRIDS, Criterion, Pool, ranks_of

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_WEIGHTS = 2**31 - 1
_MOST_CLASSES = 16 * 65_535  # a launch has so many tiles of 16 at most


_POOLS, _CRITERIA = ([member.value for member in kind] for kind in (Pool, Criterion))  # torch.compile lists no Enum


def _expect_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, known))}, got {value!r}")


def _text(shape: Sequence[int | str], dtype: torch.dtype) -> str:
    return f"[{', '.join(map(str, shape))}] {str(dtype).removeprefix('torch.')}"


def _expect(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, rows: str = ""
) -> None:
    """Raise unless ``tensor`` is as said; with ``rows`` it has a first dimension besides, of any size, so called."""
    got = tensor.shape
    fits = len(got) > 0 and got[1:] == shape if rows else got == shape
    if fits and tensor.dtype is dtype and tensor.device == device:
        return
    wanted, found = _text((rows, *shape) if rows else shape, dtype), _text(got, tensor.dtype)
    if tensor.device != device:
        wanted, found = f"{wanted} on {device}", f"{found} on {tensor.device}"
    raise ValueError(f"{name}: expected {wanted}, got {found}")


def check_gate(features: Tensor, weight: Tensor, bias: Tensor, pool: str, count: Tensor | None, criterion: str) -> None:
    """Raise unless the arguments of ``gate_score`` fit each other."""
    _expect_one_of("pool", pool, _POOLS)
    _expect_one_of("criterion", criterion, _CRITERIA)
    shape, device = features.shape, features.device
    ranks = ranks_of(Pool(pool))
    if features.dtype not in FEATURE_DTYPES or len(shape) not in ranks:
        expected = f"rank {' or '.join(map(str, ranks))} (pool={Pool(pool).value!r}), float32, bfloat16 or float16"
        raise ValueError(f"features: expected {expected}; got {_text(shape, features.dtype)}")
    if pool == Pool.CLS and shape[1] == 0:
        raise ValueError(f"features: pool='cls' expects at least one token, got {_text(shape, features.dtype)}")
    if pool == Pool.FLAT:
        width = math.prod(shape[1:])
    elif len(shape) == 4 and shape[2] * shape[3] != 1 and (side := GRIDS.get(Pool(pool).value)):
        if 0 in shape[2:]:
            expected = f"a map of at least one element (pool={Pool(pool).value!r})"
            raise ValueError(f"features: expected {expected}, got {_text(shape, features.dtype)}")
        width = shape[1] * side * side
    else:
        width = shape[2] if len(shape) == 3 else shape[1]
    _expect("weight", weight, (width,), torch.float32, device, "K")
    classes = weight.shape[0]
    if classes == 0:
        raise ValueError(f"weight: expected at least one class, got {_text(weight.shape, weight.dtype)}")
    if classes > _MOST_CLASSES:
        raise ValueError(f"weight: expected at most {_MOST_CLASSES} classes, got {classes}")
    if classes * width > _MOST_WEIGHTS:
        got = f"{classes} classes x {width} features"
        raise ValueError(f"weight: expected at most {_MOST_WEIGHTS} elements, got {got}")
    _expect("bias", bias, (classes,), torch.float32, device)
    if count is not None:
        _expect("count", count, (), torch.int32, device)


def check_route(
    src: Sequence[Tensor],
    ids: Tensor,
    margin: Tensor,
    label: Tensor,
    count: Tensor | None,
    thresholds: Tensor,
    gate: int,
    dest: Sequence[Tensor],
    dest_ids: Tensor,
    dest_count: Tensor,
    out_labels: Tensor,
    out_scores: Tensor,
    out_exits: Tensor,
    waiting: Tensor | None,
    buckets: Tensor | None,
    bucket: Tensor | None,
    handles: Tensor | None,
    status: Tensor | None,
) -> None:
    """Raise unless the arguments of ``route_`` fit each other."""
    device = ids.device
    _expect("ids", ids, (), torch.int64, device, "N")
    n = ids.shape[0]
    _expect("margin", margin, (n,), torch.float32, device)
    _expect("label", label, (n,), torch.int64, device)
    for name, scalar in (("count", count), ("waiting", waiting), ("bucket", bucket), ("status", status)):
        if scalar is not None:
            _expect(name, scalar, (), torch.int32, device)
    _expect("thresholds", thresholds, (), torch.float32, device, "G")
    if not 0 <= gate < len(thresholds):
        raise ValueError(f"gate: expected 0 to {len(thresholds) - 1}, got {gate}")
    _expect("dest_ids", dest_ids, (), torch.int64, device, "capacity")
    capacity = dest_ids.shape[0]
    _expect("dest_count", dest_count, (), torch.int32, device)
    _expect("out_labels", out_labels, (), torch.int64, device, "M")
    _expect("out_scores", out_scores, out_labels.shape, torch.float32, device)
    _expect("out_exits", out_exits, out_labels.shape, torch.int64, device)
    if buckets is None and (bucket is not None or handles is not None):
        raise ValueError("buckets: expected sizes to choose from, got none")
    if buckets is not None:
        _expect("buckets", buckets, (), torch.int32, device, "M")
        if not len(buckets):
            raise ValueError("buckets: expected at least one size, got none")
    if handles is not None:
        _expect("handles", handles, thresholds.shape, torch.int64, device)
    if len(src) != len(dest):
        raise ValueError(f"dest: expected {len(src)} tensors like src, got {len(dest)}")
    for i, (source, target) in enumerate(zip(src, dest, strict=True)):
        _expect(f"src[{i}]", source, (n, *source.shape[1:]), source.dtype, device)
        _expect(f"dest[{i}]", target, (capacity, *source.shape[1:]), source.dtype, device)
