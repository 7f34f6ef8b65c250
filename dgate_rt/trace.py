"""What every gate said about every validation sample: enough to replay any thresholds without the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgate_rt.batches import as_pair, check_labels, class_count, run_stage
from dgate_rt.cost import Costs
from dgate_rt.gate import Gate, margin_and_label, pooled_width
from dgate_rt.progress import track
from dgate_rt.staged import Boundary, StagedModel, as_tuple


@dataclass(frozen=True)
class Replay:
    """The outcome of one choice of thresholds on a trace."""

    exits: NDArray[np.int16]  # [N]; gate index, or G for the network's own classifier
    accuracy: float
    cost: float  # mean a sample, in the unit of the costs
    shares: NDArray[np.float64]  # [G + 1]; share of the samples that left at each exit


@dataclass(frozen=True)
class Trace:
    """Margins and predictions of every gate, and of the whole network, on labelled samples."""

    margins: NDArray[np.float32]  # [G, N]; -inf where the margin is not finite, since such a sample never leaves
    predictions: NDArray[np.int64]  # [G + 1, N]; the last row is the network's own classifier
    targets: NDArray[np.int64]  # [N]
    network_scores: NDArray[np.float32] | None = None  # [N]; the network's largest logit, where it was run

    @cached_property
    def correct(self) -> NDArray[np.bool_]:  # [G + 1, N]
        return self.predictions == self.targets

    @property
    def network_accuracy(self) -> float:
        """Accuracy of the network's own classifier on every sample."""
        return float(self.correct[-1].mean())

    def take(self, samples: NDArray[np.int64]) -> Trace:
        """The trace of some of the samples, by their indices."""
        scores = None if self.network_scores is None else self.network_scores[samples]
        return Trace(self.margins[:, samples], self.predictions[:, samples], self.targets[samples], scores)

    def keeping(self, gates: Sequence[int]) -> Trace:
        """The trace of some of the gates, by ascending index, and of the network."""
        chosen = list(gates)
        return Trace(self.margins[chosen], self.predictions[[*chosen, -1]], self.targets, self.network_scores)

    def gated(
        self, thresholds: Sequence[float]
    ) -> tuple[NDArray[np.int16], NDArray[np.bool_], NDArray[np.int64]]:  # [N], [N], [G + 1]
        """Where each recorded sample leaves with ``thresholds``, whether it is right there, and how many leave where.

        Without `numpy.where`, which takes ten times as long as this arithmetic on masks without order.
        """
        gate_count, count = self.margins.shape
        exits, correct = np.full(count, gate_count, dtype=np.int16), self.correct[-1]
        for g in range(gate_count - 1, -1, -1):
            if thresholds[g] != np.inf:
                leave = (self.margins[g] >= thresholds[g]) & (self.margins[g] > -np.inf)
                exits = np.minimum(exits, g + ~leave * np.int16(gate_count))
                correct = leave & self.correct[g] | ~leave & correct
        return exits, correct, np.array([np.count_nonzero(exits == g) for g in range(gate_count + 1)])

    def replay(self, thresholds: Sequence[float], costs: Costs) -> Replay:
        """What came of ``thresholds`` on the recorded samples; a gate at ``+inf`` is off and costs nothing."""
        exits, correct, left = self.gated(thresholds)
        count = len(exits)
        cost = float(left @ costs.to_exits(thresholds)) / count
        return Replay(exits, float(np.count_nonzero(correct)) / count, cost, left / count)


def collect_trace(
    staged: StagedModel,
    gates: Sequence[Gate],
    loader: Iterable[tuple[Any, Any]],
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[Trace, Tensor]:  # the trace, and a copy of the first batch
    """Run the whole network and every gate over ``loader`` once.

    Raises:
        TypeError, ValueError: if the loader yields nothing, or anything but pairs of a batch that the network takes and
            integer classes in ``[0, K)``; or if a gate does not fit its features or the network's classes.
    """
    margins: list[Tensor] = []
    network_scores: list[Tensor] = []
    predictions: list[Tensor] = []
    targets: list[Tensor] = []
    example: Tensor | None = None
    with torch.no_grad():
        for number, item in enumerate(track(loader, "margins on validation data", enabled=progress)):
            x, y = as_pair(item, f"loader: batch {number}")
            if not len(y):
                continue
            if example is None:
                example = x.to(device, copy=True)
            batch_scores, batch_labels, classes = _score(staged, gates, x.to(device, copy=True))
            check_labels(y, classes, f"loader: batch {number}")
            margins.append(batch_scores[:-1].cpu())
            network_scores.append(batch_scores[-1].cpu())
            predictions.append(batch_labels.cpu())
            targets.append(y)
    if example is None:
        raise ValueError("loader: expected at least one batch of (x, y), got none; a generator can be used only once")
    trace = Trace(
        np.nan_to_num(torch.cat(margins, 1).numpy(), nan=-np.inf, posinf=-np.inf, neginf=-np.inf),
        torch.cat(predictions, 1).numpy(),
        torch.cat(targets).numpy(),
        torch.cat(network_scores).numpy(),
    )
    return trace, example


def _score(
    staged: StagedModel, gates: Sequence[Gate], x: Tensor
) -> tuple[Tensor, Tensor, int]:  # scores and labels [G + 1, N], classes
    """Every gate on what it reads, one by one, since the next stage may work in place; then the network itself."""
    scores, labels = [], []
    boundary: Boundary = x
    for g, gate in enumerate(gates):
        boundary = run_stage(staged, g, boundary, "loader: x")
        features = staged.gate_features(g, boundary)
        width = pooled_width(tuple(features.shape[1:]), gate.pool)
        if gate.width != width:
            raise ValueError(f"gates[{g}]: expected a gate of width {width} after {staged.cuts[g]}, got {gate.width}")
        score, label = gate.score(features)
        scores.append(score)
        labels.append(label)
    logits = run_stage(staged, len(gates), boundary, "loader: x")
    classes = class_count(logits, len(x))
    for g, gate in enumerate(gates):
        if gate.classes != classes:
            raise ValueError(f"gates[{g}]: expected {classes} classes, as the network has, got {gate.classes}")
    score, label = margin_and_label(as_tuple(logits)[0].float())
    return torch.stack([*scores, score]), torch.stack([*labels, label]), classes
