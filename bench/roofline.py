"""A model, not a measurement: the bytes that a gate must move on a GPU, those that ours move, and the time they take.

    python -m dgate_rt.bench.roofline                        # a table: the dearest row of every gate
    python -m dgate_rt.bench.roofline --json roofline.json   # all rows

The least is what any design needs that scores first and copies afterwards: features and weights read once, a margin
and a label written a row, the survivors' rows read and written, the ids and the answers. Ours is counted from the
launches that `plan_score` chooses and from what the route kernel reads and writes, each byte of a tensor once
(``memory``: what a perfect cache cannot save) and as often as it is asked for (``requested``: what L2 serves besides).

The time of a gate is its bytes at the bandwidth of the data sheet; the time of a stage, its FLOPs at the data sheet's
dense bfloat16 rate. Both are floors, so their quotient is no promise. Launches are not in it: two a gate, three or four
where the score is split or pools first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torchvision.models as tv
from torch import nn

from dgate_rt import backbones
from dgate_rt.cost import stage_flops
from dgate_rt.gate import GRIDS, Pool
from dgate_rt.kernels.score_plan import ScorePlan, plan_score
from dgate_rt.progress import track
from dgate_rt.staged import as_tuple, split
from dgate_rt.timing import commit

BATCH_SIZES = (32, 64, 128, 256, 512, 1024)
KEEP_RATES = (0.0, 0.25, 0.5, 0.75, 1.0)
ELEMENT_SIZE = 2  # bytes of a feature: bfloat16
FLOAT, LABEL, ID, EXIT = 4, 8, 8, 8  # bytes of a margin, a label, an id and an exit index
LIMIT = 1.05  # what ours may move, as a multiple of the least

ROUTE_THREADS, ROUTE_BLOCKS_PER_SM, PIECE = 384, 2, 4096  # as in csrc/cuda/route_arguments.h and route.cu


@dataclass(frozen=True)
class Device:
    """What a data sheet says of a GPU."""

    name: str
    memory_gb_s: float
    bfloat16_tflops: float  # dense
    multiprocessors: int


DEVICES = (
    Device("A100 SXM 80 GB", 2039, 312, 108),
    Device("H100 SXM", 3350, 989, 132),
    Device("B200", 8000, 2250, 148),
)


@dataclass(frozen=True)
class GateShape:
    """One gate of one network."""

    network: str
    cut: str
    pool: str
    channels: int
    positions: int  # that are read
    classes: int
    row_bytes: int  # of all tensors that cross the cut, one sample
    pieces: int  # of the route kernel, one sample
    gflops: float  # of the stage before the gate, one sample

    @property
    def side(self) -> int:
        """Cells a side of the grid that is read, 0 where it is none."""
        return GRIDS.get(self.pool, 0)

    @property
    def width(self) -> int:
        """Values of a pooled vector."""
        return self.channels * max(1, self.side**2)


@dataclass(frozen=True)
class Row:
    """One gate at one batch size and keep rate on one device; the variant and sizes that `plan_score` chose for it."""

    gate: GateShape
    batch_size: int
    keep_rate: float
    device: str
    variant: str
    launches: int  # score and route
    least_bytes: int
    memory_bytes: int
    requested_bytes: int
    gate_us: float  # memory_bytes at the device's bandwidth
    stage_us: float  # the stage's FLOPs at the device's rate

    @property
    def ratio(self) -> float:
        """What ours moves from and to memory, as a multiple of the least."""
        return self.memory_bytes / self.least_bytes

    @property
    def share(self) -> float:
        """The gate's floor as a share of the stage's."""
        return self.gate_us / self.stage_us


@dataclass(frozen=True)
class _Network:
    build: Callable[[], nn.Module]
    cuts: tuple[str, ...]
    side: int
    classes: int
    pools: tuple[Pool, ...] = (Pool.AVG,)


_LAYERS, _BLOCKS = ("layer1", "layer2", "layer3"), tuple(f"features.denseblock{i}" for i in (1, 2, 3))
NETWORKS = {
    "CIFAR ResNet-101": _Network(lambda: backbones.build("resnet101"), _LAYERS, 32, 10, (Pool.AVG, Pool.GRID2)),
    "CIFAR DenseNet-201": _Network(lambda: backbones.build("densenet201"), _BLOCKS, 32, 10),
    "ImageNet ResNet-50": _Network(tv.resnet50, _LAYERS, 224, 1000),
    "ImageNet ResNet-101": _Network(tv.resnet101, _LAYERS, 224, 1000),
    "ImageNet DenseNet-201": _Network(tv.densenet201, _BLOCKS, 224, 1000),
    "ImageNet ViT-B/16": _Network(
        tv.vit_b_16, tuple(f"encoder.layers.encoder_layer_{i}" for i in (2, 5, 8)), 224, 1000, (Pool.AVG, Pool.CLS)
    ),
}


def gate_shapes(names: Sequence[str] = tuple(NETWORKS)) -> Iterator[GateShape]:
    """The gates of each network, their shapes and FLOPs found by running it on the meta device."""
    for name in names:
        network = NETWORKS[name]
        example = torch.zeros(2, 3, network.side, network.side)
        staged = split(network.build().eval(), network.cuts, example=example).to("meta")
        example = example.to("meta")
        flops = stage_flops(staged, example)
        with torch.no_grad():
            boundaries = list(staged.boundaries(example))[:-1]
        for g, (cut, boundary) in enumerate(zip(staged.cuts, boundaries, strict=True)):
            features = staged.gate_features(g, boundary)
            rows = [t[0].numel() * ELEMENT_SIZE for t in as_tuple(boundary)]
            tokens = features.ndim == 3
            channels = features.shape[2 if tokens else 1]
            for pool in network.pools:
                positions = 1 if pool is Pool.CLS else features[0].numel() // channels
                yield GateShape(
                    name, cut, pool.value, channels, positions, network.classes,
                    sum(rows), sum(-(-size // PIECE) for size in rows), flops[g] / 1e9,
                )  # fmt: skip


def least_bytes(gate: GateShape, batch_size: int, survivors: int) -> int:
    """What has to move: see the head of this file."""
    features = batch_size * gate.channels * gate.positions * ELEMENT_SIZE
    weights = (gate.width + 1) * gate.classes * FLOAT
    return features + weights + batch_size * (FLOAT + LABEL) + route_bytes(gate, batch_size, survivors, blocks=1)


def route_bytes(gate: GateShape, batch_size: int, survivors: int, blocks: int) -> int:
    """What the route kernel reads and writes when ``blocks`` blocks of it each read every margin."""
    leavers = batch_size - survivors
    verdicts = blocks * batch_size * FLOAT + batch_size * ID
    answers = leavers * (LABEL + LABEL + FLOAT + EXIT)
    return verdicts + answers + survivors * (ID + 2 * gate.row_bytes)


def route_blocks(gate: GateShape, batch_size: int, multiprocessors: int) -> int:
    """The grid that ``launch_route`` chooses."""
    for_rows = -(-batch_size // ROUTE_THREADS)
    for_pieces = -(-batch_size * gate.pieces // (ROUTE_THREADS // 32))
    return min(max(for_rows, for_pieces, 1), ROUTE_BLOCKS_PER_SM * multiprocessors)


def score_plan(gate: GateShape, batch_size: int, multiprocessors: int) -> ScorePlan:
    """The score's launches, for features as ResNets (channels_last) and transformers lay them out."""
    shape = batch_size, gate.channels, gate.positions // max(1, gate.side**2), gate.classes
    return plan_score(*shape, ELEMENT_SIZE, multiprocessors, side=gate.side, channels_adjacent=True)


def rows(
    gates: Sequence[GateShape],
    batch_sizes: Sequence[int] = BATCH_SIZES,
    keep_rates: Sequence[float] = KEEP_RATES,
    devices: Sequence[Device] = DEVICES,
) -> Iterator[Row]:
    """The model for every combination."""
    for gate in gates:
        for batch_size in batch_sizes:
            for device in devices:
                plan = score_plan(gate, batch_size, device.multiprocessors)
                blocks = route_blocks(gate, batch_size, device.multiprocessors)
                for keep_rate in keep_rates:
                    survivors = round(keep_rate * batch_size)
                    memory = plan.memory_bytes() + route_bytes(gate, batch_size, survivors, blocks=1)
                    requested = plan.l2_bytes() + route_bytes(gate, batch_size, survivors, blocks)
                    yield Row(
                        gate,
                        batch_size,
                        keep_rate,
                        device.name,
                        plan.variant,
                        plan.launches() + 1,
                        least_bytes(gate, batch_size, survivors),
                        memory,
                        requested,
                        memory / device.memory_gb_s / 1e3,
                        batch_size * gate.gflops / device.bfloat16_tflops * 1e3,
                    )


def worst(found: Sequence[Row], gate: GateShape) -> Row:
    """The row of a gate in which ours moves most beyond the least."""
    return max((row for row in found if row.gate == gate), key=lambda row: row.ratio)


def _table(found: Sequence[Row]) -> Iterator[str]:
    yield (
        "| gate | reads | K | variants | most / least bytes | at B, keep rate, device "
        "| H100, B = 256, keep rate 0.5: gate, stage, share |"
    )
    yield "|---|---|---|---|---|---|---|"
    for gate in dict.fromkeys(row.gate for row in found):
        mine = [row for row in found if row.gate == gate]
        most = worst(found, gate)
        typical = next(r for r in mine if (r.batch_size, r.keep_rate, r.device) == (256, 0.5, "H100 SXM"))
        yield (
            f"| {gate.network}, {gate.cut} ({gate.pool}) | {gate.channels} x {gate.positions} | {gate.classes} "
            f"| {', '.join(sorted({row.variant for row in mine}))} | {most.ratio:.3f} "
            f"| {most.batch_size}, {most.keep_rate:g}, {most.device} "
            f"| {typical.gate_us:.0f} us, {typical.stage_us:.0f} us, {typical.share:.1%} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m dgate_rt.bench.roofline",
        description="A model of the bytes that gates move on a GPU: the least, ours, and the time they take.",
        epilog="example: python -m dgate_rt.bench.roofline --json roofline.json",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there")
    given = parser.parse_args(arguments)
    gates = list(gate_shapes(track(tuple(NETWORKS), "networks")))
    found = list(rows(gates))
    print("A model from shapes and data sheets; nothing was measured.\n")
    print("\n".join(_table(found)))
    beyond = [row for row in found if row.ratio > LIMIT]
    print(f"\n{len(beyond)} of {len(found)} rows move more than {LIMIT} times the least.")
    if given.json is not None:
        given.json.write_text(json.dumps(_as_json(gates, found)) + "\n")


def _as_json(gates: Sequence[GateShape], found: Sequence[Row]) -> dict[str, object]:
    """All rows, each a list under ``columns``; ``gate`` is an index into ``gates``."""
    columns = [field.name for field in fields(Row)]
    listed = [[gates.index(row.gate), *(_short(getattr(row, name)) for name in columns[1:])] for row in found]
    return {
        "command": "python -m dgate_rt.bench.roofline --json FILE",
        "commit": commit(),
        "model": "from shapes and data sheets; nothing was measured",
        "devices": [asdict(device) for device in DEVICES],
        "gates": [asdict(gate) for gate in gates],
        "columns": columns,
        "rows": listed,
    }


def _short(value: object) -> object:
    return round(value, 3) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
