"""Accuracy over FLOPs: thresholds for each budget chosen on validation samples, and what they give on test samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from dgate_rt.cost import Costs
from dgate_rt.errors import UnreachableTargetError
from dgate_rt.experiments.experiment import Result
from dgate_rt.experiments.workbench import GateSpec, Workbench
from dgate_rt.frontier import search_frontier
from dgate_rt.trace import Trace


def along(chosen: Trace, tested: Trace, costs: Costs, budgets: int) -> list[tuple[float, float]]:
    """Share of the network's FLOPs, and accuracy, for budgets from nothing to all of it; the cheapest first."""
    frontier, reached = search_frontier(chosen, costs), []
    for budget in np.linspace(0, 1, budgets):
        try:
            point = frontier.most_accurate(budget * costs.dense)
        except UnreachableTargetError:
            point = frontier.points[0]
        replay = tested.replay(point.thresholds, costs)
        reached.append((replay.cost / costs.dense, replay.accuracy))
    return sorted(reached)


def of_seed(
    bench: Workbench,
    specs: Sequence[GateSpec],
    costs: Costs,
    seed: int,
    budgets: int,
    criterion: str = "margin",
    cuts: Sequence[str] | None = None,  # of the feature pass; None takes the paper's
    drop: float | None = None,  # allowed on validation samples; None asks for no such point
) -> Result:
    """The curve of the gates on the samples of a seed, and how accurate the network and every gate alone are there.

    With ``drop`` also what the cheapest thresholds within it save and lose there.
    """

    def measure() -> Result:
        val, test = bench.held_out(seed)
        scores = bench.scores(specs, cuts)
        chosen, trace = scores.trace(val, criterion), scores.trace(test, criterion)
        found = {
            "points": along(chosen, trace, costs, budgets),
            "network": trace.network_accuracy,
            "gates": [float(right.mean()) for right in trace.correct[:-1]],
        }
        if drop is not None:
            wanted = chosen.network_accuracy - drop
            point = search_frontier(chosen, costs, min_accuracy=wanted).cheapest(wanted)
            replay = trace.replay(point.thresholds, costs)
            found |= {"saved": 1 - replay.cost / costs.dense, "lost": trace.network_accuracy - replay.accuracy}
        return found

    key = {"fingerprint": bench.fingerprint, "data": bench.settings, "criterion": criterion, "seed": seed}
    key |= {"cuts": cuts} if cuts else {}
    key |= {} if drop is None else {"drop": drop}
    return bench.store.value("curve", {**key, "budgets": budgets, "gates": [asdict(spec) for spec in specs]}, measure)


def at(curve: Result, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Accuracy at each cost; past the dearest point, whose accuracy no budget raised, it stays."""
    cost, accuracy = np.array(curve["points"]).T
    return np.interp(grid, cost, accuracy)


def common_grid(curves: Sequence[Result]) -> NDArray[np.float64]:
    """Shares of the network's FLOPs over which each of the curves has points."""
    return np.linspace(max(curve["points"][0][0] for curve in curves), 1, 41)


def banded(
    lines: NDArray[np.float64],  # [seeds, grid]
) -> Result:
    """Mean, least and most accuracy over the seeds, and the area under each seed's curve as its mean height."""
    return {"mean": lines.mean(0), "low": lines.min(0), "high": lines.max(0), "area": lines.mean(1)}
