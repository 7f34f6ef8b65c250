"""Corrupted images: what network and gates lose, and whether the monitor, which sees no labels, says so in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dgate_rt.corruptions import KINDS, SEVERITIES
from dgate_rt.cost import Costs
from dgate_rt.data import ArrayDataset
from dgate_rt.drift import ALPHA, DriftReport, Reference
from dgate_rt.experiments.experiment import BEYOND, Experiment, Result, Table, claim
from dgate_rt.experiments.plots import Band, bands_figure
from dgate_rt.experiments.workbench import GateSpec, Workbench
from dgate_rt.frontier import search_frontier
from dgate_rt.gate import DEFAULT_POOL, Pool
from dgate_rt.trace import Trace

_STREAM = 3  # of random numbers, beside those of `resampling` and `guarantee`
_TINY = 1e-9  # less than one sample or window


@dataclass(frozen=True)
class Options:
    gates: int = 3
    pool: Pool = DEFAULT_POOL
    drop: float = 0.01  # allowed on validation data when thresholds are chosen
    windows: int = 100  # of each condition
    window: int = 250  # images
    alpha: float = ALPHA  # false alarms that the monitor may give
    noticed: float = 0.02  # a loss of accuracy that it should tell
    power: float = 0.95  # in this share of the windows


def _unfit(bench: Workbench) -> str:
    held = isinstance(bench.bundle.test, ArrayDataset)
    return "" if held else f"expected test images held in memory, to corrupt them, got those of {bench.bundle.name!r}"


def run(bench: Workbench, options: Options) -> Result:
    """Choose thresholds on validation data, then show the monitor windows of clean and of corrupted test images."""
    images = bench.settings["samples"]["test"]
    if options.windows < 1 or not 1 <= options.window <= images:
        raise ValueError(f"set: expected windows of at least 1, each of 1 to {images} images, got {options}")
    specs = [GateSpec(cut, pool=options.pool.value) for cut in bench.first_cuts(options.gates)]
    costs, chosen = bench.costs(specs), bench.scores(specs).trace(bench.held_out(None)[0])
    wanted = chosen.network_accuracy - options.drop
    point = search_frontier(chosen, costs, min_accuracy=wanted).cheapest(wanted)
    reference = Reference.at(_scores(chosen), point.thresholds)
    conditions: list[tuple[str, int] | None] = [None, *((kind, severity) for kind in KINDS for severity in SEVERITIES)]
    rows = []
    for number, corruption in enumerate(bench.track(conditions, "clean and corrupted images")):
        trace = bench.scores_on("test", specs, corruption=corruption).trace(np.arange(images))
        kind, severity = corruption or (None, 0)
        reports = _reports(reference, trace, number, options)
        rows.append({"kind": kind, "severity": severity, **_condition(trace, reference, costs, reports)})
    clean, corrupted = rows[0], rows[1:]
    for row in rows:
        row["network_lost"], row["gated_lost"] = clean["network"] - row["network"], clean["gated"] - row["gated"]
    result = {
        "cuts": [spec.cut for spec in specs],
        "gflops": costs.dense / 1e9,
        "thresholds": point.thresholds,
        "reference": reference.samples,
        "images": images,
        "windows": options.windows,
        "window": options.window,
        "clean": clean,
        "corrupted": corrupted,
        "first": {kind: _first([row for row in corrupted if row["kind"] == kind], options) for kind in KINDS},
    }
    return {**result, "claims": _claims(result, options)}


def _scores(trace: Trace) -> torch.Tensor:  # [G + 1, N] float32
    """Of every gate, and behind them of the network."""
    assert trace.network_scores is not None
    return torch.from_numpy(np.concatenate([trace.margins, trace.network_scores[None]]))


def _reports(reference: Reference, trace: Trace, number: int, options: Options) -> list[DriftReport]:
    """What the monitor says after each window."""
    exits = torch.from_numpy(trace.gated(reference.thresholds)[0]).long()
    left = _scores(trace).gather(0, exits[None])[0]
    drawn = _drawn(len(exits), options.windows, options.window, number)
    counts = [reference.count(exits[rows], left[rows]) for rows in map(torch.from_numpy, drawn)]
    return [reference.compare(window, options.alpha) for window in counts]


def _drawn(images: int, windows: int, window: int, number: int) -> NDArray[np.int64]:  # [windows, window]
    """Rows of each window: orders of all images, cut up, so that windows of one order have no image in common."""
    rng, each = np.random.default_rng([number, _STREAM]), images // window
    orders = [rng.permutation(images)[: each * window].reshape(each, window) for _ in range(-(-windows // each))]
    return np.concatenate(orders)[:windows]


def _condition(trace: Trace, reference: Reference, costs: Costs, reports: Sequence[DriftReport]) -> Result:
    replay = trace.replay(reference.thresholds, costs)
    return {
        "network": trace.network_accuracy,
        "gated": replay.accuracy,
        "shares": replay.shares,
        "saved": 1 - replay.cost / costs.dense,
        "alarms": np.mean([report.alarm for report in reports]),
        "by_shares": np.mean([any(e.share_moved for e in report.exits) for report in reports]),
        "by_scores": np.mean([any(e.scores_moved for e in report.exits) for report in reports]),
    }


def _first(rows: Sequence[Result], options: Options) -> Result:
    """The first severity at which the gated network has lost too much, and the first of which the monitor tells."""
    lost = next((row["severity"] for row in rows if row["gated_lost"] >= options.noticed - _TINY), None)
    told = next((row["severity"] for row in rows if row["alarms"] >= options.power - _TINY), None)
    return {"lost": lost, "told": told}


def _claims(result: Result, options: Options) -> list[Result]:
    lost = {kind: first for kind, first in result["first"].items() if first["lost"] is not None}
    in_time = [first["told"] is not None and first["told"] <= first["lost"] for first in lost.values()]
    seen = [
        f"{kind}: lost from {_severity(first['lost'])}, told from {_severity(first['told'])}"
        for kind, first in result["first"].items()
    ]
    return [
        claim(
            f"For each kind of corruption the monitor alarms in {options.power:.0%} of windows at or before the first "
            f"severity at which the gated network has lost {100 * options.noticed:g} points",
            bool(in_time) and all(in_time),
            f"{'; '.join(seen)}; windows of {result['window']} images",
        ),
        claim(
            f"On clean images no more than {options.alpha:.0%} of windows are false alarms",
            result["clean"]["alarms"] <= options.alpha + _TINY,
            f"{result['clean']['alarms']:.1%} of {result['windows']} windows of {result['window']} from "
            f"{result['images']:,} images",
        ),
    ]


def _severity(number: int | None) -> str:
    return "none of the severities" if number is None else f"severity {number}"


def tables(result: Result) -> list[Table]:
    """Accuracy, exits and alarms at every severity."""
    rows = [
        [
            f"{row['kind']} {row['severity']}" if row["kind"] else "clean",
            f"{row['network']:.2%}", f"{row['gated']:.2%}",
            f"{100 * row['network_lost']:+.2f}", f"{100 * row['gated_lost']:+.2f}",
            f"{100 * (row['gated_lost'] - row['network_lost']):+.2f}",
            "/".join(f"{100 * share:.0f}" for share in row["shares"]), f"{row['saved']:.1%}",
            f"{row['alarms']:.0%}", f"{row['by_shares']:.0%}", f"{row['by_scores']:.0%}",
        ]
        for row in (result["clean"], *result["corrupted"])
    ]  # fmt: skip
    columns = ("Images", "Network", "Gated", "Network loses", "Gated loses", "More by", "Exits (%)", "FLOPs saved")
    each = result["images"] // result["window"]
    note = (
        f"Losses in points, against clean images. Alarms in {result['windows']} windows of {result['window']} images, "
        f"by shares of exits or by scores: {result['images']:,} test images in {-(-result['windows'] // each)} random "
        f"orders, each cut into {each} windows. So windows share images, and all share one reference of "
        f"{result['reference']:,} validation images: they are not as many independent trials."
    )
    return [Table("Clean and corrupted test images", (*columns, "Alarms", "By shares", "By scores"), rows, note)]


def figures(result: Result) -> Mapping[str, str]:
    """Alarms over what is lost, and what gates lose over what the network loses."""
    alarms, lost = {}, {}
    for colour, kind in enumerate(KINDS):
        rows = [result["clean"], *(row for row in result["corrupted"] if row["kind"] == kind)]
        network, gated, told = ([row[name] for row in rows] for name in ("network_lost", "gated_lost", "alarms"))
        alarms[kind] = Band(gated, told, told, told, colour)
        lost[kind] = Band(network, gated, gated, gated, colour)
    end = max(row["network_lost"] for row in result["corrupted"])
    lost["as much"] = Band([0, end], [0, end], [0, end], [0, end], len(KINDS), dashed=True)
    return {
        "alarms": bands_figure(alarms, "accuracy that the gated network lost", "windows with an alarm", "Alarms"),
        "lost": bands_figure(lost, "accuracy lost by the network", "by the gated network", "What corruption costs"),
    }


EXPERIMENT = Experiment(
    name="drift",
    title="Corrupted images and the monitor",
    source=BEYOND,
    about="Three gates, trained with hinge loss; thresholds are the cheapest that lose at most one point on "
    "validation data. Test images are corrupted (`dgate_rt.corruptions`), and the monitor compares windows of them "
    "with the validation samples (`dgate_rt.drift`). Its tests take samples for independent; where several images "
    "show one digit that is not quite so.",
    options=Options(),
    quick=Options(windows=20, window=100),
    run=run,
    tables=tables,
    figures=figures,
    unfit=_unfit,
)
