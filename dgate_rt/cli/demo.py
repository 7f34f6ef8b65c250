"""``dgate demo``: the whole way on real images."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dgate_rt.cli.app import app, examples
from dgate_rt.cli.console import emit_json
from dgate_rt.cli.options import Json


@app.command(epilog=examples("dgate demo", "dgate demo --quick --out /tmp/demo"))
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Write network, programs and report here.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Less training: a minute, and a worse network.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the training of network and gates.")] = 0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train again, whatever is there from an earlier demo.")
    ] = False,
    json_: Json = False,
) -> None:
    """From images to a report: train a network on cluttered MNIST, put gates on it, calibrate, run dense and gated."""
    from dgate_rt.demo import run_demo

    with redirect_stdout(sys.stderr) if json_ else nullcontext():
        result = run_demo(folder, quick=quick, seed=seed, fresh=fresh)
    if json_:
        emit_json(asdict(result))
