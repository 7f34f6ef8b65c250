"""Batches from a user's loader, run stage by stage: the checks that training and calibration share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dgate_rt.staged import Boundary, StagedModel, as_tuple


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode; whatever happens, the train/eval and ``requires_grad`` flags are as before afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        module.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for parameter, mode in gradients:
            parameter.requires_grad = mode


def as_pair(item: object, where: str) -> tuple[Tensor, Tensor]:  # x [N, ...], y [N] int64 on the CPU
    """What a loader yields, as tensors.

    Raises:
        TypeError, ValueError: if it is no pair of a batch and its classes; the message begins with ``where``.
    """
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise TypeError(f"{where}: expected a pair (x, y), got {type(item).__name__}{size}")
    try:
        x, y = (torch.as_tensor(part) for part in item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{where}: expected x and y as tensors or arrays of numbers: {error}") from error
    if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool:
        raise TypeError(f"{where}: expected y of an integer dtype, got {y.dtype}")
    if x.ndim == 0 or y.shape != x.shape[:1]:
        raise ValueError(
            f"{where}: expected y [N], a class for each x [N, ...], got y {tuple(y.shape)} for x {tuple(x.shape)}"
        )
    return x, y.cpu().long()


def check_labels(y: Tensor, classes: int, where: str) -> None:
    """Raise ValueError unless every class is in ``[0, classes)``."""
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"{where}: expected labels in 0..{classes - 1}, as the network has {classes} classes, got {low}..{high}"
        )


def run_stage(staged: StagedModel, index: int, boundary: Boundary, where: str) -> Boundary:
    """One stage; what it cannot take becomes a ValueError that says which stage and what it was given."""
    try:
        return staged.run_stage(index, boundary)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        first = as_tuple(boundary)[0]
        sample = f" (its example was a batch of {staged.example_shape})" if staged.example_shape else ""
        raise ValueError(
            f"{where}: stage {index} does not take {first.dtype} of shape {tuple(first.shape)}{sample}: {error}"
        ) from error


def class_count(logits: Boundary, rows: int) -> int:
    """The number of classes, K.

    Raises:
        ValueError: if the network's output is not ``[rows, K]`` with K at least 1.
    """
    tensor = as_tuple(logits)[0]
    if tensor.ndim != 2 or tensor.shape[0] != rows or tensor.shape[1] == 0:
        raise ValueError(
            f"staged: expected logits [{rows}, K] of one class or more for a batch of {rows}, "
            f"got shape {tuple(tensor.shape)}"
        )
    return tensor.shape[1]


@torch.no_grad()
def count_classes(staged: StagedModel, x: Tensor, device: torch.device | str, name: str) -> int:
    """The width of the network's own logits, tried on one sample."""
    boundary: Boundary = x[:1].to(device, copy=True)
    for index in range(len(staged.stages)):
        boundary = run_stage(staged, index, boundary, f"{name}: x")
    return class_count(boundary, 1)


def check_staged(staged: object, device: torch.device | str) -> torch.device:
    """The device, where all of ``staged`` is.

    Raises:
        TypeError: if ``staged`` is no `StagedModel`.
        ValueError: if a parameter is elsewhere.
    """
    if not isinstance(staged, StagedModel):
        raise TypeError(f"staged: expected a StagedModel, as split returns it, got {type(staged).__name__}")
    wanted = torch.empty(0, device=device).device
    for name, parameter in staged.named_parameters():
        if parameter.device != wanted:
            raise ValueError(f"device: expected {parameter.device}, where staged has {name}, got {device!r}")
    return wanted
