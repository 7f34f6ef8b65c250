"""The gated network against narrower networks without gates, of equal FLOPs and trained alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dgate_rt import backbones, transfer
from dgate_rt.cost import Costs
from dgate_rt.errors import UnreachableTargetError
from dgate_rt.experiments import curves
from dgate_rt.experiments.experiment import BEYOND, Experiment, Result, Table, claim, points
from dgate_rt.experiments.plots import Band, bands_figure
from dgate_rt.experiments.training import Training
from dgate_rt.experiments.workbench import GateSpec, Workbench
from dgate_rt.flops import count_flops
from dgate_rt.frontier import OperatingPoint, search_frontier
from dgate_rt.gate import DEFAULT_POOL, Pool
from dgate_rt.trace import Trace

_BASE = 64  # a width of 1 / 64 is one channel of a ResNet's first block
_BATCH, _BUDGETS = 128, 41


@dataclass(frozen=True)
class Options:
    gates: int = 3
    pool: Pool = DEFAULT_POOL
    drops: tuple[float, ...] = (0.0275, 0.01, 0.0)  # allowed on validation data; each has a static network of its FLOPs
    multiple: int = 2  # of the static networks' channel counts


def _unfit(bench: Workbench) -> str:
    name = bench.meta.name
    return f"expected a network of any width, got {name}, whose width is fixed" if name in transfer.names() else ""


def run(bench: Workbench, options: Options) -> Result:
    """For each point train the static network nearest in FLOPs, and give the gated one no more than it takes."""
    if not options.drops or options.multiple < 1:
        raise ValueError(f"set: expected a drop or more and a multiple of at least 1, got {options}")
    specs = [GateSpec(cut, pool=options.pool.value) for cut in bench.first_cuts(options.gates)]
    costs, scores, (val, test) = bench.costs(specs), bench.scores(specs), bench.held_out(None)
    chosen, tested = scores.trace(val), scores.trace(test)
    how = bench.training or Training()
    sizes, least = _sizes(bench, options.multiple), search_frontier(chosen, costs).points[0].cost
    sizes = {width: flops for width, flops in sizes.items() if flops >= least} or sizes  # that thresholds can match
    rows = []
    for number, drop in enumerate(options.drops, 1):
        wanted = chosen.network_accuracy - drop
        own = search_frontier(chosen, costs, min_accuracy=wanted).cheapest(wanted)
        width = min(sizes, key=lambda width: abs(sizes[width] - own.cost))
        bench.note(f"static network {number} of {len(options.drops)}: width {width:g}")
        right = _answers(bench, how, width, options.multiple) == tested.targets
        static = {"width": width, "cost": sizes[width] / costs.dense, "accuracy": float(right.mean())}
        equal = _within(chosen, costs, sizes[width])
        gated = {name: _replayed(tested, costs, point) for name, point in (("own", own), ("equal", equal))}
        rows.append({"drop": drop, "static": static, **gated, **_ahead(tested, costs, equal, right)})
    found: Result = {
        "cuts": [spec.cut for spec in specs],
        "network": {"accuracy": tested.network_accuracy, "gflops": costs.dense / 1e9},
        "training": {**asdict(how), "as_the_network": bench.training is not None},
        "rows": rows,
        "curve": curves.along(chosen, tested, costs, _BUDGETS),
    }
    return {**found, "claims": _claims(found)}


def _sizes(bench: Workbench, multiple: int) -> dict[float, float]:
    """FLOPs a sample of every narrower network, by its width; nothing is computed.

    Raises:
        ValueError: if there is none.
    """
    sizes = {}
    for channels in range(multiple, math.ceil(_BASE * bench.meta.width), multiple):
        with torch.device("meta"), torch.no_grad():
            model, example = _build(bench, channels / _BASE, multiple).eval(), torch.empty(1, *bench.bundle.image_shape)
            with count_flops() as counter:
                model(example)
        sizes[channels / _BASE] = float(counter.get_total_flops())
    if not sizes:
        raise ValueError(f"multiple: expected less than {_BASE * bench.meta.width:g} for this width, got {multiple}")
    return sizes


def _build(bench: Workbench, width: float, multiple: int) -> nn.Module:
    meta = bench.meta
    shape: Any = {"num_classes": meta.num_classes, "in_channels": meta.in_channels}
    return backbones.build(meta.name, width=width, multiple=multiple, **shape)


def _answers(bench: Workbench, how: Training, width: float, multiple: int) -> NDArray[np.int64]:  # [N], of the tests
    """What a static network says to the test samples; it is trained now if it was not yet."""
    settings = {name: value for name, value in bench.settings.items() if name not in ("width", "network", "training")}
    key = {"data": settings, "width": width, "multiple": multiple, "training": asdict(how)}
    checkpoint = bench.store.path("static", key, ".training.safetensors")

    def train() -> dict[str, Any]:
        settings: Any = {"device": bench.device, "workers": bench.workers, "progress": bench.progress}
        return how.train(lambda: _build(bench, width, multiple), bench.bundle, checkpoint, **settings).state_dict()

    state = bench.store.tensors("static", key, train)
    checkpoint.unlink(missing_ok=True)

    def answer() -> list[int]:
        model = _build(bench, width, multiple).eval()
        model.load_state_dict(state)
        model = model.to(device=bench.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks it
        loader = bench.bundle.loader("test", _BATCH, workers=bench.workers)
        with torch.inference_mode():
            return [int(label) for x, _ in loader for label in model(x.to(bench.device)).argmax(1)]

    return np.array(bench.store.value("static-answers", key, answer))


def _within(trace: Trace, costs: Costs, most: float) -> OperatingPoint | None:
    """The most accurate point that costs no more on average; None if every one does."""
    try:
        return search_frontier(trace, costs, max_cost=most).most_accurate(most)
    except UnreachableTargetError:
        return None


def _replayed(trace: Trace, costs: Costs, point: OperatingPoint | None) -> Result | None:
    if point is None:
        return None
    replay = trace.replay(point.thresholds, costs)
    return {"cost": replay.cost / costs.dense, "accuracy": replay.accuracy, "thresholds": point.thresholds}


def _ahead(trace: Trace, costs: Costs, point: OperatingPoint | None, static: NDArray[np.bool_]) -> Result:
    """How much more accurate the gated network is on the same samples, and the standard error of that."""
    if point is None:
        return {"ahead": None, "error": None}
    difference = trace.gated(point.thresholds)[1].astype(float) - static
    return {"ahead": difference.mean(), "error": difference.std(ddof=1) / math.sqrt(len(difference))}


def _claims(found: Result) -> list[Result]:
    seen = [
        f"with {row['static']['cost']:.1%} of the FLOPs {points(row['ahead'])} (standard error "
        f"{100 * row['error']:.2f}): gated {row['equal']['accuracy']:.2%}, static {row['static']['accuracy']:.2%}"
        if row["equal"]
        else f"no thresholds cost as little as {row['static']['cost']:.1%} of the FLOPs"
        for row in found["rows"]
    ]
    return [
        claim(
            "At equal mean FLOPs the gated network is more accurate on test data than a narrower network without "
            "gates that was trained alike, at every point",
            all(row["ahead"] is not None and row["ahead"] > 0 for row in found["rows"]),
            "; ".join(dict.fromkeys(seen)),  # points near to each other have one static network
        )
    ]


def tables(result: Result) -> list[Table]:
    """Each point, its static network, and the gated network within that one's FLOPs."""
    rows = []
    for row in result["rows"]:
        own, static, equal = row["own"], row["static"], row["equal"]
        rows.append([
            f"{100 * row['drop']:g} %",
            f"{own['accuracy']:.2%} at {own['cost']:.1%}",
            f"{static['width']:.4g}",
            f"{static['accuracy']:.2%} at {static['cost']:.1%}",
            f"{equal['accuracy']:.2%} at {equal['cost']:.1%}" if equal else "–",
            f"{100 * row['ahead']:+.2f} ± {100 * row['error']:.2f}" if equal else "–",
        ])  # fmt: skip
    how = result["training"]
    alike = "as the network was" if how["as_the_network"] else "by these settings, while the network's are not known"
    note = (
        f"Accuracy on test samples at mean FLOPs, a share of the network's, which has "
        f"{result['network']['accuracy']:.2%}. Differences in points, with their standard error over the samples. "
        f"Static networks were trained {alike}: {how['epochs']} epochs, once, with seed {how['seed']}."
    )
    columns = ("Allowed", "Gated", "Static width", "Static", "Gated within its FLOPs", "Gated ahead by")
    return [Table("At equal FLOPs", columns, rows, note)]


def figures(result: Result) -> Mapping[str, str]:
    """The gated network for every budget, and the static networks beside it."""
    cost, accuracy = zip(*result["curve"], strict=True)
    static = sorted({(row["static"]["cost"], row["static"]["accuracy"]) for row in result["rows"]})
    static.append((1.0, result["network"]["accuracy"]))
    x, y = zip(*static, strict=True)
    bands = {"gated": Band(cost, accuracy, accuracy, accuracy), "static, narrower": Band(x, y, y, y, 1, True)}
    axes = "mean FLOPs a sample, of the network's", "accuracy"
    return {"curve": bands_figure(bands, *axes, "Gated network and narrower static networks", static[-1])}


EXPERIMENT = Experiment(
    name="static",
    title="Gates against a narrower network",
    source=BEYOND,
    about="Three gates, trained with hinge loss, at points that lose no more than is allowed on validation data. For "
    "each the backbone is built narrower, to about the mean FLOPs of the point, and trained by the same recipe. Widths "
    "come in steps, thresholds hardly do: so thresholds are then chosen anew, the most accurate on validation data "
    "within the FLOPs of the static network. One training each: how far another seed would move a static network is "
    "not measured, nor what gates of its own would save it.",
    options=Options(),
    quick=Options(drops=(0.02,)),
    run=run,
    tables=tables,
    figures=figures,
    unfit=_unfit,
)
