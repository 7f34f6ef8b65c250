"""The operators ``torch.ops.dgate_rt.*``: schemas, fakes, dispatch, and a checked Python function for each.

CPU tensors go to the C++ kernels of the extension. Where it is not built, and for tensors of any other device, the
plain-PyTorch `reference` runs instead and a warning says so once; on a GPU it is correct but waits for the device.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgate_rt import reference
from dgate_rt.gate import Pool

_FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library("dgate_rt", "DEF")
_library.define(
    "gate_score(Tensor features, Tensor weight, Tensor bias, str pool, Tensor? count=None)"
    " -> (Tensor margin, Tensor label)"
)
_library.define(
    "gate_distances(Tensor features, Tensor weight, Tensor bias, str pool, Tensor? count=None)"
    " -> (Tensor margin, Tensor label, Tensor distances)"
)
_library.define(
    "route_(Tensor[] src, Tensor ids, Tensor margin, Tensor label, Tensor? count, Tensor thresholds, int gate,"
    " Tensor(a!)[] dest, Tensor(b!) dest_ids, Tensor(c!) dest_count, Tensor(d!) out_labels, Tensor(e!) out_scores,"
    " Tensor(f!) out_exits, bool append=False) -> ()"
)
_library.define("build_info() -> str")
_library.define("cuda_info() -> int[]")


def gate_score(
    features: Tensor,  # [N, C, H, W], [N, T, C] or [N, C]; float32, bfloat16 or float16
    weight: Tensor,  # [K, C] float32
    bias: Tensor,  # [K] float32
    pool: Pool | str = Pool.AVG,
    count: Tensor | None = None,  # [] int32
) -> tuple[Tensor, Tensor]:  # margin [N] float32, label [N] int64
    """Score every row: ``margin = max_k (weight @ pool(features) + bias)_k``, ``label`` its argmax.

    Ties go to the lowest class. A row with a NaN distance has a NaN margin, and so never exits. Rows at and after
    ``count`` are not read; their margin and label are zero.

    Raises:
        ValueError: if an argument does not fit the features in shape, dtype or device, or there is no class.
    """
    _check_gate(features, weight, bias, pool, count)
    return _call(torch.ops.dgate_rt.gate_score.default, features, weight, bias, Pool(pool).value, count)


def gate_distances(
    features: Tensor,  # [N, C, H, W], [N, T, C] or [N, C]; float32, bfloat16 or float16
    weight: Tensor,  # [K, C] float32
    bias: Tensor,  # [K] float32
    pool: Pool | str = Pool.AVG,
    count: Tensor | None = None,  # [] int32
) -> tuple[Tensor, Tensor, Tensor]:  # margin [N] float32, label [N] int64, distances [N, K] float32
    """`gate_score`, with the signed distances to all classes.

    Raises:
        ValueError: as `gate_score`.
    """
    _check_gate(features, weight, bias, pool, count)
    return _call(torch.ops.dgate_rt.gate_distances.default, features, weight, bias, Pool(pool).value, count)


def route_(
    src: Sequence[Tensor],  # each [N, ...], any dtype
    ids: Tensor,  # [N] int64, sample of each row: its index into the outputs
    margin: Tensor,  # [N] float32
    label: Tensor,  # [N] int64
    count: Tensor | None,  # [] int32, rows that are live; all where None
    thresholds: Tensor,  # [G] float32
    gate: int,
    dest: Sequence[Tensor],  # each [capacity, ...], as src in dtype, shape and strides of a row
    dest_ids: Tensor,  # [capacity] int64
    dest_count: Tensor,  # [] int32
    out_labels: Tensor,  # [M] int64
    out_scores: Tensor,  # [M] float32
    out_exits: Tensor,  # [M] int64
    append: bool = False,
) -> None:
    """Let go the rows whose margin is finite and ``>= thresholds[gate]``; pack the others into ``dest``.

    Those that leave write label, margin and ``gate`` to the outputs at their id. The others are copied, in order, with
    their ids, to the front of ``dest``, or with ``append`` behind the ``dest_count`` rows that wait there;
    ``dest_count`` becomes the number of rows in ``dest``. Rows are copied as bytes: each must lie in one run of memory,
    and ``src`` and ``dest`` must not overlap. On an error nothing is written.

    Raises:
        ValueError: if arguments do not fit each other, an id is no index of the outputs, or ``dest`` is too small.
    """
    _check_route(
        src, ids, margin, label, count, thresholds, gate, dest, dest_ids, dest_count, out_labels, out_scores, out_exits
    )
    _call(
        torch.ops.dgate_rt.route_.default,
        src,
        ids,
        margin,
        label,
        count,
        thresholds,
        gate,
        dest,
        dest_ids,
        dest_count,
        out_labels,
        out_scores,
        out_exits,
        append,
    )


def _call(operator: torch._ops.OpOverload, *args: Any) -> Any:
    try:
        return operator(*args)
    except RuntimeError as error:  # from torch 2.15 on, what a kernel throws arrives as this, whatever it was
        argument = str(error).partition(":")[0].partition("[")[0]
        if argument in {known.name for known in operator._schema.arguments}:
            raise ValueError(str(error)) from None
        raise


def extension_loaded() -> bool:
    """Whether the C++ kernels are there; else `reference` does their work."""
    return _loaded["_C"] is None


def build_info() -> dict[str, Any]:
    """What was built and loaded, for ``dgate doctor``.

    Returns:
        ``extension`` and ``cuda_extension``: the path of each loaded binary, or None; ``error`` and ``cuda_error``: why
        it is None; ``compiler`` and ``torch``: what the extension was built with; ``cuda``: versions of ``toolkit``
        (compiled with), ``runtime`` and ``driver`` as ``(major, minor)``, None where absent, and the number of
        ``devices``; None without the CUDA half.
    """
    compiler, torch_version = torch.ops.dgate_rt.build_info().split("\n") if extension_loaded() else (None, None)
    cuda = None
    if _loaded["_C_cuda"] is None:
        *versions, devices = torch.ops.dgate_rt.cuda_info()
        toolkit, runtime, driver = ((v // 1000, v % 1000 // 10) if v else None for v in versions)
        cuda = {"toolkit": toolkit, "runtime": runtime, "driver": driver, "devices": devices}
    return {
        "extension": None if _loaded["_C"] else str(_binary("_C")),
        "error": _loaded["_C"],
        "compiler": compiler,
        "torch": torch_version,
        "cuda_extension": None if _loaded["_C_cuda"] else str(_binary("_C_cuda")),
        "cuda_error": _loaded["_C_cuda"],
        "cuda": cuda,
    }


def _binary(name: str) -> Path | None:
    return next(iter(Path(__file__).parent.glob(f"{name}.abi3.*")), None)


def _load(name: str) -> str | None:
    """Load a half of the extension; returns why it could not be, or None."""
    path = _binary(name)
    if path is None:
        return "not built"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return str(error)
    return None


@functools.cache
def _warn_reference(device: str) -> None:
    if device == "cpu":
        why = f"the dgate_rt extension is missing ({_loaded['_C']}); reinstall dgate-rt with a C++ compiler"
    else:
        why = f"dgate_rt has no {device} kernel for this operator; each call waits for the device"
    warnings.warn(f"{why}. The plain-PyTorch reference runs instead, which is slower.", RuntimeWarning, stacklevel=2)


def _check_live(count: Tensor | None, rows: int) -> None:
    if count is not None and not 0 <= int(count) <= rows:
        raise ValueError(f"count: expected 0 to {rows}, got {int(count)}")


def _score_by_reference(
    features: Tensor, weight: Tensor, bias: Tensor, pool: str, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _warn_reference(features.device.type)
    _check_live(count, len(features))
    return reference.gate_score(features, weight, bias, pool, count)


def _distances_by_reference(
    features: Tensor, weight: Tensor, bias: Tensor, pool: str, count: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _warn_reference(features.device.type)
    _check_live(count, len(features))
    return reference.gate_distances(features, weight, bias, pool, count)


def _route_by_reference(
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
    append: bool = False,
) -> None:
    _warn_reference(ids.device.type)
    _check_live(count, len(ids))
    live = ids[: int(count)] if count is not None else ids
    if bool(((live < 0) | (live >= len(out_labels))).any()):
        raise ValueError(f"ids: expected 0 to {len(out_labels) - 1}, got {int(live.min())} to {int(live.max())}")
    reference.route_(
        src,
        ids,
        margin,
        label,
        count,
        thresholds,
        gate,
        dest,
        dest_ids,
        dest_count,
        out_labels,
        out_scores,
        out_exits,
        append,
    )


def _score_fake(
    features: Tensor, weight: Tensor, bias: Tensor, pool: str, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    n = features.shape[0]
    return features.new_empty(n, dtype=torch.float32), features.new_empty(n, dtype=torch.int64)


def _distances_fake(
    features: Tensor, weight: Tensor, bias: Tensor, pool: str, count: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    distances = features.new_empty((features.shape[0], weight.shape[0]), dtype=torch.float32)
    return *_score_fake(features, weight, bias, pool), distances


def _route_fake(*args: Any, **kwargs: Any) -> None:
    return None


def _register(name: str, fallback: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.impl(name, fallback, "CompositeExplicitAutograd")
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # no gradients: a decision has none
    torch.library.register_fake(f"dgate_rt::{name}", fake, lib=_library)


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


def _check_gate(features: Tensor, weight: Tensor, bias: Tensor, pool: Pool | str, count: Tensor | None) -> None:
    try:
        pool = Pool(pool)
    except ValueError:
        raise ValueError(f"pool: expected {' or '.join(repr(p.value) for p in Pool)}, got {pool!r}") from None
    shape, device = features.shape, features.device
    ranks = (3,) if pool is Pool.CLS else (2, 3, 4)
    if features.dtype not in _FEATURE_DTYPES or len(shape) not in ranks:
        expected = f"rank {' or '.join(map(str, ranks))} (pool={pool.value!r}), float32, bfloat16 or float16"
        raise ValueError(f"features: expected {expected}; got {_text(shape, features.dtype)}")
    if pool is Pool.FLAT:
        width = math.prod(shape[1:])
    else:
        width = shape[2] if len(shape) == 3 else shape[1]
    _expect("weight", weight, (width,), torch.float32, device, "K")
    classes = weight.shape[0]
    if classes == 0:
        raise ValueError(f"weight: expected at least one class, got {_text(weight.shape, weight.dtype)}")
    _expect("bias", bias, (classes,), torch.float32, device)
    if count is not None:
        _expect("count", count, (), torch.int32, device)


def _check_route(
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
) -> None:
    device = ids.device
    _expect("ids", ids, (), torch.int64, device, "N")
    n = ids.shape[0]
    _expect("margin", margin, (n,), torch.float32, device)
    _expect("label", label, (n,), torch.int64, device)
    if count is not None:
        _expect("count", count, (), torch.int32, device)
    _expect("thresholds", thresholds, (), torch.float32, device, "G")
    if not 0 <= gate < len(thresholds):
        raise ValueError(f"gate: expected 0 to {len(thresholds) - 1}, got {gate}")
    _expect("dest_ids", dest_ids, (), torch.int64, device, "capacity")
    capacity = dest_ids.shape[0]
    _expect("dest_count", dest_count, (), torch.int32, device)
    _expect("out_labels", out_labels, (), torch.int64, device, "M")
    _expect("out_scores", out_scores, out_labels.shape, torch.float32, device)
    _expect("out_exits", out_exits, out_labels.shape, torch.int64, device)
    if len(src) != len(dest):
        raise ValueError(f"dest: expected {len(src)} tensors like src, got {len(dest)}")
    for i, (source, target) in enumerate(zip(src, dest, strict=True)):
        _expect(f"src[{i}]", source, (n, *source.shape[1:]), source.dtype, device)
        _expect(f"dest[{i}]", target, (capacity, *source.shape[1:]), source.dtype, device)


_register("gate_score", _score_by_reference, _score_fake)
_register("gate_distances", _distances_by_reference, _distances_fake)
_register("route_", _route_by_reference, _route_fake)
_loaded: dict[str, str | None] = {name: _load(name) for name in ("_C", "_C_cuda")}  # None: loaded; else why not
