"""Stages compiled by torch.compile, one callable a batch size.

Weights are frozen, so that Inductor packs them for the processor and folds what is constant. Frozen graphs stay out of
Inductor's on-disk graph cache (torch 2.14); what it keeps are the compiled kernels, which make up most of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dgate_rt.engines.base import Run
from dgate_rt.progress import track
from dgate_rt.staged import Boundary


class InductorEngine:
    """``torch.compile`` with freezing at static shapes."""

    name = "inductor"
    any_size = False
    devices = ("cpu", "cuda")
    packages: tuple[str, ...] = ()

    def __call__(self, stage: nn.Module, example: tuple[Tensor, ...], sizes: Sequence[int]) -> Run:
        import torch._inductor.config as config

        runs: dict[int, Run] = {}
        with config.patch(freezing=True), torch.inference_mode():
            for size in track(sizes, "sizes compiled"):
                # Sizes and strides are checked by PreparedStage, so guards would only cost time; and they would compile
                # again where an inference tensor takes the place of an ordinary one.
                options: Any = {"guard_filter_fn": lambda guards: [False] * len(guards)}
                run = torch.compile(_own_code(stage), dynamic=False, fullgraph=True, options=options)
                run(*(t[:size] for t in example))
                runs[size] = run
        return CompiledSizes(stage, runs)


class CompiledSizes(nn.Module):
    """A stage by its compiled sizes. It holds the stage, whose parameters tell the device."""

    def __init__(self, stage: nn.Module, runs: Mapping[int, Run]) -> None:
        super().__init__()
        self.stage = stage
        self._runs = dict(runs)

    def forward(self, *tensors: Tensor) -> Boundary:
        return self._runs[len(tensors[0])](*tensors)


def _own_code(stage: nn.Module) -> Callable[..., Boundary]:
    """A function with a code object of its own: compiled graphs are kept, and limited in number, by code object."""

    def run(*tensors: Tensor) -> Boundary:
        return stage(*tensors)

    run.__code__ = run.__code__.replace()
    return run
