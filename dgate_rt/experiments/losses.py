"""Hinge loss against cross-entropy: accuracy over FLOPs with gates of either, by every criterion (Figure 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgate_rt.experiments import curves
from dgate_rt.experiments.experiment import Experiment, Result, Table, claim, spread
from dgate_rt.experiments.plots import Band, bands_figure
from dgate_rt.experiments.scores import CRITERIA
from dgate_rt.experiments.workbench import GateSpec, Workbench
from dgate_rt.gate import DEFAULT_POOL, Pool
from dgate_rt.train import LOSSES

OURS, THEIRS = "hinge, margin", "cross-entropy, softmax"
"""What the paper compares: its gates, and those that one would have had otherwise."""
_SAID = {"hinge": "hinge", "cross_entropy": "cross-entropy"}


@dataclass(frozen=True)
class Options:
    seeds: int = 5
    gates: int = 2
    pool: Pool = DEFAULT_POOL
    budgets: int = 41  # mean FLOPs a sample for which thresholds are chosen


def run(bench: Workbench, options: Options) -> Result:
    """Every seed: gates of both losses on a bootstrap, thresholds on a new validation split, accuracy on the rest."""
    if options.seeds < 3 or options.budgets < 2:
        raise ValueError(f"set: expected seeds of at least 3 and budgets of at least 2, got {options}")
    cuts, seeds, pool = bench.first_cuts(options.gates), range(options.seeds), options.pool.value
    jobs = [(seed, loss, criterion) for seed in seeds for loss in LOSSES for criterion in CRITERIA]
    costs = bench.costs([GateSpec(cut, pool=pool, resample=0) for cut in cuts])  # those of any gates of this pool
    found: dict[str, list[Any]] = {}
    for part in ("val", "test"):
        bench.features(part, pool)
    for seed, loss, criterion in bench.track(jobs, "gates of each loss and seed, by each criterion"):
        specs = [GateSpec(cut, loss, pool, resample=seed) for cut in cuts]
        curve = curves.of_seed(bench, specs, costs, seed, options.budgets, criterion)
        found.setdefault(f"{_SAID[loss]}, {criterion}", []).append(curve)
    return {"cuts": cuts, "gflops": costs.dense / 1e9, **_compared(found)}


def _compared(found: Mapping[str, list[Result]]) -> Result:
    """All curves on one grid of FLOPs, over which each has points."""
    grid = curves.common_grid([one for seeds in found.values() for one in seeds])
    lines = {name: np.array([curves.at(one, grid) for one in seeds]) for name, seeds in found.items()}  # [seeds, grid]
    gap = lines[OURS] - lines[THEIRS]
    network = [curve["network"] for curve in found[OURS]]
    result = {
        "network": {"accuracy": float(np.mean(network)), "seeds": network},
        "grid": grid,
        "curves": {name: curves.banded(line) for name, line in lines.items()},
        "gates_alone": {
            loss: np.mean([curve["gates"] for curve in found[f"{loss}, {CRITERIA[0]}"]], 0) for loss in _SAID.values()
        },
        "ahead": {name: lines[OURS].mean(1) - line.mean(1) for name, line in lines.items()},
    }
    return {**result, "claims": _claims(result, gap)}


def _claims(result: Result, gap: NDArray[np.float64]) -> list[Result]:
    third = gap.shape[1] // 3
    cheap, dear = gap[:, :third].mean(1), gap[:, -third:].mean(1)
    rivals = {name: curve["area"].mean() for name, curve in result["curves"].items() if name.startswith("cross")}
    best = max(rivals, key=lambda name: rivals[name])
    return [
        claim(
            "At equal FLOPs gates trained with hinge loss (margin) are more accurate than with cross-entropy (softmax)",
            (gap.mean(1) > 0).all(),
            f"{spread(gap.mean(1))} on average over the FLOPs from {result['grid'][0]:.0%} of the network's to all",
        ),
        claim(
            "The gap widens where fewer FLOPs are spent",
            (cheap > 0).all() and (cheap > dear).all(),
            f"{spread(cheap)} in the cheapest third of that range, {spread(dear)} in the dearest",
        ),
        claim(
            "Hinge gates (margin) are ahead of cross-entropy gates by whatever criterion suits those best (our check)",
            (result["ahead"][best] > 0).all(),
            f"{spread(result['ahead'][best])} against {best}",
        ),
    ]


def tables(result: Result) -> list[Table]:
    """The area under every curve, how far the paper's gates are ahead of it, and the gates by themselves."""
    rows = []
    for name, curve in sorted(result["curves"].items(), key=lambda item: -float(np.mean(item[1]["area"]))):
        ahead = np.array(result["ahead"][name])
        rows.append([
            name,
            f"{np.mean(curve['area']):.2%}",
            f"{np.std(curve['area'], ddof=1):.2%}",
            "–" if name == OURS else f"{100 * ahead.mean():+.2f}",
            "–" if name == OURS else f"{100 * ahead.min():+.2f} to {100 * ahead.max():+.2f}",
        ])  # fmt: skip
    columns = ("Gates, criterion", "Mean accuracy", "Deviation", f"{OURS} ahead by", "From seed to seed")
    note = (
        f"Mean accuracy over mean FLOPs from {result['grid'][0]:.0%} to 100 % of the network's; differences in points. "
        f"The network alone: {result['network']['accuracy']:.2%}."
    )
    alone = [[loss, *(f"{share:.2%}" for share in shares)] for loss, shares in result["gates_alone"].items()]
    return [
        Table("Area under each curve", columns, rows, note),
        Table(
            "Accuracy of each gate by itself, on all test samples",
            ("Gates", *(f"after {cut}" for cut in result["cuts"])),
            alone,
            "Where hardly any FLOPs may be spent, a curve comes down to that of its first gate.",
        ),
    ]


def figures(result: Result) -> Mapping[str, str]:
    """The paper's pair with its spread, and all of them."""
    grid, pair, means = result["grid"], {}, {}
    for index, (name, curve) in enumerate(result["curves"].items()):
        mean, dashed = curve["mean"], index >= len(CRITERIA)  # the second loss
        means[name] = Band(grid, mean, mean, mean, index % len(CRITERIA), dashed)
        if name in (OURS, THEIRS):
            pair[name] = Band(grid, mean, curve["low"], curve["high"], index, dashed)
    x, at = "mean FLOPs a sample, of the network's", (1.0, result["network"]["accuracy"])
    return {
        "pair": bands_figure(pair, x, "accuracy", "Hinge against cross-entropy: mean over seeds, least and most", at),
        "criteria": bands_figure(means, x, "accuracy", "Every loss and criterion: mean over seeds", at),
    }


EXPERIMENT = Experiment(
    name="losses",
    title="Hinge loss against cross-entropy",
    source="Figure 4",
    about="Two gates of either loss. For each budget of FLOPs thresholds are chosen on validation samples; shown is "
    "what they give on test samples. The fit is convex and ends at one optimum, so a seed draws the data anew: a "
    "bootstrap of the training samples, and a new split of the validation and test samples, whatever was made of one "
    "source together. Losses and criteria of one seed share its data. top2 is the largest distance less the second.",
    options=Options(),
    quick=Options(seeds=3, budgets=11),
    run=run,
    tables=tables,
    figures=figures,
)
