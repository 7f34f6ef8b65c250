"""What a score launches on a GPU: bytes as planned, and every kernel compiled, with no GPU, for every architecture."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dgate_rt.kernels.score_plan import lay_out, plan_score

ARCHS = [80, 90, 100, 120]
REGISTERS = {  # a thread; at 4 warps 128 leave four programs on an SM
    "fused_kernel": 128,
    "pool_kernel": 64,
    "product_kernel": 128,
    "combine_kernel": 64,
}


def case(
    shape: tuple[int, ...],
    classes: int,
    dtype: str = "bfloat16",
    channels_last: bool = False,
    pool: str = "avg",
    criterion: str = "margin",
    archs: list[int] | None = None,
    sliced: bool = False,
    **options: bool,
) -> dict[str, Any]:
    features = {"shape": shape, "dtype": dtype, "channels_last": channels_last, "sliced": sliced}
    options = {"count": True, "keep_distances": False, **options}
    wanted = {"features": features, "classes": classes, "pool": pool, "criterion": criterion, **options}
    return {**wanted, "archs": archs or [90]}


CASES = {
    "CIFAR, split": case((32, 256, 32, 32), 10, archs=ARCHS),
    "CIFAR, channels_last, softmax": case((1024, 512, 16, 16), 10, "float16", True, criterion="softmax"),
    "CIFAR, float32, entropy, kept": case((128, 1024, 8, 8), 10, "float32", criterion="entropy", keep_distances=True),
    "100 classes, channels_last": case((1024, 512, 16, 16), 100, "float32", True, criterion="softmax"),
    "100 classes": case((1024, 256, 32, 32), 100, criterion="entropy", keep_distances=True),
    "sliced planes": case((1024, 64, 30, 33), 10, "float16", sliced=True),
    "ragged planes": case((1024, 2048, 7, 7), 1000),
    "ImageNet, large tiles": case((1024, 1024, 14, 14), 1000, archs=ARCHS),
    "ImageNet, channels_last": case((32, 512, 28, 28), 1000, "float16", True, criterion="softmax"),
    "ImageNet, float32, entropy, kept": case(
        (256, 256, 56, 56), 1000, "float32", criterion="entropy", keep_distances=True
    ),
    "tokens": case((1024, 197, 768), 1000, criterion="entropy", count=False),
    "cls": case((1024, 197, 768), 1000, pool="cls", criterion="softmax"),
    "cls, few": case((64, 197, 768), 1000, "float32", pool="cls", keep_distances=True),
    "vectors": case((1024, 2048), 10, "float16", criterion="entropy"),
    "grid": case((256, 256, 32, 32), 10, "float32", pool="grid2", archs=ARCHS),
    "grid, channels_last": case((32, 512, 16, 16), 10, channels_last=True, pool="grid4", criterion="softmax"),
    "grid, overlapping cells": case((256, 64, 33, 35), 10, channels_last=True, pool="grid4", criterion="softmax"),
    "grid, overlapping planes": case((64, 256, 33, 35), 10, "float32", pool="grid2"),
    "grid, pooled, overlapping cells": case((256, 1024, 7, 7), 1000, pool="grid2"),
    "grid, pooled, channels_last": case((32, 512, 28, 28), 1000, "float16", True, pool="grid4", criterion="entropy"),
    "flat, split": case((32, 512, 7, 7), 100, pool="flat", criterion="softmax", keep_distances=True),
    "flat, channels_last": case((256, 512, 7, 7), 1000, "float32", True, pool="flat"),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A row for each kernel, case and architecture."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    cache = tmp_path_factory.mktemp("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("triton_aot.py"))]
    request = json.dumps([{"name": name, **case} for name, case in CASES.items()])
    done = subprocess.run(
        command, input=request, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_every_architecture(compiled: list[dict[str, Any]]) -> None:
    assert {(row["kernel"], row["arch"]) for row in compiled} == {(k, a) for k in REGISTERS for a in ARCHS}


def test_no_kernel_spills_or_takes_more_registers_than_its_budget(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        assert row["spill_bytes"] == 0, row
        assert row["registers"] <= REGISTERS[row["kernel"]], row
        assert row["shared_bytes"] <= 48 * 1024, row


@pytest.mark.parametrize(
    ("case", "kernel", "width"),
    [
        ("CIFAR, split", "fused_kernel", 16),
        ("CIFAR, channels_last, softmax", "fused_kernel", 16),
        ("ImageNet, large tiles", "pool_kernel", 8),  # planes of 14 x 14 are aligned to 4 elements
        ("ImageNet, channels_last", "pool_kernel", 16),
        ("tokens", "pool_kernel", 16),
        ("grid", "fused_kernel", 16),
        ("grid, channels_last", "fused_kernel", 16),
        ("grid, pooled, channels_last", "pool_kernel", 16),
        ("cls", "product_kernel", 16),
    ],
)
def test_features_are_read_in_wide_loads(case: str, kernel: str, width: int, compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        if (row["case"], row["kernel"]) == (case, kernel):
            assert max(map(int, row["loads"])) == width, row


SHAPES = {  # channels, positions, classes
    "ResNet-101, CIFAR": [(256, 32 * 32, 10), (512, 16 * 16, 10), (1024, 8 * 8, 10)],
    "ResNet-50, ImageNet": [(256, 56 * 56, 1000), (512, 28 * 28, 1000), (1024, 14 * 14, 1000)],
    "DenseNet-201, CIFAR": [(256, 32 * 32, 10), (512, 16 * 16, 10), (1792, 8 * 8, 10)],
    "DenseNet-201, ImageNet": [(256, 56 * 56, 1000), (512, 28 * 28, 1000), (1792, 14 * 14, 1000)],
    "ViT-B/16": [(768, 197, 1000)],
}


def least_bytes(n: int, channels: int, positions: int, classes: int, element_size: int) -> int:
    """Features and weights once, margin and label."""
    return n * channels * positions * element_size + 4 * classes * (channels + 1) + 12 * n


@pytest.mark.parametrize("channels_adjacent", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("n", [32, 64, 100, 128, 256, 512, 1024])
@pytest.mark.parametrize("network", SHAPES)
def test_memory_moved_is_within_a_twentieth_of_the_least(network: str, n: int, channels_adjacent: bool) -> None:
    for shape in SHAPES[network]:
        for criterion in ("margin", "entropy"):
            plan = plan_score(n, *shape, 2, 132, channels_adjacent=channels_adjacent, criterion=criterion)
            assert 1 <= plan.memory_bytes() / least_bytes(n, *shape, 2) <= 1.05, plan
            assert plan.memory_bytes() <= plan.l2_bytes() <= 2 * plan.memory_bytes(), plan


def test_the_cells_of_a_grid_take_no_more_memory_than_the_map_and_their_weights() -> None:
    for side in (2, 4):
        plan, whole = (
            plan_score(256, 256, 1024 // side**2, 10, 2, 132, side=side),
            plan_score(256, 256, 1024, 10, 2, 132),
        )
        assert (plan.variant, plan.width) == ("fused", 256 * side**2)
        assert plan.memory_bytes() - whole.memory_bytes() == 4 * 10 * 256 * (side**2 - 1)


def test_elements_that_cells_share_come_from_memory_once() -> None:
    layout = lay_out((64, 7, 7), (64 * 49, 1, 7 * 64, 64), "grid4")
    assert (layout.positions, layout.elements) == (9, 49)
    shared = plan_score(256, 64, layout.positions, 10, 2, 1, side=4, elements=layout.elements, variant="pooled")
    apart = plan_score(256, 64, layout.positions, 10, 2, 1, side=4, variant="pooled")
    assert apart.memory_bytes() - shared.memory_bytes() == 256 * 64 * (16 * 9 - 49) * 2
    assert apart.l2_bytes() == shared.l2_bytes()


def test_dead_rows_move_only_their_zeros() -> None:
    plan = plan_score(100, 256, 1024, 10, 2, 132)
    assert plan.memory_bytes(live=0) == 100 * 12
    assert plan.memory_bytes(live=50) < 0.51 * plan.memory_bytes()
    assert plan.memory_bytes(live=200) == plan.memory_bytes()


@pytest.mark.parametrize("sms", [1, 8, 132, 10**6])
@pytest.mark.parametrize("variant", ["fused", "pooled"])
def test_a_plan_covers_every_row_class_and_channel(variant: Any, sms: int) -> None:
    for n, channels, positions, classes in ((1, 1, 2, 1), (31, 37, 15, 10), (1000, 2048, 49, 128), (5, 0, 4, 3)):
        for adjacent in (False, True):
            for side in (0, 2, 4):
                options: Any = {"side": side, "channels_adjacent": adjacent, "variant": variant}
                plan = plan_score(n, channels, positions, classes, 2, sms, **options)
                rows, tiles, splits = plan.grid
                assert (rows * plan.tile_n >= n, tiles * plan.tile_k >= classes) == (True, True), plan
                a_cell = -(-channels // plan.tile_c)
                blocks = a_cell * plan.cells if variant == "fused" else -(-channels * plan.cells // plan.tile_c)
                assert splits * plan.blocks_per_split >= blocks, plan
                assert (splits - 1) * plan.blocks_per_split < max(1, blocks), plan  # none is idle
                assert plan.block_c * plan.block_p <= 4096, plan


@pytest.mark.parametrize(
    ("sizes", "strides", "pool", "expected"),
    [
        ((64, 4, 5), (1280, 20, 5, 1), "avg", {"channels": 64, "positions": 20, "position_stride": 1, "width": 0}),
        ((64, 4, 5), (1280, 1, 320, 64), "avg", {"channel_stride": 1, "position_stride": 64, "width": 0}),
        ((64, 4, 5), (9999, 100, 10, 1), "avg", {"position_stride": 1, "row_stride": 10, "width": 5}),
        ((64, 4, 1), (9999, 100, 7, 3), "avg", {"positions": 4, "position_stride": 7, "width": 0}),
        ((64, 1, 5), (9999, 100, 77, 3), "avg", {"positions": 5, "position_stride": 3, "width": 0}),
        ((197, 768), (151296, 768, 1), "avg", {"channels": 768, "positions": 197, "position_stride": 768}),
        ((197, 768), (151296, 768, 1), "cls", {"channels": 768, "positions": 1, "channel_stride": 1}),
        (
            (64, 32, 32),
            (65536, 1, 2048, 64),
            "grid2",
            {"channels": 64, "positions": 256, "width": 16, "row_stride": 2048},
        ),
        ((64, 7, 5), (2240, 35, 5, 1), "grid2", {"positions": 4 * 3, "width": 3, "side": 2, "image": (7, 5)}),
        ((64, 3, 1), (192, 3, 1, 1), "grid4", {"positions": 2, "width": 1, "side": 4, "image": (3, 1)}),
        ((64, 1, 1), (64, 1, 1, 1), "grid2", {"positions": 1, "side": 0}),
        ((64,), (64, 1), "grid4", {"channels": 64, "positions": 1, "side": 0}),
        ((64, 4, 5), (1280, 20, 5, 1), "flat", {"channels": 1280, "channel_stride": 1, "flat_shape": (0, 0)}),
        ((64, 4, 5), (1280, 1, 320, 64), "flat", {"flat_shape": (4, 5), "flat_strides": (1, 320)}),
        ((4, 5), (99, 20, 2), "flat", {"channel_stride": 2, "flat_shape": (4, 5), "flat_strides": (0, 20)}),
        ((1, 1, 1), (1, 1, 1, 1), "flat", {"channels": 1, "positions": 1}),
    ],
    ids=str,
)
def test_layout_folds_what_lies_at_one_stride(
    sizes: tuple[int, ...], strides: tuple[int, ...], pool: str, expected: dict[str, Any]
) -> None:
    layout = lay_out(sizes, strides, pool)
    assert {name: getattr(layout, name) for name in expected} == expected
