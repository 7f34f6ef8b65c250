"""What every gate said about every validation sample: enough to replay any thresholds without the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dgate_rt.cost import Costs
from dgate_rt.gate import Gate, margin_and_label
from dgate_rt.progress import track
from dgate_rt.staged import StagedModel, as_tuple


@dataclass(frozen=True)
class Replay:
    """The outcome of one choice of thresholds on a trace."""

    exits: NDArray[np.int64]  # [N]; gate index, or G for the network's own classifier
    accuracy: float
    cost: float  # mean a sample, in the unit of the costs
    shares: NDArray[np.float64]  # [G + 1]; share of the samples that left at each exit


@dataclass(frozen=True)
class Trace:
    """Margins and predictions of every gate, and of the whole network, on labelled samples."""

    margins: NDArray[np.float32]  # [G, N]; -inf where the margin is not finite, since such a sample never leaves
    predictions: NDArray[np.int64]  # [G + 1, N]; the last row is the network's own classifier
    targets: NDArray[np.int64]  # [N]

    @cached_property
    def correct(self) -> NDArray[np.bool_]:  # [G + 1, N]
        return self.predictions == self.targets

    @property
    def network_accuracy(self) -> float:
        """Accuracy of the network's own classifier on every sample."""
        return float(self.correct[-1].mean())

    def replay(self, thresholds: Sequence[float], costs: Costs) -> Replay:
        """Gate the recorded samples with ``thresholds``; a gate at ``+inf`` is off and costs nothing."""
        gate_count, count = self.margins.shape
        exits = np.full(count, gate_count)
        alive, survivors, cost = np.ones(count, dtype=bool), count, 0.0
        for g, threshold in enumerate(thresholds):
            cost += costs.stages[g] * survivors
            if threshold == np.inf:
                continue
            cost += costs.gates[g] * survivors
            leave = alive & (self.margins[g] >= threshold) & (self.margins[g] > -np.inf)
            exits[leave] = g
            alive &= ~leave
            survivors = int(np.count_nonzero(alive))
        cost += costs.stages[gate_count] * survivors
        accuracy = np.count_nonzero(self.correct[exits, np.arange(count)]) / count
        shares = np.bincount(exits, minlength=gate_count + 1) / count
        return Replay(exits, float(accuracy), float(cost / count), shares)


def collect_trace(
    staged: StagedModel,
    gates: Sequence[Gate],
    loader: Iterable[tuple[Any, Any]],
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[Trace, torch.Tensor]:  # the trace, and the first batch
    """Run the whole network and every gate over ``loader`` once.

    Raises:
        ValueError: if the loader yields nothing, or a label is outside ``[0, K)``.
    """
    margins: list[torch.Tensor] = []
    predictions: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    example: torch.Tensor | None = None
    with torch.inference_mode():
        for x, y in track(loader, "margins on validation data", enabled=progress):
            batch = torch.as_tensor(x, device=device)
            example = batch if example is None else example
            batch_margins, batch_labels = [batch.new_empty((0, len(batch)), dtype=torch.float32)], []
            for g, boundary in enumerate(
                staged.boundaries(batch)
            ):  # scored one by one: the next stage may work in place
                if g < len(gates):
                    margin, label = gates[g].score(staged.gate_features(g, boundary))
                    batch_margins.append(margin[None])
                    batch_labels.append(label)
            logits = as_tuple(boundary)[0]
            _, label = margin_and_label(logits.float())
            target = torch.as_tensor(y).cpu()
            _check_targets(target, len(logits), logits.shape[1])
            margins.append(torch.cat(batch_margins).cpu())
            predictions.append(torch.stack([*batch_labels, label]).cpu())
            targets.append(target)
    if example is None:
        raise ValueError("loader: expected at least one batch of (x, y), got none")
    trace = Trace(
        np.nan_to_num(torch.cat(margins, 1).numpy(), nan=-np.inf, posinf=-np.inf, neginf=-np.inf),
        torch.cat(predictions, 1).numpy(),
        torch.cat(targets).long().numpy(),
    )
    return trace, example


def _check_targets(target: torch.Tensor, rows: int, classes: int) -> None:
    if target.ndim != 1 or len(target) != rows or target.is_floating_point():
        raise ValueError(f"loader: expected integer labels of shape [{rows}], got {target.dtype} {tuple(target.shape)}")
    if rows and not 0 <= int(target.min()) <= int(target.max()) < classes:
        raise ValueError(
            f"loader: expected labels in [0, {classes}), got values from {int(target.min())} to {int(target.max())}"
        )
