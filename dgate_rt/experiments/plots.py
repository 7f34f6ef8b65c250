"""The figures that experiments share."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dgate_rt.drawing import GATES, INK, NETWORK, PALETTE, STYLE, canvas, percent, svg_of

# Behind drawing, which says what to install where it is missing.
# isort: split
import matplotlib as mpl
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

_TILE, _GAP = 64, 2  # pixels


@dataclass(frozen=True)
class Band:
    """A line, and how far it moves from seed to seed."""

    x: Sequence[float]
    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: int = 0
    dashed: bool = False


def bands_figure(
    bands: Mapping[str, Band],
    x: str,
    y: str,
    title: str,
    at: tuple[float, float] | None = None,  # the network without gates
) -> str:
    """Shares over shares, each line with its band."""
    with mpl.rc_context(STYLE):
        figure, axes = canvas(6.4, 3.6)
        for name, band in bands.items():
            colour = PALETTE[band.colour % len(PALETTE)]
            axes.plot(band.x, band.middle, "--" if band.dashed else "-", color=colour, label=name)
            axes.fill_between(band.x, band.low, band.high, color=colour, alpha=0.2, linewidth=0)
        if at is not None:
            axes.plot(*at, "X", color=NETWORK, markersize=8, label="network without gates")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(percent)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(True, alpha=0.6)
        axes.legend(fontsize=8)
        return svg_of(figure, title, title)


def surface_figure(
    values: ArrayLike,  # [X, Y] shares
    x: Sequence[float],
    y: Sequence[float],
    names: tuple[str, str],  # of the axes
    title: str,
) -> str:
    """Shares over a grid, as shades with lines of equal height."""
    surface = np.asarray(values).T
    half = (x[1] - x[0]) / 2, (y[1] - y[0]) / 2
    extent = (x[0] - half[0], x[-1] + half[0], y[0] - half[1], y[-1] + half[1])
    with mpl.rc_context(STYLE):
        figure, axes = canvas(4.2, 3.6)
        axes.imshow(surface, origin="lower", extent=extent, aspect="auto", interpolation="none", cmap=GATES, alpha=0.55)
        if surface.min() < surface.max():
            lines = axes.contour(x, y, surface, levels=8, colors=INK, linewidths=0.8)
            axes.clabel(lines, fontsize=7.5, fmt=percent)
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])
        axes.set_title(title, fontsize=9)
        return svg_of(figure, title, title)


def marked_figure(marks: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, title: str) -> str:
    """Points of several series, shares over shares."""
    with mpl.rc_context(STYLE):
        figure, axes = canvas(6.4, 3.2)
        for (name, places), colour, marker in zip(marks.items(), PALETTE, "os^Dvp", strict=False):
            axes.plot(*zip(*places, strict=True), marker, color=colour, linestyle="none", markersize=7, label=name)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(percent)
        axes.set_xlim(0, 1.05)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(True, alpha=0.6)
        axes.legend(fontsize=8)
        return svg_of(figure, title, title)


def mosaic(
    images: Tensor,  # [N, C, H, W] in 0..1
    columns: int = 8,
) -> str:
    """The images side by side, row after row, as a PNG data URI; each about 64 pixels a side, tiny ones magnified."""
    pixels = (255 * images).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    pixels = pixels.repeat(max(1, _TILE // pixels.shape[1]), 1).repeat(max(1, _TILE // pixels.shape[2]), 2)
    tiles = [Image.fromarray(tile[..., 0] if tile.shape[2] == 1 else tile) for tile in pixels]
    for tile in tiles:
        tile.thumbnail((_TILE, _TILE))
    width, height = (tiles[0].width + _GAP, tiles[0].height + _GAP) if tiles else (1, 1)
    rows = -(-len(tiles) // columns)
    whole = Image.new(tiles[0].mode if tiles else "L", (max(1, columns * width - _GAP), max(1, rows * height - _GAP)))
    for index, tile in enumerate(tiles):
        whole.paste(tile, (index % columns * width, index // columns * height))
    buffer = io.BytesIO()
    whole.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
