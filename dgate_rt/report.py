"""One self-contained page about gated runs: the table, the frontier, who left where, and the graph of a batch."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text
from torch import Tensor

import dgate_rt
from dgate_rt import figures
from dgate_rt.compiling import compile
from dgate_rt.drawing import exit_colours
from dgate_rt.errors import ExecutorError
from dgate_rt.program import GateProgram
from dgate_rt.timing import machine_header
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
        _section("table", "Accuracy and cost", _table(HEADINGS, map(cells, table)) + _TABLE_NOTE),
        _section("frontier", "The frontier", _frontier(programs, replays, trace)),
        _section("exits", "Where samples leave", _exits(programs, replays, trace)),
        _section("classes", "Classes by exit", _classes(programs, replays, trace, classes)),
    ]
    if images is not None:
        sections.append(_section("examples", "Examples", _examples(programs, replays, trace, images, classes)))
    if graph is not None:
        sections.append(_section("graph", "The assembled graph", _graph(*next(iter(programs.items())), graph)))
    machine = " · ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine_header().items() if value)
    written = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    page = _PAGE.substitute(
        title=escape(title),
        notes="".join(f"<p>{escape(note)}</p>" for note in notes),
        machine=escape(machine),
        origin=escape(f"dgate_rt {dgate_rt.__version__} · {written} · {command}"),
        body="".join(sections),
    )
    partial = Path(f"{os.fspath(path)}.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)


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
    return figure + _table(headings, rows)


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


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(name: str, heading: str, body: str) -> str:
    return f'<section id="{name}"><h2>{heading}</h2>{body}</section>'


_TABLE_NOTE = (
    "<p>Accuracy and FLOPs on the test data; a multiply-add is two FLOPs, and the gates' own count. Time a sample is "
    "the median of runs in turn with the dense network. Reduction and speed-up are shares of its FLOPs and time, as in "
    "the paper's Table 1.</p>"
)

_SIMULATED = (
    " This is the graph of the recording driver, which simulates CUDA's on the CPU: there each capture is one node. It "
    "has not run on a GPU."
)

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d2127; --soft: #626b77; --faint: #c5cbd3; --ground: #fff; --wrong: #c2304e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #9aa4b1; --faint: #4a525d; --ground: #15181c; --wrong: #ff6b86; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 1rem; padding-bottom: .3rem; border-bottom: 1px solid var(--faint); }
h4 { font-size: .95rem; margin: 1.2rem 0 .5rem; }
h4 i { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .5em; }
p { max-width: 46rem; margin: .6rem 0; }
header p.fine, section > p, figure > p { color: var(--soft); font-size: .875rem; }
.scroll { overflow-x: auto; }
.scroll svg { max-width: none; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .5rem 0 1rem; }
th, td { padding: .35rem .9rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; border-bottom: 1px solid var(--ink); }
td { border-bottom: 1px solid var(--faint); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
#exits :is(th, td):nth-child(2) { text-align: left; }
svg { display: block; max-width: 100%; height: auto; overflow: visible; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif !important; }
figure { margin: 0; }
.side { display: flex; flex-wrap: wrap; gap: 1.5rem 3rem; }
.side > figure { flex: 0 1 auto; max-width: 100%; }
summary { cursor: pointer; font-weight: 600; margin: .75rem 0; }
.images { display: flex; flex-wrap: wrap; gap: .5rem; }
.images figure { text-align: center; font-size: .78rem; line-height: 1.3; }
.images figcaption { max-width: 7rem; overflow-wrap: anywhere; }
.images img { display: block; border-radius: 4px; margin: 0 auto .15rem; width: 52px; height: auto;
  image-rendering: pixelated; }
.images .wrong img { outline: 2px solid var(--wrong); outline-offset: -1px; }
.images .wrong figcaption { color: var(--wrong); }
</style>
</head>
<body>
<header><h1>$title</h1>$notes<p class="fine">$machine<br>$origin</p></header>
<main>$body</main>
</body>
</html>
""")
