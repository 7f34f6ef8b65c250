"""The figures of a report: SVG to stand in a page, in the page's own font and colours, and images as data URIs.

Text and axes are drawn in ``currentColor`` and everything else in mid tones on nothing, so that one figure reads on a
light page and on a dark one.
"""

from __future__ import annotations

import base64
import io
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dgate_rt.frontier import Frontier, OperatingPoint

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, Patch, Polygon
    from PIL import Image
except ImportError as error:
    raise ImportError(
        "a report is drawn by matplotlib, which is not installed: pip install 'dgate-rt[vision]'"
    ) from error

_INK, _FAINT = "#010203", "#030201"  # stand-ins, replaced in the SVG by what the page says
_GATES = LinearSegmentedColormap.from_list("gates", ["#2bb58b", "#3a8fd6", "#8d63d2"])
_NETWORK = "#de7c3c"
_PROGRAMS = ("#d6456b", "#c99a1e", "#5aa02c", "#7f6ad0", "#2f9fb3", "#b0653a")
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
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dgate_rt",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}

_FILE_STYLE = """
svg { color: #1d2127; --faint: #c5cbd3; }
@media (prefers-color-scheme: dark) { svg { color: #e4e7eb; --faint: #4a525d; } }
text { font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif !important; }
"""


def exit_colours(gates: int) -> list[str]:
    """One colour an exit: green to violet for the gates, orange for the network's own classifier."""
    return [to_hex(_GATES(g / max(gates - 1, 1))) for g in range(gates)] + [_NETWORK]


def frontier_figure(
    frontiers: Sequence[Frontier],
    chosen: Mapping[str, OperatingPoint],  # on validation data
    measured: Mapping[str, tuple[float, float]],  # cost and accuracy on test data
    dense: tuple[float, float],  # the same, of the whole network
    unit: str,
    scale: float = 1.0,  # costs are divided by it
) -> str:
    """Accuracy over cost: the frontier, the points chosen on it, and what they gave on test data."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(7.2, 4.0)
        for index, frontier in enumerate(frontiers):
            xs, ys = [p.cost / scale for p in frontier.points], [p.accuracy for p in frontier.points]
            label = None if index else "frontier (validation)"
            axes.step(xs, ys, where="post", color=_INK, alpha=0.55, zorder=2, label=label)
        axes.axhline(dense[1], color=_NETWORK, linestyle="--", linewidth=1.2, zorder=1)
        axes.plot(dense[0] / scale, dense[1], "X--", color=_NETWORK, markersize=9, label="dense network (test)")
        for index, (name, point) in enumerate(chosen.items()):
            at, marker = measured[name], _MARKERS[index % len(_MARKERS)]
            look: Any = {"color": _PROGRAMS[index % len(_PROGRAMS)], "linestyle": "none", "markersize": 8}
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
        axes.yaxis.set_major_formatter(_percent)
        axes.set_xlabel(f"mean cost a sample ({unit})")
        axes.set_ylabel("accuracy")
        axes.grid(True, alpha=0.6)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8)
        return _svg(figure, "frontier", "Accuracy over mean cost a sample")


def exits_figure(shares: Mapping[str, Sequence[float]], exits: Sequence[str]) -> str:
    """One bar a program: the share of the samples that each exit answered."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(7.2, 0.75 + 0.42 * len(shares))
        colours = exit_colours(len(exits) - 1)
        for row, values in enumerate(shares.values()):
            for value, start, colour in zip(values, np.cumsum([0, *values]), colours, strict=False):
                axes.barh(row, value, left=start, height=0.62, color=colour)
                if value >= 0.04:
                    axes.text(
                        start + value / 2, row, f"{value:.0%}", ha="center", va="center", color="white", fontsize=8.5
                    )
        axes.set_yticks(range(len(shares)), [_shortened(name) for name in shares])
        axes.set_ylim(len(shares) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(_percent)
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)
        patches = [Patch(color=colour, label=label) for colour, label in zip(colours, exits, strict=True)]
        axes.legend(handles=patches, ncols=min(5, len(exits)), loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=8.5,
                    handlelength=1.0, borderaxespad=0.2)  # fmt: skip
        return _svg(figure, "exits", "Share of the samples answered at each exit")


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
    with mpl.rc_context(_STYLE):
        if len(classes) <= _LABELLED_CELLS:
            figure, axes = _axes(1.2 + 0.8 * len(exits), 0.5 + 0.27 * len(classes))
            _labelled_cells(axes, cells, counts, shares)
            axes.set_yticks(np.arange(len(classes)) + 0.5, [_shortened(c) for c in classes])
            axes.set_xticks(np.arange(len(exits)) + 0.5, [_shortened(e) for e in exits], fontsize=8)
            axes.xaxis.tick_top()
        else:
            figure, axes = _axes(7.2, 0.9 + 0.26 * len(exits))
            order = earliest_first(counts)
            axes.imshow(cells[order].transpose(1, 0, 2), aspect="auto", interpolation="none")
            ticks = np.linspace(0, len(order) - 1, min(_SPARSE_LABELS, len(order))).astype(int)
            labels = [_shortened(classes[order[i]]) for i in ticks]
            axes.set_xticks(ticks, labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
            axes.set_yticks(range(len(exits)), [_shortened(e) for e in exits])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return _svg(figure, f"classes-{name}", "Share of each class answered at each exit")


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
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(width, height)
        axes.set(position=(0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        for column, (node, (exit_, name)) in enumerate(zip(nodes, exits.items(), strict=True)):
            left, colour = column * _COLUMN, colours[exit_]
            exit_lines = [f"exit {exit_}", _shortened(name, _LETTERS)]
            _box(axes, (left, 0.0), _BOX, 0.42, exit_lines, "white", facecolor=colour, edgecolor="none")
            _arrow(axes, (left + _BOX / 2, top), (left + _BOX / 2, 0.44))
            if column == 0:
                _box(axes, (left, top), _BOX, chain, first, edgecolor=colour)
                continue
            _arrow(axes, (left - _COLUMN + _BOX, top + chain / 2), (left, top + chain / 2))
            _switch(axes, left, top, chain, node["name"], colour)
            for row, lines in enumerate(choices[column - 1]):
                at, last = below + row * step, row == len(node["bodies"])
                look = {"edgecolor": _FAINT, "linestyle": "--"} if last else {"edgecolor": colour}
                _box(axes, (left + 2 * _BEVEL, at), _BOX - 2 * _BEVEL, box, lines, **look)
                _line(axes, (left + _BEVEL, at + box / 2), (left + 2 * _BEVEL, at + box / 2))
            _line(axes, (left + _BEVEL, top + chain), (left + _BEVEL, at + box / 2))
        return _svg(figure, "graph", "The assembled graph: a chain of switches, and the buckets each chooses from")


def lines_figure(
    lines: Mapping[str, Sequence[tuple[float, float]]],  # points by what they belong to
    x: str,
    y: str,
    title: str,
    doubling: bool = False,  # whether x goes in powers of two
) -> str:
    """Lines over one axis; the last, which others are to be held against, is dashed."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(6.4, 3.4)
        for index, (name, points) in enumerate(lines.items()):
            last = index == len(lines) - 1
            look: Any = (
                {"color": _INK, "linestyle": "--", "linewidth": 1.2} if last else {"marker": "o", "markersize": 4}
            )
            axes.plot(*zip(*points, strict=True), **{"color": _PROGRAMS[index % len(_PROGRAMS)], **look}, label=name)
        if doubling:
            ticks = sorted({point[0] for points in lines.values() for point in points})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(True, alpha=0.6)
        axes.legend(fontsize=8)
        return _svg(figure, title, title)


def bars_figure(values: Sequence[tuple[str, float, bool]], x: str, title: str) -> str:
    """A bar for each name, from the top; those that are marked stand out."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(6.4, 0.6 + 0.24 * len(values))
        for row, (_, value, marked) in enumerate(values):
            axes.barh(row, value, height=0.7, color=_GATES(0.0) if marked else _GATES(0.55))
            axes.text(value, row, f" {value:.3g}", va="center", fontsize=8)
        axes.set_yticks(range(len(values)), [name.replace("$", r"\$") for name, *_ in values], fontsize=8)
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_xlabel(x)
        axes.tick_params(axis="y", length=0)
        return _svg(figure, title, title)


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
    ink: str = _INK,
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
    _lines(axes, left + _BOX / 2, middle, ["switch", name], 1, _INK)


def _lines(axes: Axes, x: float, y: float, lines: Sequence[str], bold: int, ink: str) -> None:
    for index, line in enumerate(lines):
        at = y + (index - (len(lines) - 1) / 2) * _LINE
        weight: Any = {"fontsize": 8.5, "fontweight": "bold"} if index == bold else {"fontsize": 7.5}
        axes.text(x, at, line, ha="center", va="center", color=ink, **weight)


def _line(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.plot(*zip(start, end, strict=True), color=_FAINT, linewidth=1.1, clip_on=False)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    look = {"arrowstyle": "-|>", "color": _INK, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=look)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def _percent(value: float, _: object = None) -> str:
    return f"{100 * value:.3g}%"


def _shortened(text: str, most: int = 22) -> str:
    """Without `$`, which matplotlib reads as mathematics, and not longer than a label may be."""
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")


def standalone(svg: str) -> str:
    """A figure as a file of its own, which has to bring the page's names, font and colours, light and dark."""
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return svg.replace("<svg ", f"<svg {names} ", 1).replace(">", f">\n<style>{_FILE_STYLE}</style>", 1)


def _svg(figure: Figure, salt: str, label: str) -> str:
    """The figure as an <svg> element that scales with its column and refers to nothing outside the page."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):  # ids are page-wide: different figures must not share them
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, body = text.split(">", 1)
    width = float(re.search(r'width="([\d.]+)pt"', head)[1])  # type: ignore[index]  # matplotlib always writes it
    box = re.search(r'viewBox="[^"]*"', head)[0]  # type: ignore[index]
    used = set(re.findall(r"#(\w+)", body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", body)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # would hold for the whole page
    body = body.replace(_INK, "currentColor").replace(_FAINT, "var(--faint)")
    return f'<svg {box} style="width: {width * 1.4:.0f}px" role="img" aria-label="{label}">{body}'
