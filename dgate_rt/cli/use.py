"""The commands that put a program to use: ``run`` and ``report``."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from dgate_rt.cli.app import app, examples
from dgate_rt.cli.console import emit_json, print_table, say
from dgate_rt.cli.options import (
    BatchSize,
    DataName,
    Device,
    Download,
    Dtype,
    Engine,
    Json,
    MaxDrop,
    NetworkFile,
    ProgramFile,
    Remeasure,
    Root,
    Workers,
)
from dgate_rt.writing import finite, whole_file

if TYPE_CHECKING:
    from dgate_rt.program import GateProgram

_UNREADABLE = 1  # exit code


class LosingGates(str, Enum):
    keep = "keep"
    off = "off"


@app.command(
    epilog=examples(
        "dgate run program.safetensors net.safetensors photos/ > answers.csv",
        "dgate run program.safetensors net.safetensors images.npy -o answers.json",
        "dgate run program.safetensors net.safetensors photos/ --max-drop 0.02 --json",
        "dgate run program.safetensors net.safetensors photos/ --monitor > answers.csv",
    )
)
def run(
    program: ProgramFile,
    network: NetworkFile,
    images: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGES",
            help="A folder to search for image files, one such file, or .npy: uint8 pixels, or normalised floats.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write here: JSON if it ends in .json, else CSV.")
    ] = None,
    max_drop: MaxDrop = None,
    executor: Annotated[
        str, typer.Option("--executor", help="auto, refill, eager, dense; lag, graph on a GPU.")
    ] = "auto",
    engine: Engine = "eager",
    dtype: Dtype = None,
    batch_size: BatchSize = 256,
    device: Device = "cpu",
    remeasure: Remeasure = False,
    losing_gates: Annotated[
        LosingGates,
        typer.Option(
            "--losing-gates",
            help="Keep gates that take more time here than they save, or switch them off, which changes answers.",
        ),
    ] = LosingGates.keep,
    monitor: Annotated[
        bool, typer.Option("--monitor", help="Tell at the end whether these images drifted from the validation data.")
    ] = False,
    json_: Json = False,
) -> None:
    """Answer every image: its label, the score behind it, and the exit that answered.

    An exit is the number of a gate, or the count of gates for the network itself. --max-drop moves to another point of
    the program's frontier. Images that cannot be read are named and skipped, and the exit code is then 1.
    """
    from dgate_rt.compiling import compile
    from dgate_rt.files import device_of, open_network, open_program
    from dgate_rt.images import ImageFolder, open_images
    from dgate_rt.progress import track

    net, torch_device = open_network(network), device_of(device)
    chosen = _at(open_program(program, net), max_drop, program)
    source = open_images(images, chosen.input_shape, net.meta.stats, net.zoom)
    runtime = compile(
        chosen,
        batch_size=batch_size,
        device=torch_device,
        executor=executor,
        engine=engine,
        dtype=dtype,
        remeasure=remeasure,
        losing_gates=losing_gates.value,
        monitor=monitor,
    )
    key, classes = "file" if isinstance(source, ImageFolder) else "index", net.meta.classes
    as_json = json_ or (output is not None and output.suffix.lower() == ".json")
    exits: Counter[int] = Counter()
    unreadable: list[str] = []
    with _rows(output, key, as_json) as write:
        batches = source.batches(batch_size)
        for batch in track(batches, "images", math.ceil(len(source) / batch_size)):
            unreadable += batch.unreadable
            answers = runtime(batch.images.to(torch_device, chosen.input_dtype))
            columns = (answers.labels.tolist(), answers.scores.tolist(), answers.exits.tolist())
            for name, label, score, exit_ in zip(batch.names, *columns, strict=True):
                exits[exit_] += 1
                write((name if key == "file" else int(name), label, classes[label], score, exit_))
    for problem in unreadable:
        say(f"skipped {problem}")
    total = sum(exits.values())
    shares = " / ".join(f"{exits[e] / max(total, 1):.1%}" for e in range(len(chosen.thresholds) + 1))
    say(f"{total} images, executor {runtime.executor}, engine {runtime.engine}; left at each exit: {shares}")
    if monitor:
        say(str(runtime.monitor.report()))
    if output is not None:
        say(f"wrote {output}")
    if unreadable:
        say(f"{len(unreadable)} of {len(source)} files could not be read")
        raise typer.Exit(_UNREADABLE)


@contextmanager
def _rows(output: Path | None, key: str, as_json: bool) -> Iterator[Callable[[tuple[Any, ...]], None]]:
    """A function that writes one answer, to ``output`` (whole or not at all) or to standard output."""
    names = (key, "label", "class", "score", "exit")
    if output is not None:
        with whole_file(output) as file, _rows_into(file, names, as_json) as write:
            yield write
    else:
        with _rows_into(sys.stdout, names, as_json) as write:
            yield write


@contextmanager
def _rows_into(file: TextIO, names: tuple[str, ...], as_json: bool) -> Iterator[Callable[[tuple[Any, ...]], None]]:
    if not as_json:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        yield writer.writerow
        return
    separator = "[\n"

    def write(row: tuple[Any, ...]) -> None:
        nonlocal separator
        file.write(separator + json.dumps(finite(dict(zip(names, row, strict=True)))))
        separator = ",\n"

    yield write
    file.write("\n]\n" if separator == ",\n" else "[]\n")


def _at(program: GateProgram, max_drop: float | None, path: Path) -> GateProgram:
    """The program, or another point of its frontier."""
    if max_drop is None:
        return program
    if math.isnan(program.network_accuracy):
        raise ValueError(f"--max-drop: the gates in {path} are not calibrated; run dgate calibrate first")
    return program.at(max_accuracy_drop=max_drop)


@app.command(
    epilog=examples(
        "dgate report program.safetensors net.safetensors -o report.html",
        "dgate report program.safetensors net.safetensors --max-drop 0 --max-drop 0.01 -o report.html",
        "dgate report results/ -o report.html",
    )
)
def report(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="PROGRAM NETWORK | RESULTS",
            help="A program and its network; or folders or JSON files of [bold]dgate experiment[/bold].",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the page here.")] = Path("report.html"),
    data: DataName = None,
    max_drop: Annotated[
        list[float] | None,
        typer.Option("--max-drop", min=0, help="Show the frontier's point of this drop; may be repeated."),
    ] = None,
    executor: Annotated[
        str, typer.Option("--executor", help="auto, refill, eager, dense; lag, graph on a GPU.")
    ] = "auto",
    engine: Engine = "eager",
    dtype: Dtype = None,
    batch_size: BatchSize = 256,
    root: Root = None,
    download: Download = False,
    device: Device = "cpu",
    workers: Workers = 0,
    json_: Json = False,
) -> None:
    """Write one self-contained page: of dense and gated runs on the test split, or of experiments that were run."""
    if all(source.is_dir() or source.suffix == ".json" for source in sources):
        _report_experiments(sources, output, json_)
        return
    if len(sources) != 2:
        raise ValueError(f"sources: expected a program and its network, or results, got {len(sources)} files")
    program, network = sources
    from dgate_rt.cli.testing import measure, pictures
    from dgate_rt.files import device_of, open_data, open_network, open_program
    from dgate_rt.report import console_table, simulated_graph, write_report
    from dgate_rt.trace import collect_trace

    torch_device = device_of(device)
    net = open_network(network, torch_device)
    found = open_program(program, net)
    if max_drop:
        programs = {f"at most {drop:.2%} lost": _at(found, drop, program) for drop in dict.fromkeys(max_drop)}
    else:
        programs = {"calibrated": found}
    bundle = open_data(net, data, root, download)
    loader = bundle.loader("test", batch_size, workers=workers)
    options = {"batch_size": batch_size, "device": torch_device, "engine": engine, "dtype": dtype}
    rows = measure(programs, loader, executor, options)
    trace, _ = collect_trace(found.staged, found.gates, loader, device=torch_device)
    shown = pictures(bundle, loader)
    how = f"batch size {batch_size}, engine {engine}"
    notes = [f"{net.meta.name}, width {net.meta.width:g}; test split of {bundle.name}; {how}."]
    if shown is None:
        notes.append("The test split is too large to show examples of.")
    graph, missing = simulated_graph(next(iter(programs.values())), batch_size)
    write_report(
        output,
        title=f"Gates on {net.meta.name}, {bundle.name}",
        programs=programs,
        trace=trace,
        images=shown,
        classes=bundle.classes,
        table=rows,
        notes=[*notes, *missing],
        graph=graph,
    )
    say(f"wrote {output}")
    if json_:
        emit_json({"output": output, "rows": [asdict(row) for row in rows]})
    else:
        print_table(console_table(rows))


def _report_experiments(sources: list[Path], output: Path, json_: bool) -> None:
    from dgate_rt.experiments import page, record

    records = record.load(sources)
    page.write_html(output, records)
    say(f"wrote {output}")
    if json_:
        emit_json({"output": output, "records": list(records.values())})
