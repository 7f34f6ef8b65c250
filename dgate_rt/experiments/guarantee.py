"""Whether thresholds with a guarantee keep it: calibrations repeated on fresh samples, the drop measured exactly.

All validation and test samples together are the population, and each calibration draws from it with replacement. So
its samples are independent, which the guarantee asks for and several renderings of one digit are not, and the true drop
is known: that over the population. Samples kept apart to measure it would add chance of their own to each violation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from dgate_rt.cost import Costs
from dgate_rt.experiments.experiment import BEYOND, Experiment, Result, Table, claim
from dgate_rt.experiments.plots import Band, bands_figure
from dgate_rt.experiments.workbench import GateSpec, Workbench
from dgate_rt.frontier import Thresholds, search_frontier
from dgate_rt.gate import DEFAULT_POOL, Pool
from dgate_rt.risk import certify
from dgate_rt.trace import Trace

WAYS = ("guarantee", "plain")
_SAID = {"guarantee": "with guarantee", "plain": "without"}
_STREAM = 2  # of random numbers, beside those of `resampling`
_TINY = 1e-9  # less than one sample of any population; a drop of the bound itself is no violation


@dataclass(frozen=True)
class Options:
    calibrations: int = 200
    samples: int = 3000  # drawn for each
    gates: int = 3
    pool: Pool = DEFAULT_POOL
    drops: tuple[float, ...] = (0.005, 0.01, 0.02)  # bounds on the true drop
    confidence: float = 0.95


def run(bench: Workbench, options: Options) -> Result:
    """Calibrate again and again with and without guarantee, and replay the thresholds on the whole population."""
    if options.calibrations < 1 or options.samples < 1 or min(options.drops) <= 0:
        raise ValueError(f"set: expected calibrations and samples of at least 1, and drops above 0, got {options}")
    specs = [GateSpec(cut, pool=options.pool.value) for cut in bench.first_cuts(options.gates)]
    costs, population = bench.costs(specs), bench.scores(specs).trace(np.concatenate(bench.held_out(None)))
    found = [
        _calibrated(bench, specs, population, costs, number, options)
        for number in bench.track(range(options.calibrations), "calibrations with and without guarantee")
    ]
    result = {
        "cuts": [spec.cut for spec in specs],
        "network": {"accuracy": population.network_accuracy, "gflops": costs.dense / 1e9},
        "population": len(population.targets),
        "samples": options.samples,
        "confidence": options.confidence,
        "bounds": options.drops,
        **{
            way: [_summary([one[way][b] for one in found], bound) for b, bound in enumerate(options.drops)]
            for way in WAYS
        },
        "possible": [1 - _cheapest(population, costs, bound)[1] / costs.dense for bound in options.drops],
    }
    return {**result, "claims": _claims(result)}


def _calibrated(
    bench: Workbench, specs: list[GateSpec], population: Trace, costs: Costs, number: int, options: Options
) -> Result:
    """What one calibration's thresholds lose and save over the population, for every bound."""

    def measure() -> Result:
        rng = np.random.default_rng([number, _STREAM])
        draw = population.take(rng.integers(0, len(population.targets), options.samples))
        found: Result = {way: [] for way in WAYS}
        for bound in options.drops:
            certified = certify(draw, costs, bound, options.confidence)[0].thresholds
            for way, thresholds in zip(WAYS, (certified, _cheapest(draw, costs, bound)[0]), strict=True):
                replay = population.replay(thresholds, costs)
                found[way].append({
                    "drop": population.network_accuracy - replay.accuracy,
                    "saved": 1 - replay.cost / costs.dense,
                    "off": all(threshold == np.inf for threshold in thresholds),
                })  # fmt: skip
        return found

    key = {"fingerprint": bench.fingerprint, "data": bench.settings, "calibration": number, "samples": options.samples}
    key |= {"gates": [asdict(spec) for spec in specs], "drops": options.drops, "confidence": options.confidence}
    return bench.store.value("calibration", key, measure)


def _cheapest(trace: Trace, costs: Costs, drop: float) -> tuple[Thresholds, float]:
    """The cheapest thresholds that lose no more than ``drop`` on these samples, and their cost there."""
    wanted = trace.network_accuracy - drop
    point = search_frontier(trace, costs, min_accuracy=wanted).cheapest(wanted)
    return point.thresholds, point.cost


def _summary(rows: list[Result], bound: float) -> Result:
    drops = np.sort([row["drop"] for row in rows])
    return {
        "drops": drops,
        "violated": int(np.count_nonzero(drops > bound + _TINY)),
        "off": sum(row["off"] for row in rows),
        "saved": float(np.mean([row["saved"] for row in rows])),
    }


def _claims(result: Result) -> list[Result]:
    count, level = len(result["guarantee"][0]["drops"]), 1 - result["confidence"]
    shares = {way: [one["violated"] / count for one in result[way]] for way in WAYS}
    seen = {
        way: "; ".join(
            f"{one['violated']} of {count} at {100 * bound:g} %"
            for bound, one in zip(result["bounds"], result[way], strict=True)
        )
        for way in WAYS
    }
    return [
        claim(
            f"Thresholds certified with a confidence of {result['confidence']:.0%} lose more than the bound in at most "
            f"{level:.0%} of calibrations, at every bound",
            max(shares["guarantee"]) <= level + _TINY,
            f"violated in {seen['guarantee']}",
        ),
        claim(
            f"Without a guarantee the bound is violated in more than {level:.0%} of calibrations, at every bound",
            min(shares["plain"]) > level + _TINY,
            f"violated in {seen['plain']}",
        ),
    ]


def tables(result: Result) -> list[Table]:
    """Violations, and what the guarantee costs."""
    rows = []
    for b, bound in enumerate(result["bounds"]):
        for way in WAYS:
            one = result[way][b]
            count = len(one["drops"])
            rows.append([
                f"{100 * bound:g} %, {_SAID[way]}",
                f"{one['violated']} of {count} ({one['violated'] / count:.1%})",
                f"{np.mean(one['drops']):.2%}", f"{one['drops'][-1]:.2%}",
                f"{one['off']} of {count}", f"{one['saved']:.2%}", f"{result['possible'][b]:.2%}",
            ])  # fmt: skip
    columns = ("Bound", "Violated", "Mean true drop", "Largest", "All gates off", "FLOPs saved", "Possible")
    note = (
        f"{result['samples']:,} samples a calibration, drawn with replacement from {result['population']:,}, over "
        f"which drops and FLOPs are true; the network has {result['network']['accuracy']:.2%} there. Possible is what "
        "the cheapest thresholds found on the whole population save. All gates off: nothing cheaper could be certified."
    )
    return [Table("Violations, and what they save", columns, rows, note)]


def figures(result: Result) -> Mapping[str, str]:
    """The share of calibrations over their true drop, as a share of the bound."""
    lines = {}
    for b, bound in enumerate(result["bounds"]):
        for way in WAYS:
            count = len(result[way][b]["drops"])
            share = [number / count for number in range(1, count + 1)]
            name = f"{100 * bound:g} %, {_SAID[way]}"
            lines[name] = Band(
                [drop / bound for drop in result[way][b]["drops"]], share, share, share, b, dashed=way == "plain"
            )
    title = "True drops of repeated calibrations"
    return {"drops": bands_figure(lines, "true drop, of the bound", "calibrations that lose no more", title)}


EXPERIMENT = Experiment(
    name="guarantee",
    title="Thresholds with a guarantee",
    source=BEYOND,
    about="Three gates, trained with hinge loss. All samples that they were not trained on are the population; every "
    "calibration draws its own from it with replacement, so they are independent, and the true drop of its "
    "thresholds is known. On the same samples thresholds are chosen with guarantee (`dgate_rt.risk`) and without: the "
    "cheapest that lose no more than the bound on the samples themselves. Images as they are, with several renderings "
    "of one digit among them, are not independent, and this says nothing about those.",
    options=Options(),
    quick=Options(calibrations=20, samples=700, drops=(0.02,)),
    run=run,
    tables=tables,
    figures=figures,
)
