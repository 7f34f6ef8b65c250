"""A page of experiments from their JSON files: Markdown with its figures beside it, or one self-contained HTML file.

    python -m dgate_rt.experiments.page docs/experiments/results docs/experiments.md

writes the page of this repository again; ``dgate report FOLDER`` writes HTML.
"""

from __future__ import annotations

import base64
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from dgate_rt import webpage
from dgate_rt.drawing import standalone
from dgate_rt.experiments import record
from dgate_rt.experiments.experiment import NAMES, Experiment, Table, find
from dgate_rt.experiments.record import Record
from dgate_rt.writing import whole_file

TITLE = "Experiments"
_PNG = "data:image/png;base64,"
_CLAIMS = ("Claim", "Of", "Holds", "Here", "On", "By")
_HOLDS = {True: "yes", False: "**no**"}
_ABOUT = (
    "What the paper says, measured again. Each experiment is a command; its numbers, options and seeds are in the file "
    "that is named beside it. Claims are the paper's unless they say that the check is ours, or are beyond the paper. "
    "Networks and data are not the paper's where it says so: then only the direction of a finding can be compared, not "
    "its size."
)


@dataclass(frozen=True)
class Heading:
    """Of a part (level 2), or of one record in it (level 3)."""

    level: int
    text: str


@dataclass(frozen=True)
class Picture:
    """A figure under a name that no other has."""

    name: str
    content: str  # an SVG element, or a PNG as data URI


Block = Heading | Picture | Table | str
"""What a page is made of; in text, commands and files stand between backticks."""


def contents(records: Mapping[Path, Record], beside: Path) -> Iterator[Block]:
    """The page, block after block; files are named as seen from the folder ``beside``.

    Raises:
        ValueError: if two records would have the same name.
    """
    by_name = {name: {p: r for p, r in records.items() if r["experiment"] == name} for name in NAMES}
    slugs = Counter(_slug(found) for found in records.values())
    twice = [slug for slug, times in slugs.items() if times > 1]
    if twice:
        raise ValueError(
            f"results: expected one file of an experiment on a network and its data, got two of {twice[0]}"
        )
    yield _ABOUT
    yield Heading(2, "What the paper says, and what was seen")
    yield _claims(records)
    for name, chosen in by_name.items():
        if chosen:
            yield from _experiment(find(name), chosen, beside)
    yield Heading(2, "What did not hold")
    missed = _claims(records, missed=True)
    yield missed if missed.rows else "Every claim above held."


def _claims(records: Mapping[Path, Record], missed: bool = False) -> Table:
    rows = []
    for name in NAMES:
        for found in records.values():
            if found["experiment"] == name:
                rows += [
                    (said["claim"], find(name).source, _HOLDS[said["holds"]], said["seen"], _on(found), _by(found))
                    for said in found["result"]["claims"]
                    if not (said["holds"] and missed)
                ]
    return Table("", _CLAIMS, rows)


def _experiment(experiment: Experiment, records: Mapping[Path, Record], beside: Path) -> Iterator[Block]:
    yield Heading(2, f"{experiment.title} ({experiment.source})")
    yield experiment.about
    for path, found in records.items():
        machine = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found["machine"].items() if value)
        options = ", ".join(f"{key} {value}" for key, value in found["options"].items())
        yield Heading(3, _on(found))
        where = f"commit {found['commit'] or 'unknown'}, on {machine}"
        yield f"{_by(found)}, {where}; the run that ended it took {found['seconds']:g} s."
        if found.get("origin"):
            yield f"The network comes from `{found['origin']}`."
        yield f"Options: {options}. All numbers: `{os.path.relpath(path, beside)}`."
        yield from experiment.tables(found["result"])
        yield from _pictures(found)
    yield from experiment.reported


def write_markdown(path: Path, records: Mapping[Path, Record]) -> None:
    """Write the page, and its figures into a folder of its name."""
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"# {TITLE}", "", "<!-- Written by `python -m dgate_rt.experiments.page`; change that, not this file. -->"]
    for block in contents(records, path.parent):
        lines.append("")
        if isinstance(block, Heading):
            lines.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Picture):
            lines.append(f"![{block.name}]({folder.name}/{_write_picture(folder, block)})")
        elif isinstance(block, Table):
            lines += _markdown_table(block)
        else:
            lines.append(block)
    with whole_file(path) as file:
        file.write("\n".join(lines) + "\n")


def write_figures(folder: Path, found: Record) -> None:
    """Write the figures of one record."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in _pictures(found):
        _write_picture(folder, picture)


def _pictures(found: Record) -> Iterator[Picture]:
    for name, content in find(found["experiment"]).figures(found["result"]).items():
        yield Picture(f"{_slug(found)}-{name}", content)


def _write_picture(folder: Path, picture: Picture) -> str:
    if picture.content.startswith(_PNG):
        file = folder / f"{picture.name}.png"
        file.write_bytes(base64.b64decode(picture.content.removeprefix(_PNG)))
    else:
        file = folder / f"{picture.name}.svg"
        file.write_text(standalone(picture.content), encoding="utf-8")
    return file.name


def _markdown_table(table: Table) -> Iterator[str]:
    if table.title:
        yield from (f"**{table.title}**", "")
    yield f"| {' | '.join(table.columns)} |"
    yield "|---" * len(table.columns) + "|"
    for row in table.rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    if table.note:
        yield from ("", table.note)


def write_html(path: Path, records: Mapping[Path, Record]) -> None:
    """Write the page as one file that loads nothing."""
    sections: list[tuple[str, list[str]]] = []
    notes: list[str] = []
    for block in contents(records, path.parent):
        if isinstance(block, Heading) and block.level == 2:
            sections.append((block.text, []))
        elif not sections:
            notes.append(str(block))
        else:
            sections[-1][1].append(_html(block))
    parts = [webpage.section(f"part-{n}", escape(heading), "".join(body)) for n, (heading, body) in enumerate(sections)]
    webpage.write_page(path, TITLE, notes, parts)


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h3>{escape(block.text)}</h3>"
    if isinstance(block, Picture):
        inside = f'<img src="{block.content}" alt="">' if block.content.startswith(_PNG) else block.content
        return f"<figure>{inside}</figure>"
    if isinstance(block, Table):
        title = f"<h4>{escape(block.title)}</h4>" if block.title else ""
        rows = [[cell.replace("**", "").replace("`", "") for cell in row] for row in block.rows]
        return title + webpage.table(block.columns, rows) + (_html(block.note) if block.note else "")
    text = re.sub("`([^`]*)`", r"<code>\1</code>", escape(block))
    return f"<p>{text}</p>"


def _on(found: Record) -> str:
    """Network and images, and what gates read."""
    s, pool = found["settings"], record.pool(found)
    gates = f", gates read {pool}" if pool else ""
    return f"{s['backbone']}, width {s['width']:g}, {s['data']} at {s['image_size']} pixels{gates}"


def _by(found: Record) -> str:
    return f"`{found['command']}`"


def _slug(found: Record) -> str:
    s, suffix = found["settings"], record.suffix(record.pool(found))
    return f"{found['experiment']}{suffix}-{s['backbone']}-{s['width']:g}-{s['data']}-{s['image_size']}"


if __name__ == "__main__":
    *sources, target = map(Path, sys.argv[1:])
    write_markdown(target, record.load(sources))
