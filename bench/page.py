"""docs/performance.md from the JSON of `dgate bench`: tables, plots, and where gating does not pay.

    python -m dgate_rt.bench.page bench/results/cpu-2-cores.json docs/performance.md

writes it again from what was measured, as ``dgate bench --page`` does. Why targets are missed is written by hand, in a
Markdown file beside the JSON, ``cpu-2-cores.why.md`` here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dgate_rt.bench import plots
from dgate_rt.bench.record import Row, load_rows, machine_words
from dgate_rt.bench.targets import mix_name, over_dense, verdicts
from dgate_rt.drawing import standalone

_COMPARED = ("mixes", "sweep", "overhead", "latency", "contest")
LITTLE = 1.05
"""A gated way that is not faster by this much than the network without gates does not pay."""
SMALL = 8
"""Batches of at most so many are small."""
_SAID = {
    "mixes": "Exit mixes",
    "sweep": "From all late to all early",
    "overhead": "Where nobody leaves",
    "gates": "A gate beside its stage",
    "latency": "One sample at a time",
    "contest": "Every engine, and what a user could write instead",
    "memory": "Memory, and large batches",
    "streams": "Streams",
}
_EXPLAINED = {
    "mixes": """Shares of the samples that leave at gate 1, 2, 3 and at the end; the four mixes cost what the rows of
the paper's Table 1 cost. *Realisation* is the share of the FLOPs saving that became time, *time realisation* the
share of what the stages' own times allow, measured in the same rounds by letting all samples leave at one gate.""",
    "sweep": "Every gate lets go the same share of those who reach it, from 0 to 1.",
    "overhead": """Gates are on, and their thresholds out of reach. With `compile(losing_gates="off")` they are switched
off, since they lose time.""",
    "gates": "Time as a share of the stage before the gate; the route lets every second sample go.",
    "latency": "Batches of one. A sample leaves at the first gate, or runs to the end through all gates.",
    "contest": "All rows were timed in turn in one process. *Best dense* is the fastest dense way of all engines.",
    "memory": "Resident memory of a process of its own; the second mix. Above 256 only `refill`. Where freed "
    "memory is given back, `compile(keep_memory=False)`, operators write their results to fresh pages.",
    "streams": """Batches of one size, each taken as soon as the executor asks for it; at most 64 samples run at once.
Latency is from taking a batch to its answers, in order. With `max_wait=8` a batch is answered at the latest when eight
later ones have been taken.""",
}

_CHECKED = """Before a way is timed its answers are compared with dense execution and post-hoc gating, with every gate
off for dense ways; in the part on memory with a runtime of the same kind. The exceptions are `earlyon`, whose batches
leave whole, by a rule of its own, and a gate by itself beside its stage."""
_GATED_CHECKED = """Before a gated way was timed its answers were compared with dense execution and post-hoc gating.
Ways without gates, memory and `earlyon` were not checked when this was measured."""
_OLD = "Measured before freed memory was kept: dense batches on eager are slower here than they need be."

_WHERE: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("network", lambda row: row.network),
    ("engine", lambda row: f"{row.engine} {row.dtype}".strip()),
    ("B", lambda row: str(row.batch_size)),
    ("exit mix", lambda row: mix_name(row.mix)),
)


def write_page(path: Path, found: dict[str, Any], rows: Sequence[Row], results: Path | None) -> None:
    """Write the page, and its plots beside it.

    Args:
        path: of the page; plots go to a folder of its name.
        found: what the JSON file says of machine and command.
        rows: all of them.
        results: the JSON file, if there is one; a text beside it that ends in ".why.md" is told of missed targets.
    """
    source = "nowhere" if results is None else os.path.relpath(results, path.parent)
    beside = None if results is None else results.with_suffix(".why.md")
    why = beside.read_text(encoding="utf-8").strip() if beside is not None and beside.exists() else ""
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for part, draw in plots.PLOTS.items():
        chosen = [row for row in rows if row.part == part and row.ms]
        if chosen:
            (folder / f"{part}.svg").write_text(standalone(draw(chosen)), encoding="utf-8")
            pictures[part] = f"![{_SAID[part]}]({folder.name}/{part}.svg)"
    path.write_text("\n".join(_page(found, rows, source, why, pictures)) + "\n", encoding="utf-8")


def _page(found: dict[str, Any], rows: Sequence[Row], source: str, why: str, pictures: dict[str, str]) -> Iterator[str]:
    machine = ", ".join(machine_words(found["machine"]))
    commands = sorted({group["command"] for group in found["groups"].values()})
    commits = sorted({_short(group["commit"]) for group in found["groups"].values()})
    yield "# Performance"
    yield ""
    yield "<!-- Written by `dgate bench --page`; change bench/page.py or the results' .why.md, not this file. -->"
    yield ""
    if "freed_memory" not in found["machine"]:
        yield from (_OLD, "")
    yield f"`{'`, `'.join(commands)}`, on {machine}; commit {', '.join(commits)}. All rows are in"
    yield f"[{source}]({source}). Times are medians with p20 and p80, speed-ups medians of ratios taken round by round."
    yield "Weights are random and images noise: speed does not depend on them; thresholds give a wanted exit mix."
    yield 'Gates read one mean of a map, `pool="avg"`, or the first token, which other ways can do fast too.'
    yield _CHECKED if "versions" in found["machine"] else _GATED_CHECKED
    yield ""
    yield from verdicts(rows)
    if why:
        yield from ("", "## Why targets are missed", "", why)
    for part, title in _SAID.items():
        chosen = [row for row in rows if row.part == part]
        if chosen:
            yield from ("", f"## {title}", "", _EXPLAINED[part], "")
            if part in pictures:
                yield from (pictures[part], "")
            yield from _table(chosen)
    yield from ("", "## Where gating does not pay", "")
    yield from _does_not_pay(rows)


def _short(commit: str | None) -> str:
    """A commit's first digits, and whether there were changes beside it."""
    digits, dirty, _ = (commit or "unknown").partition("-dirty")
    return digits[:12] + dirty


def cells(rows: Sequence[Row]) -> tuple[list[list[str]], list[str]]:
    """Rows of one part as text, and the names of their columns: those in which they differ."""
    over = dict.fromkeys(name for row in rows for name in row.over)
    values = dict.fromkeys(name for row in rows for name in row.values)
    columns: list[tuple[str, Callable[[Row], str]]] = [*_WHERE, ("way", lambda row: row.way), ("ms a sample", _ms)]
    columns += [(f"over {name}", _over(name)) for name in over]
    columns += [(name, _value(name)) for name in values]
    kept = [(name, cell) for name, cell in columns if name == "way" or len({cell(row) for row in rows}) > 1]
    return [[cell(row) for _, cell in kept] for row in rows], [name for name, _ in kept]


def _table(rows: Sequence[Row]) -> Iterator[str]:
    lines, names = cells(rows)
    alike = [f"{name} {cell(rows[0])}" for name, cell in _WHERE if name not in names]
    if alike:
        yield from (f"All rows: {', '.join(alike)}.", "")
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
    for line in lines:
        yield f"| {' | '.join(line)} |"


def _ms(row: Row) -> str:
    return row.note if row.ms is None else f"{row.ms.median:.2f} [{row.ms.p20:.2f}–{row.ms.p80:.2f}]"


def _over(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row.over[name]:.2f}×" if name in row.over else ""


def _value(name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row.values.get(name)
        return "" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"

    return cell


def _does_not_pay(rows: Sequence[Row]) -> Iterator[str]:
    """Gated rows that are hardly faster, or slower, than the same network without gates, where they are alike."""
    gated = [(ratio, row) for row in rows if row.mix and row.part in _COMPARED and (ratio := over_dense(row))]
    losing = [(ratio, row) for ratio, row in gated if ratio < LITTLE]
    if not losing:
        yield f"Every gated row was at least {LITTLE:g} times as fast as the same network without gates."
        return
    others = [row for _, row in losing if row.mix[-1] < 1]
    small = sum(row.batch_size <= SMALL for row in others)
    yield f"{len(losing)} of {len(gated)} gated rows are less than {LITTLE:g} times as fast as the same network without"
    yield f"gates, whole or in chunks, whichever is faster: {len(losing) - len(others)} where nobody leaves,"
    yield f"{small} others at B <= {SMALL}, and {len(others) - small} others at larger B."
    yield ""
    yield "| network | engine | exit mix | B | ways | speed-up |"
    yield "|---|---|---|---|---|---|"
    for where in dict.fromkeys(_place(row) for _, row in losing):
        alike = [(ratio, row) for ratio, row in losing if _place(row) == where]
        sizes = ", ".join(str(size) for size in sorted({row.batch_size for _, row in alike}))
        ways = ", ".join(dict.fromkeys(row.way for _, row in alike))
        bounds = dict.fromkeys(f"{end(ratio for ratio, _ in alike):.2f}" for end in (min, max))
        yield f"| {' | '.join(where)} | {sizes} | {ways} | {'–'.join(bounds)}× |"


def _place(row: Row) -> tuple[str, ...]:
    return row.network, f"{row.engine} {row.dtype}", mix_name(row.mix)


if __name__ == "__main__":
    results, page = map(Path, sys.argv[1:])
    write_page(page, *load_rows(results), results)
