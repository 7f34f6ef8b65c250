"""The model of the bytes that gates move: it adds up, has the kernels' constants, and ours stays near the least."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dgate_rt.bench import roofline
from dgate_rt.bench.roofline import GateShape
from dgate_rt.compiling import MOST_ROWS_ON_CUDA

CUDA = Path(__file__).resolve().parent.parent / "csrc" / "cuda"


@pytest.fixture(scope="module")
def gates() -> list[GateShape]:
    return list(roofline.gate_shapes(["CIFAR ResNet-101", "ImageNet ViT-B/16"]))


def test_gates_are_those_of_the_networks(gates: list[GateShape]) -> None:
    found = [(g.cut, g.pool, g.channels, g.positions, g.row_bytes) for g in gates]
    assert found[:6] == [
        (cut, pool, channels, positions, 2 * channels * positions)
        for cut, channels, positions in (("layer1", 256, 1024), ("layer2", 512, 256), ("layer3", 1024, 64))
        for pool in ("avg", "grid2")
    ]
    assert found[6:8] == [
        ("encoder.layers.encoder_layer_2", "avg", 768, 197, 2 * 768 * 197),
        ("encoder.layers.encoder_layer_2", "cls", 768, 1, 2 * 768 * 197),
    ]
    assert [round(g.gflops, 4) for g in gates[:6:2]] == [0.4397, 0.6711, 3.3806]  # see cost.py: 5.02 in all


def test_the_least_is_what_a_hand_count_gives() -> None:
    gate = GateShape("net", "cut", "avg", channels=4, positions=6, classes=3, row_bytes=48, pieces=1, gflops=1.0)
    features, weights, scores = 10 * 4 * 6 * 2, 3 * 4 * 4 + 3 * 4, 10 * (4 + 8)
    route = 10 * (4 + 8) + 7 * (8 + 8 + 4 + 8) + 3 * (8 + 2 * 48)
    assert roofline.least_bytes(gate, 10, survivors=3) == features + weights + scores + route
    assert roofline.least_bytes(replace(gate, pool="grid2"), 10, 3) == features + 4 * 3 * 4 * 4 + 12 + scores + route


def test_ours_moves_at_most_five_per_cent_more_than_the_least(gates: list[GateShape]) -> None:
    found = list(roofline.rows(gates))
    assert len(found) == len(gates) * 6 * 5 * 3
    for row in found:
        assert 1 <= row.ratio <= roofline.LIMIT, row


def test_constants_are_those_of_the_route_kernel() -> None:
    header, launch = (CUDA / "route_arguments.h").read_text(), (CUDA / "route.cu").read_text()
    constants = {name: int(value) for name, value in re.findall(r"constexpr int k(\w+) = (\d+);", header)}
    assert constants["RouteThreads"] == roofline.ROUTE_THREADS
    assert constants["Piece"] == roofline.PIECE
    assert constants["MaxRows"] == MOST_ROWS_ON_CUDA
    per_sm = re.search(r"(\d+) / kRouteThreads \* multiprocessors", launch)
    assert per_sm is not None
    assert int(per_sm[1]) // roofline.ROUTE_THREADS == roofline.ROUTE_BLOCKS_PER_SM


def test_the_command_writes_every_row(
    gates: list[GateShape], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roofline, "gate_shapes", lambda names: iter(gates))
    roofline.main(["--json", str(tmp_path / "roofline.json")])
    assert "nothing was measured" in capsys.readouterr().out
    written = json.loads((tmp_path / "roofline.json").read_text())
    assert len(written["rows"]) == len(gates) * 90
    last = dict(zip(written["columns"], written["rows"][-1], strict=True))
    assert (last["gate"], last["batch_size"], last["device"]) == (len(gates) - 1, 1024, "B200")
