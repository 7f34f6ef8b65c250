"""Efficiency against effectiveness: FLOPs and accuracy over the thresholds of two gates (Figure 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dgate_rt.experiments.experiment import Experiment, Result, Table, claim, points
from dgate_rt.experiments.plots import surface_figure
from dgate_rt.experiments.workbench import GateSpec, Workbench
from dgate_rt.gate import DEFAULT_POOL, Pool


@dataclass(frozen=True)
class Options:
    most: float = 3.0  # the largest threshold of both gates; the smallest is 0
    steps: int = 31  # thresholds of each gate
    pool: Pool = DEFAULT_POOL
    tolerance: float = 0.001  # an accuracy within this of the network's is "the same"


def run(bench: Workbench, options: Options) -> Result:
    """Replay every pair of thresholds on the test split."""
    if options.steps < 2 or not options.most > 0:
        raise ValueError(f"set: expected steps of at least 2 and most above 0, got {options}")
    specs = [GateSpec(cut, pool=options.pool.value) for cut in bench.first_cuts(2)]
    costs = bench.costs(specs)
    trace = bench.scores(specs).trace(bench.held_out(None)[1])
    thresholds = np.linspace(0, options.most, options.steps)
    cost, accuracy = np.empty((2, options.steps, options.steps))
    for i, first in enumerate(bench.track(thresholds, "thresholds of the first gate")):
        for j, second in enumerate(thresholds):
            replay = trace.replay((first, second), costs)
            cost[i, j], accuracy[i, j] = replay.cost, replay.accuracy
    saved, lost = 1 - cost / costs.dense, trace.network_accuracy - accuracy
    back = _back(np.diagonal(lost), options.tolerance)
    found = {
        "cuts": [spec.cut for spec in specs],
        "network": {"accuracy": trace.network_accuracy, "gflops": costs.dense / 1e9},
        "thresholds": thresholds,
        "saved": saved,
        "accuracy": accuracy,
        "at_zero": {"times_fewer_flops": costs.dense / cost[0, 0], "saved": saved[0, 0], "accuracy": accuracy[0, 0]},
        "back_at": None
        if back is None
        else {"threshold": thresholds[back], "saved": saved[back, back], "accuracy": accuracy[back, back]},
    }
    return {**found, "claims": _claims(found, options)}


def _back(lost: np.ndarray, tolerance: float) -> int | None:
    """The first threshold from which on hardly anything is lost; None if that is not even so at the last."""
    above = np.flatnonzero(lost > tolerance)
    first = int(above[-1]) + 1 if len(above) else 0
    return first if first < len(lost) else None


def _claims(found: Result, options: Options) -> list[Result]:
    zero, back, network = found["at_zero"], found["back_at"], found["network"]["accuracy"]
    largest = bool(found["saved"][0, 0] == found["saved"].max())
    return [
        claim(
            "Thresholds of (0, 0) give the largest reduction of FLOPs: 6 times fewer, with 9 % less accuracy",
            largest and zero["accuracy"] < network,
            f"{zero['times_fewer_flops']:.2f} times fewer ({zero['saved']:.1%} saved), accuracy "
            f"{points(zero['accuracy'] - network)}; the largest of the grid: {'yes' if largest else 'no'}",
        ),
        claim(
            "Past a threshold (2 in the paper) accuracy is back at the network's own, with about 20 % fewer FLOPs",
            back is not None and back["saved"] > 0,
            f"from t1 = t2 = {back['threshold']:.2f} on within {100 * options.tolerance:g} points of {network:.2%}; "
            f"there {back['accuracy']:.2%} and {back['saved']:.1%} fewer FLOPs"
            if back
            else f"not up to t1 = t2 = {options.most:g}",
        ),
    ]


def tables(result: Result) -> list[Table]:
    """The diagonal t1 = t2."""
    network, count = result["network"], len(result["thresholds"])
    rows = [
        [
            f"t1 = t2 = {result['thresholds'][i]:.2f}",
            f"{result['accuracy'][i][i]:.2%}",
            f"{network['gflops'] * (1 - result['saved'][i][i]):.4g}",
            f"{result['saved'][i][i]:.2%}",
        ]
        for i in np.unique(np.linspace(0, count - 1, min(count, 7)).astype(int))
    ]
    rows.append(["network without gates", f"{network['accuracy']:.2%}", f"{network['gflops']:.4g}", "–"])
    return [Table("Along the diagonal", ("Thresholds", "Accuracy", "GFLOPs", "FLOPs reduction"), rows)]


def figures(result: Result) -> Mapping[str, str]:
    """Both surfaces."""
    grid, names = result["thresholds"], ("threshold t1", "threshold t2")
    return {
        "flops": surface_figure(result["saved"], grid, grid, names, "(a) share of the FLOPs saved"),
        "accuracy": surface_figure(result["accuracy"], grid, grid, names, "(b) accuracy"),
    }


EXPERIMENT = Experiment(
    name="surfaces",
    title="Efficiency against effectiveness",
    source="Figure 5",
    about="Two gates, after the first and second block, trained with hinge loss. Each pair of thresholds is replayed "
    "on the test split.",
    options=Options(),
    quick=Options(steps=7),
    run=run,
    tables=tables,
    figures=figures,
)
