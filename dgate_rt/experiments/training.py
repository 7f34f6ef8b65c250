"""How an experiment trains a network: one recipe for all that are to be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dgate_rt.data import DataBundle
from dgate_rt.pretrain import train_backbone


@dataclass(frozen=True)
class Training:
    """How a network is trained where none is given; see `pretrain.train_backbone`."""

    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.1
    label_smoothing: float = 0.1
    mixup: float = 0.0
    augment: bool = True
    seed: int = 0

    def but(self, **changed: Any) -> Training:
        """The same with those changed that are not None."""
        return replace(self, **{name: value for name, value in changed.items() if value is not None})

    def train(
        self,
        build: Callable[[], nn.Module],
        bundle: DataBundle,
        checkpoint: Path,  # written after every epoch; where it exists, training goes on from it
        *,
        device: torch.device,
        workers: int,
        progress: bool,
    ) -> nn.Module:
        """A network built and trained, in eval mode."""
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            model = build()
        train_backbone(
            model,
            bundle.loader("train", self.batch_size, shuffle=True, workers=workers, augment=self.augment),
            epochs=self.epochs,
            lr=self.lr,
            label_smoothing=self.label_smoothing,
            mixup=self.mixup,
            seed=self.seed,
            device=device,
            checkpoint=checkpoint,
            progress=progress,
        )
        return model
