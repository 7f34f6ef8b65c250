"""prepare(): a copy of a staged network, on a device, in a dtype, on an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgate_rt.cache import limit_bytes
from dgate_rt.engines.auto import fastest
from dgate_rt.engines.base import EngineStages, StageEngine
from dgate_rt.engines.build import build, check_engine
from dgate_rt.engines.fold import fold_batch_norms
from dgate_rt.engines.precision import check_dtype
from dgate_rt.executors.base import deploy
from dgate_rt.staged import StagedModel


def prepare(
    staged: StagedModel,
    engine: str | StageEngine = "eager",
    *,
    sizes: Sequence[int] | Sequence[Sequence[int]],
    sample_shape: Sequence[int],
    input_dtype: torch.dtype = torch.float32,
    dtype: str | torch.dtype | None = None,
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    remeasure: bool = False,
) -> EngineStages:
    """A copy of the network whose stages run on an engine; BatchNorms are folded into the convolutions before them.

    Args:
        staged: the network; it is left as it is.
        engine: a name of `ENGINES`, ``"auto"`` for the fastest of them as measured here, or a `StageEngine`.
        sizes: the batch sizes to prepare, the same for all stages or, stage by stage, such that end with the same.
            Engines that run at any size only look at the largest.
        sample_shape: of one sample of the network's input.
        input_dtype: of the input where ``dtype`` leaves it as it is, and where it is not floating.
        dtype: ``"float32"`` or ``"bfloat16"`` for weights and input; None leaves both as they are.
        device: where to run.
        channels_last: whether images and convolution weights are laid out so.
        remeasure: whether ``"auto"`` measures again what it measured before.

    Raises:
        ValueError: on an unknown engine or dtype, a size below one, or a limit of what is kept that is no number.
        ExecutorError: if the engine is not installed, does not run on the device or in the dtype, or cannot run a
            stage; the message names the stage. Only "auto" falls back, stage by stage, to eager, and says so.
    """
    device = torch.device(device)
    chosen = check_sizes(sizes, len(staged.stages))
    found = check_engine(engine, device)
    wanted = check_dtype(dtype, device)
    limit_bytes()  # a mistake there is none of an engine's
    with torch.inference_mode(False), torch.no_grad():
        copied = deploy(staged, device, channels_last)
        for stage in copied.stages:
            fold_batch_norms(stage)
        if wanted is not None:
            copied.to(wanted)
            input_dtype = wanted if input_dtype.is_floating_point else input_dtype
        example = _example((chosen[0][-1], *sample_shape), input_dtype, device, channels_last)
    if found is None:
        return fastest(copied, staged, example, chosen, remeasure)
    return build(copied, found, example, chosen)


def check_sizes(sizes: Sequence[int] | Sequence[Sequence[int]], stages: int) -> tuple[tuple[int, ...], ...]:
    """For each stage its sizes without repetition, ascending.

    Raises:
        ValueError: if there is none, one is no whole number of at least 1, there are not as many lists of them as
            stages, or the largest differ.
    """
    nested = [part for part in sizes if isinstance(part, Sequence)]
    each: list[Sequence[Any]] = [*nested] if nested else [sizes] * stages
    if any(not part or any(not isinstance(size, int) or size < 1 for size in part) for part in each):
        raise ValueError(f"sizes: expected whole numbers of at least 1, got {sizes!r}")
    if len(each) != stages or len({max(part) for part in each}) > 1:
        raise ValueError(f"sizes: expected them for {stages} stages, with the same largest, got {sizes!r}")
    return tuple(tuple(sorted(set(part))) for part in each)


def _example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, channels_last: bool) -> Tensor:
    """A batch like those to come: noise, or zeros where whole numbers are wanted."""
    if dtype.is_floating_point:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    else:
        x = torch.zeros(shape, dtype=dtype, device=device)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x
