"""The bench of a gate's operators runs end to end on the CPU, and never times wrong answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dgate_rt import ops
from dgate_rt.bench import gates
from dgate_rt.bench.roofline import GateShape
from dgate_rt.errors import ExecutorError

GATE = GateShape("net", "cut", "avg", channels=8, positions=16, classes=3, row_bytes=256, pieces=1, gflops=1.0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "gate_shapes", lambda networks: [GATE])
    monkeypatch.setitem(gates.COPY_BYTES, "cpu", 2**12)


@pytest.mark.usefixtures("small")
def test_the_command_times_score_and_routes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gates.main(["--quick", "--device", "cpu", "--json", str(tmp_path / "gates.json")])
    rows = json.loads((tmp_path / "gates.json").read_text())["rows"]
    assert [row["operator"] for row in rows] == ["score", "route, keeps 0%", "route, keeps 50%", "route, keeps 100%"]
    assert all(row["us"] > 0 and row["floor_us"] > 0 for row in rows)
    assert "| net, cut (avg) | 32 | score |" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_wrong_answers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    route = ops.route_

    def answers_one_wrongly(*arguments: object) -> None:
        route(*arguments)
        labels = arguments[10]
        assert isinstance(labels, torch.Tensor)
        labels += 1

    monkeypatch.setattr(ops, "route_", answers_one_wrongly)
    with pytest.raises(RuntimeError, match="will not time wrong answers"):
        gates.main(["--quick", "--device", "cpu"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ExecutorError, match="torch sees no CUDA device here; try --device cpu"):
        gates.main([])
