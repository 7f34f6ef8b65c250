"""A page that loads nothing from anywhere: its parts, and its look."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from string import Template

import dgate_rt
from dgate_rt.timing import machine_header
from dgate_rt.writing import whole_file


def write_page(path: str | os.PathLike[str], title: str, notes: Iterable[str], sections: Iterable[str]) -> None:
    """Write a page, whole or not at all; below its notes it says on what machine, when and by what command."""
    machine = " · ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine_header().items() if value)
    written = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    page = _PAGE.substitute(
        title=escape(title),
        notes="".join(f"<p>{escape(note)}</p>" for note in notes),
        machine=escape(machine),
        origin=escape(f"dgate_rt {dgate_rt.__version__} · {written} · {command}"),
        body="".join(sections),
    )
    with whole_file(Path(path)) as file:
        file.write(page)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of text, in a box that scrolls where it is too wide."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def section(name: str, heading: str, body: str) -> str:
    """A part of the page under its heading."""
    return f'<section id="{name}"><h2>{heading}</h2>{body}</section>'


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1d2127; --soft: #626b77; --faint: #c5cbd3; --ground: #fff; --wrong: #c2304e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #9aa4b1; --faint: #4a525d; --ground: #15181c; --wrong: #ff6b86; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 1rem; padding-bottom: .3rem; border-bottom: 1px solid var(--faint); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
h4 { font-size: .95rem; margin: 1.2rem 0 .5rem; }
h4 i { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .5em; }
p { max-width: 46rem; margin: .6rem 0; }
header p.fine, section > p, figure > p { color: var(--soft); font-size: .875rem; }
.scroll { overflow-x: auto; }
.scroll svg { max-width: none; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: .5rem 0 1rem; }
th, td { padding: .35rem .9rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; border-bottom: 1px solid var(--ink); }
td { border-bottom: 1px solid var(--faint); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
#exits :is(th, td):nth-child(2) { text-align: left; }
svg { display: block; max-width: 100%; height: auto; overflow: visible; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif !important; }
figure { margin: 0; }
.side { display: flex; flex-wrap: wrap; gap: 1.5rem 3rem; }
.side > figure { flex: 0 1 auto; max-width: 100%; }
summary { cursor: pointer; font-weight: 600; margin: .75rem 0; }
.images { display: flex; flex-wrap: wrap; gap: .5rem; }
.images figure { text-align: center; font-size: .78rem; line-height: 1.3; }
.images figcaption { max-width: 7rem; overflow-wrap: anywhere; }
.images img { display: block; border-radius: 4px; margin: 0 auto .15rem; width: 52px; height: auto;
  image-rendering: pixelated; }
.images .wrong img { outline: 2px solid var(--wrong); outline-offset: -1px; }
.images .wrong figcaption { color: var(--wrong); }
</style>
</head>
<body>
<header><h1>$title</h1>$notes<p class="fine">$machine<br>$origin</p></header>
<main>$body</main>
</body>
</html>
""")
