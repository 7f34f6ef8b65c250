"""Which classes are answered at which gate, and whether an early answer costs anything (Figures 6 to 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dgate_rt.experiments.experiment import Experiment, Result, Table, claim
from dgate_rt.experiments.plots import mosaic
from dgate_rt.experiments.workbench import GateSpec, Workbench
from dgate_rt.figures import classes_figure, earliest_first
from dgate_rt.gate import DEFAULT_POOL, Pool, leaves
from dgate_rt.trace import Trace

_NAMED = 5  # classes


@dataclass(frozen=True)
class Options:
    gates: int = 3
    pool: Pool = DEFAULT_POOL
    threshold: float = 1.0  # of every gate; as in Figure 7
    draws: int = 200  # of samples that leave at random, to say what chance gives
    shown: int = 16  # images of each exit


def run(bench: Workbench, options: Options) -> Result:
    """Gate the test split, and count."""
    specs = [GateSpec(cut, pool=options.pool.value) for cut in bench.first_cuts(options.gates)]
    trace = bench.scores(specs).trace(bench.held_out(None)[1])
    exits = trace.replay([options.threshold] * options.gates, bench.costs(specs)).exits
    classes, count = bench.bundle.classes, options.gates + 1
    counts = np.zeros((len(classes), count), dtype=np.int64)
    np.add.at(counts, (trace.targets, exits), 1)
    sure = [
        leaves(torch.from_numpy(margin), options.threshold).numpy() & right
        for margin, right in zip(trace.margins, trace.correct, strict=False)
    ]
    found: Result = {
        "cuts": [spec.cut for spec in specs],
        "classes": classes,
        "threshold": options.threshold,
        "counts": counts,
        "sure_and_right": [np.bincount(trace.targets[rows], minlength=len(classes)) for rows in sure],
        "entropy": _entropies(trace.targets, exits, len(classes), count, options.draws),
        "errors": [_errors(trace, exits, g) for g in range(options.gates)],
        "network_accuracy": trace.network_accuracy,
        "images": [_images(bench, trace, exits, g, options.shown) for g in range(count)],
    }
    return {**found, "claims": _claims(found)}


def _entropies(
    targets: NDArray[np.int64], exits: NDArray[np.integer], classes: int, count: int, draws: int
) -> list[Result]:
    """Bits of the distribution of classes at each exit, and of as many samples drawn at random."""
    rng = np.random.default_rng(0)
    found = []
    for g in range(count):
        here = int((exits == g).sum())
        chance = [_bits(rng.choice(targets, here, replace=False), classes) for _ in range(draws)]
        found.append({
            "samples": here,
            "bits": _bits(targets[exits == g], classes),
            "chance": float(np.mean(chance)),
            "deviation": float(np.std(chance)),
        })  # fmt: skip
    return found


def _bits(targets: NDArray[np.int64], classes: int) -> float:
    shares = np.bincount(targets, minlength=classes) / max(len(targets), 1)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def _errors(trace: Trace, exits: NDArray[np.integer], gate: int) -> Result:
    """Of those that leave at a gate: right or wrong there, and what the whole network would have said."""
    here = exits == gate
    early, network = trace.correct[gate][here], trace.correct[-1][here]
    return {
        "samples": here.sum(),
        "both_right": (early & network).sum(),
        "only_network_right": (~early & network).sum(),
        "only_gate_right": (early & ~network).sum(),
        "both_wrong": (~early & ~network).sum(),
    }


def _images(bench: Workbench, trace: Trace, exits: NDArray[np.integer], exit_: int, most: int) -> str:
    """Samples that leave at an exit, from the surest to the least sure of its gate, as one picture."""
    here = np.flatnonzero(exits == exit_)
    gate = min(exit_, len(trace.margins) - 1)
    here = here[np.argsort(-trace.margins[gate][here], kind="stable")]
    chosen = here[np.linspace(0, len(here) - 1, min(most, len(here))).astype(int)]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in bench.bundle.stats)
    images = [bench.bundle.test[int(index)][0] * std + mean for index in chosen]
    return mosaic(torch.stack(images) if images else torch.empty(0, *bench.bundle.image_shape))


def _claims(found: Result) -> list[Result]:
    early = found["entropy"][:-1][:2]
    harmed, helped = (sum(int(e[name]) for e in found["errors"]) for name in ("only_network_right", "only_gate_right"))
    left = sum(int(e["samples"]) for e in found["errors"])
    return [
        claim(
            "The first gates answer some classes far more than others",
            all(e["samples"] > 0 and e["bits"] < e["chance"] - 3 * e["deviation"] for e in early),
            "; ".join(
                f"gate {g}: {e['bits']:.3f} bits over {e['samples']} samples, {e['chance']:.3f} ± {e['deviation']:.3f} "
                "by chance"
                for g, e in enumerate(early, 1)
            ),
        ),
        claim(
            "An early answer costs nothing: errors that the network would have avoided are no more than those that it "
            "would have made (our check)",
            harmed <= helped,
            f"of {left} early answers {harmed} are wrong where the network is right, {helped} right where it is wrong",
        ),
    ]


def tables(result: Result) -> list[Table]:
    """Entropies, errors, and the classes that leave earliest and latest."""
    names, counts = _exits(result), np.array(result["counts"])
    bits = [
        [name, str(e["samples"]), f"{e['bits']:.3f}", f"{e['chance']:.3f} ± {e['deviation']:.3f}"]
        for name, e in zip(names, result["entropy"], strict=True)
    ]
    kinds = ("samples", "both_right", "only_network_right", "only_gate_right", "both_wrong")
    errors = [[name, *(str(e[kind]) for kind in kinds)] for name, e in zip(names, result["errors"], strict=False)]
    order = [result["classes"][i] for i in earliest_first(counts) if counts[i].sum()]
    few = min(_NAMED, len(order) // 2)
    sure = [
        [name, str(sum(found)), str(min(found)), str(max(found))]
        for name, found in zip(names, result["sure_and_right"], strict=False)
    ]
    at = f"margin of {result['threshold']:g}"
    return [
        Table(
            "Distribution of classes at each exit",
            ("Exit", "Samples", "Entropy (bits)", "By chance"),
            bits,
            f"Earliest classes: {', '.join(order[:few])}. Latest: {', '.join(order[::-1][:few])}.",
        ),
        Table(
            f"Right with a {at} or more, whatever the gates before (the paper's Figure 7)",
            ("Gate", "Samples", "Fewest of a class", "Most of a class"),
            sure,
        ),
        Table(
            "Early answers against the whole network",
            ("Exit", "Samples", "Both right", "Only network right", "Only gate right", "Both wrong"),
            errors,
        ),
    ]


def figures(result: Result) -> Mapping[str, str]:
    """The heat map, and what left where."""
    names = [*(f"gate {g}" for g in range(1, len(result["cuts"]) + 1)), "whole network"]
    pictures = {f"images-{index + 1}": picture for index, picture in enumerate(result["images"])}
    return {"heat": classes_figure(np.array(result["counts"]), result["classes"], names, "exits"), **pictures}


def _exits(result: Result) -> Sequence[str]:
    return [*(f"gate {g}, {cut}" for g, cut in enumerate(result["cuts"], 1)), "whole network"]


EXPERIMENT = Experiment(
    name="classes",
    title="Classes across gates",
    source="Figures 6 to 8",
    about="Three gates, trained with hinge loss, all at the same threshold, on the test split. Chance is what as many "
    "samples would show if they left at random. The pictures show samples of the first exit, the second and so on, "
    "from the surest to the least sure.",
    options=Options(),
    quick=Options(draws=50),
    run=run,
    tables=tables,
    figures=figures,
)
