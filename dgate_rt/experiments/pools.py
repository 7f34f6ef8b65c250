"""What a gate reads: the mean over the image, a grid of means, or every value of the map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dgate_rt.cost import Costs
from dgate_rt.experiments import curves
from dgate_rt.experiments.experiment import BEYOND, Experiment, Result, Table, claim, points, spread
from dgate_rt.experiments.plots import Band, bands_figure
from dgate_rt.experiments.workbench import GateSpec, Workbench
from dgate_rt.gate import Pool, pooled_width

AVERAGE, FLAT = "average", "flat"
POOLS = {AVERAGE: Pool.AVG, "grid2": Pool.GRID2, "grid4": Pool.GRID4, FLAT: Pool.FLAT}
"""Gates compared at the same places."""
EVERYWHERE = ", at all places"
"""Those of the paper, where some are too wide to be read flat."""
_NEGLIGIBLE = 0.01  # of the network's FLOPs


@dataclass(frozen=True)
class Options:
    seeds: int = 3
    gates: int = 3
    budgets: int = 41  # mean FLOPs a sample for which thresholds are chosen
    widest: int = 8192  # values; a map of more gets no flat gate


@dataclass(frozen=True)
class _Kind:
    """Gates of one pool at some places."""

    places: tuple[str, ...]
    pool: Pool

    @property
    def cuts(self) -> tuple[str, ...] | None:
        """Of the feature pass; that of the paper's places is there already, but flat it would keep maps too wide."""
        return self.places if self.pool is Pool.FLAT else None

    def specs(self, seed: int) -> list[GateSpec]:
        return [GateSpec(cut, pool=self.pool.value, resample=seed) for cut in self.places]


def run(bench: Workbench, options: Options) -> Result:
    """Every seed: gates of every pool on a bootstrap, thresholds on a new validation split, accuracy on the rest."""
    if options.seeds < 3 or options.budgets < 2:
        raise ValueError(f"set: expected seeds of at least 3 and budgets of at least 2, got {options}")
    cuts = bench.first_cuts(options.gates)
    widths = _widths(bench, cuts)
    narrow = tuple(cut for cut in cuts if widths[cut] <= options.widest)
    if not narrow:
        raise ValueError(f"widest: expected {min(widths.values())} or more for {cuts}, got {options.widest}")
    kinds = {name: _Kind(narrow, pool) for name, pool in POOLS.items()}
    if narrow != cuts:
        kinds |= {name + EVERYWHERE: _Kind(cuts, pool) for name, pool in POOLS.items() if name != FLAT}
    for kind in kinds.values():
        for part in ("train", "val", "test"):
            bench.features(part, kind.pool.value, kind.cuts)
    costs = {name: bench.costs(kind.specs(0), kind.cuts) for name, kind in kinds.items()}  # those of every seed
    found: dict[str, list[Result]] = {name: [] for name in kinds}
    jobs = [(seed, name) for seed in range(options.seeds) for name in kinds]
    for seed, name in bench.track(jobs, "gates of each seed and pool"):
        kind = kinds[name]
        curve = curves.of_seed(bench, kind.specs(seed), costs[name], seed, options.budgets, cuts=kind.cuts)
        found[name].append(curve)
    result = {
        "cuts": cuts,
        "widths": widths,
        "widest": options.widest,
        "gflops": costs[AVERAGE].dense / 1e9,
        "gates": {name: _gates(bench, kind, costs[name], found[name]) for name, kind in kinds.items()},
        **_compared(found),
    }
    return {**result, "claims": _claims(result)}


def _widths(bench: Workbench, cuts: Sequence[str]) -> dict[str, int]:
    """How many values the map at each place has."""
    with torch.no_grad():
        shapes = [tuple(features.shape[1:]) for features in bench.staged(cuts).features(bench.example)]
    return {cut: pooled_width(shape, Pool.FLAT) for cut, shape in zip(cuts, shapes, strict=True)}


def _gates(bench: Workbench, kind: _Kind, costs: Costs, found: Sequence[Result]) -> list[Result]:
    """Each gate's size, its FLOPs, and how accurate it is by itself, on average over the seeds."""
    gates, alone = bench.gates(kind.specs(0), kind.cuts), np.mean([one["gates"] for one in found], 0)
    return [
        {
            "cut": cut,
            "width": gate.width,
            "parameters": gate.weight.numel() + gate.bias.numel(),
            "flops": flops,
            "share": flops / costs.dense,
            "accuracy": accuracy,
        }
        for cut, gate, flops, accuracy in zip(kind.places, gates, costs.gates, alone, strict=True)
    ]


def _compared(found: Mapping[str, list[Result]]) -> Result:
    """All curves on one grid of FLOPs, over which each has points."""
    grid = curves.common_grid([one for seeds in found.values() for one in seeds])
    lines = {name: np.array([curves.at(one, grid) for one in seeds]) for name, seeds in found.items()}  # [seeds, grid]
    network = [one["network"] for one in found[AVERAGE]]
    return {
        "network": {"accuracy": float(np.mean(network)), "seeds": network},
        "grid": grid,
        "curves": {name: curves.banded(line) for name, line in lines.items()},
        "ahead": {name: lines[AVERAGE].mean(1) - line.mean(1) for name, line in lines.items()},
    }


def _claims(result: Result) -> list[Result]:
    ahead, flat, grid = np.array(result["ahead"][FLAT]), result["gates"][FLAT], np.array(result["ahead"]["grid4"])
    dearest = max(flat, key=lambda gate: gate["share"])
    return [
        claim(
            "At equal FLOPs gates that read the mean over the image are no less accurate on test data than gates that "
            "read every value at the same places, in every seed",
            bool((ahead >= 0).all()),
            f"{spread(ahead)} on average over the FLOPs from {result['grid'][0]:.0%} of the network's to all",
        ),
        claim(
            f"Reading every value takes a gate less than {_NEGLIGIBLE:.0%} of the network's FLOPs",
            dearest["share"] < _NEGLIGIBLE,
            f"{dearest['share']:.2%} after {dearest['cut']}, where it has {dearest['parameters']:,} parameters",
        ),
        claim(
            "A grid of 4x4 means gains at least half of what reading every value gains over the mean, on average",
            -grid.mean() >= -ahead.mean() / 2,
            f"{points(-grid.mean())} against {points(-ahead.mean())}",
        ),
    ]


def tables(result: Result) -> list[Table]:
    """The area under every curve, and what the gates are."""
    areas = []
    for name, curve in result["curves"].items():
        ahead = np.array(result["ahead"][name])
        areas.append([
            name,
            ", ".join(gate["cut"] for gate in result["gates"][name]),
            f"{np.mean(curve['area']):.2%}",
            f"{np.std(curve['area'], ddof=1):.2%}",
            "–" if name == AVERAGE else f"{100 * ahead.mean():+.2f}",
            "–" if name == AVERAGE else f"{100 * ahead.min():+.2f} to {100 * ahead.max():+.2f}",
        ])  # fmt: skip
    left_out = [f"{cut} ({width:,})" for cut, width in result["widths"].items() if width > result["widest"]]
    note = (
        f"Mean accuracy over mean FLOPs from {result['grid'][0]:.0%} to 100 % of the network's; differences in points. "
        f"The network alone: {result['network']['accuracy']:.2%}. Of more than {result['widest']:,} values, and so "
        f"without a flat gate: {', '.join(left_out) or 'none'}."
    )
    gates = [
        [
            name,
            gate["cut"],
            f"{gate['width']:,}",
            f"{gate['parameters']:,}",
            f"{gate['flops']:,.0f}",
            f"{gate['share']:.3%}",
            f"{gate['accuracy']:.2%}",
        ]
        for name, every in result["gates"].items()
        for gate in every
    ]
    return [
        Table(
            "Area under each curve",
            ("Gates read", "After", "Mean accuracy", "Deviation", f"{AVERAGE} ahead by", "From seed to seed"),
            areas,
            note,
        ),
        Table(
            "The gates",
            ("Gates read", "After", "Values", "Parameters", "FLOPs", "Of the network's", "Accuracy alone"),
            gates,
            "Accuracy by itself on test samples, mean over seeds.",
        ),
    ]


def figures(result: Result) -> Mapping[str, str]:
    """Every pool with its spread."""
    grid, bands = result["grid"], {}
    for name, curve in result["curves"].items():
        pool, everywhere, _ = name.partition(EVERYWHERE)
        colour = list(POOLS).index(pool)
        bands[name] = Band(grid, curve["mean"], curve["low"], curve["high"], colour, bool(everywhere))
    x, at = "mean FLOPs a sample, of the network's", (1.0, result["network"]["accuracy"])
    return {"curves": bands_figure(bands, x, "accuracy", "What gates read: mean over seeds, least and most", at)}


EXPERIMENT = Experiment(
    name="pools",
    title="What a gate reads",
    source=BEYOND,
    about="Gates on the mean over the image, as everywhere else, against gates on the means of a grid's cells and on "
    "every value of the map, where it is not too wide: at the same places, with the same loss and regulariser, and "
    "their own FLOPs counted. For each "
    "budget of FLOPs thresholds are chosen on validation samples; shown is what they give on test samples. A seed "
    "draws a bootstrap of the training samples and a new split of the others; all gates of one seed share its data.",
    options=Options(),
    quick=Options(budgets=11),
    run=run,
    tables=tables,
    figures=figures,
)
