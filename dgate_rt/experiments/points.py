"""Four operating points of three gates: accuracy, FLOPs and time (Tables 1 and 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dgate_rt.agreement import check_agreement
from dgate_rt.compiling import compile
from dgate_rt.experiments import reported
from dgate_rt.experiments.experiment import Experiment, Result, Table, claim, points
from dgate_rt.experiments.plots import marked_figure
from dgate_rt.experiments.scores import Scores
from dgate_rt.experiments.workbench import GateSpec, Workbench
from dgate_rt.frontier import search_frontier
from dgate_rt.gate import DEFAULT_POOL, Pool
from dgate_rt.program import GateProgram
from dgate_rt.report import configuration
from dgate_rt.timing import interleaved, machine_header

_SAME = 0.0025
"""A difference of accuracy that is taken for none: about one standard error of 5,000 test samples."""
_REALISED = 0.95


@dataclass(frozen=True)
class _Said:
    """What the paper says of a network, in shares of its FLOPs and of all samples."""

    free: float  # saved at the network's own accuracy
    saved: float  # where a little accuracy is lost
    lost: float
    note: str = ""  # on the first
    of: str = ""  # the network, where it is another


_RESNET_101 = _Said(0.22, 0.438, 0.017)
_SAID = {
    "resnet101": _RESNET_101,
    "densenet201": _Said(0.168, 0.39, 0.02, " (460 MFLOPs of 2.73 G, which are DenseNet-201's by our count)"),
}
"""Table 1, section 3.4 and the abstract."""
_OTHERS = replace(_RESNET_101, of=" (said of ResNet-101)")
_LEAST_IMAGES = 32  # timed one by one


@dataclass(frozen=True)
class Options:
    gates: int = 3
    pool: Pool = DEFAULT_POOL
    drops: tuple[float, ...] = (0.0275, 0.0175, 0.0075, 0.0)  # allowed on validation data; about those of Table 1
    batch_sizes: tuple[float, ...] = (1, 32, 128)
    images: int = 128  # timed a round, or a batch if that is more
    rounds: int = 5


def run(bench: Workbench, options: Options) -> Result:
    """Choose every point on validation data, test it, and time it in turn with the dense network."""
    specs = [GateSpec(cut, pool=options.pool.value) for cut in bench.first_cuts(options.gates)]
    costs, scores, (val, test) = bench.costs(specs), bench.scores(specs), bench.held_out(None)
    chosen, tested = scores.trace(val), scores.trace(test)
    programs, rows = [], []
    for drop in bench.track(options.drops, "operating points"):
        wanted = chosen.network_accuracy - drop
        point = search_frontier(chosen, costs, min_accuracy=wanted).cheapest(wanted)
        replay = tested.replay(point.thresholds, costs)
        programs.append(bench.program(specs, point, costs, chosen.network_accuracy))
        rows.append({
            "name": configuration(point.thresholds),
            "thresholds": point.thresholds,
            "drop": drop,
            "accuracy": replay.accuracy,
            "lost": tested.network_accuracy - replay.accuracy,
            "gflops": replay.cost / 1e9,
            "saved": 1 - replay.cost / costs.dense,
            "shares": replay.shares,
            "validation": {"accuracy": point.accuracy, "saved": 1 - point.cost / costs.dense},
        })  # fmt: skip
    times = [
        _times(bench, programs, scores, int(size), options)
        for size in bench.track(options.batch_sizes, "dense and gated in turn, batch sizes")
    ]
    found: Result = {
        "cuts": [spec.cut for spec in specs],
        "network": {"accuracy": tested.network_accuracy, "gflops": costs.dense / 1e9},
        "rows": rows,
        "times": times,
    }
    return {**found, "claims": _claims(found, bench.meta.name)}


def _times(
    bench: Workbench, programs: list[GateProgram], scores: Scores, batch_size: int, options: Options
) -> dict[str, Any]:
    """Milliseconds a sample of dense and every program on the same test images, and what these images would allow."""
    count = max(batch_size, options.images if batch_size > 1 else min(options.images, _LEAST_IMAGES))
    test = bench.held_out(None)[1]
    picked = np.random.default_rng(0).permutation(len(test))[: min(count, len(test))]
    trace = scores.trace(test[picked])
    costs = programs[0].costs
    saved = [1 - trace.replay(program.thresholds, costs).cost / costs.dense for program in programs]

    def measure() -> dict[str, Any]:
        images = torch.stack([bench.bundle.test[int(index)][0] for index in picked]).to(bench.device)
        how: Any = {"batch_size": batch_size, "device": bench.device}
        for program in programs:
            check_agreement(f"batch size {batch_size}", program, trace, compile(program, scores=True, **how)(images))
        runs = [compile(programs[0], executor="dense", **how), *(compile(program, **how) for program in programs)]
        jobs = [lambda run=run: run(images) for run in runs]
        timings = [timing.per(len(images)) for timing in interleaved(jobs, repeats=options.rounds)]
        return {
            "executor": runs[-1].executor,
            "ms": [{"median": t.median, "p20": t.p20, "p80": t.p80} for t in timings],
            "ratios": [timing.ratio(timings[0]) for timing in timings[1:]],
        }

    key = {
        "fingerprint": bench.fingerprint,
        "data": bench.settings,
        "machine": machine_header(),
        "batch_size": batch_size,
        "images": len(picked),
        "rounds": options.rounds,
        "cuts": programs[0].staged.cuts,
        "thresholds": [[str(t) for t in program.thresholds] for program in programs],
    }
    found = bench.store.value("times", key, measure)
    gained = [1 - ratio for ratio in found["ratios"]]
    return {
        "batch_size": batch_size,
        "executor": found["executor"],
        "dense": found["ms"][0],
        "gated": [
            {**ms, "speed_up": gain, "saved_here": share, "realisation": gain / share if share > 0 else None}
            for ms, gain, share in zip(found["ms"][1:], gained, saved, strict=True)
        ],
    }


def _claims(found: Result, backbone: str) -> list[Result]:
    rows, network, said = found["rows"], found["network"]["accuracy"], _SAID.get(backbone, _OTHERS)
    strict = min(rows, key=lambda row: row["drop"])
    loose = min(rows, key=lambda row: abs(row["drop"] - said.lost))
    last = found["times"][-1]
    realised = [(gated["realisation"], row["name"]) for gated, row in zip(last["gated"], rows, strict=True)]
    known = [(value, name) for value, name in realised if value is not None]
    worst = min(known, default=(0.0, "no row, none saves FLOPs"))
    strictly = f"{strict['name']} saves {strict['saved']:.1%}, accuracy {points(-strict['lost'])} of {network:.2%}"
    return [
        claim(
            f"FLOPs fall by {100 * said.free:g} % at the accuracy of the network itself{said.note}{said.of}",
            strict["saved"] >= said.free and strict["lost"] <= _SAME,
            f"{strictly}; up to {100 * _SAME:g} points lost count as none",
        ),
        claim(
            f"FLOPs fall by {100 * said.saved:g} % for {100 * said.lost:g} points of accuracy{said.of}",
            loose["saved"] >= said.saved and loose["lost"] <= said.lost + _SAME,
            f"{loose['name']} saves {loose['saved']:.1%}, accuracy {points(-loose['lost'])}",
        ),
        claim(
            "Time falls as FLOPs do: realised speed-up is at least 0.95 of what the FLOPs allow, in every row",
            bool(known) and worst[0] >= _REALISED,
            f"at batch size {last['batch_size']} the least is {worst[0]:.2f} ({worst[1]})",
        ),
    ]


def tables(result: Result) -> list[Table]:
    """The paper's columns, and realisation at every batch size."""
    network, rows, largest = result["network"], result["rows"], result["times"][-1]
    ours = [
        [
            row["name"], f"{row['accuracy']:.2%}", f"{row['gflops']:.4g}", f"{row['saved']:.2%}",
            f"{timed['median']:.3g}", f"{timed['speed_up']:.2%}",
            "/".join(f"{100 * share:.0f}" for share in row["shares"]),
        ]
        for row, timed in zip(rows, largest["gated"], strict=True)
    ]  # fmt: skip
    dense = f"{largest['dense']['median']:.3g}"
    ours.append(["original", f"{network['accuracy']:.2%}", f"{network['gflops']:.4g}", "–", dense, "–", "–"])
    realised = [
        [
            row["name"], str(times["batch_size"]), times["executor"], f"{times['dense']['median']:.3g}",
            f"{timed['median']:.3g} [{timed['p20']:.3g}–{timed['p80']:.3g}]", f"{timed['speed_up']:.1%}",
            f"{timed['saved_here']:.1%}", "–" if timed["realisation"] is None else f"{timed['realisation']:.2f}",
        ]
        for times in result["times"]
        for row, timed in zip(rows, times["gated"], strict=True)
    ]  # fmt: skip
    return [
        Table(
            "Ours",
            ("Model", "Accuracy", "FLOPs (G)", "FLOPs reduction", "ms", "Speed-up", "Exits (%)"),
            ours,
            f"Time a sample at batch size {largest['batch_size']}. Speed-up is the share of the dense network's time "
            "that is saved, as in the paper.",
        ),
        Table(
            "Realised",
            ("Model", "Batch", "Executor", "Dense ms", "Gated ms", "Speed-up", "FLOPs saved", "Realisation"),
            realised,
            "Medians with p20 and p80, dense and gated in turn in one process; speed-ups are medians of ratios round "
            "by round. FLOPs saved are those of the timed images, realisation the speed-up as a share of them.",
        ),
    ]


def figures(result: Result) -> Mapping[str, str]:
    """Accuracy over FLOPs, with the paper's rows beside it."""
    ours = [(1 - row["saved"], -row["lost"]) for row in result["rows"]]
    theirs = [(float(row[2]) / 5.02, (float(row[1][:-1]) - 94.71) / 100) for row in reported.RESNET_101.rows[:-1]]
    return {
        "rows": marked_figure(
            {"measured here": ours, "ResNet-101 on CIFAR-10, as reported": theirs},
            "FLOPs as a share of the network's",
            "accuracy less the network's",
            "What four operating points cost and lose",
        )
    }


EXPERIMENT = Experiment(
    name="points",
    title="Operating points",
    source="Tables 1 and 2",
    about="Three gates, trained with hinge loss. Thresholds are the cheapest that lose no more than is allowed on "
    "validation data; accuracy and FLOPs are those of the test split. Before anything is timed its answers are "
    "compared with gates applied afterwards.",
    options=Options(),
    quick=Options(batch_sizes=(1, 32), images=64, rounds=3),
    run=run,
    tables=tables,
    figures=figures,
    reported=reported.TABLES,
)
