"""The figures that experiments share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dgate_rt.drawing import GATES, INK, NETWORK, PALETTE, STYLE, canvas, percent, svg_of

# Behind drawing, which says what to install where it is missing.
# isort: split
import matplotlib as mpl
import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Band:
    """A line, and how far it moves from seed to seed."""

    x: Sequence[float]
    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def bands_figure(
    bands: Mapping[str, Band],
    x: str,
    y: str,
    title: str,
    at: tuple[float, float] | None = None,  # the network without gates
) -> str:
    """Shares over one axis, each line with its band."""
    with mpl.rc_context(STYLE):
        figure, axes = canvas(6.4, 3.6)
        for index, (name, band) in enumerate(bands.items()):
            colour = PALETTE[index % len(PALETTE)]
            dashes = "-" if index < len(PALETTE) else "--"
            axes.plot(band.x, band.middle, dashes, color=colour, label=name)
            axes.fill_between(band.x, band.low, band.high, color=colour, alpha=0.2, linewidth=0)
        if at is not None:
            axes.plot(*at, "X", color=NETWORK, markersize=8, label="network without gates")
        axes.yaxis.set_major_formatter(percent)
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
