"""What we want of the runtime on a CPU, and what rows of `dgate bench` say of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dgate_rt.bench.latency import BESIDE_EARLYON, EARLY
from dgate_rt.bench.record import Row
from dgate_rt.bench.streams import BESIDE_FULL
from dgate_rt.bench.ways import CHUNKED, DENSE, LOSING_OFF
from dgate_rt.bench.workload import NO_EXIT, PAPER_MIXES

MIXED = PAPER_MIXES[1]
RESNET = "CIFAR ResNet-101"
FASTER = "the faster of dense and dense in chunks"
FULL = 64  # a batch that fills every stage
BESIDE_FULL_BATCH = f"time a sample as a multiple of B = {FULL}"


@dataclass(frozen=True)
class Target:
    """A figure of some rows, and the least or the most that it should be.

    Attributes:
        rows: which, by their fields; a set holds all that a field may be.
        figure: "speed-up over ..." or "time added to ...", a way or `FASTER`, or the name of one of the row's values.
        from_batch_size: rows of smaller batches are not judged.
    """

    what: str
    rows: Mapping[str, Any]
    figure: str
    least: float | None = None
    most: float | None = None
    from_batch_size: int = 1

    def verdict(self, rows: Sequence[Row]) -> str:
        """A line: whether it holds for all rows that tell, how many do not, and the worst of them."""
        found = [(value, row) for row in rows if self._takes(row) and (value := self._figure(row)) is not None]
        bound = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"
        if not found:
            return f"| {self.what} | {bound} | not measured | |"
        value, row = (min if self.least is not None else max)(found, key=lambda pair: pair[0])
        missed = sum(not self._holds(value) for value, _ in found)
        network = "" if row.network == RESNET else f"{row.network}, "
        where = f"{network}{row.engine} {row.dtype}, B {row.batch_size}, {mix_name(row.mix)}"
        count = f"{missed} of {len(found)} rows miss" if missed else f"{len(found)} rows"
        return f"| {self.what} | {bound} | {'**missed**' if missed else 'holds'} | {value:.3g} ({where}; {count}) |"

    def _holds(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def _takes(self, row: Row) -> bool:
        if row.batch_size < self.from_batch_size:
            return False
        fields = [(getattr(row, name), wanted) for name, wanted in self.rows.items()]
        return all(found in wanted if isinstance(wanted, set) else found == wanted for found, wanted in fields)

    def _figure(self, row: Row) -> float | None:
        kind, _, baseline = self.figure.partition(" over ")
        if kind == "speed-up":
            return row.over.get(baseline)
        kind, _, baseline = self.figure.partition(" added to ")
        if kind == "time":
            if baseline == FASTER:
                speed_up = over_dense(row) if row.over.keys() >= {CHUNKED, DENSE} else None
            else:
                speed_up = row.over.get(baseline)
            return None if speed_up is None else 1 / speed_up - 1
        return row.values.get(self.figure)


def over_dense(row: Row) -> float | None:
    """Speed-up over the faster of dense and dense in chunks, or over the one of them that was timed beside it."""
    return min((row.over[way] for way in (DENSE, CHUNKED) if way in row.over), default=None)


_EVERYWHERE = {"part": {"mixes", "sweep", "overhead", "contest"}, "way": "refill"}  # wherever it is known
_AT_64 = {"network": RESNET, "part": "mixes", "way": "refill", "batch_size": 64}
_CONTEST = {"network": RESNET, "part": "contest", "way": "refill", "mix": MIXED}
_LATENCY = {"network": RESNET, "part": "latency", "way": "refill"}
_STREAMS = {"network": RESNET, "part": "streams", "way": "refill"}

TARGETS = (
    Target("refill over dense at B = 64", {**_AT_64, "mix": MIXED}, f"speed-up over {DENSE}", 1.9),
    Target("the same where nobody leaves", {**_AT_64, "mix": NO_EXIT}, f"speed-up over {DENSE}", 1.15),
    Target("time realisation at any B, on eager", _EVERYWHERE, "time realisation", 0.95),
    Target("realisation over dense at B >= 32", _EVERYWHERE, f"realisation over {DENSE}", 0.97, from_batch_size=32),
    Target(
        "realisation over dense in chunks at B >= 32, float32",
        {**_EVERYWHERE, "dtype": "float32"},
        f"realisation over {CHUNKED}",
        0.90,
        from_batch_size=32,
    ),
    Target(
        f"time added to {FASTER} where nobody leaves, B >= 32",
        {**_EVERYWHERE, "mix": NO_EXIT},
        f"time added to {FASTER}",
        most=0.02,
        from_batch_size=32,
    ),
    Target(
        "the same where every gate loses time and is off",
        {"part": "overhead", "way": LOSING_OFF},
        f"time added to {FASTER}",
        most=0.01,
    ),
    Target("time a sample of larger batches beside one of 64", {"part": "memory"}, BESIDE_FULL_BATCH, most=1.1),
    Target("time of a stream of batches of 8 beside one of 64", {**_STREAMS, "batch_size": 8}, BESIDE_FULL, most=1.1),
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
    rows = list(rows)
    known = [row for row in rows if not row.note]
    yield "| target | | | the worst |"
    yield "|---|---|---|---|"
    for target in TARGETS:
        yield target.verdict([*known, *_best_gated(known), *_larger(rows)])


def _best_gated(rows: Sequence[Row]) -> list[Row]:
    """The fastest gated row of the contest under a name of its own."""
    timed = [
        (row.ms.median, row) for row in rows if row.ms and (row.part, row.way, row.mix) == ("contest", "refill", MIXED)
    ]
    return [replace(min(timed, key=lambda pair: pair[0])[1], way="best gated")] if timed else []


def _larger(rows: Sequence[Row]) -> list[Row]:
    """The batches above 64 of the part "memory" through `refill`, with their times beside that of one of 64.

    None where one was left out: a larger one could tell otherwise.
    """
    found = [row for row in rows if (row.part, row.way) == ("memory", "refill")]
    full = next((row.ms.median for row in found if row.ms and row.batch_size == FULL), None)
    if full is None or any(row.part == "memory" and row.note for row in rows):
        return []
    timed = [(row.ms.median, row) for row in found if row.ms and row.batch_size > FULL]
    return [replace(row, values={BESIDE_FULL_BATCH: median / full}) for median, row in timed]
