"""The figures of a report: SVG to stand in a page, as `drawing` has it, and images as data URIs."""

from __future__ import annotations

import base64
import io
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dgate_rt.drawing import (
    FAINT,
    GATES,
    INK,
    NETWORK,
    PALETTE,
    STYLE,
    canvas,
    exit_colours,
    percent,
    shortened,
    svg_of,
)
from dgate_rt.frontier import Frontier, OperatingPoint

# Behind drawing, which says what to install where these are missing.
# isort: split
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyBboxPatch, Patch, Polygon
from PIL import Image

_MARKERS = "os^Dvp"
_LABELLED_CELLS = 40
"""Up to this many classes the heat map names each and writes the counts into its cells."""
_SPARSE_LABELS = 24
_THUMBNAIL = 96
_COLUMN, _BOX, _BEVEL, _LINE = 1.75, 1.35, 0.1, 0.15
"""Inches of the picture of a graph: from one node of the chain to the next, a box's width, what a switch lacks at each
corner, a line of text."""
_LETTERS = 19
"""So many fit a line of such a box."""


def frontier_figure(
    frontiers: Sequence[Frontier],
    chosen: Mapping[str, OperatingPoint],  # on validation data
    measured: Mapping[str, tuple[float, float]],  # cost and accuracy on test data
    dense: tuple[float, float],  # the same, of the whole network
    unit: str,
    scale: float = 1.0,  # costs are divided by it
) -> str:
    """Accuracy over cost: the frontier, the points chosen on it, and what they gave on test data."""
    with mpl.rc_context(STYLE):
        figure, axes = canvas(7.2, 4.0)
        for index, frontier in enumerate(frontiers):
            xs, ys = [p.cost / scale for p in frontier.points], [p.accuracy for p in frontier.points]
            label = None if index else "frontier (validation)"
            axes.step(xs, ys, where="post", color=INK, alpha=0.55, zorder=2, label=label)
        axes.axhline(dense[1], color=NETWORK, linestyle="--", linewidth=1.2, zorder=1)
        axes.plot(dense[0] / scale, dense[1], "X--", color=NETWORK, markersize=9, label="dense network (test)")
        for index, (name, point) in enumerate(chosen.items()):
            at, marker = measured[name], _MARKERS[index % len(_MARKERS)]
            look: Any = {"color": PALETTE[index % len(PALETTE)], "linestyle": "none", "markersize": 8}
            hollow: Any = {"markerfacecolor": "none", "markeredgewidth": 1.8, "zorder": 3}
            axes.plot(
                point.cost / scale, point.accuracy, marker, **look, **hollow, label=f"{name}: chosen (validation)"
            )
            axes.plot(at[0] / scale, at[1], marker, **look, zorder=4, label=f"{name}: measured (test)")
        known = [
            a for a in (dense[1], *(p.accuracy for p in chosen.values()), *(a for _, a in measured.values())) if a == a
        ]
        best = max(known + [p.accuracy for f in frontiers for p in f.points])
        floor = min(known) - max(0.05, 1.5 * (best - min(known)))
        axes.set_ylim(max(0.0, floor), min(1.0, best + 0.02 * (best - floor)) + 0.002)
        axes.set_xlim(0, 1.05 * dense[0] / scale)
        axes.yaxis.set_major_formatter(percent)
        axes.set_xlabel(f"mean cost a sample ({unit})")
        axes.set_ylabel("accuracy")
        axes.grid(True, alpha=0.6)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8)
        return svg_of(figure, "frontier", "Accuracy over mean cost a sample")


def exits_figure(shares: Mapping[str, Sequence[float]], exits: Sequence[str]) -> str:
    """One bar a program: the share of the samples that each exit answered."""
    with mpl.rc_context(STYLE):
        figure, axes = canvas(7.2, 0.75 + 0.42 * len(shares))
        colours = exit_colours(len(exits) - 1)
        for row, values in enumerate(shares.values()):
            for value, start, colour in zip(values, np.cumsum([0, *values]), colours, strict=False):
                axes.barh(row, value, left=start, height=0.62, color=colour)
                if value >= 0.04:
                    axes.text(
                        start + value / 2, row, f"{value:.0%}", ha="center", va="center", color="white", fontsize=8.5
                    )
        axes.set_yticks(range(len(shares)), [shortened(name) for name in shares])
        axes.set_ylim(len(shares) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(percent)
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)
        patches = [Patch(color=colour, label=label) for colour, label in zip(colours, exits, strict=True)]
        axes.legend(handles=patches, ncols=min(5, len(exits)), loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=8.5,
                    handlelength=1.0, borderaxespad=0.2)  # fmt: skip
        return svg_of(figure, "exits", "Share of the samples answered at each exit")


def classes_figure(
    counts: NDArray[np.int64],  # [K, G + 1]; samples of each class answered at each exit
    classes: Sequence[str],
    exits: Sequence[str],
    name: str,
) -> str:
    """Class x exit, shaded by the share of the class: classes in their order, or if many by `earliest_first`."""
    total = counts.sum(1, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    colours = np.array([to_rgb(c) for c in exit_colours(len(exits) - 1)])
    cells = np.dstack([np.broadcast_to(colours, (*counts.shape, 3)), 0.03 + 0.92 * shares])
    with mpl.rc_context(STYLE):
        if len(classes) <= _LABELLED_CELLS:
            figure, axes = canvas(1.2 + 0.8 * len(exits), 0.5 + 0.27 * len(classes))
            _labelled_cells(axes, cells, counts, shares)
            axes.set_yticks(np.arange(len(classes)) + 0.5, [shortened(c) for c in classes])
            axes.set_xticks(np.arange(len(exits)) + 0.5, [shortened(e) for e in exits], fontsize=8)
            axes.xaxis.tick_top()
        else:
            figure, axes = canvas(7.2, 0.9 + 0.26 * len(exits))
            order = earliest_first(counts)
            axes.imshow(cells[order].transpose(1, 0, 2), aspect="auto", interpolation="none")
            ticks = np.linspace(0, len(order) - 1, min(_SPARSE_LABELS, len(order))).astype(int)
            labels = [shortened(classes[order[i]]) for i in ticks]
            axes.set_xticks(ticks, labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
            axes.set_yticks(range(len(exits)), [shortened(e) for e in exits])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return svg_of(figure, f"classes-{name}", "Share of each class answered at each exit")


def graph_figure(
    graph: Mapping[str, Any],  # as `Runtime.describe` gives it for "json"
    exits: Mapping[int, str],  # behind each node of the chain: the exit's index and name
) -> str:
    """The chain that a batch runs through: above each node its exit, below each switch what it chooses from."""
    nodes, colours = graph["nodes"], exit_colours(max(exits))
    first = [nodes[0]["name"], *_held([nodes[0]])]
    choices = [
        [
            *([f"bucket {body['bucket']}", *_held(body["nodes"])] for body in node["bodies"]),
            ["none", "if nobody is left"],
        ]
        for node in nodes[1:]
    ]
    chain, box = _height(first), max((_height(lines) for column in choices for lines in column), default=0.0)
    top, step = 0.77, box + 0.09  # of the chain; from one body to the next
    below = top + chain + 0.24
    width, height = _COLUMN * (len(nodes) - 1) + _BOX, below + step * max(map(len, choices), default=0)
    with mpl.rc_context(STYLE):
        figure, axes = canvas(width, height)
        axes.set(position=(0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        for column, (node, (exit_, name)) in enumerate(zip(nodes, exits.items(), strict=True)):
            left, colour = column * _COLUMN, colours[exit_]
            exit_lines = [f"exit {exit_}", shortened(name, _LETTERS)]
            _box(axes, (left, 0.0), _BOX, 0.42, exit_lines, "white", facecolor=colour, edgecolor="none")
            _arrow(axes, (left + _BOX / 2, top), (left + _BOX / 2, 0.44))
            if column == 0:
                _box(axes, (left, top), _BOX, chain, first, edgecolor=colour)
                continue
            _arrow(axes, (left - _COLUMN + _BOX, top + chain / 2), (left, top + chain / 2))
            _switch(axes, left, top, chain, node["name"], colour)
            for row, lines in enumerate(choices[column - 1]):
                at, last = below + row * step, row == len(node["bodies"])
                look = {"edgecolor": FAINT, "linestyle": "--"} if last else {"edgecolor": colour}
                _box(axes, (left + 2 * _BEVEL, at), _BOX - 2 * _BEVEL, box, lines, **look)
                _line(axes, (left + _BEVEL, at + box / 2), (left + 2 * _BEVEL, at + box / 2))
            _line(axes, (left + _BEVEL, top + chain), (left + _BEVEL, at + box / 2))
        return svg_of(figure, "graph", "The assembled graph: a chain of switches, and the buckets each chooses from")


def lines_figure(
    lines: Mapping[str, Sequence[tuple[float, float]]],  # points by what they belong to
    x: str,
    y: str,
    title: str,
    doubling: bool = False,  # whether x goes in powers of two
) -> str:
    """Lines over one axis; the last, which others are to be held against, is dashed."""
    with mpl.rc_context(STYLE):
        figure, axes = canvas(6.4, 3.4)
        for index, (name, points) in enumerate(lines.items()):
            last = index == len(lines) - 1
            look: Any = (
                {"color": INK, "linestyle": "--", "linewidth": 1.2} if last else {"marker": "o", "markersize": 4}
            )
            axes.plot(*zip(*points, strict=True), **{"color": PALETTE[index % len(PALETTE)], **look}, label=name)
        if doubling:
            ticks = sorted({point[0] for points in lines.values() for point in points})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(True, alpha=0.6)
        axes.legend(fontsize=8)
        return svg_of(figure, title, title)


def bars_figure(values: Sequence[tuple[str, float, bool]], x: str, title: str) -> str:
    """A bar for each name, from the top; those that are marked stand out."""
    with mpl.rc_context(STYLE):
        figure, axes = canvas(6.4, 0.6 + 0.24 * len(values))
        for row, (_, value, marked) in enumerate(values):
            axes.barh(row, value, height=0.7, color=GATES(0.0) if marked else GATES(0.55))
            axes.text(value, row, f" {value:.3g}", va="center", fontsize=8)
        axes.set_yticks(range(len(values)), [name.replace("$", r"\$") for name, *_ in values], fontsize=8)
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_xlabel(x)
        axes.tick_params(axis="y", length=0)
        return svg_of(figure, title, title)


def earliest_first(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Classes by their mean exit; those without a sample last."""
    mean = counts @ np.arange(counts.shape[1]) / np.maximum(counts.sum(1), 1)
    return np.argsort(np.where(counts.sum(1) > 0, mean, np.inf), kind="stable")


def thumbnails(
    images: Tensor,  # [N, C, H, W]; uint8, or floats that are stretched channel by channel over the range they span
) -> list[str]:
    """Each image as a PNG data URI, at most 96 pixels a side; one channel is grey, three are RGB, else their mean."""
    pixels = images.detach().cpu().float().nan_to_num(0.0, 0.0, 0.0)
    if images.is_floating_point() and len(pixels):
        low, high = pixels.amin((0, 2, 3), keepdim=True), pixels.amax((0, 2, 3), keepdim=True)
        pixels = 255 * (pixels - low) / (high - low).clamp_min(1e-12)
    if pixels.shape[1] not in (1, 3):
        pixels = pixels.mean(1, keepdim=True)
    rows = pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [_png(row.squeeze(2) if row.shape[2] == 1 else row) for row in rows]


def _png(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _labelled_cells(
    axes: Axes, cells: NDArray[np.float64], counts: NDArray[np.int64], shares: NDArray[np.float64]
) -> None:
    axes.pcolormesh(cells, edgecolors="none")
    axes.set_ylim(len(counts), 0)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            axes.text(
                column + 0.5, row + 0.5, f"{count}  ({shares[row, column]:.0%})", ha="center", va="center", fontsize=7.5
            )


def _held(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many nodes of each type these hold, in lines."""
    total: Counter[str] = Counter()
    for node in nodes:
        total.update(node["holds"])
    counts = [f"{count} {kind if count == 1 else _plural(kind)}" for kind, count in total.items()]
    text = ", ".join(count.replace(" ", "\u00a0") for count in counts)  # lines break between counts only
    return textwrap.wrap(text, _LETTERS)


def _plural(kind: str) -> str:
    return f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"


def _height(lines: Sequence[str]) -> float:
    return 0.15 + _LINE * len(lines)


def _box(
    axes: Axes,
    at: tuple[float, float],
    width: float,
    height: float,
    lines: Sequence[str],  # the first in bold
    ink: str = INK,
    **look: Any,
) -> None:
    look = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": "none", "linewidth": 1.3, **look}
    axes.add_patch(FancyBboxPatch(at, width, height, clip_on=False, **look))
    _lines(axes, at[0] + width / 2, at[1] + height / 2, lines, 0, ink)


def _switch(axes: Axes, left: float, top: float, height: float, name: str, colour: str) -> None:
    right, middle, bottom = left + _BOX, top + height / 2, top + height
    corners = [
        (left, middle), (left + _BEVEL, top), (right - _BEVEL, top),
        (right, middle), (right - _BEVEL, bottom), (left + _BEVEL, bottom),
    ]  # fmt: skip
    axes.add_patch(Polygon(corners, facecolor="none", edgecolor=colour, linewidth=1.3, clip_on=False))
    _lines(axes, left + _BOX / 2, middle, ["switch", name], 1, INK)


def _lines(axes: Axes, x: float, y: float, lines: Sequence[str], bold: int, ink: str) -> None:
    for index, line in enumerate(lines):
        at = y + (index - (len(lines) - 1) / 2) * _LINE
        weight: Any = {"fontsize": 8.5, "fontweight": "bold"} if index == bold else {"fontsize": 7.5}
        axes.text(x, at, line, ha="center", va="center", color=ink, **weight)


def _line(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.plot(*zip(start, end, strict=True), color=FAINT, linewidth=1.1, clip_on=False)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    look = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=look)
