"""One self-contained page about gated runs: the table, the frontier, who left where, and the graph of a batch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text
from torch import Tensor

from dgate_rt import figures, webpage
from dgate_rt.compiling import compile
from dgate_rt.drawing import exit_colours
from dgate_rt.errors import ExecutorError
from dgate_rt.program import GateProgram
from dgate_rt.trace import Replay, Trace

_RIGHT_SHOWN, _WRONG_SHOWN = 12, 4
_CLASSES_NAMED = 5


@dataclass(frozen=True)
class TableRow:
    """One line in the form of the paper's Table 1; reductions are shares of the dense network's, None for itself."""

    name: str
    accuracy: float
    gflops: float  # mean a sample
    flops_reduction: float | None
    ms: float  # a sample
    speed_up: float | None  # share of the dense network's time that is saved
    shares: tuple[float, ...]  # length G + 1; share of the samples that left at each exit


def configuration(thresholds: Sequence[float]) -> str:
    """How the paper writes an operating point: ``dg(2.4, 2.4, 1.5)``; a gate that is off reads "off"."""
    return f"dg({', '.join('off' if t == math.inf else f'{t:.2f}' for t in thresholds)})"


def exit_names(program: GateProgram) -> tuple[str, ...]:
    """What to call each exit: by the stage before it."""
    return (*(f"after {cut}" for cut in program.staged.cuts), "whole network")


def cells(row: TableRow) -> list[str]:
    """The row's figures, as they are printed."""
    reduction = "–" if row.flops_reduction is None else f"{row.flops_reduction:.2%}"
    speed_up = "–" if row.speed_up is None else f"{row.speed_up:.2%}"
    shares = "/".join(f"{100 * share:.0f}" for share in row.shares)
    return [
        row.name,
        f"{row.accuracy:.2%}",
        f"{row.gflops:.{2 if row.gflops >= 1 else 4}f}",
        reduction,
        f"{row.ms:.3f}",
        speed_up,
        shares,
    ]


HEADINGS = ("Model", "Accuracy", "FLOPs (G)", "FLOPs reduction", "ms", "Speed-up", "Exits (%)")


def console_table(rows: Iterable[TableRow], title: str | None = None) -> Table:
    """The same table for a terminal."""
    table = Table(title=title, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, heading in enumerate(HEADINGS):
        table.add_column(
            heading.replace("FLOPs ", "FLOPs\n"),
            justify="right" if index else "left",
            no_wrap=index == 0,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(Text, cells(row)))  # as they are: no markup
    return table


def simulated_graph(program: GateProgram, batch_size: int) -> tuple[dict[str, Any] | None, list[str]]:
    """The graph that batches of a program become on the recording driver, as `write_report` draws it, and notes.

    One dense batch is run on the CPU for it. Where it cannot be had there is None, and a note that says why.
    """
    try:
        return compile(program, batch_size=batch_size, device="cpu-sim", executor="graph").describe("json"), []
    except ExecutorError as error:
        return None, [f"The assembled graph is not shown: {error}"]


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    programs: Mapping[str, GateProgram],
    trace: Trace,
    images: Tensor | None,  # [N, C, H, W], the samples of the trace
    classes: Sequence[str],
    table: Sequence[TableRow],
    notes: Sequence[str] = (),
    graph: Mapping[str, Any] | None = None,
) -> None:
    """Write the page, whole or not at all; it loads nothing from anywhere.

    Args:
        path: of the page.
        title: its heading.
        programs: the operating points to show, by name; gates of one network, whose margins ``trace`` holds.
        trace: of the test split. All that is said about single exits is replayed from it.
        images: what the samples look like; without them no examples are shown.
        classes: names of the K classes.
        table: the measured rows.
        notes: lines for the head of the page.
        graph: what batches of the first program become, from `simulated_graph`; without it no graph is shown.

    Raises:
        ValueError: without a program, or if programs, trace, images, classes and graph do not belong together.
    """
    _check(programs, trace, images, classes)
    replays = {name: trace.replay(program.thresholds, program.costs) for name, program in programs.items()}
    sections = [
        webpage.section("table", "Accuracy and cost", webpage.table(HEADINGS, map(cells, table)) + _TABLE_NOTE),
        webpage.section("frontier", "The frontier", _frontier(programs, replays, trace)),
        webpage.section("exits", "Where samples leave", _exits(programs, replays, trace)),
        webpage.section("classes", "Classes by exit", _classes(programs, replays, trace, classes)),
    ]
    if images is not None:
        sections.append(webpage.section("examples", "Examples", _examples(programs, replays, trace, images, classes)))
    if graph is not None:
        sections.append(webpage.section("graph", "The assembled graph", _graph(*next(iter(programs.items())), graph)))
    webpage.write_page(path, title, notes, sections)


def _check(programs: Mapping[str, GateProgram], trace: Trace, images: Tensor | None, classes: Sequence[str]) -> None:
    gates, count = trace.margins.shape
    if not programs:
        raise ValueError("programs: expected at least one, got none")
    for name, program in programs.items():
        if len(program.thresholds) != gates:
            raise ValueError(
                f"programs: expected {gates} gates, as the trace has, got {len(program.thresholds)} in {name!r}"
            )
    if count == 0:
        raise ValueError("trace: expected at least one sample, got none")
    if images is not None and (images.ndim != 4 or len(images) != count):
        raise ValueError(f"images: expected [{count}, C, H, W], one a sample of the trace, got {list(images.shape)}")
    largest = int(max(trace.targets.max(), trace.predictions.max()))
    if largest >= len(classes):
        raise ValueError(f"classes: expected at least {largest + 1} names, got {len(classes)}")


def _frontier(programs: Mapping[str, GateProgram], replays: Mapping[str, Replay], trace: Trace) -> str:
    costs = next(iter(programs.values())).costs
    scale, unit = (1e9, "GFLOPs") if costs.unit == "FLOPs" else (1.0, costs.unit)
    figure = figures.frontier_figure(
        list(dict.fromkeys(program.frontier for program in programs.values())),
        {name: program.point for name, program in programs.items()},
        {name: (replay.cost, replay.accuracy) for name, replay in replays.items()},
        (costs.dense, trace.network_accuracy),
        unit,
        scale,
    )
    return figure + (
        "<p>Every point of the line is one choice of thresholds that no other beats in both accuracy and cost on the "
        "validation data. Hollow: the points chosen there. Filled: the same thresholds on the test data.</p>"
    )


def _exits(programs: Mapping[str, GateProgram], replays: Mapping[str, Replay], trace: Trace) -> str:
    names = exit_names(next(iter(programs.values())))
    figure = figures.exits_figure({name: list(map(float, r.shares)) for name, r in replays.items()}, names)
    rows, every = [], np.arange(len(trace.targets))
    for name, replay in replays.items():
        answered = trace.correct[replay.exits, every]
        for index, label in enumerate((*programs[name].thresholds, None)):
            here = replay.exits == index
            rows.append([
                name, names[index], "–" if label is None else "off" if label == math.inf else f"{label:.4g}",
                str(here.sum()), f"{here.mean():.1%}", _mean(answered[here]), _mean(trace.correct[-1][here]),
            ])  # fmt: skip
    headings = ("Program", "Exit", "Threshold", "Samples", "Share", "Accuracy there", "Whole network on the same")
    return figure + webpage.table(headings, rows)


def _classes(
    programs: Mapping[str, GateProgram], replays: Mapping[str, Replay], trace: Trace, classes: Sequence[str]
) -> str:
    parts = []
    for name, replay in replays.items():
        names = exit_names(programs[name])
        counts = np.zeros((len(classes), len(names)), dtype=np.int64)
        np.add.at(counts, (trace.targets, replay.exits), 1)
        order = [classes[i] for i in figures.earliest_first(counts) if counts[i].sum()]
        few = min(_CLASSES_NAMED, len(order) // 2)
        figure = figures.classes_figure(counts, classes, names, name)
        parts.append(
            f"<figure><figcaption><b>{escape(name)}</b> {escape(configuration(programs[name].thresholds))}</figcaption>"
            f"{figure}<p>Earliest: {escape(', '.join(order[:few]))}. "
            f"Latest: {escape(', '.join(order[::-1][:few]))}.</p></figure>"
        )
    note = "<p>Samples of each class that each exit answered; the shade is the share of the class.</p>"
    return f'<div class="side">{"".join(parts)}</div>{note}'


def _examples(
    programs: Mapping[str, GateProgram],
    replays: Mapping[str, Replay],
    trace: Trace,
    images: Tensor,
    classes: Sequence[str],
) -> str:
    chosen = {name: _shown(replay, trace) for name, replay in replays.items()}
    ids = np.unique(np.concatenate([rows for exits in chosen.values() for rows in exits]))
    uris = dict(zip(ids.tolist(), figures.thumbnails(images[ids]), strict=True))
    colours = exit_colours(len(trace.margins))
    parts: list[str] = []
    for name, replay in replays.items():
        answers = trace.predictions[replay.exits, np.arange(len(trace.targets))]
        wrong = answers != trace.targets
        blocks = []
        for index, exit_name in enumerate(exit_names(programs[name])):
            pictures = [
                _picture(uris[i], classes[trace.targets[i]], classes[answers[i]]) for i in chosen[name][index].tolist()
            ]
            here = replay.exits == index
            blocks.append(
                f'<h4><i style="background: {colours[index]}"></i>{escape(exit_name)}: {here.sum()} samples, '
                f"{(here & wrong).sum()} wrong</h4>"
                f'<div class="images">{"".join(pictures) or "<p>None left here.</p>"}</div>'
            )
        opened = "" if parts else " open"
        parts.append(f"<details{opened}><summary>{escape(name)}</summary>{''.join(blocks)}</details>")
    return (
        "<p>From the surest to the least sure answer of each gate, then the surest wrong ones: true class → answer.</p>"
        + "".join(parts)
    )


def _graph(name: str, program: GateProgram, graph: Mapping[str, Any]) -> str:
    on = [*(t != math.inf for t in program.thresholds), True]
    exits = {index: exit_ for index, exit_ in enumerate(exit_names(program)) if on[index]}
    if len(graph["nodes"]) != len(exits):
        raise ValueError(
            f"graph: expected {len(exits)} nodes, one for each exit of {name!r} that is on, got {len(graph['nodes'])}"
        )
    simulated = _SIMULATED if graph["driver"] == "recording" else ""
    return (
        f'<div class="scroll">{figures.graph_figure(graph, exits)}</div>'
        f"<p>A batch of <b>{escape(name)}</b> on the executor graph is one launch of this chain. Each switch runs the "
        f"smallest bucket that holds the samples that are left, and none if nobody is left.{simulated}</p>"
    )


def _shown(replay: Replay, trace: Trace) -> list[NDArray[np.int64]]:
    """For each exit the samples to show: right ones evenly spread by margin, then the wrong ones of highest margin."""
    chosen = []
    for index in range(len(replay.shares)):
        here = np.flatnonzero(replay.exits == index)
        if index < len(trace.margins):
            here = here[np.argsort(-trace.margins[index][here], kind="stable")]
        right = trace.correct[index][here]
        chosen.append(np.concatenate([_spread(here[right], _RIGHT_SHOWN), here[~right][:_WRONG_SHOWN]]))
    return chosen


def _picture(uri: str, target: str, answer: str) -> str:
    if answer == target:
        return f'<figure><img src="{uri}" alt=""><figcaption>{escape(target)}</figcaption></figure>'
    caption = f"{escape(target)} → {escape(answer)}"
    return f'<figure class="wrong"><img src="{uri}" alt=""><figcaption>{caption}</figcaption></figure>'


def _spread(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most so many of the rows, evenly spread, in order."""
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]


def _mean(correct: NDArray[np.bool_]) -> str:
    return f"{correct.mean():.2%}" if len(correct) else "–"


_TABLE_NOTE = (
    "<p>Accuracy and FLOPs on the test data; a multiply-add is two FLOPs, and the gates' own count. Time a sample is "
    "the median of runs in turn with the dense network. Reduction and speed-up are shares of its FLOPs and time, as in "
    "the paper's Table 1.</p>"
)

_SIMULATED = (
    " This is the graph of the recording driver, which simulates CUDA's on the CPU: there each capture is one node. It "
    "has not run on a GPU."
)
