"""The operators ``torch.ops.dgate_rt.*``: schemas, fakes, dispatch, and a checked Python function for each.

CPU tensors go to the C++ kernels of the extension; CUDA tensors to the Triton kernels (scores) and to the extension's
CUDA half (route). Where one of them is missing the plain-PyTorch `reference` runs instead and a warning says so once;
on a GPU it is correct but waits for the device.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
import warnings
from collections.abc import Callable, Sequence
from enum import IntFlag
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from dgate_rt import reference
from dgate_rt.checks import check_gate, check_route
from dgate_rt.gate import Criterion, Pool

_library = torch.library.Library("dgate_rt", "DEF")
_lock = threading.Lock()
_library.define(
    "gate_score(Tensor features, Tensor weight, Tensor bias, str pool, Tensor? count=None, str criterion='margin')"
    " -> (Tensor margin, Tensor label)"
)
_library.define(
    "gate_distances(Tensor features, Tensor weight, Tensor bias, str pool, Tensor? count=None, str criterion='margin')"
    " -> (Tensor margin, Tensor label, Tensor distances)"
)
_library.define(
    "route_(Tensor[] src, Tensor ids, Tensor margin, Tensor label, Tensor? count, Tensor thresholds, int gate,"
    " Tensor(a!)[] dest, Tensor(b!) dest_ids, Tensor(c!) dest_count, Tensor(d!) out_labels, Tensor(e!) out_scores,"
    " Tensor(f!) out_exits, Tensor? waiting=None, Tensor? buckets=None, Tensor(g!)? bucket=None,"
    " Tensor? handles=None, Tensor(h!)? status=None) -> ()"
)
_library.define("build_info() -> str")
_library.define("cuda_info() -> int[]")
for _schema in (  # graphs: `dgate_rt.graphs` says what they mean
    "recording_graph_driver() -> int",
    "cuda_graph_driver() -> int",
    "graph_assemble(int driver, int stream, int[] captures, str[] names, int[] buckets, int[] sizes) -> int[]",
    "graph_launch(int graph, int stream) -> ()",
    "graph_destroy(int graph) -> ()",
    "graph_describe(int graph, str format) -> str",
    "sim_capture(int callback, str nodes) -> int",
    "sim_release(int capture) -> ()",
    "sim_counts() -> int[]",
    "sim_reset() -> ()",
    "sim_call(str call, int[] arguments) -> int[]",
):
    _library.define(_schema)


def gate_score(
    features: Tensor,  # [N, C, H, W], [N, T, C] or [N, C]; float32, bfloat16 or float16
    weight: Tensor,  # [K, C] float32
    bias: Tensor,  # [K] float32
    pool: Pool | str = Pool.AVG,
    count: Tensor | None = None,  # [] int32, on the device
    criterion: Criterion | str = Criterion.MARGIN,
) -> tuple[Tensor, Tensor]:  # margin [N] float32, label [N] int64
    """Score every row: ``margin = max_k (weight @ pool(features) + bias)_k``, ``label`` its argmax.

    With another ``criterion`` the first output is that criterion's value, see `Criterion`. Ties go to the lowest class.
    A row with a NaN distance has a NaN margin, and so never exits. Rows at and after ``count`` are not read; their
    margin and label are zero.

    Raises:
        ValueError: if an argument does not fit the features in shape, dtype or device, or there is no class.
    """
    check_gate(features, weight, bias, pool, count, criterion)
    operator = torch.ops.dgate_rt.gate_score.default
    return call(operator, features, weight, bias, Pool(pool).value, count, Criterion(criterion).value)


def gate_distances(
    features: Tensor,  # [N, C, H, W], [N, T, C] or [N, C]; float32, bfloat16 or float16
    weight: Tensor,  # [K, C] float32
    bias: Tensor,  # [K] float32
    pool: Pool | str = Pool.AVG,
    count: Tensor | None = None,  # [] int32, on the device
    criterion: Criterion | str = Criterion.MARGIN,
) -> tuple[Tensor, Tensor, Tensor]:  # margin [N] float32, label [N] int64, distances [N, K] float32
    """`gate_score`, with the signed distances to all classes.

    Raises:
        ValueError: as `gate_score`.
    """
    check_gate(features, weight, bias, pool, count, criterion)
    operator = torch.ops.dgate_rt.gate_distances.default
    return call(operator, features, weight, bias, Pool(pool).value, count, Criterion(criterion).value)


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
    waiting: Tensor | None = None,  # [] int32
    buckets: Tensor | None = None,  # [B] int32, ascending
    bucket: Tensor | None = None,  # [] int32
    handles: Tensor | None = None,  # [G] int64
    status: Tensor | None = None,  # [] int32
) -> None:
    """Let go the rows whose margin is finite and ``>= thresholds[gate]``; pack the others into ``dest``.

    Those that leave write label, margin and ``gate`` to the outputs at their id. The others are copied, in order, with
    their ids, to the front of ``dest``, or behind the ``waiting`` rows that are there already; ``dest_count`` becomes
    the number of rows in ``dest``. Rows are copied as bytes: each must lie in one run of memory. What is written must
    be memory of its own; so ``waiting`` is not ``dest_count``, which a device could not read and write in one launch.

    ``bucket`` becomes the index of the smallest of ``buckets`` that holds ``dest_count`` rows, or their number B where
    no row goes on. ``handles[gate]``, unless it is 0, is a switch that gets that index: on CUDA a
    ``cudaGraphConditionalHandle``, on the CPU one of the graph that the simulated driver runs (`dgate_rt.graphs`).

    Numbers that lie on the device are checked there. On the CPU, and where the reference runs, a wrong one is an error;
    the CUDA kernel adds a `RouteError` to ``status``, which is never cleared here. Either way nothing is written (but
    see `RouteError.ID`), ``dest_count`` and ``bucket`` included: without ``status`` nobody learns of it on CUDA.

    Raises:
        ValueError: if arguments do not fit each other, an id is no index of the outputs, or ``dest`` or the largest
            bucket is too small.
    """
    check_route(
        src, ids, margin, label, count, thresholds, gate, dest, dest_ids, dest_count, out_labels, out_scores, out_exits,
        waiting, buckets, bucket, handles, status,
    )  # fmt: skip
    call(
        torch.ops.dgate_rt.route_.default,
        src, ids, margin, label, count, thresholds, gate, dest, dest_ids, dest_count, out_labels, out_scores, out_exits,
        waiting, buckets, bucket, handles, status,
    )  # fmt: skip


class RouteError(IntFlag):
    """What ``status`` tells of a route on CUDA; as in ``csrc/cuda/route_arguments.h``."""

    COUNT = 1
    """``count`` was negative or more than the rows."""
    WAITING = 2
    """``waiting`` was negative or more than the capacity of ``dest``."""
    OVERFLOW = 4
    """``dest`` had no room for the survivors."""
    BUCKET = 8
    """More rows go on than the largest bucket takes."""
    ID = 16
    """An id was no index of the outputs. All else was written, the answer of that row was dropped."""


def call(operator: torch._ops.OpOverload, *args: Any) -> Any:
    """Call an operator of the extension; what it refuses about an argument is a ``ValueError``."""
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


def extension_error(name: str) -> str | None:
    """Why ``"_C"`` or ``"_C_cuda"`` is not loaded, or None."""
    return _loaded[name]


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


def _bound(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every argument of an operator by its name."""
    arguments = getattr(torch.ops.dgate_rt, name).default._schema.arguments
    given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    return {a.name: given.get(a.name, a.default_value) for a in arguments}


def _expect_live(name: str, count: Tensor | None, rows: int) -> None:
    if count is not None and not 0 <= int(count) <= rows:
        raise ValueError(f"{name}: expected 0 to {rows}, got {int(count)}")


def _score_by_reference(name: str, *args: Any, **kwargs: Any) -> Any:
    given = _bound(name, args, kwargs)
    _warn_reference(given["features"].device.type)
    _expect_live("count", given["count"], len(given["features"]))
    return getattr(reference, name)(**given)


def _route_by_reference(*args: Any, **kwargs: Any) -> None:
    given = _bound("route_", args, kwargs)
    count, ids, samples = given["count"], given["ids"], len(given["out_labels"])
    _warn_reference(ids.device.type)
    _expect_live("count", count, len(ids))
    _expect_live("waiting", given["waiting"], len(given["dest_ids"]))
    live = ids[: int(count)] if count is not None else ids
    if bool(((live < 0) | (live >= samples)).any()):
        raise ValueError(f"ids: expected 0 to {samples - 1}, got {int(live.min())} to {int(live.max())}")
    handles = given.pop("handles")
    handle = 0 if handles is None else int(handles[given["gate"]])
    if handle != 0:
        raise ValueError(f"handles: expected 0, since only the extension sets a switch, got {handle}")
    del given["status"]
    reference.route_(**given)


def _checked_score(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a score, checked once more: a direct call through ``torch.ops`` comes straight to a kernel."""
    given = _bound("gate_distances", args, kwargs)
    check_gate(**given)
    return given


def _score_on_cuda(keep_distances: bool, *args: Any, **kwargs: Any) -> Any:
    given = _checked_score(args, kwargs)
    features = given["features"]
    aligned = features.element_size()
    off = features.data_ptr() % aligned
    if off:
        raise ValueError(f"features: expected memory aligned to {aligned} bytes, got an address {off} behind one")
    with torch.cuda.device(features.device):  # Triton launches on the current one
        return _score_by_triton(keep_distances, given)


def _score_by_triton(keep_distances: bool, given: dict[str, Any]) -> Any:
    with _lock:
        operator = _triton_score()
    with torch.no_grad():  # autograd lets a score through to here, and would ask the inner operator for a gradient
        scores = operator(*given.values(), keep_distances)
    return scores if keep_distances else scores[:2]


@functools.cache
def _triton_score() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """``torch.ops.dgate_rt.triton_score``; made when it is first needed, because it imports Triton. Hold `_lock`."""
    from dgate_rt.kernels.gate_score import score

    return torch.library.triton_op("dgate_rt::triton_score", score, mutates_args=())


def _traced_score(keep_distances: bool, mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """How compilers see a score: on CUDA as ``triton_score``, into which they look, elsewhere as one operator."""
    if args[0].device.type != "cuda":
        return mode.__torch_dispatch__(op, types, args, kwargs)
    with mode:
        return _score_by_triton(keep_distances, _checked_score(args, kwargs or {}))


def _score_fake(features: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    n = features.shape[0]
    return features.new_empty(n, dtype=torch.float32), features.new_empty(n, dtype=torch.int64)


def _distances_fake(features: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    distances = features.new_empty((features.shape[0], weight.shape[0]), dtype=torch.float32)
    return *_score_fake(features), distances


def _route_fake(*args: Any, **kwargs: Any) -> None:
    return None


def _register(name: str, fallback: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.impl(name, fallback, "CompositeExplicitAutograd")
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # no gradients: a decision has none
    torch.library.register_fake(f"dgate_rt::{name}", fake, lib=_library)


for _name, _fake in (("gate_score", _score_fake), ("gate_distances", _distances_fake)):
    _register(_name, functools.partial(_score_by_reference, _name), _fake)
    if importlib.util.find_spec("triton") is not None:
        _keep = _name == "gate_distances"
        _library.impl(_name, functools.partial(_score_on_cuda, _keep), "CUDA")
        _rule = functools.partial(_traced_score, _keep)
        torch.library.register_torch_dispatch(f"dgate_rt::{_name}", FunctionalTensorMode, _rule, lib=_library)
_register("route_", _route_by_reference, _route_fake)
_loaded: dict[str, str | None] = {name: _load(name) for name in ("_C", "_C_cuda")}  # None: loaded; else why not
