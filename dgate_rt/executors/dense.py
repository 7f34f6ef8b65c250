"""Every stage on every sample, no gate: the baseline."""

from __future__ import annotations

from torch import Tensor

from dgate_rt.executors.base import GatedModel, Predictions, Setup
from dgate_rt.gate import margin_and_label


class DenseExecutor:
    """The network as it was; every sample is answered by its own classifier."""

    name = "dense"
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __init__(self, model: GatedModel, setup: Setup) -> None:
        self.model = model

    def describe(self) -> list[str]:
        """Nothing: it prepares nothing."""
        return []

    def run(self, x: Tensor, out: Predictions) -> None:
        logits = self.model.staged(x).float()
        out.scores[:], out.labels[:] = margin_and_label(logits)
        out.exits.fill_(len(self.model.gates))
        if out.distances is not None:
            out.distances[:] = logits
