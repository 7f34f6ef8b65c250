"""What we want of the runtime on a CPU, and what rows of `dgate bench` say of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dgate_rt.bench.latency import BESIDE_EARLYON, EARLY
from dgate_rt.bench.record import Row
from dgate_rt.bench.streams import BESIDE_FULL
from dgate_rt.bench.ways import CHUNKED, DENSE
from dgate_rt.bench.workload import NO_EXIT, PAPER_MIXES

MIXED = PAPER_MIXES[1]
RESNET = "CIFAR ResNet-101"
LARGE = 32
"""From this batch size on some targets are meant to hold."""


@dataclass(frozen=True)
class Target:
    """A figure of some rows, and the least or the most that it should be.

    Attributes:
        rows: which, by their fields; ``large`` is for batch sizes of at least `LARGE`.
        figure: "speed-up over ..." or "time added to ...", or the name of one of the row's values.
    """

    what: str
    rows: Mapping[str, Any]
    figure: str
    least: float | None = None
    most: float | None = None

    def verdict(self, rows: Sequence[Row]) -> str:
        """A line: whether it holds for all rows that tell, and the worst of them."""
        found = [(value, row) for row in rows if self._takes(row) and (value := self._figure(row)) is not None]
        bound = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"
        if not found:
            return f"| {self.what} | {bound} | not measured | |"
        value, row = (min if self.least is not None else max)(found, key=lambda pair: pair[0])
        holds = value >= self.least if self.least is not None else value <= (self.most or 0.0)
        where = f"{row.engine} {row.dtype}, B {row.batch_size}, {mix_name(row.mix)}; {len(found)} rows"
        return f"| {self.what} | {bound} | {'holds' if holds else '**missed**'} | {value:.3g} ({where}) |"

    def _takes(self, row: Row) -> bool:
        wanted = {"network": RESNET, **self.rows}
        if wanted.pop("large", False) and row.batch_size < LARGE:
            return False
        return all(getattr(row, name) == value for name, value in wanted.items())

    def _figure(self, row: Row) -> float | None:
        kind, _, baseline = self.figure.partition(" over ")
        if kind == "speed-up":
            return row.over.get(baseline)
        kind, _, baseline = self.figure.partition(" added to ")
        if kind == "time":
            return 1 / row.over[baseline] - 1 if baseline in row.over else None
        return row.values.get(self.figure)


_GATED = {"part": "mixes", "way": "refill"}
_AT_64 = {**_GATED, "batch_size": 64}
_CONTEST = {"part": "contest", "way": "refill", "mix": MIXED}
_LATENCY = {"part": "latency", "way": "refill"}

TARGETS = (
    Target("refill over dense at B = 64", {**_AT_64, "mix": MIXED}, f"speed-up over {DENSE}", 1.9),
    Target("the same where nobody leaves", {**_AT_64, "mix": NO_EXIT}, f"speed-up over {DENSE}", 1.15),
    Target("time realisation", {**_GATED, "large": True}, "time realisation", 0.95),
    Target("realisation over dense", {**_GATED, "large": True}, f"realisation over {DENSE}", 0.97),
    Target(
        "realisation over dense in chunks, float32",
        {**_GATED, "large": True, "dtype": "float32"},
        f"realisation over {CHUNKED}",
        0.90,
    ),
    Target(
        "time added where nobody leaves",
        {**_GATED, "large": True, "mix": NO_EXIT},
        f"time added to {CHUNKED}",
        most=0.02,
    ),
    Target(
        "time of a stream of batches of 8 beside one of 64",
        {"part": "streams", "way": "refill", "batch_size": 8},
        BESIDE_FULL,
        most=1.1,
    ),
    Target("gated Inductor over dense Inductor", {**_CONTEST, "engine": "inductor"}, f"speed-up over {DENSE}", 1.65),
    Target("gated OpenVINO over dense OpenVINO", {**_CONTEST, "engine": "openvino"}, f"speed-up over {DENSE}", 1.65),
    Target("the best gated way over the best dense one", {"way": "best gated"}, "speed-up over best dense", 1.55),
    Target("one sample that leaves early, beside earlyon", {**_LATENCY, "mix": EARLY}, BESIDE_EARLYON, most=1.0),
    Target("one sample that runs to the end", {**_LATENCY, "mix": NO_EXIT}, f"time added to {DENSE}", most=0.05),
)


def mix_name(mix: Sequence[float]) -> str:
    """``.20 .30 .25 .25``, or in words."""
    if not mix:
        return "no gates"
    if tuple(mix) == NO_EXIT:
        return "nobody leaves"
    return " ".join(f"{share:.2f}".removeprefix("0") for share in mix)


def verdicts(rows: Iterable[Row]) -> Iterator[str]:
    """A table of all targets, in Markdown."""
    known = [row for row in rows if not row.note]
    yield "| target | | | the worst |"
    yield "|---|---|---|---|"
    for target in TARGETS:
        yield target.verdict([*known, *_best_gated(known)])


def _best_gated(rows: Sequence[Row]) -> list[Row]:
    """The fastest gated row of the contest under a name of its own."""
    timed = [
        (row.ms.median, row) for row in rows if row.ms and (row.part, row.way, row.mix) == ("contest", "refill", MIXED)
    ]
    return [replace(min(timed, key=lambda pair: pair[0])[1], way="best gated")] if timed else []
