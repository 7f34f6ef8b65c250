"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NetworkFile = Annotated[
    Path,
    typer.Argument(
        metavar="NETWORK", help="The trained network, from [bold]dgate train[/bold] or [bold]dgate transfer[/bold]."
    ),
]
ProgramFile = Annotated[
    Path, typer.Argument(metavar="PROGRAM", help="Gates and thresholds, from [bold]dgate calibrate[/bold].")
]
DataName = Annotated[
    str | None, typer.Option("--data", help="Images to use instead of those that the network was trained on.")
]
Root = Annotated[Path | None, typer.Option("--root", help="Where the data is; cifar10, cifar100 and folder need it.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch CIFAR into the root where it is missing.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Samples a batch.")]
Device = Annotated[str, typer.Option("--device", help="cpu, or cuda.")]
Engine = Annotated[
    str,
    typer.Option(
        "--engine", help="What stages run on: eager, inductor, openvino, onnxruntime; auto takes the fastest."
    ),
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="float32 or bfloat16, to run in; by default that of the network.")
]
Remeasure = Annotated[bool, typer.Option("--remeasure", help="Measure times again that are kept from before.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that load data; 0 loads in this one.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON; progress goes to standard error.")]
MaxDrop = Annotated[
    float | None,
    typer.Option("--max-drop", min=0, help="Accuracy that may be lost on validation data: 0.01 is one point."),
]
