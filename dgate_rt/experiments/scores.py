"""What gates say about held-out samples, by every criterion by which a sample could be let go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgate_rt.gate import Criterion, Gate, confidence_and_label, margin_and_label
from dgate_rt.trace import Trace

TOP2 = "top2"
"""The largest distance less the second largest: what the runtime has no criterion for."""
CRITERIA = (*(criterion.value for criterion in Criterion), TOP2)
_ROWS = 4096


@dataclass(frozen=True)
class Scores:
    """Confidence of every gate by every criterion, and the answers of gates and network, on labelled samples."""

    confidence: Mapping[str, NDArray[np.float32]]  # criterion -> [G, N]; -inf where it is not finite
    predictions: NDArray[np.int64]  # [G + 1, N]; the last row is the network's
    targets: NDArray[np.int64]  # [N]
    network_scores: NDArray[np.float32]  # [N]; the network's largest logit

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """The samples of all parts, one part behind the other."""
        confidence = {name: np.concatenate([part.confidence[name] for part in parts], 1) for name in CRITERIA}
        predictions = np.concatenate([part.predictions for part in parts], 1)
        targets = np.concatenate([part.targets for part in parts])
        return cls(confidence, predictions, targets, np.concatenate([part.network_scores for part in parts]))

    def trace(self, rows: NDArray[np.int64], criterion: str = "margin") -> Trace:
        """A trace of some samples, whose "margins" are the confidence by ``criterion``."""
        margins, network_scores = self.confidence[criterion][:, rows], self.network_scores[rows]
        return Trace(margins, self.predictions[:, rows], self.targets[rows], network_scores)


@torch.no_grad()
def scores_of(
    gates: Sequence[Gate],
    features: Sequence[Tensor],  # for each gate [N, width] float32
    logits: Tensor,  # [N, K] float32
    labels: Tensor,  # [N] int64
) -> Scores:
    """Run gates over pooled features."""
    confidence: dict[str, list[Tensor]] = {name: [] for name in CRITERIA}
    predictions = []
    for gate, pooled in zip(gates, features, strict=True):
        distances = torch.cat([gate(rows) for rows in pooled.split(_ROWS)])
        for criterion in Criterion:
            values, label = confidence_and_label(distances, criterion)
            confidence[criterion.value].append(values)
        best = distances.topk(min(2, distances.shape[1])).values
        confidence[TOP2].append(best[:, 0] - best[:, -1])
        predictions.append(label)
    network_scores, label = margin_and_label(logits)
    predictions.append(label)
    return Scores(
        {
            name: np.nan_to_num(torch.stack(values).numpy(), nan=-np.inf, posinf=-np.inf, neginf=-np.inf)
            for name, values in confidence.items()
        },
        torch.stack(predictions).numpy(),
        labels.numpy().copy(),
        network_scores.numpy(),
    )
