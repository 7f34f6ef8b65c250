"""Thresholds of all gates chosen together, against the paper's gate after gate: FLOPs at equal accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from dgate_rt.cost import Costs
from dgate_rt.experiments.experiment import BEYOND, Experiment, Result, Table, claim, spread
from dgate_rt.experiments.plots import Band, bands_figure
from dgate_rt.experiments.workbench import GateSpec, Workbench
from dgate_rt.frontier import search_frontier, sequential
from dgate_rt.gate import DEFAULT_POOL, Pool

WAYS = ("joint", "sequential")
_GRID = 41


@dataclass(frozen=True)
class Options:
    seeds: int = 10
    gates: int = 3
    pool: Pool = DEFAULT_POOL
    drops: tuple[float, ...] = (0.0, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04)  # allowed on validation data
    judged: float = 0.01  # the one of them at which ways are compared


def run(bench: Workbench, options: Options) -> Result:
    """Every seed: gates on a bootstrap, thresholds in both ways on a new validation split, both tested on the rest."""
    if options.seeds < 3 or len(options.drops) < 2 or options.judged not in options.drops:
        raise ValueError(f"set: expected seeds of at least 3, two drops or more, and judged among them, got {options}")
    cuts = bench.first_cuts(options.gates)
    specs = {
        seed: [GateSpec(cut, pool=options.pool.value, resample=seed) for cut in cuts] for seed in range(options.seeds)
    }
    costs = bench.costs(specs[0])  # those of any gates of this pool
    for part in ("val", "test"):
        bench.features(part, options.pool.value)
    found = [
        _chosen(bench, specs[seed], costs, seed, options.drops)
        for seed in bench.track(specs, "gates of each seed, and their thresholds in both ways")
    ]
    network = [one["network"] for one in found]
    result = {
        "cuts": cuts,
        "gflops": costs.dense / 1e9,
        "network": {"accuracy": float(np.mean(network)), "seeds": network},
        "drops": options.drops,
        **{way: {name: [one[way][name] for one in found] for name in found[0][way]} for way in WAYS},
    }
    result["equal"] = _equal(result)
    return {**result, "claims": _claims(result, options.drops.index(options.judged))}


def _chosen(bench: Workbench, specs: Sequence[GateSpec], costs: Costs, seed: int, drops: Sequence[float]) -> Result:
    """What the thresholds of one seed cost and lose on its test samples, and cost on its validation samples."""

    def measure() -> Result:
        scores = bench.scores(specs)
        chosen, tested = (scores.trace(rows) for rows in bench.held_out(seed))
        found: Result = {way: {"cost": [], "lost": [], "validation_cost": []} for way in WAYS}
        for drop in drops:
            wanted = chosen.network_accuracy - drop
            together = search_frontier(chosen, costs, min_accuracy=wanted).cheapest(wanted)
            for way, point in zip(WAYS, (together, sequential(chosen, costs, wanted)), strict=True):
                replay = tested.replay(point.thresholds, costs)
                found[way]["cost"].append(replay.cost / costs.dense)
                found[way]["lost"].append(tested.network_accuracy - replay.accuracy)
                found[way]["validation_cost"].append(point.cost / costs.dense)
        return {"network": tested.network_accuracy, **found}

    key = {"fingerprint": bench.fingerprint, "data": bench.settings, "seed": seed, "drops": drops}
    return bench.store.value("joint", {**key, "gates": [asdict(spec) for spec in specs]}, measure)


def _equal(result: Result) -> list[Result | None]:
    """How much cheaper joint thresholds of each seed are at equal accuracy, on average over what both ways lose.

    None where they lose nothing in common.
    """
    found: list[Result | None] = []
    for seed in range(len(result["network"]["seeds"])):
        lost, cost = ([result[way][name][seed] for way in WAYS] for name in ("lost", "cost"))
        low, high = max(map(min, lost)), min(map(max, lost))
        grid = np.linspace(low, high, _GRID)
        joint, after = (_at(grid, *curve) for curve in zip(lost, cost, strict=True))
        found.append({"from": low, "to": high, "cheaper": (after - joint).mean()} if low < high else None)
    return found


def _at(grid: NDArray[np.float64], lost: Sequence[float], cost: Sequence[float]) -> NDArray[np.float64]:
    """A curve's cost at each loss, between its points; several of one loss count as their mean."""
    losses, where = np.unique(lost, return_inverse=True)
    return np.interp(grid, losses, np.bincount(where, cost) / np.bincount(where))


def _claims(result: Result, judged: int) -> list[Result]:
    joint, after = ({name: np.array(rows)[:, judged] for name, rows in result[way].items()} for way in WAYS)
    cheaper, more_accurate = after["cost"] - joint["cost"], after["lost"] - joint["lost"]
    gaps = [one["cheaper"] for one in result["equal"] if one]
    allowed = f"{100 * result['drops'][judged]:g}"
    return [
        claim(
            f"With an accuracy drop of {allowed} % allowed on validation data, joint thresholds cost fewer FLOPs on "
            "test samples than those chosen gate after gate, in every seed",
            (cheaper > 0).all(),
            f"fewer by {spread(cheaper)} of the network's FLOPs, {np.mean(cheaper / after['cost']):.1%} of the gated "
            f"network's; in {np.count_nonzero(cheaper > 0)} of {len(cheaper)} seeds",
        ),
        claim(
            "There they lose no more accuracy on test samples, on average over the seeds",
            more_accurate.mean() >= 0,
            f"{spread(more_accurate)} of accuracy; joint lose {joint['lost'].mean():.2%}, gate after gate "
            f"{after['lost'].mean():.2%}",
        ),
        claim(
            "At equal accuracy on test samples joint thresholds cost fewer FLOPs, in every seed",
            len(gaps) == len(result["equal"]) and min(gaps) > 0,
            f"fewer by {spread(gaps)} of the network's FLOPs, on average over what both ways of a seed lose"
            if gaps
            else "in no seed do both ways lose any accuracy in common",
        ),
    ]


def tables(result: Result) -> list[Table]:
    """Both ways at every allowed drop, means over the seeds; and each seed at equal accuracy."""
    joint, after = ({name: np.array(rows) for name, rows in result[way].items()} for way in WAYS)
    cheaper = after["cost"] - joint["cost"]
    rows = [
        [
            f"{100 * drop:g} %",
            f"{joint['cost'][:, d].mean():.2%}", f"{after['cost'][:, d].mean():.2%}",
            f"{100 * cheaper[:, d].mean():+.2f} ({100 * cheaper[:, d].min():+.2f} to {100 * cheaper[:, d].max():+.2f})",
            f"{joint['lost'][:, d].mean():.2%}", f"{after['lost'][:, d].mean():.2%}",
            f"{100 * (after['validation_cost'] - joint['validation_cost'])[:, d].mean():+.2f}",
        ]
        for d, drop in enumerate(result["drops"])
    ]  # fmt: skip
    columns = ("Allowed", "Joint: FLOPs", "Sequential: FLOPs", "Joint cheaper by", "Joint loses", "Sequential loses")
    note = (
        f"Means over {len(result['network']['seeds'])} seeds on test samples, least and most in parentheses. FLOPs are "
        f"shares of the network's, which has {result['network']['accuracy']:.2%}; differences in points of them."
    )
    equal = [
        [
            str(seed),
            *((f"{one['from']:.2%} to {one['to']:.2%}", f"{100 * one['cheaper']:+.2f}") if one else ("nothing", "–")),
        ]
        for seed, one in enumerate(result["equal"])
    ]
    return [
        Table("At every allowed drop", (*columns, "Cheaper on validation data by"), rows, note),
        Table("At equal accuracy on test samples", ("Seed", "Both lose", "Joint cheaper by"), equal),
    ]


def figures(result: Result) -> Mapping[str, str]:
    """FLOPs over the accuracy lost on test samples, at every allowed drop."""
    bands = {}
    for colour, way in enumerate(WAYS):
        lost, costs = np.array(result[way]["lost"]), np.array(result[way]["cost"])
        bands[way] = Band(lost.mean(0), costs.mean(0), costs.min(0), costs.max(0), colour, way != WAYS[0])
    title = "Joint thresholds against gate after gate: mean over seeds, least and most"
    return {
        "ways": bands_figure(bands, "accuracy lost on test samples", "mean FLOPs a sample, of the network's", title)
    }


EXPERIMENT = Experiment(
    name="joint",
    title="Joint thresholds against gate after gate",
    source=BEYOND,
    about="Three gates, trained with hinge loss. Thresholds are the cheapest that lose no more than is allowed on "
    "validation samples: of all gates together, or gate after gate, as in section 3.1 of the paper. Shown is what they "
    "give on test samples. A seed draws a bootstrap of the training samples and a new split of the others; both ways "
    "share its gates and samples. Equal accuracy is read between the points of each seed's own curve.",
    options=Options(),
    quick=Options(seeds=3),
    run=run,
    tables=tables,
    figures=figures,
)
