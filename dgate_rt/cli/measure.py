"""Commands that measure: ``bench``, ``flops`` and ``doctor``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dgate_rt.cli.app import app, examples
from dgate_rt.cli.console import command, emit_json, out, print_table, say, table
from dgate_rt.cli.options import Json

_MARKS = {True: "[green]yes[/green]", False: "[red]no[/red]", None: ""}
_QUICK_PARTS = ("mixes", "overhead", "latency", "contest", "streams")


@app.command(
    epilog=examples(
        "dgate bench --quick",
        "dgate bench -o results.json                 (resumes where it was interrupted)",
        "dgate bench -p contest -p streams",
        "dgate bench -p mixes --only 'ResNet-101, eager float32, B 64'",
        "dgate bench -o results.json --page performance.md",
    )
)
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="One batch size, few engines and rounds: three minutes.")
    ] = False,
    part: Annotated[
        list[str] | None, typer.Option("--part", "-p", help="Only this part; may be repeated. All parts by default.")
    ] = None,
    only: Annotated[
        str, typer.Option("--only", help="Only groups whose name has this in it, such as 'ViT' or 'B 64'.")
    ] = "",
    repeats: Annotated[int | None, typer.Option("--repeats", min=1, help="Rounds; medians are over them.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep everything in this JSON file, and go on from it.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--page", help="Write tables and plots to this Markdown file, and beside it.")
    ] = None,
    json_: Json = False,
) -> None:
    """Time gated against dense execution, each stage engine and what a user could write instead, on the CPU.

    Parts: mixes, sweep, overhead, latency, contest, memory, streams. What is compared runs in turn in one
    process, after its answers have been compared. Hours in full, minutes with --quick.
    """
    from dgate_rt.bench import page as pages
    from dgate_rt.bench import suite
    from dgate_rt.bench.record import Results, machine_words
    from dgate_rt.bench.targets import verdicts
    from dgate_rt.progress import note, track

    scale = suite.QUICK if quick else suite.FULL
    scale = replace(scale, repeats=repeats or scale.repeats)
    parts = tuple(part or (_QUICK_PARTS if quick else suite.PARTS))
    unknown = [name for name in parts if name not in suite.PARTS]
    if unknown:
        raise ValueError(f"part: expected one of {', '.join(suite.PARTS)}, got {unknown[0]!r}")
    results = Results(output, command())
    left = [group for group in suite.groups(scale, parts) if only in group.name and group.name not in results]
    for group in track(left, "groups"):
        note(group.name)
        results.add(group, group.measure())
    rows = list(results.rows())
    if page is not None:
        pages.write_page(page, results.as_json(), rows, output)
        say(f"wrote {page}")
    if json_:
        emit_json(results.as_json())
        return
    out.print(" · ".join(machine_words(results.as_json()["machine"])))
    for name in dict.fromkeys(row.part for row in rows):
        cells, columns = pages.cells([row for row in rows if row.part == name])
        print_table(table(columns, cells), name)
    out.print("\n".join(verdicts(rows)), markup=False)


@app.command(epilog=examples("dgate flops", "dgate flops resnet101 --json"))
def flops(
    backbone: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these.")] = None,
    json_: Json = False,
) -> None:
    """Count the FLOPs an image costs in every backbone, stage by stage; two a multiply-add.

    ResNet-101 costs 5.02 GFLOPs, as in the paper's Table 1.
    """
    from dgate_rt.backbones import image_size, names, stage_flops

    counted = {name: stage_flops(name) for name in backbone or names()}
    if json_:
        emit_json({name: {"stages": stages, "total": sum(stages)} for name, stages in counted.items()})
        return
    columns = ("backbone", "pixels", "to gate 1", "to gate 2", "to gate 3", "to the end", "GFLOPs")
    lines = [
        [name, f"{image_size(name)}×{image_size(name)}", *(f"{f / 1e9:.4f}" for f in (*parts, sum(parts)))]
        for name, parts in counted.items()
    ]
    print_table(table(columns, lines))


@app.command(epilog=examples("dgate doctor", "dgate doctor --json"))
def doctor(json_: Json = False) -> None:
    """Say what this machine can run, and why not the rest. Exit code 0 if the CPU path works."""
    from dgate_rt.cli.doctor import cpu_works, examine

    findings = examine()
    works = cpu_works(findings)
    if json_:
        sections: dict[str, dict[str, Any]] = {}
        for f in findings:
            sections.setdefault(f.section, {})[f.name] = {"works": f.works, "detail": f.detail}
        emit_json({"cpu_works": works, **sections})
    else:
        from rich.markup import escape
        from rich.table import Table

        shown = Table(show_header=False, box=None, pad_edge=False)
        section = None
        for f in findings:
            if f.section != section:
                section = f.section
                shown.add_row(f"[bold]{section}[/bold]")
            shown.add_row(f"  {escape(f.name)}", _MARKS[f.works], escape(f.detail))
        print_table(shown)
    if not works:
        raise typer.Exit(1)
