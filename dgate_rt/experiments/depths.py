"""Where gates are worth having: a gate after every block, and the few of them that save most."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from dgate_rt.backbones import block_cuts
from dgate_rt.cost import Costs
from dgate_rt.experiments.experiment import BEYOND, Experiment, Result, Table, claim, spread
from dgate_rt.experiments.plots import Band, bands_figure
from dgate_rt.experiments.scores import Scores
from dgate_rt.experiments.workbench import GateSpec, Workbench
from dgate_rt.frontier import search_frontier
from dgate_rt.gate import DEFAULT_POOL, Pool
from dgate_rt.selection import Subset, forward_selection
from dgate_rt.trace import Trace

_NEARLY = 0.9


@dataclass(frozen=True)
class Options:
    drop: float = 0.01  # allowed on validation data
    pool: Pool = DEFAULT_POOL
    seeds: int = 5  # new splits, on each of which gates are chosen anew
    subsets: int = 300  # of one size, the most that are all tried


@dataclass(frozen=True)
class _Candidates:
    """Gates after all blocks, of which some are chosen; their costs follow without running anything again."""

    bench: Workbench
    cuts: tuple[str, ...]
    specs: tuple[GateSpec, ...]
    costs: Costs
    scores: Scores
    drop: float

    def measured(self, subset: Subset, seed: int | None) -> Result:
        """The cheapest thresholds of these gates on the validation samples of a seed, there and on its test samples."""

        def measure() -> Result:
            costs, (val, test) = self.costs.keeping(subset), self.bench.held_out(seed)
            chosen, tested = (self.scores.trace(rows).keeping(subset) for rows in (val, test))
            wanted = chosen.network_accuracy - self.drop
            point = search_frontier(chosen, costs, min_accuracy=wanted).cheapest(wanted)
            replay = tested.replay(point.thresholds, costs)
            return {
                "cuts": [self.cuts[gate] for gate in subset],
                "validation": {"cost": point.cost / costs.dense, "lost": chosen.network_accuracy - point.accuracy},
                "test": {"cost": replay.cost / costs.dense, "lost": tested.network_accuracy - replay.accuracy},
                "shares": list(replay.shares),
            }

        gates = [asdict(self.specs[gate]) for gate in subset]
        key = {"fingerprint": self.bench.fingerprint, "data": self.bench.settings, "cuts": self.cuts, "gates": gates}
        return self.bench.store.value("subset", {**key, "seed": seed, "drop": self.drop}, measure)

    def greedy(self, seed: int | None) -> Iterator[tuple[int, Result]]:
        """Each gate in turn that makes the gates so far cheapest on validation data, until none makes them cheaper."""

        def worth(subset: Subset) -> tuple[float]:
            return (-self.measured(subset, seed)["validation"]["cost"],)

        for added, subset in forward_selection(len(self.cuts), worth):
            yield added, self.measured(subset, seed)


def run(bench: Workbench, options: Options) -> Result:
    """One feature pass cut after every block; then gates are chosen from their scores alone."""
    if not 0 <= options.drop < 1 or options.seeds < 3 or options.subsets < 0:
        raise ValueError(f"set: expected a drop in [0, 1), seeds of at least 3, and subsets, got {options}")
    cuts = block_cuts(bench.meta.name)
    specs = tuple(GateSpec(cut, pool=options.pool.value) for cut in cuts)
    among = _Candidates(bench, cuts, specs, bench.costs(specs, cuts), bench.scores(specs, cuts), options.drop)
    ends = tuple(_last(cuts, end) for end in bench.cuts)
    steps = []
    for gate, found in bench.track(among.greedy(None), "gates chosen one by one"):
        steps.append({"added": cuts[gate], **found})
    best = [_best(among, size, options.subsets) for size in range(1, len(ends) + 1)]
    seeds = []
    for seed in bench.track(range(options.seeds), "as many gates as the paper has, chosen on new splits"):
        chosen = [found for _, (_, found) in zip(ends, among.greedy(seed), strict=False)]
        seeds.append({"chosen": chosen[-1] if chosen else among.measured((), seed), "ends": among.measured(ends, seed)})
    tested = among.scores.trace(bench.held_out(None)[1])
    found = {
        "cuts": cuts,
        "network": {"accuracy": tested.network_accuracy, "gflops": among.costs.dense / 1e9},
        "drop": options.drop,
        "gates": _alone(tested, among.costs),
        "steps": steps,
        "ends": among.measured(ends, None),
        "best": best,
        "seeds": seeds,
    }
    return {**found, "claims": _claims(found)}


def _last(cuts: Sequence[str], end: str) -> int:
    """The block that a place of the paper's ends with."""
    return max(index for index, cut in enumerate(cuts) if cut == end or cut.startswith(f"{end}."))


def _best(among: _Candidates, size: int, most: int) -> Result:
    """The cheapest subset of a size on validation data; none where too many had to be tried."""
    count = math.comb(len(among.cuts), size)
    if count > most:
        return {"size": size, "subsets": count, "found": None}
    every = among.bench.track(list(combinations(range(len(among.cuts)), size)), f"every choice of {size} gates")
    found = min((among.measured(subset, None) for subset in every), key=lambda one: one["validation"]["cost"])
    return {"size": size, "subsets": count, "found": found}


def _alone(tested: Trace, costs: Costs) -> list[Result]:
    """FLOPs up to each gate and its own, and its accuracy if every sample left there."""
    reached: NDArray[np.float64] = np.cumsum(costs.stages)[:-1] / costs.dense
    return [
        {"reached": at, "own": own / costs.dense, "accuracy": float(right.mean())}
        for at, own, right in zip(reached, costs.gates, tested.correct[:-1], strict=True)
    ]


def _claims(found: Result) -> list[Result]:
    count, rows = len(found["ends"]["cuts"]), found["seeds"]
    cost, lost = (
        np.array([[row[which]["test"][name] for row in rows] for which in ("chosen", "ends")])
        for name in ("cost", "lost")
    )
    cheaper, more_accurate = cost[1] - cost[0], lost[1] - lost[0]
    allowed, saved = f"{100 * found['drop']:g} %", [1 - step["test"]["cost"] for step in found["steps"]] or [0.0]
    few, every = saved[:count][-1], saved[-1]
    return [
        claim(
            f"With an accuracy drop of {allowed} allowed on validation data, {count} gates chosen one by one from all "
            f"blocks save more FLOPs on test data than {count} at the ends of the stages, in every split",
            (cheaper > 0).all(),
            f"more by {spread(cheaper)} of the network's FLOPs: {1 - cost[0].mean():.1%} saved against "
            f"{1 - cost[1].mean():.1%}",
        ),
        claim(
            "They lose no more accuracy on test data, on average over the splits",
            more_accurate.mean() >= 0,
            f"{spread(more_accurate)} of accuracy; chosen ones lose {lost[0].mean():.2%}, those at the ends "
            f"{lost[1].mean():.2%}",
        ),
        claim(
            f"{count} gates chosen so save at least {_NEARLY:.0%} of what any number of them saves",
            every > 0 and few >= _NEARLY * every,
            f"{few:.1%} on test data against {every:.1%} with {len(found['steps'])}",
        ),
    ]


def tables(result: Result) -> list[Table]:
    """The gates after every block, the order in which they are chosen, the best subsets, and the splits."""
    gates = [
        [cut, f"{gate['reached']:.1%}", f"{gate['own']:.3%}", f"{gate['accuracy']:.2%}"]
        for cut, gate in zip(result["cuts"], result["gates"], strict=True)
    ]
    steps = [[str(n), step["added"], *_numbers(step)] for n, step in enumerate(result["steps"], 1)]
    steps.append(["–", f"the paper's: {', '.join(result['ends']['cuts'])}", *_numbers(result["ends"])])
    best = [
        [
            str(one["size"]),
            str(one["subsets"]),
            *((", ".join(one["found"]["cuts"]), *_numbers(one["found"])) if one["found"] else ("not tried", *"––––")),
        ]
        for one in result["best"]
    ]
    seeds = [
        [str(seed), ", ".join(row["chosen"]["cuts"]), *_numbers(row["chosen"])[2:], *_numbers(row["ends"])[2:]]
        for seed, row in enumerate(result["seeds"])
    ]
    numbers = ("FLOPs, validation", "Loses", "FLOPs, test", "Loses there")
    note = (
        "FLOPs are a sample's mean as a share of the network's, with those of the gates. Thresholds are the cheapest "
        f"that lose no more than {100 * result['drop']:g} % on validation data. The network has "
        f"{result['network']['accuracy']:.2%} on test data."
    )
    split = ("Split", "Chosen", "FLOPs", "Loses", "Ends: FLOPs", "Ends lose")
    return [
        Table("A gate after every block", ("Gate after", "FLOPs up to it", "Its own", "Accuracy alone"), gates),
        Table("Gates chosen one by one", ("Gates", "Added", *numbers), steps, note),
        Table("The best of every choice", ("Gates", "Choices", "Best on validation data", *numbers), best),
        Table("On new splits, test data", split, seeds, "Gates and thresholds are chosen anew on each."),
    ]


def _numbers(one: Result) -> list[str]:
    return [f"{one[part][name]:.2%}" for part in ("validation", "test") for name in ("cost", "lost")]


def figures(result: Result) -> Mapping[str, str]:
    """How accurate a gate is alone, over the FLOPs up to it."""
    reached = [gate["reached"] for gate in result["gates"]]
    accuracy = [gate["accuracy"] for gate in result["gates"]]
    line = {"a gate alone": Band(reached, accuracy, accuracy, accuracy)}
    x, at = "FLOPs up to the gate, of the network's", (1.0, result["network"]["accuracy"])
    return {"gates": bands_figure(line, x, "accuracy", "A gate after every block: its own accuracy", at)}


EXPERIMENT = Experiment(
    name="depths",
    title="Gates after every block",
    source=BEYOND,
    about="A gate after each residual block of a ResNet, or each dense block and transition of a DenseNet, but the "
    "last, trained with hinge loss on one pass of features. They are added one by one, each time that which lowers the "
    "cost of the cheapest thresholds on validation data most, until none does, as calibrate(max_gates=...) does. Every "
    "choice of as many as the paper has, or fewer, is tried where there are not too many. The paper's places are also "
    "compared on new splits of validation and test samples, with the same gates.",
    options=Options(),
    quick=Options(seeds=3, subsets=20),
    run=run,
    tables=tables,
    figures=figures,
)
