"""``dgate experiment``: the experiments of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dgate_rt.cli.app import app, examples
from dgate_rt.cli.console import command, emit_json, out, print_table, say, table
from dgate_rt.cli.options import Device, Download, Json, Root, Workers

_EVERY = "all"


@app.command(
    epilog=examples(
        "dgate experiment                                       (lists them with their options)",
        "dgate experiment surfaces --quick -o results/",
        "dgate experiment all --data cluttered-mnist --backbone resnet101 --width 0.25 -o results/",
        "dgate experiment surfaces --network net.safetensors --set steps=61 -o results/",
        "dgate experiment all --data cifar10 --root ~/data --backbone resnet101 --network net.safetensors -o results/",
    )
)
def experiment(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="One of them, or all; without a name they are listed.")
    ] = "",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Keep everything here, and go on from it."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Images; by default those that the network was trained on.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option("--backbone", help="See [bold]dgate flops[/bold] for the names.")
    ] = None,
    width: Annotated[float | None, typer.Option("--width", help="Factor on every channel count.")] = None,
    network: Annotated[
        Path | None,
        typer.Option(
            "--network",
            metavar="FILE",
            help="From [bold]dgate train[/bold] or [bold]transfer[/bold]; else one is trained.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="OPTION=VALUE", help="Of the experiment; may be repeated.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small network on digits and coarse options: to see that it works.")
    ] = False,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Of training a network; 10 by default.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Its highest step size; 0.1 by default.")] = None,
    label_smoothing: Annotated[
        float | None, typer.Option("--label-smoothing", help="Of its labels; 0.1 by default.")
    ] = None,
    mixup: Annotated[
        float | None, typer.Option("--mixup", help="Mixes its images in pairs; 0, for none, by default.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", min=1, help="Its samples a batch; 64 by default.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of its weights and order; 0 by default.")] = None,
    image_size: Annotated[int | None, typer.Option("--image-size", min=1, help="Pixels a side.")] = None,
    data_seed: Annotated[
        int | None, typer.Option("--data-seed", help="Of the split into train, val and test; 0 by default.")
    ] = None,
    cache_gb: Annotated[float, typer.Option("--cache-gb", help="The most that features of one split may take.")] = 32.0,
    root: Root = None,
    download: Download = False,
    device: Device = "cpu",
    workers: Workers = 0,
    json_: Json = False,
) -> None:
    """Run an experiment of the paper: FOLDER/NAME.json has its numbers and where they come from.

    Everything expensive is kept in FOLDER: network, features, gates. What was interrupted goes on from there, and
    other experiments on the same network use it too. dgate report FOLDER makes a page of all that is there.
    """
    from dgate_rt import pretrain
    from dgate_rt.experiments import page, record
    from dgate_rt.experiments.experiment import NAMES, find
    from dgate_rt.experiments.training import Training
    from dgate_rt.experiments.workbench import Workbench
    from dgate_rt.files import device_of

    if not name:
        _list([find(known) for known in NAMES])
        return
    chosen = [find(known) for known in (NAMES if name == _EVERY else (name,))]
    if name == _EVERY and set_:
        raise ValueError(f"set: options belong to one experiment, got {set_[0]!r} for all")
    options = [one.configured(quick, set_ or ()) for one in chosen]
    if output is None:
        raise ValueError("output: expected a folder (-o FOLDER), got none")
    given = {
        "epochs": epochs,
        "lr": lr,
        "label_smoothing": label_smoothing,
        "mixup": mixup,
        "batch_size": batch_size,
        "seed": seed,
    }
    untouched = all(value is None for value in given.values())
    training = None if network is not None and untouched else Training().but(**given)
    if quick and network is None:
        recipe = pretrain.QUICK
        data, backbone, width = data or recipe.dataset, backbone or recipe.name, width or recipe.width
        image_size = image_size or recipe.image_size
        training = Training(recipe.epochs, recipe.batch_size, recipe.lr, augment=False).but(**given)
    bench = Workbench(
        output,
        data=data,
        backbone=backbone,
        width=width,
        network=network,
        training=training,
        image_size=image_size,
        data_seed=data_seed,
        root=root,
        download=download,
        device=device_of(device),
        workers=workers,
        cache_gb=cache_gb,
    )
    records = []
    for one, configured in zip(chosen, options, strict=True):
        if name == _EVERY and (reason := one.unfit(bench)):
            say(f"{one.name} is left out: {reason}")
            continue
        say(f"{one.name}: {one.title}")
        found = record.run(one, bench, configured, command())
        page.write_figures(output / "figures", found)
        say(f"wrote {output / record.file_name(found)}")
        records.append(found)
    if json_:
        emit_json({found["experiment"]: found for found in records})
        return
    for found in records:
        one = find(found["experiment"])
        for shown in (*one.tables(found["result"]), *one.reported):
            print_table(table(shown.columns, shown.rows), f"{one.title} ({one.source}): {shown.title}")
            if shown.note:
                out.print(shown.note, markup=False, soft_wrap=True)
        for said in found["result"]["claims"]:
            verdict = "holds" if said["holds"] else "does not hold"
            out.print(f"{verdict}: {said['claim']}. Here: {said['seen']}.", markup=False, soft_wrap=True)


def _list(known: list[Any]) -> None:
    lines = [(one.name, f"{one.title} ({one.source})", one.described()) for one in known]
    print_table(table(("name", "shows", "options"), lines, left=3))
