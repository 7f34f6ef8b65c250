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
    drop: float = 0.01  # allowed on validation data, where it is asked what pools save
    widest: int = 4096  # values; a map of more gets no flat gate


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
    if options.seeds < 3 or options.budgets < 2 or not 0 <= options.drop < 1:
        raise ValueError(f"set: expected seeds of at least 3, budgets of at least 2, a drop in [0, 1), got {options}")
    cuts = bench.first_cuts(options.gates)
    widths = _widths(bench, cuts)
    narrow = tuple(cut for cut in cuts if widths[cut] <= options.widest)
    kinds = {name: _Kind(narrow, pool) for name, pool in POOLS.items() if narrow}
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
        curve = curves.of_seed(
            bench, kind.specs(seed), costs[name], seed, options.budgets, cuts=kind.cuts, drop=options.drop
        )
        found[name].append(curve)
    some = next(iter(kinds))
    network = [one["network"] for one in found[some]]
    result = {
        "cuts": cuts,
        "widths": widths,
        "widest": options.widest,
        "gflops": costs[some].dense / 1e9,
        "network": {"accuracy": float(np.mean(network)), "seeds": network},
        "gates": {name: _gates(bench, kind, costs[name], found[name]) for name, kind in kinds.items()},
        "drop": options.drop,
        "at_drop": {name: {what: [one[what] for one in found[name]] for what in ("saved", "lost")} for name in kinds},
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


def _mean_at(name: str) -> str:
    """The gates that read the mean at the same places as those of this name."""
    return AVERAGE + EVERYWHERE if name.endswith(EVERYWHERE) else AVERAGE


def _compared(found: Mapping[str, list[Result]]) -> Result:
    """Curves at the same places on one grid of FLOPs, over which each has points, and what the mean is ahead by."""
    lines, grids = {}, {}
    for name in found:
        alike = [one for other, seeds in found.items() if _mean_at(other) == _mean_at(name) for one in seeds]
        grids[name] = curves.common_grid(alike)
        lines[name] = np.array([curves.at(one, grids[name]) for one in found[name]])  # [seeds, grid]
    return {
        "curves": {name: {"grid": grids[name], **curves.banded(line)} for name, line in lines.items()},
        "ahead": {name: lines[_mean_at(name)].mean(1) - line.mean(1) for name, line in lines.items()},
    }


def _claims(result: Result) -> list[Result]:
    everywhere = EVERYWHERE if AVERAGE + EVERYWHERE in result["at_drop"] else ""
    one, four = (result["at_drop"][name + everywhere] for name in (AVERAGE, "grid2"))
    more = np.array(four["saved"]) - one["saved"]
    said = claim(
        f"Where {result['drop']:.0%} may be lost on validation data, gates that read a 2x2 grid of means save more of "
        f"the FLOPs than gates that read one mean{everywhere}, in every seed",
        bool((more > 0).all()),
        f"{np.mean(four['saved']):.1%} against {np.mean(one['saved']):.1%}, {spread(more)}; lost on test data "
        f"{points(np.mean(four['lost']))} and {points(np.mean(one['lost']))}",
    )
    return [said, *_claims_on_flat(result)] if FLAT in result["gates"] else [said]


def _claims_on_flat(result: Result) -> list[Result]:
    ahead, flat, grid = np.array(result["ahead"][FLAT]), result["gates"][FLAT], np.array(result["ahead"]["grid4"])
    dearest = max(flat, key=lambda gate: gate["share"])
    return [
        claim(
            "At equal FLOPs gates that read the mean over the image are no less accurate on test data than gates that "
            "read every value at the same places, in every seed",
            bool((ahead >= 0).all()),
            f"{spread(ahead)} on average over the FLOPs from {result['curves'][FLAT]['grid'][0]:.0%} of the network's "
            "to all",
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
    """The area under every curve, what is saved at one point of it, and what the gates are."""
    areas = []
    for name, curve in result["curves"].items():
        ahead, at, mean = np.array(result["ahead"][name]), result["at_drop"][name], name == _mean_at(name)
        areas.append([
            name,
            ", ".join(gate["cut"] for gate in result["gates"][name]),
            f"{curve['grid'][0]:.0%}",
            f"{np.mean(curve['area']):.2%}",
            f"{np.std(curve['area'], ddof=1):.2%}",
            "–" if mean else f"{100 * ahead.mean():+.2f}",
            "–" if mean else f"{100 * ahead.min():+.2f} to {100 * ahead.max():+.2f}",
            f"{np.mean(at['saved']):.1%}",
            f"{100 * np.mean(at['lost']):+.2f}",
        ])  # fmt: skip
    left_out = [f"{cut} ({width:,})" for cut, width in result["widths"].items() if width > result["widest"]]
    note = (
        "Mean accuracy over mean FLOPs from a share of the network's to all of them; differences in points, from gates "
        f"that read the mean at the same places. Saved are FLOPs where {result['drop']:.0%} may be lost on validation "
        "data, lost is what that loses on test data, in points; means over seeds. "
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
    columns = (
        "Gates read", "After", "FLOPs from", "Accuracy", "Deviation", "Mean ahead by", "Seed to seed", "Saved", "Lost"
    )  # fmt: skip
    return [
        Table("Area under each curve, and one point of it", columns, areas, note),
        Table(
            "The gates",
            ("Gates read", "After", "Values", "Parameters", "FLOPs", "Of the network's", "Accuracy alone"),
            gates,
            "Accuracy by itself on test samples, mean over seeds.",
        ),
    ]


def figures(result: Result) -> Mapping[str, str]:
    """Every pool with its spread."""
    bands = {}
    for name, curve in result["curves"].items():
        pool, everywhere, _ = name.partition(EVERYWHERE)
        colour = list(POOLS).index(pool)
        bands[name] = Band(curve["grid"], curve["mean"], curve["low"], curve["high"], colour, bool(everywhere))
    x, at = "mean FLOPs a sample, of the network's", (1.0, result["network"]["accuracy"])
    return {"curves": bands_figure(bands, x, "accuracy", "What gates read: mean over seeds, least and most", at)}


EXPERIMENT = Experiment(
    name="pools",
    title="What a gate reads",
    source=BEYOND,
    about="Gates on the mean over the image against gates on the means of a grid's cells and on "
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
