"""Stages must treat samples independently: the runtime takes samples out of a batch and puts others beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from dgate_rt.errors import SplitError
from dgate_rt.tracing import describe

_RANDOM_BY_NAME = {"StochasticDepth", "DropPath", "DropBlock2d"}
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # of the largest activation; other dtypes 3e-2
_TOLERANCE_CUDA = 3e-2  # TF32, and kernels that differ with the batch size


def refuse_training(model: nn.Module) -> None:
    """Raise if a module would mix samples, or answer at random, in the mode that the model is in.

    Raises:
        SplitError: naming the first such module.
    """
    for path, module in model.named_modules():
        name = f"{path!r} ({type(module).__name__})"
        if isinstance(module, _BatchNorm):
            if module.running_mean is None:
                raise SplitError(f"model: {name} has track_running_stats=False, so samples depend on their batch")
            if module.training:
                raise SplitError(f"model: {name} is in train mode, so samples depend on their batch; call model.eval()")
        random = isinstance(module, _DropoutNd) or type(module).__name__ in _RANDOM_BY_NAME
        if random and module.training and getattr(module, "p", None) != 0:
            raise SplitError(f"model: {name} is in train mode and drops at random; call model.eval()")


@torch.no_grad()
def check_stages(
    stages: Iterable[nn.Module],
    batch: Tensor,  # [N, ...], N >= 3
    expected: Tensor | None = None,  # [N, K], what the model itself gives, where that is known
) -> None:
    """Run every stage on a batch and on a permuted part of it, and hold the last one to the model's own answer.

    Raises:
        SplitError: naming the first module, or operation, whose output for a sample depends on the other samples.
    """
    part = torch.arange(len(batch) - 1, -1, -2, device=batch.device)
    boundary: tuple[Tensor, ...] = (batch,)
    for index, stage in enumerate(stages):
        whole = _run(stage, [tensor.clone() for tensor in boundary])
        some = _run(stage, [tensor[part] for tensor in boundary])
        if not all(_close(a[part], b) for a, b in zip(whole, some, strict=True)):
            culprit = _culprit(stage, boundary, part)
            raise SplitError(
                f"model: stage {index} does not treat samples independently: the output of {culprit} for a sample "
                "depends on the other samples of its batch"
            )
        boundary = whole
    if expected is not None and not _close(expected, boundary[0]):
        raise SplitError(
            "model: the traced stages do not give what the model gives; its forward depends on more than x"
        )


def _run(stage: nn.Module, boundary: Sequence[Tensor]) -> tuple[Tensor, ...]:
    result = stage(*boundary)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _close(expected: Tensor, got: Tensor) -> bool:
    """Equal but for float noise, measured against the largest finite activation."""
    if expected.shape != got.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(expected, got)
    tolerance = _TOLERANCE_CUDA if expected.is_cuda else _TOLERANCE.get(expected.dtype, 3e-2)
    expected, got = expected.double(), got.double()
    scale = expected.nan_to_num(0, 0, 0).abs().amax() if expected.numel() else expected.new_zeros(())
    return torch.allclose(expected, got, rtol=0, atol=float(tolerance * scale), equal_nan=True)


def _culprit(stage: nn.Module, boundary: Sequence[Tensor], part: Tensor) -> str:
    """The first node whose rows differ when the stage runs on a part of the batch, both runs in step."""
    if not isinstance(stage, fx.GraphModule):
        return f"the stage ({type(stage).__name__})"
    runs = [fx.Interpreter(stage), fx.Interpreter(stage)]
    runs[0].args_iter = iter([tensor.clone() for tensor in boundary])
    runs[1].args_iter = iter([tensor[part] for tensor in boundary])
    for node in stage.graph.nodes:
        whole, some = (run.run_node(node) for run in runs)
        for run, value in zip(runs, (whole, some), strict=True):
            run.env[node] = value
        if isinstance(whole, Tensor) and isinstance(some, Tensor) and _differ(whole, some, part, len(boundary[0])):
            return describe(node)
    return "the stage"


def _differ(whole: Tensor, some: Tensor, part: Tensor, batch: int) -> bool:
    if whole.shape == some.shape:  # nothing left of the batch: equal, unless it was reduced over
        return not _close(whole, some)
    if whole.ndim != some.ndim:
        return False
    dims = [dim for dim in range(whole.ndim) if whole.shape[dim] != some.shape[dim]]
    if len(dims) != 1 or (whole.shape[dims[0]], some.shape[dims[0]]) != (batch, len(part)):
        return False  # the batch is merged with another dimension
    return not _close(whole.index_select(dims[0], part), some)
