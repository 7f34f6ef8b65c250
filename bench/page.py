"""docs/performance.md from the JSON of `dgate bench`: tables, plots, and where gating does not pay.

    python -m dgate_rt.bench.page bench/results/cpu-2-cores.json docs/performance.md

writes it again from what was measured, as ``dgate bench --page`` does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dgate_rt.bench import plots
from dgate_rt.bench.record import Row, load_rows, machine_words
from dgate_rt.bench.targets import mix_name, verdicts
from dgate_rt.bench.ways import CHUNKED, DENSE
from dgate_rt.drawing import standalone

_COMPARED = ("mixes", "sweep", "overhead", "latency", "contest")
LITTLE = 1.05
"""A gated way that is not faster by this much than the dense network in chunks does not pay."""
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
    "overhead": "Gates are on, and their thresholds out of reach.",
    "gates": "Time as a share of the stage before the gate; the route lets every second sample go.",
    "latency": "Batches of one. A sample leaves at the first gate, or runs to the end through all gates.",
    "contest": "All rows were timed in turn in one process. *Best dense* is the fastest dense way of all engines.",
    "memory": "Resident memory of a process of its own; the second mix. Above 256 only `refill`. Where freed "
    "memory is given back, `compile(keep_memory=False)`, operators write their results to fresh pages.",
    "streams": """Batches of one size, each taken as soon as the executor asks for it; at most 64 samples run at once.
Latency is from taking a batch to its answers, in order. With `max_wait=8` a batch is answered at the latest when eight
later ones have been taken.""",
}

_WHERE: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("network", lambda row: row.network),
    ("engine", lambda row: f"{row.engine} {row.dtype}".strip()),
    ("B", lambda row: str(row.batch_size)),
    ("exit mix", lambda row: mix_name(row.mix)),
)


def write_page(path: Path, found: dict[str, Any], rows: Sequence[Row], source: str) -> None:
    """Write the page, and its plots beside it.

    Args:
        path: of the page; plots go to a folder of its name.
        found: what the JSON file says of machine and command.
        rows: all of them.
        source: where the JSON file is, as the page says it.
    """
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for part, draw in plots.PLOTS.items():
        chosen = [row for row in rows if row.part == part and row.ms]
        if chosen:
            (folder / f"{part}.svg").write_text(standalone(draw(chosen)), encoding="utf-8")
            pictures[part] = f"![{_SAID[part]}]({folder.name}/{part}.svg)"
    path.write_text("\n".join(_page(found, rows, source, pictures)) + "\n", encoding="utf-8")


def _page(found: dict[str, Any], rows: Sequence[Row], source: str, pictures: dict[str, str]) -> Iterator[str]:
    machine = ", ".join(machine_words(found["machine"]))
    commands, commits = (
        sorted({group[of] or "unknown" for group in found["groups"].values()}) for of in ("command", "commit")
    )
    yield "# Performance"
    yield ""
    yield "<!-- Written by `dgate bench --page`; change bench/page.py, not this file. -->"
    yield ""
    yield f"`{'`, `'.join(commands)}`, on {machine}; commit {', '.join(c[:12] for c in commits)}. All rows are in"
    yield f"[{source}]({source}). Times are medians with p20 and p80, speed-ups medians of ratios taken round by round."
    yield "Weights are random and images noise: speed does not depend on them; thresholds give a wanted exit mix."
    yield 'Gates read one mean of a map, `pool="avg"`, or the first token, which other ways can do fast too.'
    yield "Before a way is timed its answers are compared with dense execution and post-hoc gating."
    yield ""
    yield from verdicts(rows)
    for part, title in _SAID.items():
        chosen = [row for row in rows if row.part == part]
        if chosen:
            yield from ("", f"## {title}", "", _EXPLAINED[part], "")
            if part in pictures:
                yield from (pictures[part], "")
            yield from _table(chosen)
    yield from ("", "## Where gating does not pay", "")
    yield from _does_not_pay(rows)


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
    """Every gated row that is hardly faster, or slower, than the same network without gates in chunks, or dense."""
    lines = []
    for row in rows:
        base = next((name for name in (CHUNKED, DENSE) if name in row.over), None)
        if row.mix and row.part in _COMPARED and base and row.over[base] < LITTLE:
            where = f"{row.network}, {row.engine} {row.dtype}, B {row.batch_size}, {mix_name(row.mix)}"
            lines.append(f"- `{row.way}`: {row.over[base]:.2f}× {base} ({where})")
    if not lines:
        yield f"Every gated row was at least {LITTLE:g} times as fast as the same network without gates."
        return
    yield f"Rows less than {LITTLE:g} times as fast as the same network without gates, in chunks if measured so:"
    yield ""
    yield from lines


if __name__ == "__main__":
    results, page = map(Path, sys.argv[1:])
    write_page(page, *load_rows(results), os.path.relpath(results, page.parent))
