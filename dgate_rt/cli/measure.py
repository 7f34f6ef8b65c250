"""Commands that measure: ``bench``, ``flops`` and ``doctor``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgate_rt.cli.app import app, examples
from dgate_rt.cli.console import emit_json, finite, out, print_table, say, table, whole_file
from dgate_rt.cli.options import Dtype, Engine, Json

if TYPE_CHECKING:
    from dgate_rt.bench.exit_mixes import Row
    from dgate_rt.bench.memory import Peak

_QUICK_BATCH_SIZES = (1, 32)
_QUICK_REPEATS = 3
_QUICK_IMAGES, _IMAGES = 32, 64  # a round
_REPEATS = 5
_MARKS = {True: "[green]yes[/green]", False: "[red]no[/red]", None: ""}


@app.command(epilog=examples("dgate bench --quick", "dgate bench -b 32 -b 128 --repeats 9 -o results.json"))
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Two batch sizes, two exit mixes, few repeats, no memory: three minutes.")
    ] = False,
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch-size", "-b", min=1, help="A batch size to measure; may be repeated.")
    ] = None,
    repeats: Annotated[int | None, typer.Option("--repeats", min=1, help="Rounds; medians are over them.")] = None,
    memory: Annotated[
        bool | None,
        typer.Option(
            "--memory/--no-memory", help="Peak memory of dense and gated execution (Linux); not with --quick."
        ),
    ] = None,
    engine: Engine = "eager",
    dtype: Dtype = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write everything to this JSON file.")] = None,
    json_: Json = False,
) -> None:
    """Time gated against dense execution of ResNet-101 at the exit mixes of the paper's Table 1.

    In the same process and in turn: the dense network, dgate_rt, a masked loop as one would write it, and earlyon.
    Before anything is timed the answers are compared. On another engine, or in another dtype, dense and dgate_rt alone
    are run, both on it.
    """
    from dgate_rt.bench import exit_mixes, workload
    from dgate_rt.progress import track
    from dgate_rt.timing import commit, machine_header

    sizes = tuple(batch_size or (_QUICK_BATCH_SIZES if quick else exit_mixes.BATCH_SIZES))
    mixes = (workload.PAPER_MIXES[1], workload.NO_EXIT) if quick else exit_mixes.MIXES
    rounds = repeats or (_QUICK_REPEATS if quick else _REPEATS)
    ticks = track(range(len(sizes) * (rounds + 1)), "rounds")
    next(ticks, None)
    images = _QUICK_IMAGES if quick else _IMAGES
    rows = list(exit_mixes.run(sizes, mixes, rounds, images, lambda: next(ticks, None), engine, dtype))
    peaks = _peaks(sizes) if memory or (memory is None and not quick and sys.platform == "linux") else {}
    machine = machine_header()
    result = {
        "command": ["dgate", *sys.argv[1:]],
        "commit": commit(),
        "machine": machine,
        "engine": engine,
        "dtype": dtype,
        "rows": [row.as_json() for row in rows],
        "memory": [
            {"batch_size": size, "executor": name, "idle_mib": peak.idle, "peak_mib": peak.peak}
            for (size, name), peak in peaks.items()
        ],
    }
    if output is not None:
        with whole_file(output) as file:
            json.dump(finite(result), file, indent=2, allow_nan=False)
        say(f"wrote {output}")
    if json_:
        emit_json(result)
        return
    out.print(" · ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items() if value))
    what = f"CIFAR ResNet-101 on {engine}, {dtype or 'float32'}"
    print_table(_bench_table(rows), f"{what}; times are medians [p20–p80]; exit mix: gate 1, 2, 3, end")
    if peaks:
        print_table(_memory_table(sizes, peaks), "Resident memory of a process")


def _bench_table(rows: Iterable[Row]) -> Any:
    columns = ("runtime", "B", "exit mix", "GFLOPs", "ms a sample", "speed-up", "realisation", "of time")
    lines = [
        (
            f"{row.engine} ({row.executor})" if row.engine == "dgate_rt" else row.engine,
            str(row.batch_size),
            " ".join(f"{share:.2f}".removeprefix("0") for share in row.mix),
            _number(row.gflops, "{:.2f}"),
            f"{row.ms.median:.2f} [{row.ms.p20:.2f}–{row.ms.p80:.2f}]",
            f"{row.speed_up:.2f}×",
            _number(row.realisation, "{:.3f}"),
            _number(row.time_realisation, "{:.3f}"),
        )
        for row in rows
    ]
    return table(columns, lines)


def _memory_table(sizes: Sequence[int], peaks: dict[tuple[int, str], Peak]) -> Any:
    lines = []
    for size in sizes:
        dense, eager = peaks[size, "dense"], peaks[size, "eager"]
        ratio = eager.peak / dense.peak
        above = [f"{peak.peak - peak.idle:.0f}" for peak in (dense, eager)]
        lines.append((str(size), f"{dense.peak:.0f}", f"{eager.peak:.0f}", f"{ratio:.3f}", " / ".join(above)))
    return table(("B", "dense peak MiB", "eager peak MiB", "ratio", "above idle MiB"), lines, left=0)


def _peaks(sizes: Sequence[int]) -> dict[tuple[int, str], Peak]:
    from dgate_rt.bench.memory import measure
    from dgate_rt.progress import track

    jobs = [(size, executor) for size in sizes for executor in ("dense", "eager")]
    return {job: measure(job[1], job[0]) for job in track(jobs, "memory")}


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


@app.command(epilog=examples("dgate flops", "dgate flops resnet101 --json"))
def flops(
    backbone: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these.")] = None,
    json_: Json = False,
) -> None:
    """Count the FLOPs a 32×32 image costs in every backbone, stage by stage; two a multiply-add.

    ResNet-101 costs 5.02 GFLOPs, as in the paper's Table 1.
    """
    from dgate_rt.backbones import names, stage_flops

    counted = {name: stage_flops(name) for name in backbone or names()}
    if json_:
        emit_json({name: {"stages": stages, "total": sum(stages)} for name, stages in counted.items()})
        return
    columns = ("backbone", "to gate 1", "to gate 2", "to gate 3", "to the end", "GFLOPs")
    lines = [[name, *(f"{f / 1e9:.4f}" for f in parts), f"{sum(parts) / 1e9:.4f}"] for name, parts in counted.items()]
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
