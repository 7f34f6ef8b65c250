"""What all figures share: style, colours, and the way to an SVG that stands in a page.

Text and axes are drawn in ``currentColor`` and everything else in mid tones on nothing, so that one figure reads on a
light page and on a dark one.
"""

from __future__ import annotations

import io
import re
from typing import Any

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap, to_hex
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        "a report is drawn by matplotlib, which is not installed: pip install 'dgate-rt[vision]'"
    ) from error

INK, FAINT = "#010203", "#030201"  # stand-ins, replaced in the SVG by what the page says
GATES = LinearSegmentedColormap.from_list("gates", ["#2bb58b", "#3a8fd6", "#8d63d2"])
NETWORK = "#de7c3c"
PALETTE = ("#d6456b", "#c99a1e", "#5aa02c", "#7f6ad0", "#2f9fb3", "#b0653a")
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dgate_rt",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": FAINT,
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
    return [to_hex(GATES(g / max(gates - 1, 1))) for g in range(gates)] + [NETWORK]


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def percent(value: float, _: object = None) -> str:
    return f"{100 * value:.3g}%"


def shortened(text: str, most: int = 22) -> str:
    """Without `$`, which matplotlib reads as mathematics, and not longer than a label may be."""
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")


def standalone(svg: str) -> str:
    """A figure as a file of its own, which has to bring the page's names, font and colours, light and dark."""
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return svg.replace("<svg ", f"<svg {names} ", 1).replace(">", f">\n<style>{_FILE_STYLE}</style>", 1)


def svg_of(figure: Figure, salt: str, label: str) -> str:
    """The figure as an <svg> element that scales with its column and refers to nothing outside the page."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):  # ids are page-wide: different figures must not share them
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, body = text.split(">", 1)
    width = float(re.search(r'width="([\d.]+)pt"', head)[1])  # type: ignore[index]  # matplotlib always writes it
    box = re.search(r'viewBox="[^"]*"', head)[0]  # type: ignore[index]  # as above
    used = set(re.findall(r"#(\w+)", body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", body)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # would hold for the whole page
    body = body.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    return f'<svg {box} style="width: {width * 1.4:.0f}px" role="img" aria-label="{label}">{body}'
