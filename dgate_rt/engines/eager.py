"""Stages as they are: torch's own kernels, one operator after the other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dgate_rt.engines.base import Run


class EagerEngine:
    """No compilation. Folded BatchNorms and channels_last, which all engines get, are what makes it fast."""

    name = "eager"
    any_size = True
    devices = ("cpu", "cuda")
    packages: tuple[str, ...] = ()

    def __call__(self, stage: nn.Module, example: tuple[Tensor, ...], sizes: Sequence[int]) -> Run:
        return stage
