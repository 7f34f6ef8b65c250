"""The plots of docs/performance.md, each from the rows of one part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dgate_rt import figures
from dgate_rt.bench.record import Row
from dgate_rt.bench.targets import mix_name
from dgate_rt.bench.ways import CHUNKED, DENSE


def sweep(rows: Sequence[Row]) -> str:
    """Speed-up over the share that leaves at each gate, beside what the FLOPs allow."""
    gated = sorted((row for row in rows if row.way == "refill"), key=lambda row: row.mix[0])
    dense = next(row for row in rows if row.way == DENSE).values["gflops"]
    lines = {f"over {name}": [(row.mix[0], row.over[name]) for row in gated] for name in (DENSE, CHUNKED)}
    lines["FLOPs saved"] = [(row.mix[0], dense / row.values["gflops"]) for row in gated]
    return figures.lines_figure(lines, "share that leaves at each gate", "speed-up", "From all late to all early")


def streams(rows: Sequence[Row]) -> str:
    """Time a sample over the size of the batches that arrive."""
    ways = dict.fromkeys(row.way for row in rows)
    lines = {way: [(row.batch_size, row.ms.median) for row in rows if row.way == way and row.ms] for way in ways}
    best = min(ms for points in lines.values() for _, ms in points)
    lines["least"] = [(size, best) for size, _ in next(iter(lines.values()))]
    return figures.lines_figure(lines, "samples of a batch", "ms a sample", "Streams", doubling=True)


def contest(rows: Sequence[Row]) -> str:
    """Time a sample of every way, fastest last; gated ones stand out."""
    timed = [(row.ms.median, row) for row in rows if row.ms]
    bars = [(_name(row), ms, row.way == "refill") for ms, row in sorted(timed, key=lambda pair: -pair[0])]
    return figures.bars_figure(bars, "ms a sample", "Every engine, dense and gated")


def _name(row: Row) -> str:
    mix = f", {mix_name(row.mix)}" if row.mix else ""
    network = "" if row.network == "CIFAR ResNet-101" else f"{row.network.removeprefix('CIFAR ')}: "
    return f"{network}{row.engine} {row.dtype}, {row.way}{mix}"


PLOTS: dict[str, Callable[[Sequence[Row]], str]] = {"sweep": sweep, "contest": contest, "streams": streams}
"""By the part that they show."""
