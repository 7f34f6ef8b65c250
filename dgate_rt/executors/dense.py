"""Every stage on every sample, no gate: the baseline."""

from __future__ import annotations

from torch import Tensor

from dgate_rt.executors.base import GatedModel, Predictions
from dgate_rt.gate import margin_and_label


class DenseExecutor:
    """The network as it was; every sample is answered by its own classifier."""

    name = "dense"

    def __init__(self, model: GatedModel) -> None:
        self.model = model

    def run(self, x: Tensor, out: Predictions) -> None:
        logits = self.model.staged(x).float()
        out.scores[:], out.labels[:] = margin_and_label(logits)
        out.exits.fill_(len(self.model.gates))
        if out.distances is not None:
            out.distances[:] = logits
