"""Rows of `gpu_acceptance`, their table, and what they say of the targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dgate_rt.bench.acceptance_work import WITHOUT_GATES
from dgate_rt.bench.workload import NO_EXIT, Mix
from dgate_rt.timing import Timing

REALISATION, LARGE_BATCH, OVERHEAD = 0.95, 128, 0.02


@dataclass(frozen=True)
class Row:
    """One engine at one batch size and exit mix. Times are milliseconds a batch; ratios are taken round by round."""

    network: str
    batch_size: int
    mix: Mix  # shares of (gate 1, gate 2, gate 3, end)
    engine: str
    status: str = "measured"  # or "skipped", or "failed"; then note says why
    note: str = ""
    ms: Timing | None = None
    to_dense: float | None = None  # time as a multiple of the best dense engine's, and of these
    to_without_gates: float | None = None  # the same kernels as one graph, less gates
    to_eager: float | None = None
    realisation: float | None = None
    stages_ms: float | None = None  # of its stages alone, at their buckets
    time_realisation: float | None = None  # of the saving that those would allow, over the same kernels without gates
    peak_mib: float | None = (
        None  # that making and running it allocated; a copy of the weights where `compile` makes one
    )
    waits: bool | None = None  # whether the host waited for the device; None where not looked at

    @property
    def where(self) -> str:
        """The row in words, but for its engine."""
        return f"{self.network}, B {self.batch_size}, {mix_name(self.mix)}"

    @property
    def group(self) -> tuple[str, int, Mix]:
        """What is measured together."""
        return self.network, self.batch_size, self.mix

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Row:
        """The row of ``asdict``, from JSON."""
        ms = values["ms"] and Timing(**{**values["ms"], "rounds": tuple(values["ms"]["rounds"])})
        return cls(**{**values, "mix": tuple(values["mix"]), "ms": ms})


@dataclass(frozen=True)
class Verdict:
    """Whether a target holds; None where no row can tell."""

    target: str
    holds: bool | None
    detail: str

    def __str__(self) -> str:
        word = {True: "holds", False: "FAILS", None: "unknown"}[self.holds]
        return f"{word}: {self.target} ({self.detail})"


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """A verdict a target, worst row named."""
    failed = [row for row in rows if row.status == "failed"]
    graph = [row for row in rows if row.engine in WITHOUT_GATES and row.status == "measured"]
    large = [(r.realisation, r) for r in graph if r.batch_size >= LARGE_BATCH and r.realisation is not None]
    fastest = {r.group: (value, r) for value, r in sorted(large, key=lambda pair: pair[0])}  # the last of a group stays
    idle = [(r.to_without_gates - 1, r) for r in graph if r.mix == NO_EXIT and r.to_without_gates is not None]
    waits = [(r.waits, r) for r in graph if r.waits is not None]
    eager = [(r.to_eager, r) for r in graph if r.engine == "graph" and r.to_eager is not None]
    done = sum(row.status == "measured" for row in rows)
    detail = f"{len(failed)} failed, first {failed[0].engine}, {failed[0].where}" if failed else f"{done} rows"
    least = f"realisation of graph on its best engine >= {REALISATION} at B >= {LARGE_BATCH}"
    return [
        Verdict("every engine runs and answers as dense with post-hoc gating", not failed if done else None, detail),
        _verdict(least, list(fastest.values()), lambda v: v >= REALISATION, "{:.3f}", min),
        _verdict(
            f"gates cost <= {OVERHEAD:.0%} of the same kernels as one graph, nobody leaving",
            idle, lambda v: v <= OVERHEAD, "{:+.1%}", max,
        ),
        _verdict("the host never waits in graph", waits, lambda v: not v, "waits: {}", max),
        _verdict("graph at least as fast as eager", eager, lambda v: v <= 1.0, "{:.3f} of its time", max),
    ]  # fmt: skip


def _verdict(
    target: str, found: list[tuple[Any, Row]], holds: Callable[[Any], bool], text: str, worst: Callable[..., Any]
) -> Verdict:
    if not found:
        return Verdict(target, None, "no row measured it")
    value, row = worst(found, key=lambda pair: pair[0])
    return Verdict(target, holds(value), f"worst of {len(found)}: {text.format(value)}, {row.engine}, {row.where}")


def mix_name(mix: Mix) -> str:
    """Shares as text."""
    return "nobody leaves" if mix == NO_EXIT else " ".join(f"{share:.2f}".lstrip("0") for share in mix)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The rows as Markdown."""
    yield (
        "| network | B | shares that leave | engine | ms a batch (p20 to p80) | speed-up | realisation | in time "
        "| MiB | note |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for r in rows:
        ms = "" if r.ms is None else f"{r.ms.median:.3f} ({r.ms.p20:.3f} to {r.ms.p80:.3f})"
        speed_up = "" if r.to_dense is None else f"{1 / r.to_dense:.2f}"
        realised = "" if r.realisation is None else f"{r.realisation:.3f}"
        in_time = "" if r.time_realisation is None else f"{r.time_realisation:.3f}"
        peak = "" if r.peak_mib is None else f"{r.peak_mib:.0f}"
        note = r.note if r.status == "measured" else f"{r.status}: {r.note}"
        cells = [r.network, r.batch_size, mix_name(r.mix), r.engine, ms, speed_up, realised, in_time, peak, note]
        yield f"| {' | '.join(map(str, cells))} |"
