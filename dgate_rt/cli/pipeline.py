"""The commands that make things, each from the file that the one before wrote.

A network by ``train`` or ``transfer``, gates for it by ``fit``, their thresholds by ``calibrate``.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from dgate_rt.cli.app import app, examples
from dgate_rt.cli.console import check_output, command, emit_json, print_table, say, table
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
    Remeasure,
    Root,
    Workers,
)

if TYPE_CHECKING:
    from dgate_rt.gate import Gate
    from dgate_rt.program import GateProgram

_SHOWN_DROPS = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1)


class Loss(str, Enum):
    hinge = "hinge"
    cross_entropy = "cross_entropy"


class PoolName(str, Enum):
    avg = "avg"
    cls = "cls"
    flat = "flat"
    grid2 = "grid2"
    grid4 = "grid4"


class CriterionName(str, Enum):
    margin = "margin"
    softmax = "softmax"
    entropy = "entropy"


class CostName(str, Enum):
    flops = "flops"
    time = "time"


@app.command(
    epilog=examples(
        "dgate train --data digits --backbone resnet26 --width 0.25 -o net.safetensors",
        "dgate train --data cluttered-mnist --backbone resnet101 --width 0.25 --lr 0.1 --label-smoothing 0.1 "
        "--checkpoint training.safetensors -o net.safetensors",
        "dgate train --data cifar10 --root ~/data --download --backbone resnet101 --device cuda -o net.safetensors",
    )
)
def train(
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the network here.")],
    data: Annotated[str, typer.Option("--data", help="digits, mnist, cluttered-mnist, cifar10, cifar100 or folder.")],
    backbone: Annotated[
        str, typer.Option("--backbone", help="See [bold]dgate flops[/bold] for the names.")
    ] = "resnet26",
    width: Annotated[float, typer.Option("--width", help="Factor on every channel count.")] = 1.0,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the training data.")] = 10,
    lr: Annotated[float, typer.Option("--lr", help="Highest step size.")] = 0.2,
    augment: Annotated[bool, typer.Option(help="Shift training images at random, and mirror photographs.")] = True,
    label_smoothing: Annotated[
        float, typer.Option("--label-smoothing", help="Share of each label that is spread over all classes.")
    ] = 0.0,
    mixup: Annotated[float, typer.Option("--mixup", help="Mix pairs of images, by a Beta of this; 0 for none.")] = 0.0,
    batch_size: BatchSize = 64,
    root: Root = None,
    download: Download = False,
    image_size: Annotated[int | None, typer.Option("--image-size", min=1, help="Pixels a side.")] = None,
    data_seed: Annotated[int, typer.Option("--data-seed", help="Of the split; kept with the network.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the initial weights and the order.")] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Written after every epoch; training goes on from it.")
    ] = None,
    device: Device = "cpu",
    workers: Workers = 0,
    json_: Json = False,
) -> None:
    """Train a backbone from scratch, to put gates on."""
    import torch

    from dgate_rt import pretrain
    from dgate_rt.backbones import BackboneMeta, save_backbone
    from dgate_rt.data import load
    from dgate_rt.files import device_of

    torch_device = device_of(device)
    check_output(output)
    bundle = load(data, root=root, image_size=image_size, seed=data_seed, download=download)
    meta = BackboneMeta.of(backbone, width, bundle, data_seed)
    torch.manual_seed(seed)
    model = meta.build()
    history = pretrain.train_backbone(
        model,
        bundle.loader("train", batch_size, shuffle=True, workers=workers, augment=augment),
        epochs=epochs,
        lr=lr,
        label_smoothing=label_smoothing,
        mixup=mixup,
        augment=augment,
        seed=seed,
        device=torch_device,
        val_loader=bundle.loader("val", batch_size, workers=workers),
        checkpoint=checkpoint,
    )
    accuracy = pretrain.evaluate(model, bundle.loader("test", batch_size, workers=workers), device=torch_device)
    meta = replace(meta, accuracy=accuracy, origin=command())
    save_backbone(output, model, meta)
    say(f"wrote {output}")
    if json_:
        emit_json({"output": output, **asdict(meta), "epochs": [asdict(epoch) for epoch in history]})
        return
    lines = [
        (str(number), f"{epoch.loss:.4f}", f"{epoch.train_accuracy:.2%}", f"{epoch.val_accuracy:.2%}")
        for number, epoch in enumerate(history, 1)
    ]
    title = f"{backbone}, width {width:g}, on {bundle.name}: test accuracy {accuracy:.2%}"
    print_table(table(("epoch", "loss", "training accuracy", "validation accuracy"), lines, left=0), title)


@app.command(
    epilog=examples(
        "dgate transfer --data mnist --image-size 128 -o net.safetensors",
        "dgate transfer --data folder --root ~/photos --cache features/ -o net.safetensors",
    )
)
def transfer(
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the network here.")],
    data: Annotated[str, typer.Option("--data", help="digits, mnist, cluttered-mnist, cifar10, cifar100 or folder.")],
    backbone: Annotated[
        str, typer.Option("--backbone", help="One that comes trained: efficientnet_lite0.")
    ] = "efficientnet_lite0",
    l2: Annotated[float, typer.Option("--l2", help="Penalty on the classifier's weights.")] = 1e-2,
    cache: Annotated[
        str, typer.Option("--cache", help="memory, or a folder: what was interrupted goes on from there.")
    ] = "memory",
    cache_gb: Annotated[float, typer.Option("--cache-gb", help="The most that the cache may take.")] = 4.0,
    batch_size: BatchSize = 64,
    root: Root = None,
    download: Download = False,
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size",
            min=1,
            help="Pixels a side; by default those that the network was trained on, 224. Far fewer cost accuracy.",
        ),
    ] = None,
    data_seed: Annotated[int, typer.Option("--data-seed", help="Of the split; kept with the network.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the order in which the classifier sees samples.")] = 0,
    device: Device = "cpu",
    workers: Workers = 0,
    json_: Json = False,
) -> None:
    """Fit a new classifier to a network that was trained on ImageNet, to put gates on; nothing else of it changes.

    Grey images go through its first kernels summed over colour, which is what they would give in three channels.
    """
    from dgate_rt import backbones, pretrain
    from dgate_rt import transfer as transfers
    from dgate_rt.data import load
    from dgate_rt.files import device_of

    torch_device = device_of(device)
    stats = transfers.normalisation(backbone)
    size = image_size or backbones.image_size(backbone)
    check_output(output)
    bundle = load(data, root=root, image_size=size, seed=data_seed, download=download, stats=stats)
    model, report = transfers.transfer(
        backbone,
        bundle,
        l2=l2,
        batch_size=batch_size,
        cache=cache,
        cache_gb=cache_gb,
        seed=seed,
        device=torch_device,
        workers=workers,
    )
    accuracy = pretrain.evaluate(
        model, bundle.loader("test", batch_size, workers=workers), device=torch_device, progress=True
    )
    meta = backbones.BackboneMeta.of(backbone, 1.0, bundle, data_seed)
    meta = replace(meta, accuracy=accuracy, origin=command())
    backbones.save_backbone(output, model, meta)
    say(f"wrote {output}")
    if json_:
        emit_json({"output": output, **asdict(meta), "classifier": asdict(report)})
        return
    lines = [(str(report.width), f"{report.accuracy:.2%}", f"{report.val_accuracy:.2%}", f"{accuracy:.2%}")]
    columns = ("features", "training accuracy", "validation accuracy", "test accuracy")
    print_table(table(columns, lines, left=0), f"{backbone} at {size} pixels, a new classifier for {bundle.name}")


@app.command(
    epilog=examples(
        "dgate fit net.safetensors -o gates.safetensors",
        "dgate fit net.safetensors --at layer1,layer2 --cache features/ -o gates.safetensors",
        "dgate fit net.safetensors --at blocks -o gates.safetensors",
    )
)
def fit(
    network: NetworkFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the gates here, all of them off.")],
    data: DataName = None,
    at: Annotated[
        str,
        typer.Option(
            "--at",
            help="Submodules to put gates after, with commas between; auto for the ends of the main blocks; or blocks "
            "for every block, of which [bold]dgate calibrate --max-gates[/bold] keeps few. A module of that name takes "
            "a comma: blocks,",
        ),
    ] = "auto",
    loss: Annotated[Loss, typer.Option("--loss", help="What the gates are trained with.")] = Loss.hinge,
    pool: Annotated[PoolName, typer.Option("--pool", help="What a gate reads of a map.")] = PoolName.grid2,
    criterion: Annotated[
        CriterionName, typer.Option("--criterion", help="What is compared with a gate's threshold.")
    ] = CriterionName.margin,
    epochs: Annotated[int, typer.Option("--epochs", min=0, help="Passes of mini-batch steps.")] = 20,
    lr: Annotated[float, typer.Option("--lr", help="First step size.")] = 0.1,
    l2: Annotated[float, typer.Option("--l2", help="Penalty on the weights.")] = 1e-3,
    polish: Annotated[int, typer.Option("--polish", min=0, help="L-BFGS passes after them; 0 for none.")] = 200,
    cache: Annotated[
        str, typer.Option("--cache", help="memory, or a folder: an interrupted fit goes on from there.")
    ] = "memory",
    cache_gb: Annotated[float, typer.Option("--cache-gb", help="The most that the cache may take.")] = 4.0,
    batch_size: BatchSize = 256,
    root: Root = None,
    download: Download = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of mini-batches.")] = 0,
    device: Device = "cpu",
    workers: Workers = 0,
    json_: Json = False,
) -> None:
    """Train a gate after each cut of a network, which stays as it is."""
    from dgate_rt.files import device_of, gates_off, open_data, open_network
    from dgate_rt.staged import split
    from dgate_rt.train import fit as fit_gates

    net = open_network(network, device_of(device))
    bundle = open_data(net, data, root, download)
    loader = bundle.loader("train", batch_size, workers=workers)
    val_loader = bundle.loader("val", batch_size, workers=workers)
    example = next(iter(val_loader))[0][:2].to(device)
    staged = split(
        net.model, at if at in ("auto", "blocks") else [name.strip() for name in at.split(",") if name.strip()], example
    )
    gates = fit_gates(
        staged,
        loader,
        loss=loss.value,
        pool=pool.value,
        criterion=criterion.value,
        epochs=epochs,
        lr=lr,
        l2=l2,
        polish=polish,
        val_loader=val_loader,
        device=device,
        cache=cache,
        cache_gb=cache_gb,
        seed=seed,
    )
    gates_off(staged, cast("list[Gate]", list(gates)), example).save(output)
    say(f"wrote {output}; all gates are off: dgate calibrate chooses their thresholds")
    if json_:
        emit_json({"output": output, "cuts": staged.cuts, "gates": [asdict(report) for report in gates.reports]})
        return
    lines = [
        (r.cut, str(r.width), f"{r.accuracy:.2%}", f"{r.val_accuracy:.2%}", f"{r.seconds:.1f}") for r in gates.reports
    ]
    print_table(table(("gate after", "features", "training accuracy", "validation accuracy", "s"), lines))


@app.command(
    epilog=examples(
        "dgate calibrate gates.safetensors net.safetensors --max-drop 0.01 -o program.safetensors",
        "dgate calibrate gates.safetensors net.safetensors --max-drop 0.01 --confidence 0.95 -o program.safetensors",
        "dgate calibrate gates.safetensors net.safetensors --max-drop 0.01 --max-gates 3 -o program.safetensors",
        "dgate calibrate gates.safetensors net.safetensors --max-cost 2.8e9 -o program.safetensors",
        "dgate calibrate gates.safetensors net.safetensors --cost time -b 32 --engine openvino -o program.safetensors",
    )
)
def calibrate(
    gates: Annotated[Path, typer.Argument(metavar="GATES", help="The gates, from [bold]dgate fit[/bold].")],
    network: NetworkFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Write gates, thresholds and frontier here.")],
    data: DataName = None,
    max_drop: MaxDrop = None,
    min_accuracy: Annotated[float | None, typer.Option("--min-accuracy", help="Accuracy to keep, 0 to 1.")] = None,
    max_cost: Annotated[
        float | None, typer.Option("--max-cost", help="Mean cost a sample to stay within: FLOPs, or ms.")
    ] = None,
    confidence: Annotated[
        float | None, typer.Option("--confidence", help="With which --max-drop is to hold on new data too: 0.95.")
    ] = None,
    max_gates: Annotated[
        int | None, typer.Option("--max-gates", min=1, help="Keep so many of the gates at most, those that help most.")
    ] = None,
    cost: Annotated[
        CostName, typer.Option("--cost", help="Count FLOPs, or measure time here at this batch size.")
    ] = CostName.flops,
    engine: Engine = "eager",
    dtype: Dtype = None,
    remeasure: Remeasure = False,
    batch_size: BatchSize = 256,
    root: Root = None,
    download: Download = False,
    device: Device = "cpu",
    workers: Workers = 0,
    json_: Json = False,
) -> None:
    """Choose thresholds on validation data: the cheapest that lose no more than is allowed.

    Without a target, no accuracy is lost on that data.
    """
    from dgate_rt.calibrate import calibrate as choose
    from dgate_rt.files import device_of, open_data, open_network, open_program

    net = open_network(network, device_of(device))
    found = open_program(gates, net)
    bundle = open_data(net, data, root, download)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        program = choose(
            found.staged,
            found.gates,
            bundle.loader("val", batch_size, workers=workers),
            max_accuracy_drop=max_drop,
            min_accuracy=min_accuracy,
            max_cost=max_cost,
            confidence=confidence,
            max_gates=max_gates,
            cost=cost.value,
            engine=engine,
            dtype=dtype,
            remeasure=remeasure,
            device=device,
        )
    for warning in told:
        say(f"warning: {warning.message}")
    program.save(output)
    say(f"wrote {output}")
    if json_:
        emit_json(
            {
                "output": output,
                "unit": program.costs.unit,
                "network_accuracy": program.network_accuracy,
                "dense_cost": program.costs.dense,
                "cost_reduction": program.cost_reduction,
                "cuts": program.staged.cuts,
                "point": asdict(program.point),
                "guarantee": asdict(program.guarantee) if program.guarantee else None,
                "frontier": [asdict(point) for point in program.frontier.points],
            }
        )
        return
    _print_program(program)


def _print_program(program: GateProgram) -> None:
    """The operating point gate by gate, then the frontier at some drops of accuracy."""
    point = program.point
    rows = [
        (f"after {cut}", "off" if threshold == float("inf") else f"{threshold:.4g}", f"{share:.1%}")
        for cut, threshold, share in zip(program.staged.cuts, program.thresholds, point.shares, strict=False)
    ]
    rows.append(("whole network", "", f"{point.shares[-1]:.1%}"))
    title = (
        f"accuracy {point.accuracy:.2%} of {program.network_accuracy:.2%}, cost {_cost(program, point.cost)} "
        f"of {_cost(program, program.costs.dense)} ({program.cost_reduction:.1%} saved)"
    )
    title += f"\non new data: {program.guarantee}" if program.guarantee else ""
    print_table(table(("exit", "threshold", "left here"), rows), title)
    lines: list[tuple[str, ...]] = []
    for drop in _SHOWN_DROPS:
        there = program.at(max_accuracy_drop=drop)
        shares = " / ".join(f"{share:.0%}" for share in there.point.shares)
        line = (f"{there.point.accuracy:.2%}", _cost(program, there.point.cost), f"{there.cost_reduction:.1%}", shares)
        if not lines or lines[-1][1:] != line:
            lines.append((f"{drop:.2%}", *line))
    print_table(table(("drop allowed", "accuracy", "cost", "saved", "left at each exit"), lines, left=0), "Frontier")


def _cost(program: GateProgram, value: float) -> str:
    if program.costs.unit == "ms":
        return f"{value:.4g} ms"
    return f"{value / 1e9:.4g} GFLOPs" if program.costs.dense >= 1e8 else f"{value / 1e6:.4g} MFLOPs"
